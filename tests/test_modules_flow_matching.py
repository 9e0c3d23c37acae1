"""Timesteps, noising and loss, held against recorded values and the formulas."""

import json
import math

import pytest
import torch

from modules.flow_matching import (
    TimestepOptions,
    check_timesteps,
    noised,
    sample_timesteps,
)
from utils.errors import UserError

GIVEN = {"discrete_flow_shift": 3.0}


def _recorded(golden):
    return json.loads((golden / "timesteps.json").read_text())


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_given_uniform_numbers_become_the_recorded_noise_levels(golden):
    index = _recorded(golden)
    u = index["given"]["u"]
    for row in index["given"]["rows"]:
        t = sample_timesteps(TimestepOptions(**{**GIVEN, **row["args"]}), len(u), 60, 104, _generator(), u)
        torch.testing.assert_close(t, torch.tensor(row["sigma"]), rtol=1e-5, atol=0)
        # The recorded timesteps are one too great: 1000 t + 1.
        torch.testing.assert_close(1000 * t + 1, torch.tensor(row["timesteps"]), rtol=0, atol=1e-3)


def test_drawn_timesteps_have_the_recorded_distribution(golden):
    for row in _recorded(golden)["drawn"]:
        if row["args"] == {"min_timestep": 0, "max_timestep": 500}:
            continue  # musubi-tuner mirrors the bounds of `sigma`; see the next test
        t = sample_timesteps(TimestepOptions(**{**GIVEN, **row["args"]}), row["draws"], 60, 104, _generator())
        levels = torch.tensor([float(level) for level in row["quantiles"]])
        want = torch.tensor(list(row["quantiles"].values()))
        assert (torch.quantile(1000 * t, levels) - want).abs().max() <= 20, row["args"]


@pytest.mark.parametrize("preserve", [False, True])
def test_the_bounds_of_sigma_are_timesteps_and_all_of_them_occur(preserve):
    options = TimestepOptions(min_timestep=300, max_timestep=310, preserve_distribution_shape=preserve)
    t = 1000 * sample_timesteps(options, 400, 8, 8, _generator())
    assert set(t.round().long().tolist()) == set(range(301, 311))
    whole = 1000 * sample_timesteps(TimestepOptions(), 20000, 8, 8, _generator())
    assert (whole.min(), whole.max()) == (1, 1000) and torch.allclose(whole, whole.round(), rtol=1e-6)


@pytest.mark.parametrize("name", TimestepOptions.__dataclass_fields__["timestep_sampling"].metadata["choices"])
def test_every_sampling_stays_within_its_bounds(name):
    t = sample_timesteps(
        TimestepOptions(timestep_sampling=name, min_timestep=100, max_timestep=900), 500, 60, 104, _generator()
    )
    assert t.dtype == torch.float32 and t.shape == (500,)
    assert t.min() >= 0.1 and t.max() <= 0.9 + 1e-6 and t.std() > 0.001


def test_shifts_by_size_follow_their_lines():
    u, height, width = [0.3], 90, 160  # a video of 1280x720
    n = math.sqrt(2) * torch.erfinv(torch.tensor(2 * 0.3 - 1)).item()
    q = 1 / (1 + math.exp(-n))
    for name, mu in {
        "flux_shift": 1.0660,
        "qwen_shift": 0.66855,
        "krea2_shift": 0.5 + (3600 - 256) * 0.65 / 6144,
    }.items():
        t = sample_timesteps(TimestepOptions(timestep_sampling=name), 1, height, width, _generator(), u).item()
        assert t == pytest.approx(math.exp(mu) * q / (1 + (math.exp(mu) - 1) * q), rel=1e-4)


def test_preserving_the_shape_redraws_and_at_last_takes_the_nearest_bound(caplog):
    options = TimestepOptions(
        timestep_sampling="shift", min_timestep=300, max_timestep=700, preserve_distribution_shape=True
    )
    t = sample_timesteps(options, 4, 8, 8, _generator(), [0.0, 0.2, 0.5, 0.999])
    assert t[1] == pytest.approx(0.3012, abs=1e-4) and t[2] == 0.5 and (t >= 0.3).all() and (t <= 0.7).all()
    never = TimestepOptions(
        timestep_sampling="logsnr", logit_mean=40.0, logit_std=0.1, min_timestep=500, preserve_distribution_shape=True
    )
    assert sample_timesteps(never, 2, 8, 8, _generator()).tolist() == [0.5, 0.5]
    assert "no timestep between 500 and 1000" in caplog.text


def test_a_generator_decides_the_draw():
    options = TimestepOptions(timestep_sampling="qinglong_flux")
    draws = [sample_timesteps(options, 8, 60, 104, _generator(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_noised_latents_run_from_the_video_to_noise_at_constant_velocity():
    video, noise = torch.randn(3, 2, 1, 4, 4).bfloat16(), torch.randn(3, 2, 1, 4, 4)
    x, velocity = noised(video, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x[0], video[0].float())
    torch.testing.assert_close(x[2], noise[2])
    torch.testing.assert_close(x[1] - 0.25 * velocity[1], video[1].float())
    torch.testing.assert_close(velocity, noise - video.float())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"min_timestep": 500, "max_timestep": 500}, "--min_timestep 500 --max_timestep 500: no timestep lies between"),
        ({"max_timestep": 1200}, "--min_timestep 0 --max_timestep 1200: no timestep lies between them"),
        ({"discrete_flow_shift": 0.0}, "--discrete_flow_shift 0: must be greater than 0."),
        ({"num_timestep_buckets": 0}, "--num_timestep_buckets 0: must be at least 1."),
    ],
)
def test_settings_that_leave_nothing_to_draw_are_refused(options, line):
    with pytest.raises(UserError) as error:
        check_timesteps(TimestepOptions(**options))
    assert str(error.value).startswith(line)
