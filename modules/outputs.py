"""Results as files: latents, pictures and mp4, each with what is needed to make it again inside."""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from modules.video_files import MP4, VIDEO_FORMATS, FrameWriter, VideoFormat, video_writer
from utils.errors import UserError
from utils.files import atomic_path, require_file, require_writable_folder
from utils.options import given_options, option
from utils.safetensors_io import open_tensors, save_file_atomically

logger = logging.getLogger(__name__)

LATENT_CHANNELS = 16
# What each --output_type makes, and the suffix by which --save_path names its file.
OUTPUT_TYPES = {
    "video": (("video",), ".mp4"),
    "images": (("images",), ".png"),
    "latent": (("latent",), ".safetensors"),
    "both": (("latent", "video"), ".mp4"),
    "latent_images": (("latent", "images"), ".png"),
}
MEDIA_SUFFIXES = (".mp4", ".png", ".safetensors", ".webm", ".mkv", ".mov", ".avi", ".gif", ".webp", ".jpg", ".jpeg")
MAX_FPS = 1000


@dataclass(frozen=True)
class OutputOptions:
    """what to write"""

    save_path: Path | None = option(
        None, "folder for the results; with a suffix (.mp4, .png, .safetensors) the name of the file"
    )
    output_type: str = option(
        "video", "both: video and latent; latent_images: pictures and latent", choices=tuple(OUTPUT_TYPES)
    )
    fps: int = option(16, "frames per second of the video file; Wan's motion is made for 16")
    video_format: str | None = option(
        None,
        "kind of video file; png is an animated PNG, lossless (default: what --save_path ends in, else mp4)",
        choices=tuple(VIDEO_FORMATS),
    )
    crf: int | None = option(None, "quality of mp4 (0 to 51) and webm (0 to 63), 0 the best (default: 16, webm 20)")
    ten_bit: bool = option(False, "10 bits a colour for smooth gradients: HEVC in mp4, AV1 in webm")
    preview: int | None = option(
        None, "write a small moving picture of what becomes of the noise, NAME_preview.gif, after every N steps"
    )
    save_partial: bool = option(
        False, "when a run is stopped, save the latents of the video in work as far as they are: NAME_partial_latent"
    )
    trim_tail_frames: int = option(0, "drop this many frames at the end")
    no_metadata: bool = option(False, "write no prompt, seed or settings into the files")
    latent_path: tuple[Path, ...] = option((), "decode these saved latents instead of making new ones")

    def encoding(self) -> VideoFormat:
        """Return the kind of video file; a name in .png alone may as well mean a picture."""
        ending = self.save_path.suffix.lower()[1:] if self.save_path and names_a_file(self.save_path) else ""
        named = ending if ending in VIDEO_FORMATS and ending != "png" else "mp4"
        return VideoFormat(self.video_format or named, self.crf, self.ten_bit)

    def repeated(self) -> dict[str, Any]:
        """Return the options by which --from_metadata makes a file of the same kind."""
        names = ("output_type", "fps", "crf", "ten_bit", "trim_tail_frames")
        found = {name: value for name, value in given_options(self).items() if name in names}
        other = self.suffix() if "video" in OUTPUT_TYPES[self.output_type][0] else ".mp4"
        return found if other == ".mp4" else found | {"video_format": other[1:]}

    def suffix(self) -> str:
        """Return how the name of the main file ends."""
        parts, suffix = OUTPUT_TYPES[self.output_type]
        return f".{self.encoding().name}" if "video" in parts else suffix


@dataclass(frozen=True)
class Files:
    """Where the parts of one result go; None for a part that is not asked for."""

    video: Path | None = None
    images: Path | None = None  # of a single frame; several are <stem>_000.png, <stem>_001.png, ... beside this name
    latent: Path | None = None  # of a saved one that is decoded: where it is

    def beside(self, ending: str) -> Path:
        """Return the path of something that belongs to this result: its name with another ending."""
        named = self.video or self.images or self.latent
        return named.with_name(f"{named.stem.removesuffix('_latent')}{ending}")


@dataclass(frozen=True)
class Result:
    """What becomes of one latent."""

    files: Files
    frames: int  # to keep of those that are decoded
    metadata: Mapping[str, Any] | None = None
    waiting: Path | None = None  # where its latent is until it has been decoded

    def last_files(self) -> list[Path]:
        """Return the files that are there once all are."""
        images = self.files.images
        if images and self.frames > 1:
            images = images.with_stem(f"{images.stem}_{self.frames - 1:03d}")
        return [path for path in (self.files.latent, images, self.files.video) if path]


def check_outputs(options: OutputOptions, results: int) -> None:
    """Raise UserError unless the results can be written where --save_path says; makes the folder."""
    path = options.save_path
    if path is None:
        raise UserError("--save_path is missing", fix="give a folder, or the name of the file to write")
    if not 1 <= options.fps <= MAX_FPS:
        raise UserError(f"--fps {options.fps}: must be from 1 to {MAX_FPS}", fix="Wan's motion is made for 16")
    if options.trim_tail_frames < 0:
        raise UserError(f"--trim_tail_frames {options.trim_tail_frames}: must be 0 or more", fix="leave it out")
    if options.preview is not None and options.preview < 1:
        raise UserError(f"--preview {options.preview}: must be at least 1", fix="it counts steps")
    options.encoding().check()
    if "video" not in OUTPUT_TYPES[options.output_type][0]:
        for name in ("crf", "ten_bit"):
            if getattr(options, name):
                logger.warning("--%s: ignored by --output_type %s", name, options.output_type)
    if not names_a_file(path):
        require_writable_folder(path, "--save_path")
        return
    expected = options.suffix()
    if path.suffix.lower() != expected:
        raise UserError(
            f"--save_path {path}: --output_type {options.output_type} writes {expected} files",
            fix=f"use {path.with_suffix(expected).name}, a folder, or another --output_type or --video_format",
        )
    if results > 1:
        raise UserError(f"--save_path {path}: names one file, but there are {results} results", fix="name a folder")
    require_writable_folder(path.parent, "--save_path")


def names_a_file(save_path: Path) -> bool:
    """Return whether --save_path is a file's name: it ends like a media file and is no folder already."""
    return save_path.suffix.lower() in MEDIA_SUFFIXES and not save_path.is_dir()


def plan_files(
    options: OutputOptions,
    results: Sequence[tuple[int | str, int]],
    sources: Sequence[Path] = (),
    stems: Sequence[str] = (),
) -> list[Files]:
    """Return the paths of each result, given as (seed, frames): as --save_path names them, or <time>_<seed> there.

    sources: the latent files that are decoded, whose names are then appended. stems: names to use instead.
    """
    parts, _ = OUTPUT_TYPES[options.output_type]
    path, time = options.save_path, datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    if names_a_file(path):
        latent = path if parts == ("latent",) else path.with_name(f"{path.stem}_latent.safetensors")
        return [_files(parts, path, path, latent)]
    planned, taken = [], set()
    for i, (seed, frames) in enumerate(results):
        plain = f"{time}_{seed}" + (f"_{sources[i].stem}" if sources else "")
        plain = stems[i] if stems else plain
        stem, number = plain, 1
        while stem in taken:
            number += 1
            stem = f"{plain}-{number}"
        taken.add(stem)
        pictures = path if frames == 1 else path / stem
        latent = path / f"{stem}_latent.safetensors"
        planned.append(_files(parts, path / f"{stem}.{options.encoding().name}", pictures / f"{stem}.png", latent))
    return planned


def _files(parts: Sequence[str], video: Path, images: Path, latent: Path) -> Files:
    paths = {"video": video, "images": images, "latent": latent}
    return Files(**{part: paths[part] for part in parts})


def save_latent(path: Path, latent: Tensor, metadata: Mapping[str, Any] | None) -> None:
    """Write a latent [16 f h w] as float32 under the key `latent`, its metadata as strings."""
    _warn_of_replacement(path)
    texts = {name: _text(value) for name, value in (metadata or {}).items()}
    save_file_atomically({"latent": latent.float().cpu()}, path, texts)
    logger.info("wrote %s", path)


def load_latent(path: Path, option: str = "--latent_path") -> tuple[Tensor, dict[str, Any]]:
    """Return the latent [16 f h w], float32, of a file that --output_type latent wrote, and its metadata."""
    with open_tensors(require_file(path, option, "a saved latent"), option) as file:
        if "latent" not in file:
            raise UserError(f"{option} {path}: there is no tensor 'latent' in it", fix="give a saved latent")
        latent, metadata = file.get("latent").float(), dict(file.metadata)
    latent = latent[0] if latent.ndim == 5 and len(latent) == 1 else latent
    if latent.ndim != 4 or len(latent) != LATENT_CHANNELS or latent.numel() == 0:
        raise UserError(f"{option} {path}: a tensor {list(latent.shape)} is no latent [16, frames, height, width]")
    if not bool(torch.isfinite(latent).all()):
        raise UserError(f"{option} {path}: the latent has values that are not finite", fix="make it again")
    return latent, {name: _from_text(name, value) for name, value in metadata.items()}


@contextlib.contextmanager
def frame_writer(
    files: Files,
    frames: int,
    fps: int,
    metadata: Mapping[str, Any] | None,
    video_format: VideoFormat = MP4,
) -> Iterator[FrameWriter]:
    """Yield a function that takes the frames [H W 3] one by one and writes the video or the pictures.

    They are uint8, or uint16 where the video has ten bits.

    frames: how many will be kept; those after them are dropped.
    """
    with contextlib.ExitStack() as stack:
        writers: list[FrameWriter] = []
        if files.video:
            _warn_of_replacement(files.video)
            text = _text(metadata) if metadata else None
            writers.append(stack.enter_context(video_writer(files.video, fps, text, video_format)))
        if files.images:
            writers.append(_picture_writer(files.images, frames, metadata))
        written = 0

        def write(frame: np.ndarray) -> None:
            nonlocal written
            if written < frames:
                for writer in writers:
                    writer(frame)
            written += 1

        yield write


def tell_written(files: Files, frames: int) -> None:
    """Name the files of a result on the console."""
    for path in filter(None, (files.video, files.images)):
        logger.info("wrote %s", path if frames == 1 or path == files.video else path.with_stem(f"{path.stem}_*"))


def _picture_writer(path: Path, frames: int, metadata: Mapping[str, Any] | None) -> FrameWriter:
    """Return the writer of PNG files: `path` itself for a single frame, else numbered ones beside it."""
    names = iter([path] if frames == 1 else [path.with_stem(f"{path.stem}_{i:03d}") for i in range(frames)])
    path.parent.mkdir(parents=True, exist_ok=True)
    if frames > 1 and any(path.parent.glob(f"{path.stem}_[0-9][0-9][0-9].png")):
        logger.warning("%s: pictures of an earlier run are there; equal numbers are replaced", path.parent)

    def write(frame: np.ndarray) -> None:
        name = next(names)
        if frames == 1:
            _warn_of_replacement(name)
        save_picture(name, frame, metadata)

    return write


def save_picture(path: Path, frame: np.ndarray, metadata: Mapping[str, Any] | None = None) -> None:
    """Write one frame uint8 [H W 3] as a PNG file, the metadata as JSON in its text chunk `comment`."""
    info = PngInfo()
    if metadata:
        info.add_itxt("comment", _text(metadata))
    with atomic_path(path) as temporary:
        Image.fromarray(frame).save(temporary, format="PNG", pnginfo=info)


def _warn_of_replacement(path: Path) -> None:
    if path.exists():
        logger.warning("%s exists and is replaced", path)


def _text(value: Any) -> str:
    """Return a text as it is and all else as JSON, without what no file can hold: bytes of a path that are no UTF-8."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode("utf-8")


def _from_text(name: str, text: str) -> Any:
    """Return a metadata value of a latent file as it was before it became a string."""
    if name in ("prompt", "negative_prompt"):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text
