"""Fine-tuning of the DiT's own weights, in this process, on recorded caches and tiny weights."""

import shlex
from dataclasses import fields

import cv2
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from modules.full_training import FullOptions, TrainedDit, rounded_at_random, step_in_float32
from modules.precision import trained_precision
from modules.prediction import predict
from modules.run_logs import LoggingOptions
from modules.states import unpacked
from modules.train_options import TrainOptions
from modules.trainer import Trainer, make_trainer
from tests import tiny
from tests.test_wan_block_exchange import LateBothWays
from utils.errors import UserError
from utils.options import parse_options
from utils.safetensors_io import read_metadata, save_file_atomically
from wan.configs import TASKS
from wan.loading import load_dit

BASE = "--task t2v-1.3B --max_data_loader_n_workers 0 --output_name name --timestep_sampling shift --seed 3"
COMPILED = " --compile --compile_backend aot_eager --compile_fullgraph"


@pytest.fixture
def trainer(models, dataset, tmp_path):
    """Return the Trainer that a command line makes; its files go to a folder of its own."""

    def make(options: str = "", dit=models["dit_t2v"]) -> Trainer:
        AcceleratorState._reset_state(reset_partial_state=True)
        folder = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        paths = ["--dit", dit, "--dataset_config", dataset, "--output_dir", folder]
        groups = [field.type for field in fields(TrainOptions)]
        argv = [*shlex.split(f"{BASE} {options}"), *map(str, paths)]
        *parsed, full, logs = parse_options("doc", *groups, FullOptions, LoggingOptions, argv=argv)
        return make_trainer(TrainOptions(*parsed), TrainedDit(full), logs)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


def pixels(path) -> torch.Tensor:
    return torch.from_numpy(cv2.imread(str(path)))


def trained(run: Trainer):
    """Run to the end and return the final file's path."""
    run.run()
    return run.plan.options.saving.output_dir / "name.safetensors"


def test_the_dit_learns_to_tell_noise_from_the_videos_it_sees(trainer):
    run = trainer("--learning_rate 3e-3 --max_train_epochs 30 --sigmoid_scale 0.2")
    before = {name: value.clone() for name, value in run.dit.state_dict().items()}
    trained(run)
    untouched = trainer("--learning_rate 0 --max_train_epochs 1 --sigmoid_scale 0.2")
    trained(untouched)
    assert sum(run.losses) < 0.5 * sum(untouched.losses)
    assert all(not torch.equal(before[name], value) for name, value in run.dit.state_dict().items())


@pytest.mark.parametrize("more", ["--full_bf16", "--blocks_to_swap 2", "--fused_backward_pass --blocks_to_swap 2"])
def test_compiled_blocks_are_trained_the_same_bit_by_bit(trainer, more):
    options = f"--learning_rate 1e-3 --max_train_steps 1 --gradient_checkpointing {more}"
    plain, compiled = (load_file(trained(trainer(options + flags))) for flags in ("", COMPILED))
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)


@pytest.mark.parametrize(
    "more",
    [
        "--full_bf16 --fused_backward_pass",
        "--optimizer_type adamw8bit --gradient_accumulation_steps 2 --blocks_to_swap 2",
        "--full_bf16 --fused_backward_pass --optimizer_type adamw8bit --blocks_to_swap 2 --gradient_checkpointing",
    ],
)
def test_a_resumed_run_is_the_one_that_was_never_stopped(trainer, more):
    options = (
        f"--learning_rate 1e-3 --lr_scheduler cosine --max_train_steps 5 --save_every_n_steps 3 --save_state {more}"
    )
    whole = trained(trainer(options))
    state = whole.parent / "name-step00000003-state"
    again = trained(trainer(f"{options} --resume {state}"))
    plain, resumed = load_file(whole), load_file(again)
    assert all(torch.equal(plain[name], resumed[name]) for name in plain)
    moments = [torch.load(path.parent / "name-state" / "optimizer.bin", weights_only=True) for path in (whole, again)]
    for one, other in zip(*(held["state"].values() for held in moments), strict=True):
        one, other = dict(unpacked(one)), dict(unpacked(other))
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)


def test_the_file_is_the_live_model_with_its_keys_and_number_of_heads(trainer, models):
    run = trainer("--learning_rate 1e-3 --max_train_steps 3 --metadata_author me --save_every_n_steps 2")
    path = trained(run)
    assert sorted(file.name for file in path.parent.glob("*.safetensors")) == [
        "name-step00000002.safetensors",
        "name.safetensors",
    ]
    source, result = load_file(models["dit_t2v"]), load_file(path)
    assert {key: value.shape for key, value in source.items()} == {key: value.shape for key, value in result.items()}
    metadata = read_metadata(path)
    assert metadata["num_heads"] == "3" and metadata["modelspec.author"] == "me"
    assert metadata["modelspec.architecture"] == "wan2.1" and metadata["ss_full_bf16"] == "False"
    assert metadata["ss_steps"] == "3" and not any("network" in key or "sshs" in key for key in metadata)
    config = TASKS["t2v-1.3B"]
    loaded = load_dit(path, config, torch.float32, "cpu")
    batch = next(iter(run.loader))
    t = torch.full((len(batch),), 0.5)
    with torch.no_grad():
        velocities = [predict(dit, config, batch, batch.latents, t) for dit in (loaded, run.dit)]
    assert torch.equal(*velocities)


@pytest.mark.parametrize("flags", ["", "--full_bf16", "--full_bf16 --fused_backward_pass --gradient_checkpointing"])
def test_the_same_seed_gives_the_same_weights_bit_by_bit(trainer, flags):
    first, second = (load_file(trained(trainer(f"--learning_rate 1e-3 --max_train_steps 3 {flags}"))) for _ in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_processes_that_draw_other_noise_round_their_weights_alike(trainer):
    weights = []
    for seed in (1, 2):
        run = trainer("--full_bf16 --learning_rate 1e-4")
        torch.manual_seed(seed)
        for number, parameter in enumerate(run.parameters):
            parameter.grad = torch.full_like(parameter, number + 1)
        run.update(run.parameters)
        weights.append([parameter.detach().clone() for parameter in run.parameters])
    assert all(torch.equal(first, second) for first, second in zip(*weights, strict=True))


@pytest.mark.parametrize("flags", ["", "--optimizer_type adamw8bit", "--gradient_checkpointing"])
def test_a_fused_backward_pass_gives_the_weights_of_the_plain_one(trainer, flags):
    options = f"--learning_rate 1e-3 --max_train_steps 4 --max_grad_norm 0 --lr_scheduler linear {flags}"
    plain, fused = (trainer(f"{options} {flag}") for flag in ("", "--fused_backward_pass"))
    first, second = load_file(trained(plain)), load_file(trained(fused))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert plain.rates() == fused.rates() != {"lr/unet": 1e-3}
    assert all(parameter.grad is None for parameter in fused.parameters)


def test_a_fused_backward_pass_limits_each_gradient_alone(trainer):
    run = trainer(
        "--optimizer_type SGD --learning_rate 1 --max_train_steps 1 --max_grad_norm 1e-3 --fused_backward_pass"
    )
    before = [parameter.detach().clone() for parameter in run.parameters]
    trained(run)
    steps = [(parameter - old).norm().item() for parameter, old in zip(run.parameters, before, strict=True)]
    assert max(steps) == pytest.approx(1e-3, rel=0.01) and sum(step > 9e-4 for step in steps) > len(steps) / 2


@pytest.mark.parametrize("flag", ["", "--fused_backward_pass"])
def test_bfloat16_weights_learn_what_float32_weights_learn(trainer, flag):
    options = "--learning_rate 1e-4 --max_train_epochs 3 --sigmoid_scale 0.2"
    exact, rounded, untouched = (
        trainer(f"{options} {flags}") for flags in ("", f"--full_bf16 {flag}", "--learning_rate 0")
    )
    for run in (exact, rounded, untouched):
        trained(run)
    assert {p.dtype for p in rounded.parameters} == {torch.bfloat16} and rounded.dit.dtype == torch.bfloat16
    before, exactly, got = (run.dit.blocks[0].ffn[0].weight.detach().float() for run in (untouched, exact, rounded))
    # Far less than half the distance of two bfloat16 numbers, which rounding to the nearest would lose.
    assert (exactly - before).abs().max() < 0.01
    moved, wanted = (got - before.to(torch.bfloat16).float()), exactly - before
    assert (moved * wanted).sum() / wanted.square().sum() == pytest.approx(1, abs=0.1)


def test_rounding_at_random_is_right_on_average_and_leaves_what_is_exact():
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([1.0, -3.5, 0.1, -0.3, 1e-20, float("inf"), 0.0])
    draws = torch.stack([rounded_at_random(x, generator) for _ in range(4000)])
    assert draws.dtype == torch.bfloat16
    exact = x.to(torch.bfloat16).float() == x
    assert exact.tolist() == [True, True, False, False, False, True, True]
    assert (draws[:, exact] == x[exact]).all()
    assert all(len(draws[:, i].unique()) == 2 for i in (2, 3, 4))
    torch.testing.assert_close(draws[:, ~exact].double().mean(0), x[~exact].double(), rtol=2e-4, atol=0)


def test_a_step_in_float32_is_the_optimizers_own_but_for_the_rounding():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(40, 30).to(torch.bfloat16)) for _ in range(3)]
    exact = [torch.nn.Parameter(weight.detach().float()) for weight in weights]
    optimizers = [torch.optim.AdamW(parameters, lr=0.1) for parameters in (weights, exact)]
    places = [weight.data_ptr() for weight in weights]
    for weight, copy in zip(weights[:2], exact[:2], strict=True):
        weight.grad = torch.randn_like(weight)
        copy.grad = weight.grad.float()
    step_in_float32(optimizers[0], weights, torch.Generator())
    optimizers[1].step()
    assert all(weight.grad is None and weight.dtype == torch.bfloat16 for weight in weights)
    assert [weight.data_ptr() for weight in weights] == places
    for weight, copy in zip(weights, exact, strict=True):
        torch.testing.assert_close(weight.float(), copy, rtol=2**-7, atol=0)
    assert torch.equal(weights[2].float(), exact[2])
    assert {state["exp_avg"].dtype for state in optimizers[0].state.values()} == {torch.float32}


@pytest.fixture
def four_blocks(tmp_path, monkeypatch):
    """A DiT of four blocks, which are swapped by the slowest of GPUs."""
    monkeypatch.setattr("wan.loading.streaming_device", lambda *_: LateBothWays())
    path = tmp_path / "four.safetensors"
    wide = 4 * 96  # an MLP beside which layers too are computed again in the backward pass
    save_file_atomically(tiny.state_dict("dit_t2v", blocks=4, ffn=wide), path, {"num_heads": "3"})
    return path


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--gradient_checkpointing --gradient_accumulation_steps 2",
        "--full_bf16",
        "--full_bf16 --fused_backward_pass --gradient_checkpointing",
        "--full_bf16 --fused_backward_pass --optimizer_type adamw8bit",
        "--optimizer_type adamw8bit --max_grad_norm 0",
    ],
)
def test_files_hold_the_same_bits_when_blocks_are_swapped(trainer, four_blocks, flags):
    options = f"--learning_rate 1e-3 --max_train_steps 3 --save_every_n_steps 1 {flags}"
    plain = trained(trainer(options, dit=four_blocks)).parent
    for swapped in ("4 --block_swap_ring_size 1", "3"):
        path = trained(trainer(f"{options} --blocks_to_swap {swapped}", dit=four_blocks))
        for file in sorted(path.parent.glob("*.safetensors")):
            same, other = load_file(file), load_file(plain / file.name)
            assert list(same) == list(other) and all(torch.equal(same[key], other[key]) for key in same), file.name
        first, second = read_metadata(path), read_metadata(plain / path.name)
        own = ("session_id", "started_at", "finished_at", "modelspec.date")  # of each run
        assert first.keys() == second.keys()
        assert all(first[key] == second[key] for key in first if not key.endswith(own))


@pytest.mark.parametrize("flags", ["", "--full_bf16 --fused_backward_pass --gradient_checkpointing"])
def test_validation_changes_nothing_and_is_the_same_where_blocks_are_swapped(trainer, four_blocks, flags):
    options = f"--learning_rate 1e-3 --max_train_steps 2 --validation_split 0.3 --validation_timesteps 2 {flags}"
    files, measured = [], []
    for more in ("--validate_every_n_epochs 9", "--validate_every_n_steps 1", "--blocks_to_swap 3"):
        run = trainer(f"{options} {more}", dit=four_blocks)
        values, log = [], run.log
        run.log = lambda logged, step: log(logged, step) or values.append(logged.get("loss/validation"))  # noqa: B023
        files.append(load_file(trained(run)))
        measured.append([value for value in values if value is not None])
    assert measured[0] == [measured[1][0], measured[1][-1]] == measured[2] and len(set(measured[1])) == 3
    assert all(torch.equal(files[0][key], other[key]) for other in files[1:] for key in other)


def test_the_norm_of_all_gradients_is_limited_wherever_they_are(trainer, four_blocks):
    options = "--optimizer_type SGD --learning_rate 1 --max_train_steps 1 --max_grad_norm 1e-3"
    run = trainer(f"{options} --blocks_to_swap 3", dit=four_blocks)
    before = {name: value.clone() for name, value in run.dit.state_dict().items()}
    trained(run)
    steps = [(value - before[name]).norm() for name, value in run.dit.state_dict().items()]
    assert torch.stack(steps).norm().item() == pytest.approx(1e-3, rel=0.01)


def test_swapped_weights_can_be_read_at_any_moment(trainer, four_blocks):
    states = []
    for flag in ("", "--blocks_to_swap 4 --block_swap_ring_size 1"):
        run = trainer(f"--learning_rate 1e-3 --fused_backward_pass {flag}", dit=four_blocks)
        run.accelerator.backward(run.loss(next(iter(run.loader)).to("cpu")))
        states.append(run.dit.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_files_have_the_dtype_of_the_file_trained_from_unless_another_is_asked_for(trainer, models, tmp_path):
    source = tmp_path / "half.safetensors"
    half = {key: value.half() for key, value in load_file(models["dit_t2v"]).items()}
    save_file_atomically(half, source, {"num_heads": "3", "modelspec.title": "old", "note": "kept"})
    for flag, dtype in (("", torch.float16), ("--save_precision bf16", torch.bfloat16)):
        run = trainer(f"--max_train_steps 1 {flag}", dit=source)
        assert run.dit.dtype == torch.float32
        path = trained(run)
        assert {value.dtype for value in load_file(path).values()} == {dtype}
        assert (read_metadata(path)["note"], read_metadata(path)["modelspec.title"]) == ("kept", "name")


def test_samples_show_the_dit_in_training_and_do_not_change_the_run(trainer, models, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 32 --h 32 --f 1 --s 2 --d 1")
    encoders = " ".join(f"--{name} {models[name].as_posix()}" for name in ("vae", "t5"))
    sampling = f"--sample_prompts {prompts.as_posix()} --sample_every_n_steps 2 --sample_at_first {encoders}"
    sampling += f" --t5_tokenizer {models['tokenizer'].as_posix()}"
    options = "--learning_rate 1e-2 --max_train_steps 2"
    plain, sampled = trained(trainer(options)), trained(trainer(f"{options} {sampling}"))
    swapped = trained(trainer(f"{options} {sampling} --blocks_to_swap 2 --block_swap_ring_size 1"))
    first, second, third = (load_file(path) for path in (plain, sampled, swapped))
    assert all(torch.equal(first[key], second[key]) and torch.equal(first[key], third[key]) for key in first)
    pictures, same = (sorted((path.parent / "sample").iterdir()) for path in (sampled, swapped))
    assert len(pictures) == 2 and pictures[0].read_bytes() != pictures[1].read_bytes()
    assert all(torch.equal(pixels(one), pixels(other)) for one, other in zip(pictures, same, strict=True))


# -------------------------------------------------------------------------------------------------------- wrong options
@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--fp8_base", "--fp8_base: is not available in fine-tuning, such weights are frozen. Leave it out."),
        ("--fp8_scaled", "--fp8_scaled: is not available in fine-tuning, such weights are frozen. Leave it out."),
        ("--quantize nf4", "--quantize: is not available in fine-tuning, such weights are frozen. Leave it out."),
        ("--blocks_to_swap 3", "--blocks_to_swap 3: the DiT has 2 blocks. Use 2 or fewer, or auto."),
        (
            "--blocks_to_swap auto",
            "--blocks_to_swap auto: is not available in fine-tuning.",
        ),
        (
            "--blocks_to_swap 2 --weights_on_disk",
            "--weights_on_disk: is not available in fine-tuning",
        ),
        (
            "--fused_backward_pass --gradient_accumulation_steps 2",
            "--fused_backward_pass: keeps no gradients for --gradient_accumulation_steps 2 to add up. Leave one",
        ),
        (
            "--mixed_precision bf16",
            "--mixed_precision bf16: the weights are trained either in float32 or, with --full_",
        ),
        pytest.param(
            "--optimizer_type Muon",
            "--optimizer_type Muon: Muon refuses its arguments (Muon only supports 2D parameters",
            marks=pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon"),
        ),
        ("--network_dim 4", "--network_dim: unknown option."),
    ],
)
def test_wrong_options_are_refused_in_one_line_before_the_model_loads(trainer, nothing_loads, options, line):
    with pytest.raises(UserError) as error:
        trainer(options)
    assert str(error.value).startswith(line)


def test_float8_weights_cannot_be_trained(trainer, models, tmp_path):
    path = tmp_path / "float8.safetensors"
    weights = {key: value.to(torch.float8_e4m3fn) for key, value in load_file(models["dit_t2v"]).items()}
    save_file_atomically(weights, path, {"num_heads": "3"})
    with pytest.raises(UserError, match="holds float8 weights, which are too coarse to train. Use the bf16 file."):
        trainer(dit=path)


def test_weights_are_float32_or_all_bfloat16(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert trained_precision(None, full_bf16=False) == ("no", torch.float32)
    assert trained_precision(None, full_bf16=True) == ("bf16", torch.bfloat16)
    assert trained_precision("bf16", full_bf16=True) == ("bf16", torch.bfloat16)
    for asked, flag in (("fp16", False), ("bf16", False), ("no", True), ("fp16", True)):
        with pytest.raises(UserError, match=f"--mixed_precision {asked}"):
            trained_precision(asked, flag)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert trained_precision("no", full_bf16=False) == ("no", torch.float32)
    with pytest.raises(UserError, match="--mixed_precision bf16 of accelerate launch: the weights are trained either"):
        trained_precision(None, full_bf16=False)
