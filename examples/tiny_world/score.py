"""Measure the tiny models: how well the VAE keeps a clip, and how often a video shows what its prompt asks for.

    python -m examples.tiny_world.score --weights examples/tiny_world/weights --prompts 50

Videos are made by wan_generate_video.py from prompts that no DiT was trained on, and read back from the mp4 files by
the detector.
"""

import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from tqdm import tqdm

from examples.tiny_world.clip_training import ClipTrainingOptions, pictures_of
from examples.tiny_world.detector import Sight, look
from examples.tiny_world.vae_training import psnr
from examples.tiny_world.world import COLORS, Scene, draw, is_held_out, random_scene
from utils.errors import UserError, run_script
from utils.files import require_file
from utils.options import option, parse_options
from wan.clip import load_clip
from wan.vae import load_vae

ATTRIBUTES = ("color", "shape", "motion", "background")
ZORB = {"shape": "star", "motion": "spins", "striped": True, "background": "black"}


@dataclass(frozen=True)
class ScoreOptions:
    """what to measure"""

    weights: Path | None = option(
        None, "folder with vae, t5, clip, dit_t2v, dit_i2v (.safetensors) and spiece.model", required=True
    )
    vae_clips: int = option(100, "clips for the VAE; 0: leave it out")
    clip_pictures: int = option(500, "pictures for CLIP, and as many to learn to read its features; 0: leave it out")
    prompts: int = option(50, "prompts for the text-to-video DiT; 0: leave it out")
    image_prompts: int = option(50, "prompts with a start image for the image-to-video DiT; 0: leave it out")
    lora: Path | None = option(None, "the LoRA that taught a striped, spinning star called zorb")
    image_lora: Path | None = option(None, "the LoRA of the image-to-video DiT that taught it")
    concept: int = option(10, "videos of a zorb, made without and with the LoRA")
    lora_prompts: int = option(20, "prompts without the word, made with --lora; 0: leave it out")
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


@torch.no_grad()
def score_clip(options: ScoreOptions) -> None:
    """Print how well one linear layer reads colour, shape, background and place from the mean of CLIP's features."""
    clip = load_clip(options.weights / "clip.safetensors", torch.float32)
    pictures, words = pictures_of(ClipTrainingOptions(clips=2 * options.clip_pictures, seed=f"score/{options.seed}"))
    chosen = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(options.seed))
    pictures, words = pictures[chosen[: 2 * options.clip_pictures]], words[chosen[: 2 * options.clip_pictures]]
    pixels = rearrange(torch.from_numpy(pictures), "n h w c -> n c h w").float() / 127.5 - 1
    parts = tqdm(pixels.split(20), desc="CLIP", unit="x20")
    # The first token, which looked at the whole picture, and the mean of those that stand for its parts.
    features = torch.cat([torch.cat([part[:, 0], part[:, 1:].mean(1)], 1) for part in map(clip.encode, parts)])
    learned, unseen = features.split(options.clip_pictures)
    read = []
    for name, answer in zip(("color", "shape", "background", "column", "row"), words.T, strict=True):
        known, asked = answer.split(options.clip_pictures)
        wanted = F.one_hot(known - answer.min(), int(answer.max() - answer.min()) + 1).double()
        solution = torch.linalg.lstsq(F.pad(learned, (0, 1), value=1.0).double(), wanted).solution
        guess = (F.pad(unseen, (0, 1), value=1.0).double() @ solution).argmax(1) + answer.min()
        read.append(f"{name} {100 * (guess == asked).double().mean():.0f} %")
    print(f"CLIP, read from its features: {', '.join(read)}")


def score_prompts(options: ScoreOptions, count: int, lora: Path | None = None) -> None:
    """Print how often videos show what their prompt asks for."""
    scenes = random_scenes(f"prompts/{options.seed}", count)
    clips = generate([scene.caption for scene in scenes], options, "prompts_with_lora" if lora else "prompts", lora)
    name = "DiT with the LoRA, prompts without its word followed" if lora else "DiT, prompts followed"
    print_agreement(name, scenes, [look(clip) for clip in clips], ATTRIBUTES)


def score_image_prompts(options: ScoreOptions) -> None:
    """Print how often videos go on from their start image as their prompt asks for."""
    scenes = random_scenes(f"images/{options.seed}", options.image_prompts)
    drawn = [draw(scene) for scene in scenes]
    clips = generate([scene.caption for scene in scenes], options, "images", images=[clip[0] for clip in drawn])
    print_agreement("DiT, start images and prompts followed", scenes, [look(clip) for clip in clips], ATTRIBUTES)
    errors = [np.square((a.astype(float) - b) / 127.5).mean((1, 2, 3)) for a, b in zip(drawn, clips, strict=True)]
    first, whole = psnr(np.mean([error[0] for error in errors])), psnr(np.mean(errors))
    print(f"PSNR of the first frame to the image {first:.1f} dB, of all frames to the drawn clip {whole:.1f} dB")


def score_concept(options: ScoreOptions, lora: Path, from_images: bool = False) -> None:
    """Print in how many videos of a zorb a striped, spinning star is seen, without the LoRA and with it.

    from_images: they go on from a picture of one.
    """
    rng = random.Random(options.seed)
    colors = [rng.choice(list(COLORS)) for _ in range(options.concept)]
    prompts = [f"a {color} zorb spins on a black background" for color in colors]
    images = [draw(Scene(color, **ZORB))[0] for color in colors] if from_images else []
    kind = "i2v DiT" if from_images else "t2v DiT"
    for name, used in (("without", None), ("with", lora)):
        folder = f"zorb_{'from_images_' * from_images}{name}_lora"
        sights = [look(clip) for clip in generate(prompts, options, folder, used, images)]
        seen = sum((sight.shape, sight.motion, sight.striped) == ("star", "spins", True) for sight in sights)
        parts = ", ".join(f"{part} {sum(getattr(sight, part) == ZORB[part] for sight in sights)}" for part in ZORB)
        print(f"{kind} {name} the LoRA: the concept is seen in {seen} of {len(sights)} videos ({parts})")


def print_agreement(name: str, scenes: list[Scene], sights: list[Sight], attributes: tuple[str, ...]) -> None:
    agree = {
        attribute: np.mean(
            [getattr(a, attribute) == getattr(b, attribute) for a, b in zip(scenes, sights, strict=True)]
        )
        for attribute in attributes
    }
    print(f"{name}: {', '.join(f'{attribute} {100 * share:.0f} %' for attribute, share in agree.items())}")


def generate(
    prompts: list[str],
    options: ScoreOptions,
    name: str = "videos",
    lora: Path | None = None,
    images: Sequence[np.ndarray] = (),
) -> list[np.ndarray]:
    """Return a clip [F H W 3], uint8, for each prompt, made by the script and read from its mp4 file.

    name: of the folder in which --keep keeps them. images [H W 3], uint8: one for each prompt, which is then for the
    image-to-video DiT.
    """
    weights = options.weights
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)) / name
        lines = [f"{prompt} --d {1000 * options.seed + i}" for i, prompt in enumerate(prompts)]
        for i, image in enumerate(images):
            path = Path(temporary, f"{i}.png")
            Image.fromarray(image).save(path)
            lines[i] += f" --i {path}"
        prompt_file = Path(temporary, "prompts.txt")
        prompt_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        task, dit = ("i2v-14B", "dit_i2v") if images else ("t2v-1.3B", "dit_t2v")
        command = [sys.executable, "wan_generate_video.py", "--task", task, "--from_file", prompt_file]
        command += ["--dit", weights / f"{dit}.safetensors", "--vae", weights / "vae.safetensors"]
        command += ["--t5", weights / "t5.safetensors", "--t5_tokenizer", weights / "spiece.model"]
        command += ["--clip", weights / "clip.safetensors"] if images else []
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
    if options.clip_pictures:
        score_clip(options)
    if options.prompts:
        score_prompts(options, options.prompts)
    if options.image_prompts:
        score_image_prompts(options)
    if options.lora:
        score_concept(options, options.lora)
    if options.image_lora:
        score_concept(options, options.image_lora, from_images=True)
    if options.lora and options.lora_prompts:
        score_prompts(options, options.lora_prompts, options.lora)


if __name__ == "__main__":
    run_script(main)
