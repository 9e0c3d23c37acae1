"""The training loop and its preflight, in this process, on recorded caches and tiny weights."""

import math
import shlex
from dataclasses import fields, replace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from dataset.loader import Batch, CachedItem
from modules.gradients import average_gradients
from modules.lora_training import NetworkOptions, TrainedLora
from modules.precision import frozen_precision
from modules.prediction import condition_latents, predict
from modules.preflight import check_caches, choose_attention
from modules.run_logs import LoggingOptions
from modules.train_options import AttentionOptions, TrainOptions
from modules.trainer import Trainer, make_trainer
from tests.live_bytes import LiveBytes
from tests.test_wan_auto_swap import Small
from utils.errors import UserError
from utils.options import parse_options
from utils.safetensors_io import read_metadata, save_file_atomically
from wan.configs import TASKS
from wan.dit_file import dit_shape
from wan.loading import build_dit
from wan.memory import Step

BASE = "--max_data_loader_n_workers 0 --output_name name --timestep_sampling shift --seed 3 --network_dim 4"


@pytest.fixture
def trainer(models, dataset, tmp_path):
    """Return the Trainer that a command line makes; its LoRA goes to a folder of its own."""

    def make(options: str = "", dit: str = "dit_t2v", base: str = BASE) -> Trainer:
        AcceleratorState._reset_state(reset_partial_state=True)
        given = shlex.split(f"{base} {options}")
        folder = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        defaults = {
            "--task": "t2v-1.3B",
            "--dit": models[dit],
            "--dataset_config": dataset,
            "--output_dir": folder,
        }
        given += [str(word) for name, path in defaults.items() if name not in given for word in (name, path)]
        groups = [field.type for field in fields(TrainOptions)]
        *options, network, logs = parse_options("doc", *groups, NetworkOptions, LoggingOptions, argv=given)
        return make_trainer(TrainOptions(*options), TrainedLora(network), logs)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


def _lora(trainer):
    return load_file(trainer.plan.options.saving.output_dir / "name.safetensors")


def _metadata(trainer):
    return read_metadata(trainer.plan.options.saving.output_dir / "name.safetensors")


def _final_losses(trainer):
    trainer.run()
    return list(trainer.losses)


def test_a_lora_learns_to_tell_noise_from_the_videos_it_sees(trainer):
    run = trainer("--learning_rate 5e-3 --network_dim 32 --network_alpha 32 --max_train_epochs 40 --sigmoid_scale 0.2")
    losses = _final_losses(run)
    early = trainer("--learning_rate 0 --max_train_epochs 1 --sigmoid_scale 0.2")
    assert sum(losses) / len(losses) < 0.75 * sum(_final_losses(early)) / len(losses)


def test_another_seed_gives_another_lora_and_a_drawn_one_repeats_the_run(trainer, caplog):
    caplog.set_level("INFO")
    drawn = trainer("--max_train_steps 2 --learning_rate 1e-3", base=BASE.replace("--seed 3", ""))
    drawn.run()
    seed = _metadata(drawn)["ss_seed"]
    assert f"seed {seed}" in caplog.text
    again, other = (trainer(f"--max_train_steps 2 --learning_rate 1e-3 --seed {s}") for s in (seed, int(seed) ^ 1))
    again.run()
    other.run()
    first, second, third = map(_lora, (drawn, again, other))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], third[key]) for key in first)


def test_accumulation_makes_one_step_of_several_batches_and_of_the_rest_at_an_epochs_end(trainer):
    run = trainer("--max_train_epochs 2 --gradient_accumulation_steps 3 --save_every_n_steps 2")
    assert (run.plan.total_steps, run.plan.epochs, len(run.loader)) == (6, 2, 7)
    run.run()
    folder = run.plan.options.saving.output_dir
    assert sorted(path.stem for path in folder.glob("*-step*")) == [f"name-step0000000{n}" for n in (2, 4, 6)]
    assert _metadata(run)["ss_steps"] == "6"


def test_the_learning_rate_follows_its_schedule_to_the_end_of_the_run(trainer):
    run = trainer("--max_train_epochs 2 --lr_scheduler linear --lr_warmup_steps 50% --learning_rate 1e-3")
    rates, step = [], run.optimizer_step
    run.optimizer_step = lambda: rates.append(run.rates()["lr/unet"]) or step()
    run.run()
    warm_up = [n / 7 for n in range(7)]
    assert rates == pytest.approx([1e-3 * share for share in (*warm_up, 1, *reversed(warm_up[1:]))])


def test_files_have_what_an_optimizer_without_a_schedule_averages(trainer):
    kind = "--optimizer_type tests.test_modules_optimizers.MeanScheduleFree --learning_rate 1e-3"
    run = trainer(f"{kind} --max_train_steps 2 --save_every_n_steps 1 --save_state_on_train_end")
    run.run()
    live, optimizer = run.trained.tensors(), run.optimizer.optimizer
    assert optimizer.training
    folder = run.plan.options.saving.output_dir
    for path, factor in ((folder / "name.safetensors", 2), (folder / "name-state" / "model.safetensors", 1)):
        saved = load_file(path)
        assert all(torch.equal(saved[key], live[key] * factor) for key in live if "alpha" not in key)


def test_epochs_are_saved_but_for_the_last_and_outdated_ones_go(trainer):
    run = trainer("--max_train_epochs 4 --save_every_n_epochs 1 --save_last_n_epochs 2 --save_precision bf16")
    run.run()
    folder = run.plan.options.saving.output_dir
    assert sorted(path.stem for path in folder.glob("*.safetensors")) == ["name", "name-000002", "name-000003"]
    assert {value.dtype for value in _lora(run).values()} == {torch.bfloat16}
    assert _metadata(run)["ss_epoch"] == "4"


def test_gradient_checkpointing_changes_nothing_and_is_told_in_the_metadata(trainer):
    checkpointing = "--gradient_checkpointing"
    loras = []
    for flags, said in (
        ("", ("False", "False")),
        (checkpointing, ("True", "False")),
        (f"{checkpointing} --gradient_checkpointing_cpu_offload", ("True", "True")),
        (f"{checkpointing} --gradient_checkpointing_keep_attention --blocks_to_swap 1", ("True", "False")),
        ("--gradient_checkpointing_cpu_offload", ("False", "False")),
    ):
        run = trainer(f"--max_train_steps 2 --learning_rate 1e-3 --network_dropout 0.1 {flags}")
        run.run()
        loras.append(_lora(run))
        metadata = _metadata(run)
        assert said == tuple(metadata[f"ss_gradient_checkpointing{more}"] for more in ("", "_cpu_offload"))
    for lora in loras[1:]:
        assert all(torch.equal(lora[key], loras[0][key]) for key in loras[0])


def test_offloading_sends_the_inputs_of_blocks_away_and_needs_checkpointing(trainer, caplog):
    run = trainer("--max_train_steps 1 --gradient_checkpointing --gradient_checkpointing_cpu_offload")
    run.run()
    offload = run.dit.run_block.keywords["offload"]
    assert offload.bytes_away == offload.bytes_back > 0
    for name in ("cpu_offload", "keep_attention"):
        trainer(f"--max_train_steps 1 --gradient_checkpointing_{name}")
        assert f"--gradient_checkpointing_{name}: ignored without --gradient_checkpointing" in caplog.text


@pytest.mark.parametrize(
    "flags",
    [
        *("--fp8_base", "--fp8_base --fp8_scaled", "--quantize int8"),
        *("--split_attn", "--mixed_precision bf16", "--residual_dtype bf16"),
    ],
)
def test_every_way_to_save_memory_trains_nearly_the_same(trainer, flags):
    options = "--max_train_steps 4 --learning_rate 1e-3"
    want, got = _final_losses(trainer(options)), _final_losses(trainer(f"{options} {flags}"))
    assert got == pytest.approx(want, rel=0.05)
    assert (got == want) == (flags == "--split_attn")


@pytest.mark.parametrize(
    "more",
    [
        "",
        "--gradient_checkpointing",
        *(f"{held} --gradient_checkpointing" for held in ("--fp8_base", "--quantize nf4")),
    ],
)
def test_swapped_blocks_train_the_same_lora_bit_by_bit(trainer, recipe, tmp_path, more):
    path = tmp_path / "base.safetensors"
    save_file_atomically(recipe.state_dict("lora_t2v"), path)
    options = f"--max_train_steps 2 --learning_rate 1e-3 --network_dropout 0.1 --base_weights {path.as_posix()} {more}"
    loras = []
    ways = ("--blocks_to_swap 1", "--blocks_to_swap 2 --block_swap_ring_size 1", "--blocks_to_swap 2 --weights_on_disk")
    for swap in ("", *ways):
        run = trainer(f"{options} {swap}")
        run.run()
        loras.append(_lora(run))
    for lora in loras[1:]:
        assert all(torch.equal(lora[key], loras[0][key]) for key in loras[0])


def test_compiled_blocks_train_the_same_lora_bit_by_bit(trainer):
    options = "--max_train_steps 1 --learning_rate 1e-3 --network_dropout 0.1 --gradient_checkpointing"
    loras = []
    for flags in ("", "--blocks_to_swap 1 --dynamo_backend AOT_EAGER --dynamo_fullgraph"):
        torch._dynamo.reset()
        counters.clear()
        run = trainer(f"{options} {flags}")
        run.run()
        loras.append(_lora(run))
    assert counters["stats"]["unique_graphs"] == 2
    assert all(torch.equal(loras[0][key], loras[1][key]) for key in loras[0])


def test_training_starts_from_a_lora_with_its_ranks_and_alphas(trainer, recipe, tmp_path):
    lora = recipe.state_dict("lora_t2v")
    path = tmp_path / "start.safetensors"
    save_file_atomically(lora, path)
    for flags in ("--dim_from_weights", "--network_dim 4"):
        run = trainer(f"--learning_rate 0 --max_train_steps 1 --network_weights {path.as_posix()} {flags}")
        run.run()
        saved = _lora(run)
        assert saved.keys() == lora.keys() and all(torch.equal(saved[key], lora[key]) for key in lora)
        assert (_metadata(run)["ss_network_alpha"], _metadata(run)["ss_network_dim"]) == ("2.0", "4")


@pytest.mark.parametrize("fp8", ["", "--fp8_base --fp8_scaled"])
def test_base_weights_are_in_the_model_as_if_they_were_attached(trainer, recipe, tmp_path, fp8):
    lora = {key: value * 10 if "lora_up" in key else value for key, value in recipe.state_dict("lora_t2v").items()}
    path = tmp_path / "base.safetensors"
    save_file_atomically(lora, path)
    frozen = f"--learning_rate 0 --max_train_epochs 1 {fp8}"
    plain = _final_losses(trainer(frozen))
    merged = _final_losses(trainer(f"{frozen} --base_weights {path.as_posix()} --base_weights_multiplier 0.5"))
    save_file_atomically({key: value / 2 if "lora_up" in key else value for key, value in lora.items()}, path)
    attached = _final_losses(trainer(f"{frozen} --network_weights {path.as_posix()}"))
    assert merged == pytest.approx(attached, rel=0.01 if fp8 else 1e-4)
    assert math.dist(merged, plain) > 10 * math.dist(merged, attached)


def test_gradients_are_averaged_over_processes_and_a_missing_one_counts_as_zero():
    class Pair:
        """Stands for two processes, of which the other has three times this one's gradients."""

        def reduce(self, tensor, reduction):
            return {"mean": (tensor + 3 * tensor) / 2}[reduction]

    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (4,), (1, 2))]
    parameters[0].grad, parameters[2].grad = torch.ones(2, 3), torch.tensor([[1.0, 2.0]])
    average_gradients(parameters, Pair())
    assert [p.grad.tolist() for p in parameters] == [[[2.0] * 3] * 2, [0.0] * 4, [[2.0, 4.0]]]


def test_gradients_travel_between_processes_in_bundles_of_bounded_size(monkeypatch):
    class Alone:
        sizes = []

        def reduce(self, tensor, reduction):
            self.sizes.append(tensor.numel())
            return tensor

    monkeypatch.setattr("modules.gradients._BUNDLE", 10)
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in (4, 4, 4, 30, 2)]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, number)
    average_gradients(parameters, Alone())
    assert Alone.sizes == [12, 30, 2]
    assert [p.grad.mean().item() for p in parameters] == [0, 1, 2, 3, 4]


def test_there_is_no_autocast_and_only_float16_gradients_are_scaled(trainer, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run = trainer()
    assert run.dit.dtype == torch.bfloat16 and run.plan.mixed_precision == "bf16"
    assert run.accelerator.mixed_precision == "no" and run.accelerator.scaler is None


@pytest.mark.parametrize("engine", ["MEGATRON_LM", "DEEPSPEED"])
def test_engines_that_shard_what_is_trained_are_refused(trainer, monkeypatch, engine):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(
        UserError, match=f"accelerate launch: {engine} is not available. Use --multi_gpu, or --use_fsdp"
    ):
        trainer()


def test_norms_of_the_lora_are_limited(trainer):
    run = trainer("--learning_rate 1e-1 --max_train_epochs 1 --scale_weight_norms 0.5")
    run.run()
    assert max(branch.norm().item() for _, branch in run.module.branches()) <= 0.5 + 1e-5


def test_tensorboard_logs_hold_losses_and_learning_rates(trainer, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logs = tmp_path / "logs"
    trainer(f"--max_train_epochs 2 --logging_dir {logs.as_posix()} --log_prefix run- --scale_weight_norms 1").run()
    (folder,) = logs.iterdir()
    accumulator = events.EventAccumulator(str(folder / "network_train")).Reload()
    assert folder.name.startswith("run-2")
    tags = set(accumulator.Tags()["scalars"])
    bins = {tag for tag in tags if tag.startswith("loss/epoch/t")}
    assert bins and tags - bins == {
        "loss/current",
        "loss/average",
        "loss/epoch",
        "lr/unet",
        "max_norm/keys_scaled",
        "max_norm/average_key_norm",
        "max_norm/max_key_norm",
    }
    assert [event.step for event in accumulator.Scalars("loss/current")] == list(range(1, 15))
    assert [event.step for event in accumulator.Scalars("loss/epoch")] == [1, 2]


# ------------------------------------------------------------------------------------------------ what the DiT is told
def _batch(frames=2, **tensors):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    shapes = {"latents_image": (2, 20, frames, 4, 6), "latents_control": (2, 16, frames, 4, 6)}
    made = {name: draw(*shapes[name]) for name in tensors if name in shapes}
    return Batch(draw(2, 16, frames, 4, 6), [draw(3, 64), draw(5, 64)], **{**tensors, **made})


def test_i2v_sees_mask_and_image_and_text_to_video_nothing():
    batch = _batch(latents_image=True)
    assert condition_latents(TASKS["t2v-14B"], batch) is None
    assert condition_latents(TASKS["i2v-14B"], batch) is batch.latents_image


def test_fun_control_sees_the_control_video_and_only_the_first_frames_image():
    batch = _batch(latents_image=True, latents_control=True)
    plain = condition_latents(TASKS["t2v-14B-FC"], batch)
    assert torch.equal(plain[:, :16], batch.latents_control) and not plain[:, 16:].any()
    image = condition_latents(TASKS["i2v-14B-FC"], batch)
    assert torch.equal(image[:, 16:, 0], batch.latents_image[:, 4:, 0]) and not image[:, 16:, 1:].any()


@pytest.mark.parametrize(
    ("task", "dit", "pictures", "tensors"),
    [
        ("t2v-1.3B", "dit_t2v", 0, {}),
        ("i2v-14B", "dit_i2v", 1, {"latents_image": True}),
        ("flf2v-14B", "dit_flf2v", 2, {"latents_image": True, "frame_indices": torch.tensor([[0, 9], [3, 4]])}),
        ("t2v-1.3B-FC", "dit_fun", 0, {"latents_control": True}),
        ("i2v-14B-FC", "dit_fun", 1, {"latents_control": True, "latents_image": True}),
        ("i2v-A14B", "dit_i2v_a14b", 0, {"latents_image": True}),
    ],
)
def test_every_task_hands_its_conditions_to_the_dit(models, task, dit, pictures, tensors):
    clip = torch.randn(2, 2, 257, 1280) if pictures == 2 else torch.randn(2, 257, 1280) if pictures else None
    batch, config = _batch(**tensors, clip=clip), TASKS[task]
    model = build_dit(load_file(models[dit]), heads=3)
    t = torch.tensor([0.25, 0.75])
    with torch.no_grad():
        both = predict(model, config, batch, batch.latents, t)
        for i in (0, 1):

            def only(value, i=i):
                return value[i : i + 1] if isinstance(value, torch.Tensor | list) else value

            single = Batch(*(only(getattr(batch, field.name)) for field in fields(Batch)))
            alone = predict(model, config, single, single.latents, t[i : i + 1])
            torch.testing.assert_close(alone[0], both[i], atol=1e-5, rtol=1e-4)
        if pictures:
            swapped = predict(model, config, replace(batch, clip=clip.flip(0)), batch.latents, t)
            assert not torch.allclose(swapped, both, atol=1e-4)
        if batch.frame_indices is not None:
            consecutive = predict(model, config, replace(batch, frame_indices=None), batch.latents, t)
            assert not torch.allclose(consecutive[0], both[0], atol=1e-4)
            # RoPE sees differences alone: frames 3 and 4 are as far apart as 0 and 1.
            torch.testing.assert_close(consecutive[1], both[1], atol=1e-4, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------------- preflight
@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--task i2v-14B", "--dit DIT: is a text-to-video model (16 input channels), but --task is i2v-14B."),
        ("--dataset_config nowhere.toml", "--dataset_config nowhere.toml: no such file."),
        ("--dit nowhere.safetensors", "--dit nowhere.safetensors: no such file."),
        ("--sage_attn", "--sage_attn: sage attention cannot be trained through."),
        (
            "--mixed_precision fp16",
            "--mixed_precision fp16: training in float16 needs a GPU. Use --mixed_precision no.",
        ),
        ("--fp8_scaled", "--fp8_scaled: is a way of doing --fp8."),
        ("--optimizer_type AdamWW", "--optimizer_type AdamWW: unknown optimizer. Did you mean 'AdamW'?"),
        ("--network_module networks.lora_wam", "--network_module networks.lora_wam: cannot be imported"),
        ("--network_module networks.formats", "--network_module networks.formats: is no network module."),
        ("--network_args rank_dropuot=0.1", "--network_args rank_dropuot: unknown network argument. Did you mean"),
        ("--network_args rank_dropout", "--network_args rank_dropout: not of the form key=value."),
        ("--blocks_to_swap 20", "--blocks_to_swap 20: the DiT has 2 blocks. Use 2 or fewer, or auto."),
        ("--blocks_to_swap all", "--blocks_to_swap: 'all' is neither a whole number nor auto."),
        ("--weights_on_disk", "--weights_on_disk: is for blocks that are swapped. Add --blocks_to_swap auto."),
        ("--blocks_to_swap -1", "--blocks_to_swap -1: must not be negative."),
        ("--blocks_to_swap 2 --block_swap_ring_size 0", "--block_swap_ring_size 0: there must be room"),
        ("--dynamo_backend OFI", "--compile_backend ofi: is not one that torch"),
        ("--max_train_steps 0", "--max_train_steps 0: must be at least 1."),
        (
            "--min_timestep 900 --max_timestep 100",
            "--min_timestep 900 --max_timestep 100: no timestep lies between them.",
        ),
        (
            "--lr_scheduler linear --lr_warmup_steps 20 --max_train_steps 10",
            "--lr_warmup_steps and --lr_decay_steps: tog",
        ),
        ("--log_with tensorboard", "--log_with tensorboard: needs a folder. Add --logging_dir PATH."),
        ("--dim_from_weights", "--dim_from_weights: needs the LoRA file. Add --network_weights PATH."),
        ("--base_weights_multiplier 1", "--base_weights_multiplier: 1 numbers for 0 --base_weights files."),
        ("--seed -1", "--seed -1: must be from 0 to 2^63 - 1. Leave it out to have one drawn."),
        (f"--seed {2**70}", f"--seed {2**70}: must be from 0 to 2^63 - 1."),
        ("--learning_rate nan", "--learning_rate nan: must not be negative."),
        ("--network_dim 0", "--network_dim 0: must be at least 1."),
        ("--network_alpha -1", "--network_alpha -1: must not be negative."),
        ("--network_dropout 2", "--network_dropout 2: must be from 0 to below 1."),
        ("--scale_weight_norms 0", "--scale_weight_norms 0: must be greater than 0."),
        ("--network_weights DIT", "--network_weights DIT: "),
    ],
)
def test_wrong_options_are_refused_in_one_line_before_the_model_loads(trainer, models, nothing_loads, options, line):
    with pytest.raises(UserError) as error:
        trainer(options.replace("DIT", models["dit_t2v"].as_posix()))
    assert str(error.value).replace(str(models["dit_t2v"]), "DIT").startswith(line)


def test_a_missing_output_name_is_found_at_once(trainer):
    with pytest.raises(UserError, match="--output_name is missing. Name the trained files: --output_name TEXT."):
        trainer(base=BASE.replace("--output_name name", ""))


def test_caches_of_another_task_are_refused(trainer):
    with pytest.raises(UserError) as error:
        trainer("--task i2v-14B", dit="dit_i2v")
    assert str(error.value).startswith("--task i2v-14B: these caches have no image latents, e.g. ")
    assert str(error.value).endswith("Run wan_cache_latents.py with --clip PATH again.")


@pytest.mark.parametrize(
    ("task", "dit", "shapes", "line"),
    [
        (
            "i2v-14B",
            "dit_i2v",
            {"latents_image": (20, 1, 8, 8)},
            "--task i2v-14B: these caches have no clip features, e.g. cache (1 of 1). "
            "Run wan_cache_latents.py with --clip PATH",
        ),
        (
            "flf2v-14B",
            "dit_flf2v",
            {},
            "--task flf2v-14B: these caches have no image latents, e.g. cache (1 of 1). "
            "Run wan_cache_latents.py with --flf2v --clip PATH again.",
        ),
        (
            "flf2v-14B",
            "dit_flf2v",
            {"latents": (16, 2, 8, 8), "latents_image": (20, 2, 8, 8), "clip": (257, 1280)},
            "--task flf2v-14B: is trained with first and last picture as condition, cache has 1 picture. "
            "Run wan_cache_latents.py with --flf2v --clip PATH again.",
        ),
        (
            "i2v-14B",
            "dit_i2v",
            {"latents": (16, 2, 8, 8), "latents_image": (20, 2, 8, 8), "clip": (2, 257, 1280)},
            "--task i2v-14B: is trained with first picture as condition, cache has 2 pictures. "
            "Run wan_cache_latents.py with --clip PATH, without --flf2v, again.",
        ),
        (
            "i2v-A14B",
            "dit_i2v_a14b",
            {"latents": (16, 2, 8, 8), "latents_image": (20, 2, 8, 8), "clip": (2, 257, 1280)},
            "--task i2v-A14B: is trained with first picture as condition, cache has 2 pictures. "
            "Run wan_cache_latents.py with --i2v, without --flf2v, again.",
        ),
        (
            "i2v-14B",
            "dit_i2v",
            {"latents_image": (20, 1, 8, 8), "clip": (2, 257, 1280), "f_indices": (1,)},
            "--task i2v-14B: is trained with first picture as condition, cache has 2 pictures. "
            "Use datasets with one control picture.",
        ),
        ("t2v-1.3B-FC", "dit_fun", {}, "--task t2v-1.3B-FC: these caches have no control latents"),
        (
            "flf2v-14B",
            "dit_flf2v",
            {"latents_image": (20, 1, 8, 8), "clip": (257, 1280)},
            "--task flf2v-14B: is trained with first and last picture as condition, cache has 1 picture. "
            "Use videos, cached with --flf2v, or one-frame datasets",
        ),
        (
            "i2v-14B",
            "dit_i2v",
            {"latents_image": (20, 1, 8, 8), "clip": (257, 64)},
            "cache: clip features of 64 channels, the DiT takes 1280.",
        ),
        (
            "t2v-1.3B",
            "dit_t2v",
            {"latents": (48, 1, 8, 8)},
            "cache: latents of shape (48, 1, 8, 8), not of the Wan2.1 VAE",
        ),
        ("t2v-1.3B", "dit_t2v", {"latents": (16, 1, 9, 8)}, "cache: 64x72 is no multiple of 16."),
    ],
)
def test_caches_that_do_not_fit_the_model_are_refused(models, task, dit, shapes, line):
    item = CachedItem("cache", "text", tuple(sorted({"latents": (16, 1, 8, 8), **shapes}.items())))
    with pytest.raises(UserError) as error:
        check_caches([item], TASKS[task], dit_shape(load_file(models[dit]), heads=3))
    assert str(error.value).startswith(line)


def test_text_of_another_encoder_is_refused(models, golden):
    (text,) = (golden / "cache" / "t2v_video").glob("*_te.safetensors")
    item = CachedItem("cache", text, (("latents", (16, 1, 8, 8)),))
    wide = replace(dit_shape(load_file(models["dit_t2v"]), heads=3), text_dim=4096)
    with pytest.raises(UserError, match="text features of 64 channels, the DiT takes 4096"):
        check_caches([item], TASKS["t2v-1.3B"], wide)


def test_a_lora_for_another_model_is_refused(trainer, recipe, tmp_path):
    path = tmp_path / "i2v.safetensors"
    save_file_atomically(recipe.state_dict("lora_i2v"), path)
    with pytest.raises(
        UserError,
        match="--network_weights .*i2v.safetensors: LoRA for another model: 4 of its 24 layers are not in this model",
    ):
        trainer(f"--network_weights {path.as_posix()} --dim_from_weights")
    with pytest.raises(UserError, match="i2v.safetensors: LoRA for another model: 4 of its layers are not in the DiT"):
        trainer(f"--base_weights {path.as_posix()}")


@pytest.mark.parametrize(
    ("asked", "file", "device", "want"),
    [
        ("bf16", torch.bfloat16, "cuda", ("bf16", torch.bfloat16)),
        ("fp16", torch.float16, "cuda", ("fp16", torch.float16)),
        ("bf16", torch.float8_e4m3fn, "cuda", ("bf16", torch.bfloat16)),
        ("bf16", torch.float32, "cuda", ("bf16", torch.bfloat16)),
        ("no", torch.float16, "cuda", ("no", torch.float16)),
        ("no", torch.float32, "cuda", ("no", torch.float32)),
        (None, torch.float8_e4m3fn, "cuda", ("no", torch.bfloat16)),
        (None, torch.bfloat16, "cpu", ("no", torch.float32)),
    ],
)
def test_the_computing_dtype_follows_from_option_file_and_device(monkeypatch, asked, file, device, want):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert frozen_precision(asked, file, torch.device(device)) == want


def test_accelerates_mixed_precision_counts_where_the_script_is_not_told(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert frozen_precision(None, torch.bfloat16, torch.device("cuda")) == ("bf16", torch.bfloat16)
    assert frozen_precision("no", torch.bfloat16, torch.device("cuda"))[0] == "no"
    with pytest.raises(
        UserError, match="bf16 of accelerate launch: the DiT's file holds float16. Use --mixed_precision"
    ):
        frozen_precision(None, torch.float16, torch.device("cuda"))


def test_sdpa_is_the_default_attention():
    assert choose_attention(AttentionOptions()) == "torch"
    assert choose_attention(AttentionOptions(sdpa=True, sage_attn=True)) == "torch"


# ---------------------------------------------------------------------------------------------- too little memory
@pytest.mark.parametrize("more", ["--network_dropout 0.3 --gradient_checkpointing", "--gradient_accumulation_steps 2"])
def test_a_first_step_that_runs_out_of_memory_trains_the_same_lora_bit_by_bit(trainer, monkeypatch, caplog, more):
    options = f"--max_train_steps 2 --learning_rate 1e-2 {more}"
    wanted = trainer(f"{options} --blocks_to_swap 2 --block_swap_ring_size 1")
    wanted.run()
    with LiveBytes() as live:
        monkeypatch.setattr("wan.loading.streaming_device", lambda *_: Small(live))
        run = trainer(f"{options} --blocks_to_swap auto --block_swap_ring_size 1")
        ring = run.dit.auto_swap.ring
        assert ring.numbers == []
        backward, attempts = run.accelerator.backward, []

        def backward_in_little_memory(loss):
            attempts.append(len(ring.numbers))
            second = "accumulation" in more and len(attempts) == 1
            live.capacity = live.now + 2000 if not ring.numbers and not second else math.inf
            backward(loss)

        monkeypatch.setattr(run.accelerator, "backward", backward_in_little_memory)
        run.run()
    assert attempts[:3] == ([0, 0, 2] if "accumulation" in more else [0, 2, 2])
    assert "--blocks_to_swap auto swaps 2 blocks instead of 0" in caplog.text
    first, second = map(_lora, (wanted, run))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_auto_counts_the_largest_batch_the_lora_and_the_samples(trainer, tmp_path, models):
    (tmp_path / "prompts.txt").write_text("a cat --w 512 --h 256 --f 5 --s 2 --l 5")
    samples = f"--sample_prompts {tmp_path / 'prompts.txt'} --sample_every_n_epochs 1"
    encoders = f"--vae {models['vae']} --t5 {models['t5']} --t5_tokenizer {models['tokenizer']}"
    run = trainer(f"--blocks_to_swap auto --network_dim 16 {samples} {encoders}")
    steps = run.plan.steps()
    trained = [step for step in steps if step.trained]
    assert {step.grid for step in trained} == {
        dict(item.shapes)["latents"][1:] for items in run.plan.data.items for item in items
    }
    assert {step.rank for step in trained} == {16}
    assert {step.trained for step in trained} == {sum(p.numel() for p in run.parameters)}
    assert [step for step in steps if not step.trained] == [Step((2, 32, 64), passes=2)]


def test_auto_is_recommended_when_training_runs_out_of_memory(trainer, monkeypatch):
    run = trainer("--max_train_steps 1")

    def backward(loss):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(run.accelerator, "backward", backward)
    with pytest.raises(UserError, match="not enough GPU memory .* Use --blocks_to_swap auto"):
        run.run()


def test_options_of_other_models_are_accepted_and_told(trainer, caplog):
    run = trainer("--max_train_steps 1 --guidance_scale 3.5 --img_in_txt_in_offloading")
    run.run()
    assert _metadata(run)["ss_guidance_scale"] == "3.5"
    for name in ("guidance_scale", "img_in_txt_in_offloading"):
        assert f"--{name}: has no effect, it is of another model than Wan" in caplog.text
    trainer("--max_train_steps 1")
    assert caplog.text.count("has no effect") == 2
