"""The pixels of training examples: images, videos, frame windows, resampling, resizing."""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import av
import cv2
import numpy as np
from PIL import Image, ImageOps

from dataset.buckets import choose_bucket, control_size
from dataset.config import DatasetConfig, ImageConfig, VideoConfig, clip_lengths
from dataset.items import IMAGE_SUFFIXES, DatasetItem, Source, media_in
from utils.errors import UserError

FPS = 16  # what Wan's videos run at
T = TypeVar("T")


class MediaError(Exception):
    """A media file cannot be used; the message says which, and why."""


@dataclass(frozen=True)
class Clip:
    """The pixels of one training example."""

    item: DatasetItem
    pixels: np.ndarray  # uint8 [F H W 3]
    controls: tuple[np.ndarray, ...] = ()  # uint8 [F H W 3] each, of the same size; F is 1 for pictures


def plan_items(source: Source, config: DatasetConfig) -> list[DatasetItem]:
    """Return the training examples of a file without decoding more than its first frame.

    The frames of a video are counted by its packets, which a damaged file may not keep. Raises MediaError.
    """
    with _readable(source.path):
        if not isinstance(config, VideoConfig):
            return [_image_item(source, config, _image_size(source.path))]
        facts = probe_video(source.path)
        at_16_fps = resample(range(facts.frames), config.source_fps)
        count = sum(1 for _ in itertools.islice(at_16_fps, frames_needed(config)))
        return _video_items(source, config, (facts.width, facts.height), count)


def read_clips(source: Source, config: DatasetConfig) -> list[Clip]:
    """Return the training examples of a file with their pixels; [] for a video shorter than every target length.

    Raises MediaError for what cannot be read.
    """
    if not isinstance(config, VideoConfig):
        with _readable(source.path):
            image = load_image(source.path)
        item = _image_item(source, config, (image.shape[1], image.shape[0]))
        size = item.width, item.height
        controls = tuple(_control_image(path, size, config)[None] for path in source.controls)
        return [Clip(item, resize_to_bucket(image, size)[None], controls)]
    size, frames = read_video(source.path, config)
    items = _video_items(source, config, size, len(frames))
    control = np.empty(0)
    if items and source.controls:
        _, control = read_video(source.controls[0], config, bucket=(items[0].width, items[0].height))
    clips = []
    for item in items:
        window = np.arange(item.first_frame, item.first_frame + item.frames)
        # A control video that is too short stays on its last frame.
        controls = (control[np.minimum(window, len(control) - 1)],) if source.controls else ()
        clips.append(Clip(item, frames[window[0] : window[-1] + 1], controls))
    return clips


def read_video(
    path: Path, config: VideoConfig, bucket: tuple[int, int] | None = None
) -> tuple[tuple[int, int], np.ndarray]:
    """Return the (width, height) of a video's first frame and its frames as the dataset needs them, uint8 [F H W 3].

    They are resized while they are read, to the first frame's bucket unless one is given, and reading stops after the
    last frame that a clip can use. Raises MediaError.
    """
    size, frames = None, []
    with _readable(path):
        for frame in itertools.islice(resample(decoded_frames(path), config.source_fps), frames_needed(config)):
            size = size or (frame.shape[1], frame.shape[0])
            bucket = bucket or video_bucket(config, size)
            frames.append(resize_to_bucket(frame, bucket))
    if size is None:
        raise MediaError(f"{path}: holds no frames")
    return size, np.stack(frames)


# ------------------------------------------------------------------------------------------------------- windows
def resample(frames: Iterable[T], source_fps: float | None) -> Iterator[T]:
    """Yield the frames that a video has at 16 frames per second; all of them where the file's rate is None.

    Of a faster file frames are left out; of a slower one the nearest frame is repeated, so that motion keeps its speed.
    """
    if source_fps is None or source_fps >= FPS:
        yield from (frame for _, frame in at_16_fps(frames, source_fps))
        return
    shown = 0
    for number, frame in enumerate(frames):
        # The last 16th of a second at which this frame is not farther than the next.
        last = math.floor((number + 0.5) * FPS / source_fps)
        yield from itertools.repeat(frame, last + 1 - shown)
        shown = last + 1


def at_16_fps(frames: Iterable[T], source_fps: float | None) -> Iterator[tuple[int, T]]:
    """Yield (time in whole 16ths of a second, frame) for the first frame of each 16th of a second.

    Frames are left out but never repeated. Time is a running sum of 16 / source_fps in double precision: its rounding
    decides which frames are kept, and so makes cache files equal to musubi-tuner's.
    """
    step = 1.0 if source_fps is None else FPS / source_fps
    time, last = 0.0, -1
    for frame in frames:
        if int(time) != last:
            last = int(time)
            yield last, frame
        time += step


def frame_windows(
    frames: int,
    extraction: str,
    target_frames: Sequence[int],
    stride: int = 1,
    sample: int = 1,
    max_frames: int = 129,
) -> list[tuple[int, int]]:
    """Return the clips (first frame, number of frames) that a video of `frames` frames gives.

    target_frames: the lengths wanted, rounded down to 4 n + 1; a video shorter than one gives no clip of it.
    """
    if extraction == "full":
        length = (min(frames, max_frames) - 1) // 4 * 4 + 1
        return [(0, length)] if length > 0 else []
    windows = []
    for length in clip_lengths(target_frames):
        room = frames - length  # the last possible start
        if room < 0:
            continue
        if extraction == "head" or (extraction == "uniform" and sample == 1):
            starts = [0]
        elif extraction == "uniform":
            starts = np.linspace(0, room, sample, dtype=int).tolist()
        else:
            starts = range(0, room + 1, length if extraction == "chunk" else stride)
        windows += [(start, length) for start in starts]
    return windows


def frames_needed(config: VideoConfig) -> int | None:
    """Return how many frames of a video can be used at most, or None for all of them."""
    if config.frame_extraction == "full":
        return config.max_frames
    only_first = config.frame_extraction == "head" or (config.frame_extraction, config.frame_sample) == ("uniform", 1)
    return max(config.target_frames) if only_first else None


def video_bucket(config: DatasetConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Return the (width, height) that a video of `size` is resized to: always a bucket, whatever enable_bucket says."""
    return choose_bucket(config.resolution, True, False, size)


def _image_item(source: Source, config: DatasetConfig, size: tuple[int, int]) -> DatasetItem:
    bucket = choose_bucket(config.resolution, config.enable_bucket, config.bucket_no_upscale, size)
    return DatasetItem(source, *bucket, *size)


def _video_items(source: Source, config: VideoConfig, size: tuple[int, int], frames: int) -> list[DatasetItem]:
    bucket = video_bucket(config, size)
    windows = frame_windows(
        frames,
        config.frame_extraction,
        config.target_frames,
        config.frame_stride,
        config.frame_sample,
        config.max_frames,
    )
    # A short video can give the same uniform window several times; it would be one cache file all the same.
    return [DatasetItem(source, *bucket, *bucket, first, length) for first, length in dict.fromkeys(windows)]


# -------------------------------------------------------------------------------------------------------- pixels
def load_image(path: Path) -> np.ndarray:
    """Return a picture as uint8 RGB [H W 3], turned upright by its EXIF tag; an alpha channel is dropped."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion would clip instead of scale
            image = Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8))
        return np.array(image.convert("RGB"))


def resize_to_bucket(image: np.ndarray, bucket: tuple[int, int]) -> np.ndarray:
    """Return the picture scaled to cover the bucket (width, height) and cropped around its centre; uint8 [h w 3].

    Lanczos enlarges, averaging over areas shrinks.
    """
    height, width = image.shape[:2]
    if (width, height) == bucket:
        return image
    scale = max(bucket[0] / width, bucket[1] / height)
    new_width, new_height = int(width * scale + 0.5), int(height * scale + 0.5)
    if scale > 1:
        resized = np.array(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.LANCZOS))
    else:
        resized = cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_AREA)
    left, top = (new_width - bucket[0]) // 2, (new_height - bucket[1]) // 2
    return np.ascontiguousarray(resized[top : top + bucket[1], left : left + bucket[0]])


def decoded_frames(path: Path) -> Iterator[np.ndarray]:
    """Yield the frames of a video, or of a folder of images, as uint8 RGB [H W 3], turned upright."""
    if path.is_dir():
        yield from map(load_image, _folder_frames(path))
        return
    with av.open(str(path)) as container:
        stream = _video_stream(container)
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            yield _upright(frame.to_ndarray(format="rgb24"), frame.rotation)


def _upright(pixels: np.ndarray, rotation: int) -> np.ndarray:
    """Return pixels turned by the display matrix, whose angle counts counter-clockwise in degrees."""
    quarters = round(rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, quarters)) if quarters else pixels


def _control_image(path: Path, bucket: tuple[int, int], config: ImageConfig) -> np.ndarray:
    with _readable(path):
        image = load_image(path)
    height, width = image.shape[:2]
    size = control_size(config.no_resize_control, config.control_resolution, (width, height), bucket)
    if size != bucket:
        shown = f"{size[0]}x{size[1]}, but its picture {bucket[0]}x{bucket[1]}"
        raise MediaError(f"{path}: the control picture would be {shown}; Wan needs both of one size")
    if config.no_resize_control and width - size[0] in range(16) and height - size[1] in range(16):
        left, top = (width - size[0]) // 2, (height - size[1]) // 2
        return np.ascontiguousarray(image[top : top + size[1], left : left + size[0]])
    return resize_to_bucket(image, size)


def require_fitting_controls(config: DatasetConfig, sources: Iterable[Source]) -> None:
    """Raise UserError where no_resize_control or control_resolution make a control of another size than its picture.

    Wan takes both in the same places, so that nothing could be trained. Only headers are read; what is unreadable is
    passed over.
    """
    if not isinstance(config, ImageConfig) or not (config.no_resize_control or config.control_resolution):
        return
    keys = "no_resize_control" if config.no_resize_control else "control_resolution"
    for source in sources:
        try:
            bucket = choose_bucket(
                config.resolution, config.enable_bucket, config.bucket_no_upscale, _size(source.path)
            )
            sizes = {path: _size(path) for path in source.controls}
        except MediaError:
            continue
        for path, own in sizes.items():
            size = control_size(config.no_resize_control, config.control_resolution, own, bucket)
            if size != bucket:
                shown = f"{size[0]}x{size[1]}, but {source.path.name} {bucket[0]}x{bucket[1]}"
                raise UserError(
                    f"{config.where}: {keys}: the control picture {path} would be {shown}; Wan needs both of one size",
                    f"leave {keys} out, and controls are resized like their pictures",
                )


def _size(path: Path) -> tuple[int, int]:
    with _readable(path):
        return _image_size(path)


def _image_size(path: Path) -> tuple[int, int]:
    """Return (width, height) of an upright picture from its header."""
    with Image.open(path) as image:
        sideways = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 are turned by 90 degrees
        return image.size[::-1] if sideways else image.size


def _folder_frames(path: Path) -> list[Path]:
    frames = media_in(path, IMAGE_SUFFIXES)
    if not frames:
        raise MediaError(f"{path}: the folder holds no images")
    return frames


@dataclass(frozen=True)
class VideoFacts:
    """What a video says of itself without being decoded; a damaged file may not keep it."""

    width: int  # pixels of the first frame, upright
    height: int
    frames: int  # counted by packets
    fps: float | None  # None for a folder of pictures, and where the file does not tell


def probe_video(path: Path) -> VideoFacts:
    """Return what a video file, or a folder of pictures, holds; only the first frame is decoded. Raises MediaError."""
    with _readable(path):
        if path.is_dir():
            frames = _folder_frames(path)
            return VideoFacts(*_image_size(frames[0]), len(frames), None)
        with av.open(str(path)) as container:
            stream = _video_stream(container)
            rate = float(stream.average_rate or 0) or None
            first = next(container.decode(stream), None)
            if first is None:
                raise MediaError(f"{path}: holds no frames")
            size = (first.height, first.width) if round(first.rotation / 90) % 2 else (first.width, first.height)
        with av.open(str(path)) as container:
            frames = sum(1 for packet in container.demux(_video_stream(container)) if packet.size)
        return VideoFacts(*size, frames, rate)


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    if not container.streams.video:
        raise MediaError(f"{container.name}: holds no video stream")
    return container.streams.video[0]


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the decoders raise into a MediaError of one line with the path."""
    try:
        yield
    except (
        av.error.FFmpegError,
        Image.DecompressionBombError,
        OSError,
        ValueError,
        SyntaxError,
        RuntimeError,
    ) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise MediaError(f"{path}: cannot be read ({' '.join(reason.split())})") from None
