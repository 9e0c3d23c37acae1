"""The tiny world's recipe: a detector one can trust, a VAE trained as it is run, runs that go on where they stopped."""

import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from examples.tiny_world import clip_training, i2v_training, pretraining, vae_training
from examples.tiny_world.detector import NOTHING, look
from examples.tiny_world.muon import orthogonal
from examples.tiny_world.training import run as run_step
from examples.tiny_world.world import draw, random_scene, varied_caption
from utils.errors import UserError
from wan.clip import load_clip
from wan.configs import TASKS
from wan.dit_file import check_dit
from wan.loading import build_dit
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
        u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        spread = torch.linspace(0.1, 1, 8 if 8 in shape else 16)  # a random square one can be too near to singular
        values = torch.linalg.svdvals(orthogonal(u @ spread.diag() @ v))
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


def run(module: str, *arguments: object, processes: int = 1) -> None:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    launch = torchrun if processes > 1 else []
    command = [sys.executable, "-m", *launch, f"examples.tiny_world.{module}", *map(str, arguments), "--threads", "1"]
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


@pytest.fixture(scope="module")
def pretrained(models, tmp_path_factory) -> Path:
    """The folder of a pretraining of two steps, with the tiny VAE of the tests beside its results."""
    folder = tmp_path_factory.mktemp("pretrained")
    shutil.copyfile(models["vae"], folder / "vae.safetensors")
    run("pretraining", "--folder", folder, "--vae", models["vae"], *SHORT)
    return folder


SHORT = ("--steps", 2, "--clips", 4, "--batch_size", 2)


def test_pretraining_writes_models_that_the_scripts_load(models, run_cli, pretrained, tmp_path):
    text = [
        "--t5",
        pretrained / "t5.safetensors",
        "--t5_tokenizer",
        pretrained / "spiece.model",
        "--prompt",
        "a circle",
    ]
    size = ["--video_size", 32, 32, "--video_length", 1, "--infer_steps", 1, "--output_type", "images"]
    weights = ["--dit", pretrained / "dit_t2v.safetensors", "--vae", models["vae"]]
    arguments = ["--task", "t2v-1.3B", *weights, *text, *size, "--save_path", tmp_path]
    done = run_cli("wan_generate_video.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_two_processes_learn_what_one_learns(models, pretrained, tmp_path):
    run("pretraining", "--folder", tmp_path, "--vae", models["vae"], *SHORT, processes=2)
    one, two = (torch.load(folder / "pretraining_state.pt") for folder in (pretrained, tmp_path))
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, rtol=0, atol=2e-5)
    assert torch.equal(torch.load(pretrained / "latents.pt"), torch.load(tmp_path / "latents.pt"))


def test_a_second_round_starts_from_what_the_first_one_learned(models, pretrained, tmp_path):
    options = pretraining.PretrainingOptions(tmp_path, models["vae"], start_from=pretrained)
    training = pretraining.start(options)
    learned = load_file(pretrained / "dit_t2v.safetensors")
    assert all(
        torch.equal(weight, learned[key]) for key, weight in bfloat16(training.model["dit"].state_dict()).items()
    )
    learned = load_file(pretrained / "t5.safetensors")
    weights = bfloat16(pretraining.official_t5(training.model["t5"]))
    assert all(torch.equal(weight, learned[key]) for key, weight in weights.items())
    pretraining.train_tokenizer(tmp_path / "spiece.model", pretrained)
    assert (tmp_path / "spiece.model").read_bytes() == (pretrained / "spiece.model").read_bytes()


def bfloat16(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: weight.to(torch.bfloat16) for key, weight in weights.items()}


def test_a_step_of_the_recipe_that_fails_is_named(capfd):
    with pytest.raises(UserError, match=r"examples\.tiny_world\.draw did not finish"):
        run_step("-m", "examples.tiny_world.draw", "--clips", 24)
    with pytest.raises(UserError, match=r"wan_train\.py did not finish"):
        run_step("wan_train.py", "--nonsense")
    assert "--folder: required" in capfd.readouterr().err


def test_every_part_of_the_noise_distribution_gets_its_share():
    t = pretraining.noise_levels(100, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal((t * 100).long().sort().values, torch.arange(100))
    shifted = pretraining.noise_levels(100, 3.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(shifted, 3 * t / (1 + 2 * t))


@pytest.fixture(scope="module")
def trained_clip(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    run("clip_training", "--folder", folder, *SHORT_CLIP)
    return folder / "clip.safetensors"


SHORT_CLIP = ("--steps", 4, "--clips", 2, "--batch_size", 2, "--save_every", 2)


def test_clip_is_trained_as_it_is_run(trained_clip):
    options = clip_training.ClipTrainingOptions(trained_clip.parent, steps=4)
    training, pixels = clip_training.start(options), torch.rand(2, 3, 64, 64) * 2 - 1
    assert training.step == 4
    with training.averaged(), torch.no_grad():
        seen = clip_training.clip_input(pixels, 112)
        states = training.model.visual(pixel_values=seen, output_hidden_states=True).hidden_states
    features = load_clip(trained_clip, torch.float32).encode(pixels)
    assert features.shape == (2, 65, 64)
    torch.testing.assert_close(features, states[-2], rtol=0, atol=0.01)  # the file is in half precision


def test_a_clip_run_that_goes_on_is_the_run_that_was_not_stopped(trained_clip, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(training):
        save(training)
        raise Stopped

    save = clip_training.Training.save
    monkeypatch.setattr(clip_training.Training, "save", stop)
    monkeypatch.setattr(sys, "argv", ["clip_training", *map(str, ("--folder", tmp_path, *SHORT_CLIP, "--threads", 1))])
    with pytest.raises(Stopped):
        clip_training.main()
    assert torch.load(tmp_path / "clip_state.pt")["step"] == 2
    run("clip_training", "--folder", tmp_path, *SHORT_CLIP)
    weights, others = load_file(trained_clip), load_file(tmp_path / "clip.safetensors")
    assert all(torch.equal(weights[key], others[key]) for key in weights)


def test_a_caption_fits_every_picture_of_which_its_words_are_true():
    words = torch.tensor([[0, 6], [1, 6], [0, 7]])
    fits = torch.stack([clip_training.captions_of(words, torch.Generator().manual_seed(seed))[1] for seed in range(20)])
    assert fits.diagonal(dim1=1, dim2=2).all()
    assert fits[:, 1, 0].any() and not fits[:, 1, 0].all()  # the colour is said at times, the shape always
    assert not fits[:, 2, 0].any() and not fits[:, 2, 1].any()
    right = torch.tensor([[True, False, True], [False, True, False], [True, False, True]])
    assert clip_training.loss_of(100 * right.float(), right) < 1 < 10 < clip_training.loss_of(100 * torch.eye(3), right)


@pytest.mark.parametrize("left_out", [None, 1])
def test_the_image_to_video_dit_begins_as_the_text_to_video_dit(models, left_out):
    t2v = load_file(models["dit_t2v"])
    weights = i2v_training.with_eyes(t2v, clip_dim=64, left_out=left_out, seed=0)
    i2v = build_dit(weights, heads=3)
    plain = build_dit(t2v, heads=3)
    x, text = torch.randn(1, 16, 2, 4, 4), [torch.randn(5, 64)]
    seen = i2v(x, torch.tensor([500.0]), text, torch.randn(1, 20, 2, 4, 4), torch.randn(1, 257, 64))
    expected = plain(x, torch.tensor([500.0]), text, skip_blocks=() if left_out is None else (left_out,))
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)


def test_the_image_to_video_dit_is_trained_by_the_scripts(models, trained_clip, pretrained):
    shutil.copyfile(trained_clip, pretrained / "clip.safetensors")
    folder = pretrained / "i2v"
    small = ["--rounds", 2, "--steps", 1, "--clips", 2, "--batch_size", 2, "--processes", 1]
    command = ["-m", "examples.tiny_world.i2v_training", "--folder", folder, "--weights", pretrained, *small]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, last, published = (
        load_file(folder / name) for name in ("round_0.safetensors", "round_2.safetensors", "dit_i2v.safetensors")
    )
    assert any(not torch.equal(first[key], last[key]) for key in first)
    assert all(torch.equal(weight, published[key]) for key, weight in bfloat16(last).items())
    assert check_dit(folder / "dit_i2v.safetensors", TASKS["i2v-14B"]).blocks == 5
