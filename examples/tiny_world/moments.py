"""Draw pictures for one-frame training: how something begins, how it ends, and a caption that says what it does.

python -m examples.tiny_world.moments --folder output/moments
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from examples.tiny_world.recipe import WEIGHTS
from examples.tiny_world.world import draw, is_held_out, random_scene
from utils.errors import run_script
from utils.options import option, parse_options
from utils.safetensors_io import open_tensors, save_file_atomically

CONFIG = """\
[general]
resolution = [{size}, {size}]
caption_extension = ".txt"
batch_size = 8

[[datasets]]
image_directory = "{folder}/pictures"
control_directory = "{folder}/controls"
cache_directory = "{folder}/cache"
fp_1f_clean_indices = {controls}
fp_1f_target_index = 1
"""


@dataclass(frozen=True)
class MomentOptions:
    """what to draw"""

    folder: Path | None = option(None, "where pictures/, controls/ and dataset.toml go", required=True)
    count: int = option(320, "number of pictures to train on")
    test: int = option(6, "number of pictures in test/, of captions that are in no training set")
    between: bool = option(
        False, "draw the moment between a first and a last picture, and write a DiT that looks at both"
    )
    size: int = option(64, "side of the picture in pixels; a multiple of 16")
    seed: int = option(0, "which pictures")


def main() -> None:
    (options,) = parse_options(__doc__, MomentOptions)
    folder, rng = options.folder, random.Random(options.seed)
    for name in ("pictures", "controls", "test"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for held_out, count in ((False, options.count), (True, options.test)):
        for number in range(count):
            scene = random_scene(rng)
            while is_held_out(scene) != held_out or scene.motion == "stays still":
                scene = random_scene(rng)
            first, middle, last = (Image.fromarray(frame) for frame in draw(scene, 3, options.size))
            picture, controls = (middle, [first, last]) if options.between else (last, [first])
            pictures, shown = (folder / "test",) * 2 if held_out else (folder / "pictures", folder / "controls")
            picture.save(pictures / f"{number:03d}.png")
            (pictures / f"{number:03d}.txt").write_text(scene.caption + "\n", encoding="utf-8")
            for i, control in enumerate(controls):
                control.save(shown / f"{number:03d}_{i}.png")
    numbers = {"folder": folder.as_posix(), "size": options.size, "controls": [0, 2] if options.between else [0]}
    (folder / "dataset.toml").write_text(CONFIG.format(**numbers), encoding="utf-8")
    print(f"{options.count} pictures in {folder}, config in {folder / 'dataset.toml'}")
    if options.between:
        write_two_picture_dit(folder / "dit_flf2v.safetensors")


def write_two_picture_dit(path: Path) -> None:
    """Write the tiny image-to-video DiT with learned positions, all 0, for the features of two pictures."""
    with open_tensors(WEIGHTS / "dit_i2v.safetensors", "the weights", "the tiny DiT") as file:
        tensors, metadata = {key: file.get(key) for key in file.keys()}, dict(file.metadata)  # noqa: SIM118
    with open_tensors(WEIGHTS / "clip.safetensors", "the weights", "the tiny CLIP") as file:
        _, tokens, width = file.shape("visual.pos_embedding")
    tensors["img_emb.emb_pos"] = torch.zeros(1, 2 * tokens, width, dtype=torch.bfloat16)
    save_file_atomically(tensors, path, metadata)
    print(path)


if __name__ == "__main__":
    run_script(main)
