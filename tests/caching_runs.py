"""Runs of both caching scripts' work on a small dataset, in processes that may be killed at any moment."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

import torch

from dataset.config import DatasetConfig, load_config
from modules.caching import CachingOptions
from modules.latent_caching import cache_latents
from modules.latent_encoding import LatentEncoders
from modules.text_caching import cache_texts
from tests.media import write_pictures, write_toml, write_video
from wan.t5 import TextEncoder, build_t5
from wan.tokenizer import load_tokenizer
from wan.vae import build_vae

GENERAL = {"resolution": [48, 48], "caption_extension": ".txt", "enable_bucket": True}
OPTIONS = CachingOptions(device="cpu", num_workers=2)
MODELS = {"vae": "a VAE", "t5": "a T5"}


@dataclass(frozen=True)
class Runs:
    """A dataset of pictures and clips, and the encoders for it."""

    folder: Path
    configs: list[DatasetConfig]
    encoders: LatentEncoders
    text_encoder: TextEncoder

    def run(self, options: CachingOptions = OPTIONS) -> None:
        """Cache latents and texts in this process."""
        cache_latents(self.configs, lambda: self.encoders, torch.bfloat16, options, models={"vae": MODELS["vae"]})
        cache_texts(self.configs, lambda: self.text_encoder, options, models={"t5": MODELS["t5"]})

    def start(self, options: CachingOptions = OPTIONS) -> BaseProcess:
        """Start a process that caches, and that has its imports and encoders already."""
        process = multiprocessing.get_context("fork").Process(target=_quietly, args=(self.run, options))
        process.start()
        return process

    def files(self) -> dict[str, bytes]:
        """Return the content of everything in the cache folders, hidden files too."""
        found = (path for config in self.configs for path in config.cache_directory.iterdir())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in found}


def make_runs(folder: Path, recipe: ModuleType, golden: Path) -> Runs:
    """Draw four pictures and three videos, and return the runs over them with the recorded tiny encoders."""
    encoders = LatentEncoders(build_vae(recipe.state_dict("vae", str(golden))), None)
    t5 = build_t5(recipe.state_dict("t5", str(golden)), torch.float32)
    text_encoder = TextEncoder(t5, load_tokenizer(golden / "tokenizer"))
    images = write_pictures(folder / "images", {name: (48, 48) for name in "abcd"})
    videos = folder / "videos"
    for name in "xyz":
        write_video(videos / f"{name}.mp4", frames=9, width=48, height=48)
        (videos / f"{name}.txt").write_text(f"the square of {name}")
    clips = {"video_directory": videos, "target_frames": [1, 5], "frame_extraction": "chunk"}
    tables = ({"image_directory": images, "cache_directory": folder / "i"}, clips | {"cache_directory": folder / "v"})
    configs = load_config(write_toml(folder / "data.toml", GENERAL, *tables))
    return Runs(folder, configs, encoders, text_encoder)


def kill_at_random(runs: Runs, kills: int, seed: int = 0) -> tuple[int, int]:
    """Start runs and kill each; return how many were killed, and how many of them while they wrote a file.

    Every second one goes on with --skip_existing where half of the files are there. Runs that ended before they were
    killed do not count.
    """
    chance = random.Random(seed)
    started = time.monotonic()
    process = runs.start()
    process.join()
    duration = time.monotonic() - started
    killed = writing = 0
    while killed < kills:
        skipping = killed % 2 == 1
        if skipping:
            for name in chance.sample(names := sorted(runs.files()), len(names) // 2):
                (runs.folder / name).unlink()
        before = runs.files().keys()
        process = runs.start(replace(OPTIONS, skip_existing=skipping))
        process.join(chance.uniform(0, duration / (2 if skipping else 1)))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        writing += any(name.endswith(".unfinished") for name in runs.files().keys() - before)
    return killed, writing


def _quietly(work: Callable[[CachingOptions], None], options: CachingOptions) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    code = 1
    try:
        work(options)
        code = 0
    finally:
        os._exit(code)  # not on into what belongs to the process that was forked
