"""The tiny world's recipe: a detector one can trust, a VAE trained as it is run, runs that go on where they stopped."""

import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from examples.tiny_world import pretraining, vae_training
from examples.tiny_world.detector import NOTHING, look
from examples.tiny_world.muon import orthogonal
from examples.tiny_world.world import draw, random_scene, varied_caption
from wan.vae import LATENT_MEAN, LATENT_STD, VaeShape, WanVAE, load_vae


def test_the_detector_says_what_was_drawn():
    rng = random.Random(5)
    for i in range(12):
        scene = replace(random_scene(rng), striped=i % 3 == 0)
        sight = look(draw(scene))
        seen = (sight.color, sight.shape, sight.motion, sight.background, sight.striped)
        assert seen == (scene.color, scene.shape, scene.motion, scene.background, scene.striped)


@pytest.mark.parametrize("kind", ["noise", "empty", "two circles", "half the picture"])
def test_the_detector_sees_no_shape_where_there_is_none(kind):
    rng = np.random.default_rng(0)
    clip = np.full((17, 64, 64, 3), 15, np.uint8)
    y, x = np.mgrid[:64, :64]
    if kind == "noise":
        clip = rng.integers(0, 256, clip.shape, dtype=np.uint8)
    elif kind == "two circles":
        clip[:, np.minimum((x - 16) ** 2, (x - 48) ** 2) + (y - 32) ** 2 < 100, 0] = 225
    elif kind == "half the picture":
        clip[:, :, 20:50, 0] = 225
    assert look(clip).shape == NOTHING


def test_captions_name_everything_or_leave_it_out_or_call_it_by_a_word_without_meaning():
    scene = random_scene(random.Random(0))
    captions = [varied_caption(scene, random.Random(i), rate=0.3) for i in range(100)]
    assert scene.caption in captions and len(set(captions)) > 50
    assert varied_caption(scene, random.Random(0), rate=0) == scene.caption
    assert any(scene.color not in caption for caption in captions)


def test_an_orthogonal_step_has_singular_values_about_one():
    for shape in ((8, 30), (30, 8), (16, 16)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert (values > 0.5).all() and (values < 1.4).all()


def random_vae() -> WanVAE:
    vae = WanVAE(VaeShape(4, (4, 8, 16, 16)))
    vae_training.initialize(vae, torch.Generator().manual_seed(0))
    return vae


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_the_vae_is_trained_as_it_is_run(frames):
    """The whole video at once, with gradients, is what encode() and decode() compute chunk by chunk."""
    vae, pixels = random_vae(), torch.rand(1, 3, frames, 32, 32) * 2 - 1
    mean, _ = vae_training.encode(vae, pixels)
    decoded = vae_training.decode(vae, mean)
    assert decoded.requires_grad
    vae.requires_grad_(False)
    latents = vae.encode(pixels)
    scale, shift = (torch.tensor(values).view(-1, 1, 1, 1) for values in (LATENT_STD, LATENT_MEAN))
    torch.testing.assert_close(latents * scale + shift, mean.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(vae.decode(latents), decoded.detach().clamp(-1, 1), rtol=0, atol=5e-5)


def run(module: str, *arguments: object) -> None:
    command = [sys.executable, "-m", f"examples.tiny_world.{module}", *map(str, arguments), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_vae_run_that_goes_on_is_the_run_that_was_not_stopped_and_its_latents_are_normal(tmp_path):
    small = ["--clips", 3, "--width", 4, "--batch_pixels", 2000, "--save_every", 2]
    run("vae_training", "--folder", tmp_path / "whole", "--steps", 4, *small)
    options = vae_training.VaeTrainingOptions(tmp_path / "halves", 4, 3, 4, 2000, threads=1, save_every=2)
    pool = vae_training.draw_pool(options)
    vae_training.train(options, pool, until=2)
    run("vae_training", "--folder", tmp_path / "halves", "--steps", 4, *small)
    weights, others = (load_file(tmp_path / name / "vae.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    vae = load_vae(tmp_path / "whole" / "vae.safetensors", torch.float32)
    latents = vae.encode(torch.from_numpy(pool).permute(0, 4, 1, 2, 3).float() / 127.5 - 1)
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(16), rtol=0, atol=0.01)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(16), rtol=0.01, atol=0)


def test_pretraining_writes_models_that_the_scripts_load(models, run_cli, tmp_path):
    run("pretraining", "--folder", tmp_path, "--vae", models["vae"], "--steps", 2, "--clips", 4, "--batch_size", 2)
    text = ["--t5", tmp_path / "t5.safetensors", "--t5_tokenizer", tmp_path / "spiece.model", "--prompt", "a circle"]
    size = ["--video_size", 32, 32, "--video_length", 1, "--infer_steps", 1, "--output_type", "images"]
    weights = ["--dit", tmp_path / "dit_t2v.safetensors", "--vae", models["vae"]]
    arguments = ["--task", "t2v-1.3B", *weights, *text, *size, "--save_path", tmp_path]
    done = run_cli("wan_generate_video.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_every_part_of_the_noise_distribution_gets_its_share():
    t = pretraining.noise_levels(100, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal((t * 100).long().sort().values, torch.arange(100))
    shifted = pretraining.noise_levels(100, 3.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(shifted, 3 * t / (1 + 2 * t))
