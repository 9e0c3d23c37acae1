"""Approximate videos of the trained tiny model: how near they are, what is logged and recorded."""

import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import wan_generate_video
from examples.tiny_world.recipe import WEIGHTS
from modules.approximation import psnr
from utils.errors import UserError

STEPS = 20


@pytest.fixture
def make(monkeypatch, tmp_path, caplog):
    """Make a video of the trained model; return its latent and what was logged."""

    def run(name, **options):
        path = tmp_path / f"{name}.safetensors"
        given = {"task": "t2v-1.3B", "prompt": "a blue ring moves left on a white background", "seed": 1}
        given |= {kind: WEIGHTS / f"{kind}.safetensors" for kind in ("vae", "t5")}
        given |= {"dit": WEIGHTS / "dit_t2v.safetensors", "t5_tokenizer": WEIGHTS / "spiece.model", "device": "cpu"}
        given |= {
            "infer_steps": STEPS,
            "flow_shift": 3,
            "guidance_scale": 4,
            "output_type": "latent",
            "save_path": path,
        }
        given |= {"video_length": 9, **options}
        words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
        monkeypatch.setattr(sys, "argv", ["wan_generate_video.py", *words, "--video_size", "64", "64"])
        caplog.clear()
        caplog.set_level("INFO")
        wan_generate_video.main()
        return path, caplog.text

    return run


def measured(text):
    steps, of, predictions, asked = map(int, re.search(r"(\d+) of (\d+) steps computed, (\d+) of (\d+)", text).groups())
    assert (of, asked) == (STEPS, 2 * STEPS)
    return steps, predictions, float(re.search(r"latents PSNR ([\d.]+) dB", text)[1])


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    return tmp_path_factory.mktemp("curve") / "curve.json"


def test_a_calibration_writes_a_curve_and_changes_nothing(make, curve):
    exact, _ = make("exact")
    calibrated, text = make("calibrated", calibrate_magcache=curve)
    assert torch.equal(load_file(exact)["latent"], load_file(calibrated)["latent"]) and f"wrote {curve}" in text
    content = json.loads(curve.read_text())
    assert (content["task"], content["dit"], content["videos"]) == ("t2v-1.3B", "dit_t2v.safetensors", 1)
    assert len(content["curve"]) == STEPS
    # The blocks' sum gets a little shorter from step to step, as that of the published models.
    assert all(0.9 < number < 1.02 for number in content["curve"][:-2])


def test_approximate_videos_are_near_the_exact_one_at_a_part_of_its_steps(make, curve):
    """The order of magnitude of docs/speed.md, on a shorter video."""
    if not curve.exists():
        make("calibrated", calibrate_magcache=curve)
    ways = {
        "easycache": {"step_cache_threshold": 0.2},
        "magcache": {"magcache_curve": curve},
        # That every step adds 0.05: each second one is computed.
        "teacache": {"teacache_coefficients": "0,0.05", "step_cache_threshold": 0.1},
    }
    for method, options in ways.items():
        path, text = make(method, step_cache=method, compare_exact=True, **options)
        steps, predictions, decibel = measured(text)
        assert steps <= 0.75 * STEPS and predictions <= 1.5 * STEPS and decibel > 22, (method, text)
        assert re.search(r"[\d.]+ of the exact time \([\d.]+ s of [\d.]+ s", text)
        with safe_open(path, "pt") as file:
            recorded = file.metadata()
        assert recorded["step_cache"] == method and float(recorded["step_cache_threshold"]) > 0


def test_the_comparison_is_with_what_the_run_without_makes(make, tmp_path):
    exact, _ = make("exact")
    easy = {"step_cache": "easycache", "step_cache_threshold": 0.1}
    alone, _ = make("alone", **easy)
    compared, text = make("compared", **easy, compare_exact=True)
    mine, wanted = (load_file(path)["latent"].double().numpy() for path in (alone, exact))
    assert np.array_equal(mine, load_file(compared)["latent"].numpy()), "the file is the approximate one"
    decibel = 20 * np.log10((wanted.max() - wanted.min()) / np.sqrt(np.mean((mine - wanted) ** 2)))
    assert measured(text)[2] == pytest.approx(decibel, abs=0.01) and text.count("latents PSNR") == 1
    with safe_open(exact, "pt") as file:
        assert not [name for name in file.metadata() if "cache" in name]


def test_frames_are_compared_where_they_are_decoded(make, tmp_path):
    easy = {"step_cache": "easycache", "video_length": 1, "infer_steps": 6, "compare_exact": True}
    _, text = make("a", **easy, step_cache_threshold=0.3, output_type="images", save_path=tmp_path / "a.png")
    assert 10 < float(re.search(r"--compare_exact: seed 1: frames PSNR ([\d.]+) dB", text)[1]) < 60
    _, text = make("b", **easy, step_cache_threshold=0, output_type="images", save_path=tmp_path / "b.png")
    assert "frames PSNR inf dB" in text and "6 of 6 steps computed" in text


def test_what_is_not_known_of_the_weights_is_said_before_anything_loads(make, nothing_loads):
    with pytest.raises(
        UserError, match="--step_cache teacache: its polynomial is not known for a model of other sizes"
    ):
        make("a", step_cache="teacache")


def test_psnr_is_that_of_a_formula_in_one_go():
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randint(0, 256, (2, 5, 4), generator=generator, dtype=torch.uint8) for _ in range(2))
    wanted = 10 * math.log10(255**2 / float((a.double() - b.double()).square().mean()))
    assert psnr([a[:1], a[1:]], [b[:1], b[1:]], 255) == pytest.approx(wanted)
    assert psnr([a], [a]) == math.inf
