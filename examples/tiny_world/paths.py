"""Draw clips whose shape goes along a path of its own, and a control video for each that shows the path.

python -m examples.tiny_world.paths --folder output/paths

The captions do not say how the shape moves; the control video, a white disc on black, does. Beside them goes a
Fun-Control DiT made of the text-to-video one, which sees nothing in control videos until it is trained.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from examples.tiny_world.draw import check_size, write_clip
from examples.tiny_world.i2v_training import with_eyes
from examples.tiny_world.recipe import WEIGHTS
from examples.tiny_world.world import Motion, Scene, draw, random_scene
from utils.errors import run_script
from utils.options import option, parse_options
from utils.safetensors_io import open_tensors, save_file_atomically

CONTROL_CHANNELS = 32  # 16 of the control video's latents, 16 of the start image's

CONFIG = """\
[general]
resolution = [{size}, {size}]
caption_extension = ".txt"
batch_size = 16

[[datasets]]
video_directory = "{folder}/clips"
control_directory = "{folder}/controls"
cache_directory = "{folder}/cache"
target_frames = [{frames}]
"""


@dataclass(frozen=True)
class PathOptions:
    """what to draw"""

    folder: Path | None = option(None, "where clips/, controls/ and dataset.toml go", required=True)
    clips: int = option(120, "number of clips to train on")
    test: int = option(4, "number of clips in test/, with the control beside each, on paths that no clip goes")
    frames: int = option(17, "frames of a clip at 16 per second; 4 n + 1")
    size: int = option(64, "side of the picture in pixels; a multiple of 16")
    seed: int = option(0, "which clips")


def main() -> None:
    (options,) = parse_options(__doc__, PathOptions)
    check_size(options.frames, options.size)
    folder, rng = options.folder, random.Random(options.seed)
    for name in ("clips", "controls", "test"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for count, clips, controls in (
        (options.clips, folder / "clips/{:03d}.mp4", folder / "controls/{:03d}.mp4"),
        (options.test, folder / "test/{:03d}.mp4", folder / "test/{:03d}_control.mp4"),
    ):
        for number in range(count):
            scene, motion = replace(random_scene(rng), place=0), random_path(rng)
            clip, control = (Path(str(path).format(number)) for path in (clips, controls))
            write_clip(clip, draw(scene, options.frames, options.size, motion))
            write_clip(control, draw_control(scene, motion, options.frames, options.size))
            clip.with_suffix(".txt").write_text(caption(scene) + "\n", encoding="utf-8")
    numbers = {"folder": folder.as_posix(), "size": options.size, "frames": options.frames}
    (folder / "dataset.toml").write_text(CONFIG.format(**numbers), encoding="utf-8")
    print(f"{options.clips} clips in {folder}, config in {folder / 'dataset.toml'}")
    write_control_dit(folder / "dit_control.safetensors")


def random_path(rng: random.Random) -> Motion:
    """Return a motion along a quadratic Bezier curve through the room around the shape."""
    points = [np.array([rng.uniform(-1, 1), rng.uniform(-1, 1)]) for _ in range(3)]

    def motion(t: float) -> tuple[float, float, float, float]:
        x, y = (1 - t) ** 2 * points[0] + 2 * t * (1 - t) * points[1] + t**2 * points[2]
        return x, y, 0, 1

    return motion


def draw_control(scene: Scene, motion: Motion, frames: int = 17, size: int = 64) -> np.ndarray:
    """Return the control video uint8 [frames size size 3]: a white disc on black in the shape's place and size."""
    disc = draw(replace(scene, color="yellow", shape="circle", background="black"), frames, size, motion)
    return np.repeat(disc[..., :1], 3, axis=-1)  # yellow has all of red


def caption(scene: Scene) -> str:
    """Return the scene's caption without its motion: "a red circle on a black background"."""
    return scene.caption.replace(f" {scene.motion}", "")


def write_control_dit(path: Path) -> None:
    """Write the tiny text-to-video DiT with weights of 0 for control video, start image and CLIP features."""
    t2v = WEIGHTS / "dit_t2v.safetensors"
    with open_tensors(t2v, "the weights") as file, open_tensors(WEIGHTS / "clip.safetensors", "the weights") as tower:
        metadata, clip_dim = {"num_heads": file.metadata["num_heads"]}, tower.shape("visual.pos_embedding")[-1]
    save_file_atomically(with_eyes(load_file(t2v), clip_dim, None, 0, CONTROL_CHANNELS), path, metadata)
    print(path)


if __name__ == "__main__":
    run_script(main)
