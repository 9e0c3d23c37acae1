"""Put frames of several videos side by side into one PNG, a row a video.

python -m examples.tiny_world.contact_sheet --videos a.mp4 b.mp4 --labels before after --output sheet.png
"""

from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.errors import UserError, run_script
from utils.files import atomic_path, require_file
from utils.options import option, parse_options

FPS = 16
GAP, TEXT = 4, 18  # pixels between tiles, and of the line above them
DARK = (30, 30, 34)


@dataclass(frozen=True)
class SheetOptions:
    """the sheet"""

    videos: tuple[Path, ...] = option((), "videos, one a row", required=True)
    labels: tuple[str, ...] = option((), "a line of text above each row (default: the file's name)")
    output: Path | None = option(None, "the .png, .gif or .webp to write", required=True)
    columns: int = option(8, "frames of each video in a PNG")
    height: int = option(128, "height of a frame in the sheet, in pixels")


def main() -> None:
    (options,) = parse_options(__doc__, SheetOptions)
    if options.labels and len(options.labels) != len(options.videos):
        raise UserError(f"--labels: {len(options.labels)} for {len(options.videos)} videos", "give one for each")
    labels = options.labels or tuple(path.name for path in options.videos)
    rows = [read_frames(require_file(path, "--videos", "a video")) for path in options.videos]
    with atomic_path(options.output) as temporary:
        if options.output.suffix.lower() in (".gif", ".webp"):
            first, *rest = moving(rows, labels, options.height)
            first.save(temporary, save_all=True, append_images=rest, duration=1000 // FPS, loop=0)
        else:
            sheet(rows, labels, options.columns, options.height).save(temporary)
    print(options.output)


def read_frames(path: Path) -> list[Image.Image]:
    """Return all frames of a video as RGB pictures."""
    try:
        with av.open(str(path)) as video:
            frames = [frame.to_image() for frame in video.decode(video=0)]
    except (av.error.FFmpegError, IndexError) as error:
        raise UserError(f"--videos {path}: cannot be read ({error})") from None
    if not frames:
        raise UserError(f"--videos {path}: has no frames")
    return frames


def sheet(rows: list[list[Image.Image]], labels: tuple[str, ...], columns: int, height: int) -> Image.Image:
    """Return one picture: for each row its label and `columns` frames spread evenly over the video."""
    strips = []
    for row, label in zip(rows, labels, strict=True):
        chosen = np.linspace(0, len(row) - 1, columns).round().astype(int)
        strips.append(_labelled([_scaled(row[i], height) for i in chosen], label))
    canvas = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), DARK)
    top = 0
    for strip in strips:
        canvas.paste(strip, (0, top))
        top += strip.height
    return canvas


def moving(rows: list[list[Image.Image]], labels: tuple[str, ...], height: int) -> list[Image.Image]:
    """Return the frames of a moving picture in which the videos run side by side; shorter ones begin again."""
    pictures = []
    for i in range(max(len(row) for row in rows)):
        tiles = [
            _labelled([_scaled(row[i % len(row)], height)], label) for row, label in zip(rows, labels, strict=True)
        ]
        canvas = Image.new("RGB", (sum(tile.width for tile in tiles), tiles[0].height), DARK)
        left = 0
        for tile in tiles:
            canvas.paste(tile, (left, 0))
            left += tile.width
        pictures.append(canvas)
    return pictures


def _labelled(tiles: list[Image.Image], label: str) -> Image.Image:
    """Return the tiles in a row with a line of text above."""
    font = ImageFont.load_default(12)
    width = sum(tile.width + GAP for tile in tiles) + GAP
    strip = Image.new("RGB", (max(width, round(font.getlength(label)) + 3 * GAP), tiles[0].height + TEXT + GAP), DARK)
    ImageDraw.Draw(strip).text((GAP + 2, 2), label, fill=(235, 235, 235), font=font)
    left = GAP
    for tile in tiles:
        strip.paste(tile, (left, TEXT))
        left += tile.width + GAP
    return strip


def _scaled(frame: Image.Image, height: int) -> Image.Image:
    width = round(frame.width * height / frame.height)
    return frame.resize(
        (width, height), Image.Resampling.NEAREST if height % frame.height == 0 else Image.Resampling.LANCZOS
    )


if __name__ == "__main__":
    run_script(main)
