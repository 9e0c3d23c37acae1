"""Video to video: where it starts, that its ends are the video and plain generation, and the solvers in between."""

import sys

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

import wan_generate_video
from modules.clips import read_clip
from modules.latent_encoding import as_pixels
from modules.outputs import load_latent
from modules.prompts import PromptOptions, make_request
from modules.solvers import SOLVERS, sample, sigma_schedule
from modules.video_to_video import first_step, start
from tests.media import write_pictures, write_video
from tests.test_modules_solvers import toy_velocity
from tests.test_script_wan_generate_video import arguments
from utils.errors import UserError
from wan.configs import TASKS
from wan.vae import load_vae


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Nine frames, not of the size or the shape that is made of them."""
    path = tmp_path_factory.mktemp("video") / "start.mp4"
    write_video(path, 9, 64, 64)
    return path


@pytest.fixture
def generate(monkeypatch, models, tmp_path):
    """Run the script on tiny models; return the latent and what it says of itself."""

    def run(name, **options):
        path = tmp_path / f"{name}.safetensors"
        words = arguments(models, **{"output_type": "latent", "save_path": path, **options})
        monkeypatch.setattr(sys, "argv", ["wan_generate_video.py", *words])
        wan_generate_video.main()
        return load_latent(path)

    return run


@pytest.mark.parametrize("solver", SOLVERS)
def test_strength_1_is_plain_generation_and_0_the_video_itself(generate, video, models, solver, caplog):
    caplog.set_level("INFO")
    how = {"sample_solver": solver, "infer_steps": 3}
    plain, _ = generate("plain", vae=None, **how)
    again, described = generate("again", video_path=video, strength=1, **how)
    assert torch.equal(plain, again) and described["strength"] == 1 and described["video_path"] == str(video)
    kept, _ = generate("kept", video_path=video, strength=0.01, **how)
    assert "start.mp4 at noise level 0, 0 of 3 steps are left" in caplog.text
    pixels = as_pixels(read_clip(video, 5, 48, 32, "--video_path"))
    want = load_vae(models["vae"], torch.float32, "cpu").encode(pixels[None])[0]
    torch.testing.assert_close(kept, want, rtol=0, atol=1e-6)
    between, _ = generate("between", video_path=video, strength=0.7, **how)
    distances = [float((latent - want).norm()) for latent in (kept, between, plain)]
    assert distances == sorted(distances) and distances[1] > 0.1


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_run_from_the_middle_equals_that_of_diffusers(solver, strength):
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    theirs = {
        "unipc": lambda: UniPCMultistepScheduler(**flow),
        "dpm++": lambda: DPMSolverMultistepScheduler(**flow, algorithm_type="dpmsolver++"),
        "vanilla": lambda: FlowMatchEulerDiscreteScheduler(),
    }[solver]()
    steps, generator = 12, torch.Generator().manual_seed(0)
    timesteps, sigmas = sigma_schedule(solver, steps, 3.0)
    first = int((sigmas - strength).abs().argmin())
    x = want = torch.randn(1, 16, 1, 4, 4, generator=generator)
    theirs.set_timesteps(steps)
    theirs.timesteps, theirs.sigmas = timesteps, sigmas
    theirs.set_begin_index(first)
    for i in range(first, steps):
        step = type("Step", (), {"sigma": float(sigmas[i])})
        want = theirs.step(toy_velocity(want, step), timesteps[i], want, return_dict=False)[0]
    seen = []
    got = sample(solver, toy_velocity, x, steps, 3.0, lambda step, x, clean: seen.append(step.index), first)
    assert seen == list(range(first, steps)) and 0 < first < steps
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_it_starts_at_the_nearest_noise_level_and_with_that_noise(video):
    config, noise, latents = TASKS["t2v-1.3B"], torch.full((16, 3, 4, 6), 2.0), torch.ones(16, 3, 4, 6)
    sigmas = sigma_schedule("unipc", 20, 5.0)[1]
    for strength in (0, 0.05, 0.11, 0.3, 0.8, 0.995, 1):
        options = PromptOptions("a", infer_steps=20, video_path=video, strength=strength)
        request = make_request(options, config)
        first = first_step(request, "unipc")
        assert abs(sigmas[first] - strength) == min(abs(sigmas - strength))
        x, begun = start(request, "unipc", noise, latents)
        assert begun == first
        expected = 2.0 if first == 0 else 1 + float(sigmas[first])
        torch.testing.assert_close(x, torch.full_like(x, expected))
    default = make_request(PromptOptions("a", video_path=video), config)
    assert default.strength == 0.8


def test_its_length_is_the_video_s_up_to_the_usual_one(video):
    config = TASKS["t2v-1.3B"]
    assert make_request(PromptOptions("a", video_path=video), config).frames == 9
    assert make_request(PromptOptions("a", video_path=video, video_length=5), config).frames == 5
    assert make_request(PromptOptions("a", video_path=video), TASKS["t2i-14B"]).frames == 1


def test_an_image_to_video_model_starts_from_a_video_too(generate, models, video, tmp_path):
    write_pictures(tmp_path / "pictures", {"a": (48, 32)}, caption=None)
    i2v = {"task": "i2v-14B", "dit": "dit_i2v", "clip": models["clip"], "image_path": tmp_path / "pictures" / "a.png"}
    plain, _ = generate("plain", **i2v)
    again, _ = generate("again", **i2v, video_path=video, strength=1)
    other, _ = generate("other", **i2v, video_path=video, strength=0.5)
    assert torch.equal(plain, again) and not torch.equal(plain, other)


def test_a_folder_and_a_picture_are_videos_too(generate, tmp_path):
    write_pictures(tmp_path / "frames", {name: (48, 32) for name in "abcde"}, caption=None)
    folder, _ = generate("folder", video_path=tmp_path / "frames", strength=0.6)
    picture, _ = generate("picture", video_path=tmp_path / "frames" / "a.png", strength=0.6, video_length=1)
    assert (folder.shape, picture.shape) == ((16, 2, 4, 6), (16, 1, 4, 6)) and np.isfinite(picture.numpy()).all()


def test_what_cannot_be_is_told_before_a_model_loads(generate, video, tmp_path, nothing_loads):
    (tmp_path / "no.mp4").write_text("nothing")
    for options, line in (
        ({"video_path": video, "strength": 1.2}, "--strength 1.2: must be from 0 to 1"),
        ({"strength": 0.5}, "--strength 0.5: is for --video_path"),
        ({"video_path": video, "video_length": 13}, f"--video_path {video}: 9 frames, the video is to have 13"),
        ({"video_path": tmp_path / "no.mp4"}, "no.mp4: cannot be read"),
        ({"video_path": tmp_path / "nowhere.mp4"}, "--video_path"),
        ({"video_path": video, "vae": None}, "--vae"),
    ):
        with pytest.raises(UserError, match=line):
            generate("none", **options)


def test_nothing_is_compared_or_measured_of_steps_that_are_left_out(generate, video, tmp_path, caplog):
    caplog.set_level("INFO")
    generate("kept", video_path=video, strength=0, infer_steps=3, step_cache="easycache", compare_exact=True)
    assert "latents PSNR inf dB" in caplog.text
    with pytest.raises(UserError, match="--video_path leaves out steps, which are to be measured"):
        generate("curve", video_path=video, infer_steps=3, calibrate_magcache=tmp_path / "curve.json")
