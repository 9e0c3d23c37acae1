"""Draw clips of the tiny world as H.264 mp4 files with captions, and a dataset config for them.

python -m examples.tiny_world.draw --folder output/tiny_world --clips 12
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from examples.tiny_world.world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, is_held_out, random_scene, training_caption
from examples.tiny_world.world import draw as draw_scene
from modules.outputs import Files, frame_writer
from utils.errors import UserError, run_script
from utils.options import option, parse_options

CONFIG = """\
[general]
resolution = [{size}, {size}]
caption_extension = ".txt"
batch_size = {batch_size}
"""
DATASET = """
[[datasets]]
video_directory = "{folder}/{clips}"
cache_directory = "{folder}/{clips}_cache"
target_frames = [{frames}]
num_repeats = {repeats}
"""


@dataclass(frozen=True)
class DrawOptions:
    """what to draw"""

    folder: Path | None = option(None, "where clips/ and dataset.toml go", required=True)
    clips: int = option(12, "number of clips")
    frames: int = option(17, "frames of a clip at 16 per second; 4 n + 1")
    size: int = option(64, "side of the picture in pixels; a multiple of 16")
    seed: int = option(0, "which clips")
    color: str | None = option(None, "draw this colour only", choices=COLORS)
    shape: str | None = option(None, "draw this shape only", choices=SHAPES)
    motion: str | None = option(None, "draw this motion only", choices=MOTIONS)
    background: str | None = option(None, "draw on this background only", choices=BACKGROUNDS)
    striped: bool = option(False, "with white stripes")
    name: str | None = option(None, "call the shape this word in the captions")
    for_training: bool = option(
        False, "as for training a model: captions with words left out, made up or missing, and none that are held out"
    )
    others: int = option(
        0, "so many clips of anything beside them, as for training: a LoRA that sees them too leaves them as they are"
    )
    batch_size: int = option(4, "clips of a training batch, in dataset.toml")


def main() -> None:
    (options,) = parse_options(__doc__, DrawOptions)
    check_size(options.frames, options.size)
    fixed = {
        name: getattr(options, name) for name in ("color", "shape", "motion", "background") if getattr(options, name)
    }
    if options.for_training and len(fixed) == 4:
        raise UserError("--for_training: draws what is not held out, but all of it is fixed", "leave one choice open")
    draw_clips(options.folder / "clips", options, fixed)
    numbers = {"folder": options.folder.as_posix(), "size": options.size, "frames": options.frames}
    text = CONFIG.format(batch_size=options.batch_size, **numbers)
    # Both are seen equally often.
    text += DATASET.format(clips="clips", repeats=max(1, options.others // options.clips), **numbers)
    if options.others:
        others = {"clips": options.others, "seed": options.seed + 1, "for_training": True}
        anything = replace(options, striped=False, name=None, **others)
        draw_clips(options.folder / "others", anything, {})
        text += DATASET.format(clips="others", repeats=1, **numbers)
    config = options.folder / "dataset.toml"
    config.write_text(text, encoding="utf-8")
    print(f"{options.clips + options.others} clips in {options.folder}, config in {config}")


def check_size(frames: int, size: int) -> None:
    """Raise UserError for what the VAE takes no clips of."""
    if frames % 4 != 1 or size % 16:
        raise UserError(f"--frames {frames} --size {size}: need 4 n + 1 frames, a size divisible by 16")


def write_clip(path: Path, frames: Sequence[np.ndarray]) -> None:
    with frame_writer(Files(video=path), len(frames), fps=16, metadata=None) as write:
        for frame in frames:
            write(frame)


def draw_clips(folder: Path, options: DrawOptions, fixed: dict[str, str]) -> None:
    """Write the clips with their captions; fixed: attributes of a scene that all of them share."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(options.seed)
    for i in tqdm(range(options.clips), desc=f"draw {folder.name}", unit="clip"):
        scene = replace(random_scene(rng), striped=options.striped, **fixed)
        while options.for_training and is_held_out(scene):
            scene = replace(random_scene(rng), striped=options.striped, **fixed)
        caption = training_caption(scene, rng) if options.for_training else scene.caption
        if options.name:
            caption = caption.replace(scene.shape, options.name)
        write_clip(folder / f"{i:03d}.mp4", draw_scene(scene, options.frames, options.size))
        (folder / f"{i:03d}.txt").write_text(caption + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
