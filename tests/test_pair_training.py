"""One LoRA for both models of Wan2.2: which of them sees which batch, and the same file wherever they wait."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from modules.flow_matching import TimestepOptions, one_sided, sample_timesteps
from tests import tiny
from tests.test_modules_trainer import _lora, _metadata, trainer  # noqa: F401
from utils.errors import UserError
from wan.model import WanModel

HOW = "--learning_rate 1e-3 --network_dropout 0.1 --sigmoid_scale 3"


@pytest.fixture(scope="module")
def high(tmp_path_factory):
    path = tmp_path_factory.mktemp("high") / "high.safetensors"
    save_file(tiny.state_dict("dit_t2v", seed=1), path, {"num_heads": "3"})
    return path


@pytest.fixture
def pair(trainer, high):  # noqa: F811
    """Return the Trainer of a pair of tiny models."""

    def make(options=""):
        return trainer(f"--task t2v-A14B --dit_high_noise {high} {HOW} {options}")

    return make


@pytest.fixture
def single(golden, tmp_path):
    """A dataset file whose batches are of one example."""
    text = json.loads((golden / "cache_index.json").read_text())["plans"]["t2v"]["toml"]
    (tmp_path / "single.toml").write_text(
        text.replace("<GOLDEN>", golden.as_posix()).replace("batch_size = 2", "batch_size = 1")
    )
    return tmp_path / "single.toml"


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def result(run):
    run.run()
    return _lora(run)


@pytest.fixture
def calls(monkeypatch):
    """What is asked of each model: (its first weight, timesteps)."""
    seen, forward = [], WanModel.forward

    def watched(self, x, timestep, *inputs, **more):
        seen.append((self.patch_embedding.weight.flatten()[0].item(), timestep.tolist()))
        return forward(self, x, timestep, *inputs, **more)

    monkeypatch.setattr(WanModel, "forward", watched)
    return seen


def test_each_batch_goes_to_the_model_of_its_side(pair, models, high, calls):
    pair("--max_train_epochs 6 --timestep_boundary 500").run()
    first = {
        side: tiny.state_dict("dit_t2v", seed=side)["patch_embedding.weight"].flatten()[0].item() for side in (0, 1)
    }
    sides = []
    for weight, timesteps in calls:
        (side,) = {timestep >= 500 for timestep in timesteps}
        assert weight == first[side]
        sides.append(side)
    assert {True, False} == set(sides) and max(len(timesteps) for _, timesteps in calls) == 2


def test_two_equal_models_train_the_lora_of_one_where_a_batch_is_one_example(trainer, models, single):  # noqa: F811
    options = f"--task t2v-A14B {HOW} --max_train_epochs 1 --dataset_config {single} --num_timestep_buckets 4"
    alone = result(trainer(options))
    both = trainer(f"{options} --dit_high_noise {models['dit_t2v']} --timestep_boundary 0.5")
    assert same(result(both), alone)
    found = _metadata(both)
    assert (found["ss_task"], found["ss_sd_model_name_high_noise"]) == ("t2v-A14B", "dit_t2v.safetensors")
    assert (found["ss_timestep_boundary"], found["modelspec.architecture"]) == ("0.5", "wan2.2/lora")


@pytest.mark.parametrize(
    "options",
    [
        ("--offload_inactive_dit",),
        (
            "--blocks_to_swap 1 --block_swap_h2d_only",
            "--offload_inactive_dit --blocks_to_swap 2 --block_swap_ring_size 1 --gradient_checkpointing",
            "--blocks_to_swap auto --force_v2_1_time_embedding",
        ),
        ("--fp8_base --fp8_scaled", "--fp8_base --fp8_scaled --offload_inactive_dit --blocks_to_swap 1"),
    ],
)
def test_wherever_the_idle_model_waits_the_lora_is_the_same(pair, options):
    base = "--max_train_steps 4 --gradient_accumulation_steps 2 --timestep_boundary 0.5"
    if options[0].startswith("--fp8"):
        base, options = f"{base} {options[0]}", options[1:]
    plain = result(pair(base))
    for more in options:
        assert same(result(pair(f"{base} {more}")), plain), more


def test_a_resumed_run_is_the_one_that_was_never_stopped(pair):
    base = "--max_train_steps 8 --save_every_n_steps 3 --save_state --timestep_boundary 0.5 --offload_inactive_dit"
    straight = pair(base)
    straight.run()
    for step in (3, 6):
        state = straight.plan.options.saving.output_dir / f"name-step{step:08d}-state"
        assert same(result(pair(f"{base} --resume {state}")), _lora(straight)), step


def test_samples_are_made_with_both_models(pair, models, calls, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat --w 32 --h 32 --f 1 --s 4 --l 1 --fs 5 --d 1")
    encoders = f"--vae {models['vae']} --t5 {models['t5']} --t5_tokenizer {models['tokenizer']}"
    run = pair(f"--max_train_steps 1 --sample_at_first --sample_prompts {tmp_path / 'prompts.txt'} {encoders}")
    run.sample(epoch=0)
    noisy = [weight for weight, timesteps in calls if timesteps[0] >= 875]
    assert len(set(noisy)) == 1 and {weight for weight, _ in calls} > set(noisy)
    assert list((run.plan.options.saving.output_dir / "sample").iterdir())


# -------------------------------------------------------------------------------------------------------- timesteps
def sided(options, boundary, count, generator, uniforms=None):
    def draw(count, uniforms=None):
        return sample_timesteps(options, count, 32, 32, generator, uniforms)

    return one_sided(draw(count, uniforms), boundary, draw)


@pytest.mark.parametrize(
    "options",
    [
        {"timestep_sampling": "sigma"},
        {"timestep_sampling": "shift", "discrete_flow_shift": 3.0},
        {"timestep_sampling": "qinglong_flux"},
        {"timestep_sampling": "uniform", "min_timestep": 200, "max_timestep": 950, "preserve_distribution_shape": True},
        {"timestep_sampling": "uniform", "min_timestep": 200, "max_timestep": 950},
    ],
)
def test_sides_do_not_change_how_timesteps_are_distributed(options):
    options, generator = TimestepOptions(**options), torch.Generator().manual_seed(0)
    batches = [sided(options, 0.6, 3, generator) for _ in range(2500)]
    assert all(len({bool(t >= 0.6) for t in batch}) == 1 for batch in batches)
    free = sample_timesteps(options, 50_000, 32, 32, generator).sort().values
    for column in torch.stack(batches).T:
        found = column.sort().values
        # Kolmogorov-Smirnov: beyond 2.2 / sqrt(n) in one of 8000 draws.
        grid = torch.linspace(0, 1, 201)
        far = torch.searchsorted(found, grid) / len(found) - torch.searchsorted(free, grid) / len(free)
        assert far.abs().max() < 2.2 / math.sqrt(len(found))


def test_a_side_that_is_hardly_ever_drawn_is_kept_to():
    options = TimestepOptions(timestep_sampling="sigmoid", sigmoid_scale=0.01)
    t = sided(options, 0.9, 4, torch.Generator().manual_seed(0), [1 - 1e-9, 0.5, 0.1, 0.9])
    low = sided(options, 0.9, 2, torch.Generator().manual_seed(0), [0.5, 0.5])
    assert len(t) == 4 and (low < 0.9).all() and len({bool(value >= 0.9) for value in t}) == 1
    rare = TimestepOptions(timestep_sampling="uniform")
    t = sided(rare, 0.9999999, 3, torch.Generator().manual_seed(0), [0.99999999, 0.5, 0.1])
    assert t.tolist() == [1.0, 1.0, 1.0]


# ----------------------------------------------------------------------------------------------------------- refused
def test_what_cannot_be_is_told_before_a_model_loads(pair, trainer, models, tmp_path, nothing_loads):  # noqa: F811
    save_file(tiny.state_dict("dit_t2v", blocks=1), tmp_path / "small.safetensors", {"num_heads": "3"})
    for options, line in (
        ("--max_timestep 800", "--max_timestep 800: nothing is left for the high-noise model, from 875 on"),
        ("--min_timestep 875", "--min_timestep 875: nothing is left for the low-noise model, below 875"),
        ("--timestep_boundary 1.5e3", "--timestep_boundary: '1.5e3' is not between 0 and 1"),
        (f"--dit_high_noise {tmp_path / 'small.safetensors'}", "small.safetensors: is of another size than --dit"),
        ("--task t2v-14B", "--dit_high_noise: t2v-14B has one model"),
    ):
        with pytest.raises(UserError, match=line):
            pair(options)
