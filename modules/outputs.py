"""Results as files: latents, pictures and mp4, each with what is needed to make it again inside."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from utils.errors import UserError
from utils.files import atomic_path, require_file, require_writable_folder
from utils.options import option
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
FrameWriter = Callable[[np.ndarray], None]


@dataclass(frozen=True)
class OutputOptions:
    """what to write"""

    save_path: Path | None = option(
        None, "folder for the results; with a suffix (.mp4, .png, .safetensors) the name of the file"
    )
    output_type: str = option(
        "video", "both: video and latent; latent_images: pictures and latent", choices=tuple(OUTPUT_TYPES)
    )
    fps: int = option(16, "frames per second of the mp4 file; Wan's motion is made for 16")
    trim_tail_frames: int = option(0, "drop this many frames at the end")
    no_metadata: bool = option(False, "write no prompt, seed or settings into the files")
    latent_path: tuple[Path, ...] = option((), "decode these saved latents instead of making new ones")


@dataclass(frozen=True)
class Files:
    """Where the parts of one result go; None for a part that is not asked for."""

    video: Path | None = None
    images: Path | None = None  # of a single frame; several are <stem>_000.png, <stem>_001.png, ... beside this name
    latent: Path | None = None  # of a saved one that is decoded: where it is


@dataclass(frozen=True)
class Result:
    """What becomes of one latent."""

    files: Files
    frames: int  # to keep of those that are decoded
    metadata: Mapping[str, Any] | None = None


def check_outputs(options: OutputOptions, results: int) -> None:
    """Raise UserError unless the results can be written where --save_path says; makes the folder."""
    path = options.save_path
    if path is None:
        raise UserError("--save_path is missing", fix="give a folder, or the name of the file to write")
    if not 1 <= options.fps <= MAX_FPS:
        raise UserError(f"--fps {options.fps}: must be from 1 to {MAX_FPS}", fix="Wan's motion is made for 16")
    if options.trim_tail_frames < 0:
        raise UserError(f"--trim_tail_frames {options.trim_tail_frames}: must be 0 or more", fix="leave it out")
    if not names_a_file(path):
        require_writable_folder(path, "--save_path")
        return
    expected = OUTPUT_TYPES[options.output_type][1]
    if path.suffix.lower() != expected:
        raise UserError(
            f"--save_path {path}: --output_type {options.output_type} writes {expected} files",
            fix=f"use {path.with_suffix(expected).name}, a folder, or another --output_type",
        )
    if results > 1:
        raise UserError(f"--save_path {path}: names one file, but there are {results} results", fix="name a folder")
    require_writable_folder(path.parent, "--save_path")


def names_a_file(save_path: Path) -> bool:
    """Return whether --save_path is a file's name: it ends like a media file and is no folder already."""
    return save_path.suffix.lower() in MEDIA_SUFFIXES and not save_path.is_dir()


def plan_files(
    options: OutputOptions, results: Sequence[tuple[int | str, int]], sources: Sequence[Path] = ()
) -> list[Files]:
    """Return the paths of each result, given as (seed, frames): as --save_path names them, or <time>_<seed> there.

    sources: the latent files that are decoded, whose names are then appended.
    """
    parts, _ = OUTPUT_TYPES[options.output_type]
    path, time = options.save_path, datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    if names_a_file(path):
        latent = path if parts == ("latent",) else path.with_name(f"{path.stem}_latent.safetensors")
        return [_files(parts, path, path, latent)]
    planned, taken = [], set()
    for i, (seed, frames) in enumerate(results):
        plain = f"{time}_{seed}" + (f"_{sources[i].stem}" if sources else "")
        stem, number = plain, 1
        while stem in taken:
            number += 1
            stem = f"{plain}-{number}"
        taken.add(stem)
        pictures = path if frames == 1 else path / stem
        latent = path / f"{stem}_latent.safetensors"
        planned.append(_files(parts, path / f"{stem}.mp4", pictures / f"{stem}.png", latent))
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


def load_latent(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Return the latent [16 f h w], float32, of a file that --output_type latent wrote, and its metadata."""
    with open_tensors(require_file(path, "--latent_path", "a saved latent"), "--latent_path") as file:
        if "latent" not in file:
            raise UserError(f"--latent_path {path}: there is no tensor 'latent' in it", fix="give a saved latent")
        latent, metadata = file.get("latent").float(), dict(file.metadata)
    latent = latent[0] if latent.ndim == 5 and len(latent) == 1 else latent
    if latent.ndim != 4 or len(latent) != LATENT_CHANNELS or latent.numel() == 0:
        raise UserError(f"--latent_path {path}: a tensor {list(latent.shape)} is no latent [16, frames, height, width]")
    if not bool(torch.isfinite(latent).all()):
        raise UserError(f"--latent_path {path}: the latent has values that are not finite", fix="make it again")
    return latent, {name: _from_text(name, value) for name, value in metadata.items()}


@contextlib.contextmanager
def frame_writer(files: Files, frames: int, fps: int, metadata: Mapping[str, Any] | None) -> Iterator[FrameWriter]:
    """Yield a function that takes the frames uint8 [H W 3] one by one and writes the mp4 or the pictures.

    frames: how many will be kept; those after them are dropped.
    """
    with contextlib.ExitStack() as stack:
        writers: list[FrameWriter] = []
        if files.video:
            writers.append(stack.enter_context(_video_writer(files.video, fps, metadata)))
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
    for path in filter(None, (files.video, files.images)):
        logger.info("wrote %s", path if frames == 1 or path == files.video else path.with_stem(f"{path.stem}_*"))


@contextlib.contextmanager
def _video_writer(path: Path, fps: int, metadata: Mapping[str, Any] | None) -> Iterator[FrameWriter]:
    """Yield the writer of an H.264 mp4 file (4:2:0, BT.709), which has its name once it is whole."""
    _warn_of_replacement(path)
    with atomic_path(path) as temporary, av.open(str(temporary), "w", options={"movflags": "+faststart"}) as container:
        if metadata:
            container.metadata["comment"] = _text(metadata)
        stream = None

        def write(frame: np.ndarray) -> None:
            nonlocal stream
            if stream is None:
                stream = _add_stream(container, fps, *frame.shape[:2])
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(picture))

        yield write
        if stream is not None:
            container.mux(stream.encode())


def _add_stream(container: av.container.OutputContainer, fps: int, height: int, width: int) -> av.VideoStream:
    # Constant quality instead of a bit rate: small pictures stay small, and noise and fine detail stay visible.
    stream = container.add_stream("libx264", rate=fps, options={"crf": "16", "preset": "medium"})
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    bt709 = 1
    stream.codec_context.colorspace = bt709
    stream.codec_context.color_primaries = bt709
    stream.codec_context.color_trc = bt709
    stream.codec_context.color_range = ColorRange.MPEG
    return stream


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
