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


@dataclass(frozen=True)
class SheetOptions:
    """the sheet"""

    videos: tuple[Path, ...] = option((), "videos, one a row", required=True)
    labels: tuple[str, ...] = option((), "a line of text above each row (default: the file's name)")
    output: Path | None = option(None, "the PNG to write", required=True)
    columns: int = option(8, "frames of each video")
    height: int = option(128, "height of a frame in the sheet, in pixels")


def main() -> None:
    (options,) = parse_options(__doc__, SheetOptions)
    if options.labels and len(options.labels) != len(options.videos):
        raise UserError(f"--labels: {len(options.labels)} for {len(options.videos)} videos", "give one for each")
    labels = options.labels or tuple(path.name for path in options.videos)
    rows = [read_frames(require_file(path, "--videos", "a video")) for path in options.videos]
    with atomic_path(options.output) as temporary:
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
    gap, text = 4, 18
    tiles = [
        [_scaled(row[i], height) for i in np.linspace(0, len(row) - 1, columns).round().astype(int)] for row in rows
    ]
    width = max(sum(tile.width + gap for tile in row) for row in tiles) + gap
    canvas = Image.new("RGB", (width, len(rows) * (height + text + gap) + gap), (30, 30, 34))
    pen = ImageDraw.Draw(canvas)
    for r, (row, label) in enumerate(zip(tiles, labels, strict=True)):
        top = gap + r * (height + text + gap)
        pen.text((gap + 2, top + 2), label, fill=(235, 235, 235), font=ImageFont.load_default(12))
        left = gap
        for tile in row:
            canvas.paste(tile, (left, top + text))
            left += tile.width + gap
    return canvas


def _scaled(frame: Image.Image, height: int) -> Image.Image:
    width = round(frame.width * height / frame.height)
    return frame.resize(
        (width, height), Image.Resampling.NEAREST if height % frame.height == 0 else Image.Resampling.LANCZOS
    )


if __name__ == "__main__":
    run_script(main)
