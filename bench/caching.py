"""Compare the caching of latents with the plain loop: decode one, encode one, write one, nothing at the same time.

python -m bench.caching
python -m bench.caching --quick

64 clips of H.264 in 1080p at 30 frames per second; and windows of long videos, of which the plain loop decodes all for
each window. The VAE is examples/tiny_world's; it has one thread, as a GPU would leave the CPU's cores to the rest. Each
run has a process of its own.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from statistics import median

import av
import cv2
import numpy as np
import torch
from safetensors.torch import load_file

from bench.loading import memory
from bench.measure import Row, Setting, distance, main
from dataset.cache import write_latents
from dataset.config import DatasetConfig, load_config
from dataset.items import DatasetItem, find_sources
from dataset.media import plan_items, resample, resize_to_bucket
from modules.caching import CachingOptions
from modules.latent_caching import cache_latents
from modules.latent_encoding import LatentEncoders, as_pixels
from wan.vae import WanVAE, load_vae

VAE = Path(__file__).resolve().parent.parent / "examples" / "tiny_world" / "weights" / "vae.safetensors"
CHILD = "import sys; from bench.caching import report; report(*sys.argv[1:])"
PAIRS = 3  # of runs of many clips each


def rows(setting: Setting) -> Iterator[Row]:
    clips, windows = (12, 8) if setting.quick else (64, 16)
    with tempfile.TemporaryDirectory() as folder:
        write_videos(Path(folder, "clips"), clips, 33, 1920, 1080)
        keys = 'resolution = [128, 72]\nframe_extraction = "full"\nmax_frames = 17\nsource_fps = 30'
        yield from compared(f"{clips} clips of 1080p", Path(folder, "clips"), keys)
        write_videos(Path(folder, "long"), 2, 600, 640, 360)
        keys = f'resolution = [64, 64]\nframe_extraction = "uniform"\ntarget_frames = [17]\nframe_sample = {windows}'
        yield from compared(f"{2 * windows} windows of 2 videos of 600 frames", Path(folder, "long"), keys)


def write_videos(folder: Path, count: int, frames: int, width: int, height: int) -> None:
    """Write videos of cloudy colours that drift, with captions; every eighth is like the first."""
    folder.mkdir()
    for number in range(count):
        path, like = folder / f"{number:03d}.mp4", folder / f"{number % 8:03d}.mp4"
        path.with_suffix(".txt").write_text("clouds")
        if like != path:
            path.hardlink_to(like)
            continue
        random = np.random.default_rng(number)
        scene = cv2.resize(random.integers(0, 255, (45, 80, 3), np.uint8), (2 * width, 2 * height))
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(30), options={"crf": "20", "preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for i in range(frames):
                top, left = i % height, 2 * i % width
                picture = np.ascontiguousarray(scene[top : top + height, left : left + width])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())


def compared(name: str, folder: Path, keys: str) -> Iterator[Row]:
    """Yield rows of time, peak memory and the share of time in which the encoder has nothing to do."""
    runs = []
    for _ in range(PAIRS):
        for side in ("ours", "theirs"):
            cache = folder / side
            dataset = f'video_directory = "{folder.as_posix()}"\ncaption_extension = ".txt"\n{keys}\n'
            config = folder / f"{side}.toml"
            config.write_text(f'[[datasets]]\ncache_directory = "{cache.as_posix()}"\n{dataset}')
            done = subprocess.run([sys.executable, "-c", CHILD, side, config], check=True, stdout=subprocess.PIPE)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    ours, theirs = runs[::2], runs[1::2]
    ratio = median(a["seconds"] / b["seconds"] for a, b in zip(ours, theirs, strict=True))
    sides = [median(run["seconds"] for run in side) for side in (ours, theirs)]
    yield Row(f"{name}: time", *sides, ratio, 1 / 1.6, "s", apart(folder / "ours", folder / "theirs"))
    peaks = [max(run["peak"] for run in side) / 1e6 for side in (ours, theirs)]
    yield Row(f"{name}: peak main memory", *peaks, peaks[0] / peaks[1], None, "MB")
    idle = [median(100 * run["idle"] for run in side) for side in (ours, theirs)]
    yield Row(f"{name}: encoder idle; ratio: ours to all time", *idle, idle[0] / 100, 0.1, "%")


def apart(ours: Path, theirs: Path) -> float:
    """Return the largest distance of a cached tensor; both folders must hold the same caches."""
    names = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in (ours, theirs)]
    assert names[0] == names[1] and names[0]
    pairs = ((load_file(ours / name), load_file(theirs / name)) for name in names[0])
    return max(distance(a[key], b[key]) for a, b in pairs for key in b)


def report(side: str, config: str) -> None:
    """Cache one side's latents and print {"seconds", "peak", "idle"}; bytes, and the encoder's share of the time."""
    torch.set_num_threads(1)
    vae = load_vae(VAE, torch.float32, "cpu")
    vae.encode(torch.zeros(1, 3, 5, 64, 64))
    # What a plain loop learns when it has decoded a video is told to it beforehand.
    configs = load_config(config)
    items = [item for config in configs for source in find_sources(config) for item in plan_items(source, config)]
    before, start = memory("VmRSS"), time.perf_counter()
    idle = cache_ours(configs, vae) if side == "ours" else cache_plainly(configs[0], items, vae)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak": memory("VmHWM") - before, "idle": idle / seconds}))


def cache_ours(configs: list[DatasetConfig], vae: WanVAE) -> float:
    """Return the seconds that the encoder has waited."""
    options = CachingOptions(device="cpu")
    return cache_latents(configs, lambda: LatentEncoders(vae, None), torch.float32, options).waited


def cache_plainly(config: DatasetConfig, items: list[DatasetItem], vae: WanVAE) -> float:
    """Return the seconds in which nothing was encoded."""
    start, encoding = time.perf_counter(), 0.0
    for item in items:
        with av.open(str(item.source.path)) as container:
            every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        frames = list(resample(every, config.source_fps))[item.first_frame : item.first_frame + item.frames]
        frames = np.stack([resize_to_bucket(frame, (item.width, item.height)) for frame in frames])
        begin = time.perf_counter()
        (latents,) = vae.encode(as_pixels(frames)[None])
        encoding += time.perf_counter() - begin
        write_latents(config, item, {"latents": latents}, torch.float32)
    return time.perf_counter() - start - encoding


if __name__ == "__main__":
    main(__doc__, {"caching": rows})
