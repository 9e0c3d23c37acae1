"""Measure the tiny models: how well the VAE keeps a clip, and how often a video shows what its prompt asks for.

    python -m examples.tiny_world.score --weights examples/tiny_world/weights --prompts 50

Videos are made by wan_generate_video.py from prompts that no DiT was trained on, and read back from the mp4 files by
the detector.
"""

import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

from examples.tiny_world.detector import Sight, look
from examples.tiny_world.vae_training import psnr
from examples.tiny_world.world import COLORS, Scene, draw, is_held_out, random_scene
from utils.errors import UserError, run_script
from utils.files import require_file
from utils.options import option, parse_options
from wan.vae import load_vae

ATTRIBUTES = ("color", "shape", "motion", "background")


@dataclass(frozen=True)
class ScoreOptions:
    """what to measure"""

    weights: Path | None = option(None, "folder with vae, t5, dit_t2v (.safetensors) and spiece.model", required=True)
    vae_clips: int = option(100, "clips for the VAE; 0: leave it out")
    prompts: int = option(50, "prompts for the DiT; 0: leave it out")
    lora: Path | None = option(None, "the LoRA that taught a striped, spinning star called zorb")
    concept: int = option(10, "videos of a zorb, made without and with --lora")
    steps: int = option(20, "denoising steps")
    guidance_scale: float = option(4.0, "weight of the prompt")
    flow_shift: float = option(3.0, "shift of the noise schedule")
    seed: int = option(0, "which clips and prompts")
    keep: Path | None = option(None, "folder for the videos; left out: they are not kept")


def random_scenes(seed: str, count: int) -> list[Scene]:
    """Return scenes whose captions were held out of training."""
    rng, scenes = random.Random(seed), []
    while len(scenes) < count:
        scene = random_scene(rng)
        if is_held_out(scene):
            scenes.append(scene)
    return scenes


def score_vae(options: ScoreOptions) -> None:
    """Print the quality of encoded and decoded clips, and how often the detector still reads them."""
    vae = load_vae(options.weights / "vae.safetensors", torch.float32)
    squared, sights = [], []
    scenes = [replace(scene, striped=i % 5 == 0) for i, scene in enumerate(random_scenes("vae", options.vae_clips))]
    for scene in tqdm(scenes, desc="VAE", unit="clip"):
        clip = draw(scene)
        pixels = rearrange(torch.from_numpy(clip), "f h w c -> 1 c f h w").float() / 127.5 - 1
        decoded = vae.decode(vae.encode(pixels))
        squared.append((decoded - pixels).square().mean().item())
        frames = rearrange((decoded[0] + 1) * 127.5, "c f h w -> f h w c")
        sights.append(look(frames.round().clamp(0, 255).to(torch.uint8).numpy()))
    print(f"VAE: PSNR {psnr(float(np.mean(squared))):.1f} dB over {len(scenes)} clips")
    print_agreement("VAE, read in reconstructions", scenes, sights, (*ATTRIBUTES, "striped"))


def score_prompts(options: ScoreOptions) -> None:
    """Print how often videos show what their prompt asks for."""
    scenes = random_scenes(f"prompts/{options.seed}", options.prompts)
    clips = generate([scene.caption for scene in scenes], options)
    print_agreement("DiT, prompts followed", scenes, [look(clip) for clip in clips], ATTRIBUTES)


def score_concept(options: ScoreOptions) -> None:
    """Print in how many videos of a zorb a striped, spinning star is seen, without the LoRA and with it."""
    rng = random.Random(options.seed)
    prompts = [f"a {rng.choice(list(COLORS))} zorb spins on a black background" for _ in range(options.concept)]
    for name, lora in (("without", None), ("with", options.lora)):
        sights = [look(clip) for clip in generate(prompts, options, lora)]
        seen = sum((sight.shape, sight.motion, sight.striped) == ("star", "spins", True) for sight in sights)
        print(f"{name} the LoRA: the concept is seen in {seen} of {len(sights)} videos")


def print_agreement(name: str, scenes: list[Scene], sights: list[Sight], attributes: tuple[str, ...]) -> None:
    agree = {
        attribute: np.mean(
            [getattr(a, attribute) == getattr(b, attribute) for a, b in zip(scenes, sights, strict=True)]
        )
        for attribute in attributes
    }
    print(f"{name}: {', '.join(f'{attribute} {100 * share:.0f} %' for attribute, share in agree.items())}")


def generate(prompts: list[str], options: ScoreOptions, lora: Path | None = None) -> list[np.ndarray]:
    """Return a clip [F H W 3], uint8, for each prompt, made by the script and read from its mp4 file."""
    weights = options.weights
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)) / ("with_lora" if lora else "without_lora")
        lines = [f"{prompt} --d {1000 * options.seed + i}" for i, prompt in enumerate(prompts)]
        prompt_file = Path(temporary, "prompts.txt")
        prompt_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        script = [sys.executable, "wan_generate_video.py", "--task", "t2v-1.3B", "--from_file", prompt_file]
        command = [*script, "--dit", weights / "dit_t2v.safetensors", "--vae", weights / "vae.safetensors"]
        command += ["--t5", weights / "t5.safetensors", "--t5_tokenizer", weights / "spiece.model"]
        command += ["--video_size", 64, 64, "--video_length", 17, "--infer_steps", options.steps]
        command += ["--guidance_scale", options.guidance_scale, "--flow_shift", options.flow_shift]
        command += [*(["--lora_weight", lora] if lora else []), "--save_path", folder]
        done = subprocess.run([str(word) for word in command], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(done.stderr.strip().splitlines()[-1])
        return [read_clip(next(folder.glob(f"*_{1000 * options.seed + i}.mp4"))) for i in range(len(prompts))]


def read_clip(path: Path) -> np.ndarray:
    """Return the frames of a video, uint8 [F H W 3]."""
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


def main() -> None:
    (options,) = parse_options(__doc__, ScoreOptions)
    require_file(options.weights / "vae.safetensors", "--weights", "the folder of the tiny weights")
    if options.vae_clips:
        score_vae(options)
    if options.prompts:
        score_prompts(options)
    if options.lora:
        score_concept(options)


if __name__ == "__main__":
    run_script(main)
