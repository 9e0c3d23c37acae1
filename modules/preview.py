"""Shows what the model will see of a dataset: every example as it is cut, resized and cropped, encoded by nothing."""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from dataset.cache import latent_path
from dataset.config import DatasetConfig
from dataset.decoding import MediaError
from dataset.items import Source, find_sources
from dataset.media import FPS, Clip, read_clips, require_fitting_controls, resize_to_bucket
from modules.outputs import Files, frame_writer, tell_written
from utils.errors import UserError
from utils.options import option

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreviewOptions:
    """looking at the data instead of caching"""

    debug_mode: str | None = option(
        None,
        "show every example as the model will see it, and stop: image in a window, console in the terminal, "
        "video as files in the folder `preview` of the cache folder",
        choices=("image", "console", "video"),
    )
    console_width: int = option(80, "with --debug_mode console: columns of a picture")
    console_num_images: int | None = option(None, "with --debug_mode console: do not ask; examples of each dataset")
    console_back: str | None = option(None, "taken for old command lines; pictures here fill their background")


_BLOCK = "▀"
# Shows one example and returns what to do next: "" for the next example, "d" for the next dataset, "q" to stop.
Show = Callable[[Clip], str]


def preview(configs: Sequence[DatasetConfig], options: PreviewOptions) -> None:
    """Show the examples of all datasets in one of the ways of PREVIEWS; UserError where that is not possible here."""
    for name, least in (("console_width", 1), ("console_num_images", 0)):
        if (value := getattr(options, name)) is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    for config in configs:
        show = _PREVIEWS[options.debug_mode](config, options)
        sources = find_sources(config)
        require_fitting_controls(config, sources)
        for shown, clip in enumerate(_clips(config, sources)):
            if options.debug_mode == "console" and shown == options.console_num_images:
                break
            logger.info("%s", _description(clip))
            key = show(clip)
            if key == "q":
                return
            if key == "d":
                break


def _clips(config: DatasetConfig, sources: Sequence[Source]) -> Iterator[Clip]:
    for source in sources:
        try:
            yield from read_clips(source, config)
        except MediaError as error:
            logger.warning("left out: %s", error)


def _description(clip: Clip) -> str:
    item, count = clip.item, len(clip.pixels)
    frames = "1 frame" if count == 1 else f"{count} frames"
    controls = f", {len(clip.controls)} control" + "s" * (len(clip.controls) > 1) if clip.controls else ""
    return f"{item.key}: {item.width}x{item.height}, {frames}{controls}, caption: {item.source.caption}"


def _as_files(config: DatasetConfig, options: PreviewOptions) -> Show:
    def show(clip: Clip) -> str:
        path = latent_path(config, clip.item)
        path = path.parent / "preview" / path.with_suffix(".mp4" if clip.item.source.is_video else ".png").name
        path.parent.mkdir(parents=True, exist_ok=True)
        controls = {path.with_stem(f"{path.stem}_control_{i}"): control for i, control in enumerate(clip.controls)}
        if clip.mask is not None:
            controls[path.with_stem(f"{path.stem}_mask")] = _shown(clip.mask)
        for place, pixels in {path: clip.pixels, **controls}.items():
            files = Files(video=place) if clip.item.source.is_video else Files(images=place)
            with frame_writer(files, len(pixels), FPS, None) as write:
                for frame in pixels:
                    write(frame)
            tell_written(files, len(pixels))
        return ""

    return show


def _in_console(config: DatasetConfig, options: PreviewOptions) -> Show:
    asks = options.console_num_images is None
    if asks and not sys.stdin.isatty():
        raise UserError(
            "--debug_mode console: there is no terminal to ask",
            "give --console_num_images N, or use --debug_mode video",
        )
    try:
        _BLOCK.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"--debug_mode console: the terminal's encoding {sys.stdout.encoding} has no half blocks",
            "set PYTHONIOENCODING=utf-8, or use --debug_mode video",
        ) from None

    def show(clip: Clip) -> str:
        for picture in _pictures(clip):
            print(as_blocks(picture, options.console_width))
        if not asks:
            return ""
        try:
            return input("Enter: next, d: next dataset, q: quit > ").strip().lower()[:1]
        except EOFError:
            return "q"

    return show


def _pictures(clip: Clip) -> list[np.ndarray]:
    """Return what is shown of a clip: its first frame, its last one, the first of each control, and of its mask."""
    last = [clip.pixels[-1]] if len(clip.pixels) > 1 else []
    mask = [] if clip.mask is None else [_shown(clip.mask)[0]]
    return [clip.pixels[0], *last, *(control[0] for control in clip.controls), *mask]


def _shown(mask: np.ndarray) -> np.ndarray:
    """Return a mask uint8 [F H W] as pixels [F H W 3]."""
    return np.repeat(mask[..., None], 3, axis=-1)


def as_blocks(frame: np.ndarray, columns: int) -> str:
    """Return a frame uint8 [H W 3] as lines of coloured half blocks for a terminal with 24-bit colour."""
    columns = max(1, columns)
    rows = max(1, round(frame.shape[0] / frame.shape[1] * columns / 2))
    small = resize_to_bucket(frame, (columns, 2 * rows))
    lines = []
    for upper, lower in zip(small[::2], small[1::2], strict=True):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m{_BLOCK}"
            for a, b in zip(upper, lower, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


def _in_window(config: DatasetConfig, options: PreviewOptions) -> Show:
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise UserError("--debug_mode image: there is no display", "use --debug_mode video or console")

    def show(clip: Clip) -> str:
        for picture in _pictures(clip):
            try:
                cv2.imshow("any key: next, d: next dataset, q: quit", picture[..., ::-1])
                key = chr(cv2.waitKey(0) & 0xFF).lower()
            except cv2.error:
                raise UserError(
                    "--debug_mode image: the installed OpenCV opens no windows (opencv-python-headless does not)",
                    "use --debug_mode video or console",
                ) from None
            if key in "dq":
                cv2.destroyAllWindows()
                return key
        return ""

    return show


_PREVIEWS = {"image": _in_window, "console": _in_console, "video": _as_files}
