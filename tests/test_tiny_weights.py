"""The shipped tiny weights: whole, small, and worth looking at."""

import hashlib
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange

from examples.tiny_world.detector import look
from examples.tiny_world.recipe import FILES, WEIGHTS
from examples.tiny_world.score import ScoreOptions, generate, random_scenes, score_clip
from examples.tiny_world.vae_training import psnr
from examples.tiny_world.world import BACKGROUNDS, MOTIONS, Scene, draw
from wan.vae import load_vae

OPTIONS = ScoreOptions(WEIGHTS)


def test_the_files_are_those_whose_sums_are_listed_and_small():
    listed = dict(reversed(line.split()) for line in (WEIGHTS / "SHA256SUMS").read_text().splitlines())
    assert listed.keys() == set(FILES)
    assert all(hashlib.sha256((WEIGHTS / name).read_bytes()).hexdigest() == digest for name, digest in listed.items())
    assert sum((WEIGHTS / name).stat().st_size for name in FILES) < 12_000_000


def test_the_vae_keeps_clips_so_that_the_detector_still_reads_them():
    vae, errors = load_vae(WEIGHTS / "vae.safetensors", torch.float32), []
    for scene in random_scenes("vae", 6):
        pixels = rearrange(torch.from_numpy(draw(scene)), "f h w c -> 1 c f h w").float() / 127.5 - 1
        decoded = vae.decode(vae.encode(pixels))
        errors.append((decoded - pixels).square().mean().item())
        frames = rearrange((decoded[0] + 1) * 127.5, "c f h w -> f h w c").round().to(torch.uint8).numpy()
        sight = look(frames)
        assert (sight.color, sight.shape, sight.motion) == (scene.color, scene.shape, scene.motion)
    assert psnr(sum(errors) / len(errors)) > 27


def test_videos_have_the_colours_of_their_prompts():
    scenes = random_scenes("prompts/0", 4)
    sights = [look(clip) for clip in generate([scene.caption for scene in scenes], OPTIONS)]
    assert [sight.background for sight in sights] == [scene.background for scene in scenes]
    assert sum(sight.color == scene.color for sight, scene in zip(sights, scenes, strict=True)) >= 3


def test_clip_tells_pictures_apart_by_colour_shape_and_background(capsys):
    score_clip(replace(OPTIONS, clip_pictures=200))
    read = dict(re.findall(r"(\w+) (\d+) %", capsys.readouterr().out))
    assert int(read["color"]) >= 80 and int(read["background"]) >= 90 and int(read["shape"]) >= 40, read


def test_a_video_goes_on_from_its_start_image_as_its_prompt_says():
    scenes = [
        Scene("red", "square", "moves right", "black", place=0.3),
        Scene("blue", "circle", "moves up", "white"),
        Scene("yellow", "ring", "moves down", "gray"),
        Scene("green", "cross", "moves left", "black", place=-0.3),
    ]
    images = [draw(scene)[0] for scene in scenes]
    clips = generate([scene.caption for scene in scenes], OPTIONS, images=images)
    moved = 0
    for image, clip, scene in zip(images, clips, scenes, strict=True):
        assert psnr(np.square((image.astype(float) - clip[0]) / 127.5).mean()) > 20
        sight = look(clip)
        assert (sight.color, sight.background) == (scene.color, scene.background)
        shown = np.abs(clip[[0, -1]].astype(int) - BACKGROUNDS[scene.background]).sum(-1) > 120
        first, last = (np.argwhere(frame).mean(0)[::-1] for frame in shown)
        way = np.array(MOTIONS[scene.motion](1)[:2])  # 1 or -1 along one axis
        moved += (last - first) @ way > 10
    assert moved >= 3


@pytest.fixture(scope="module")
def zorb(tmp_path_factory, run_cli) -> Path:
    """A LoRA that learned from 12 clips, in a fraction of the quickstart's steps, what a zorb is."""
    folder = tmp_path_factory.mktemp("zorb")
    drawn = ["--clips", 12, "--shape", "star", "--motion", "spins", "--striped", "--background", "black"]
    config, text = (
        folder / "dataset.toml",
        ["--t5", WEIGHTS / "t5.safetensors", "--t5_tokenizer", WEIGHTS / "spiece.model"],
    )
    train = ["--task", "t2v-1.3B", "--dit", WEIGHTS / "dit_t2v.safetensors", "--dataset_config", config]
    train += ["--learning_rate", "3e-3", "--network_dim", 16, "--network_alpha", 16, "--max_train_steps", 150]
    train += [
        "--timestep_sampling",
        "shift",
        "--discrete_flow_shift",
        3,
        "--seed",
        42,
        "--max_data_loader_n_workers",
        0,
    ]
    for command in (
        ("-m", "examples.tiny_world.draw", "--folder", folder, *drawn, "--name", "zorb"),
        ("wan_cache_latents.py", "--dataset_config", config, "--vae", WEIGHTS / "vae.safetensors"),
        ("wan_cache_text_encoder_outputs.py", "--dataset_config", config, *text),
        ("wan_train_network.py", *train, "--output_dir", folder, "--output_name", "zorb"),
    ):
        done = run_cli(*command)
        assert done.returncode == 0, done.stderr
    return folder / "zorb.safetensors"


def test_a_lora_teaches_what_the_model_has_never_seen(zorb):
    rng = random.Random(0)
    prompts = [f"a {rng.choice(('red', 'blue', 'yellow'))} zorb spins on a black background" for _ in range(3)]
    taught, untaught = ([look(clip) for clip in generate(prompts, OPTIONS, lora=lora)] for lora in (zorb, None))
    assert sum(sight.striped for sight in taught) >= 2
    assert not any(sight.striped for sight in untaught)
