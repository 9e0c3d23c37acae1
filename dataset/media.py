"""The training examples of a media file: frame windows, resampling, resizing; streamed, whatever a video's length."""

import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from PIL import Image

from dataset.buckets import choose_bucket, control_size
from dataset.config import DatasetConfig, ImageConfig, VideoConfig, clip_lengths
from dataset.decoding import (
    MediaError,
    MisnumberedError,
    VideoIndex,
    coming_frames,
    counted,
    frame_rate,
    image_size,
    index_video,
    load_image,
    no_step,
    numbered_frames,
    readable,
)
from dataset.items import DatasetItem, Source
from dataset.masks import gray, moving_mask, require_shape, still_mask
from utils.errors import UserError

FPS = 16  # what Wan's videos run at
T = TypeVar("T")


@dataclass(frozen=True)
class Clip:
    """The pixels of one training example."""

    item: DatasetItem
    pixels: np.ndarray  # uint8 [F H W 3]
    controls: tuple[np.ndarray, ...] = ()  # uint8 [F H W 3] each, of the same size; F is 1 for pictures
    mask: np.ndarray | None = None  # uint8 [F H W]: 255 counts in the loss, 0 does not; None: all counts


# Yields clips and returns the items of the whole file.
Clips = Generator[Clip, None, list[DatasetItem]]


def plan_items(source: Source, config: DatasetConfig, step: Callable[[], None] = no_step) -> list[DatasetItem]:
    """Return the training examples of a file without decoding more than its first frame.

    The frames of a video are counted by its packets, which a damaged file may not keep. Raises MediaError.
    """
    with readable(source.path):
        if not isinstance(config, VideoConfig):
            return [_image_item(source, config, image_size(source.path))]
        index = index_video(source.path, step)
        at_16_fps = resample(range(index.frames), config.source_fps)
        count = sum(1 for _ in itertools.islice(at_16_fps, frames_needed(config)))
        return _video_items(source, config, (index.width, index.height), count)


def read_clips(
    source: Source,
    config: DatasetConfig,
    wanted: Callable[[DatasetItem], bool] = lambda item: True,
    step: Callable[[], None] = no_step,
) -> Clips:
    """Yield the training examples of a file that are wanted, with their pixels; return all that it has.

    There are none in a video shorter than every target length. Of a video no more is held than its longest clip, and
    the one that is yielded. step: called whenever a frame or packet has been read. Raises MediaError for what cannot be
    read.
    """
    if not isinstance(config, VideoConfig):
        return (yield from _read_picture(source, config, wanted))
    if frames_needed(config) is not None:
        return (yield from _read_opening(source, config, wanted, step))
    paths = [source.path, *_tracks(source)]
    indexes = [_index(path, step) for path in paths]
    try:
        return (yield from _read_windows(source, config, indexes, wanted, step))
    except MisnumberedError:
        # All windows once more: those that have been yielded may be misplaced.
        indexes = [_counted(path, index, step) for path, index in zip(paths, indexes, strict=True)]
        return (yield from _read_windows(source, config, indexes, wanted, step))


def _read_picture(source: Source, config: DatasetConfig, wanted: Callable[[DatasetItem], bool]) -> Clips:
    with readable(source.path):
        image = load_image(source.path)
    item = _image_item(source, config, (image.shape[1], image.shape[0]))
    if wanted(item):
        size = item.width, item.height
        controls = tuple(_control_image(path, size, config)[None] for path in source.controls)
        still = _still(source, config, (image.shape[1], image.shape[0]), size)
        yield Clip(item, resize_to_bucket(image, size)[None], controls, None if still is None else still[None])
    return [item]


def _still(source: Source, config: DatasetConfig, size: tuple[int, int], bucket: tuple[int, int]) -> np.ndarray | None:
    """Return the mask of a picture, or of all frames of a video, resized as they are, uint8 [H W]; None for none."""
    if not source.masked or (source.is_video and moving_mask(source)):
        return None
    return resize_to_bucket(still_mask(source, config, size), bucket)


def _tracks(source: Source) -> list[Path]:
    """Return what is read beside a video: its control, and its mask where that moves."""
    return [*source.controls[:1], *filter(None, [moving_mask(source)])]


def _clip(source: Source, still: np.ndarray | None, item: DatasetItem, pixels: np.ndarray, *tracks: np.ndarray) -> Clip:
    """Return a clip of a video; still: its mask where that is a picture; tracks: the frames of _tracks()."""
    controls = tracks[: len(source.controls[:1])]
    if not source.masked:
        return Clip(item, pixels, controls)
    mask = gray(tracks[-1]) if still is None else np.broadcast_to(still, (len(pixels), *still.shape))
    return Clip(item, pixels, controls, mask)


def _read_opening(
    source: Source, config: VideoConfig, wanted: Callable[[DatasetItem], bool], step: Callable[[], None]
) -> Clips:
    """Read clips that all begin with the first frame: decoding stops after the longest."""
    size, frames = _first_frames(source.path, config, step)
    items = _video_items(source, config, size, len(frames))
    chosen = [item for item in items if wanted(item)]
    if not chosen:
        return items
    bucket = items[0].width, items[0].height
    beside = [_first_frames(path, config, step, bucket) for path in _tracks(source)]
    if moving_mask(source):
        require_shape(source, beside[-1][0], size)
    still = _still(source, config, size, bucket)
    for item in chosen:
        # A control video that is too short stays on its last frame.
        tracks = [track[np.minimum(np.arange(item.frames), len(track) - 1)] for _, track in beside]
        yield _clip(source, still, item, frames[: item.frames], *tracks)
    return items


def _first_frames(
    path: Path, config: VideoConfig, step: Callable[[], None], bucket: tuple[int, int] | None = None
) -> tuple[tuple[int, int], np.ndarray]:
    """Return the (width, height) of a video's first frame and its frames as far as a clip can use them, [F H W 3].

    They are resized while they are read, to the first frame's bucket unless one is given.
    """
    size, frames = None, []
    with readable(path):
        coming = resample(_each(coming_frames(path), step), config.source_fps)
        for pixels in itertools.islice(coming, frames_needed(config)):
            frame = pixels()
            size = size or (frame.shape[1], frame.shape[0])
            bucket = bucket or video_bucket(config, size)
            frames.append(resize_to_bucket(frame, bucket))
    if size is None:
        raise MediaError(f"{path}: holds no frames")
    return size, np.stack(frames)


def _each(frames: Iterable[T], step: Callable[[], None]) -> Iterator[T]:
    for frame in frames:
        step()
        yield frame


def _index(path: Path, step: Callable[[], None]) -> VideoIndex:
    with readable(path):
        index = index_video(path, step)
    return index if len(index.times) else _counted(path, index, step)


def _counted(path: Path, index: VideoIndex, step: Callable[[], None]) -> VideoIndex:
    with readable(path):
        return index if path.is_dir() else counted(path, index, step)


def _read_windows(
    source: Source,
    config: VideoConfig,
    indexes: Sequence[VideoIndex],
    wanted: Callable[[DatasetItem], bool],
    step: Callable[[], None],
) -> Clips:
    """Read clips from anywhere in a video; indexes: of the video, and of what is read beside it.

    Raises MisnumberedError where an index is found wrong.
    """
    index, *beside = indexes
    size, kept = (index.width, index.height), _kept(index, config)
    items = _video_items(source, config, size, len(kept))
    chosen = [item for item in items if wanted(item)]
    pixels = _windows(source.path, index, kept, chosen, step)
    tracks = [
        _windows(path, other, _kept(other, config), chosen, step)
        for path, other in zip(_tracks(source), beside, strict=True)
    ]
    if moving_mask(source):
        require_shape(source, (beside[-1].width, beside[-1].height), size)
    still = _still(source, config, size, (items[0].width, items[0].height)) if chosen else None
    # Without names for what is yielded, which would be held while the next is made.
    yield from map(partial(_clip, source, still), chosen, pixels, *tracks)
    return items


def _kept(index: VideoIndex, config: VideoConfig) -> np.ndarray:
    """Return the numbers of the frames that remain at 16 frames per second."""
    return np.fromiter(resample(range(index.frames), config.source_fps), dtype=np.int64)


def _windows(
    path: Path, index: VideoIndex, kept: np.ndarray, items: Sequence[DatasetItem], step: Callable[[], None]
) -> Iterator[np.ndarray]:
    """Yield the pixels of clips, uint8 [F H W 3] resized to their bucket; the clips in the order in which they end.

    kept: the numbers of the frames that clips count. A clip that goes on after the last of them stays on it.
    """
    last = len(kept) - 1
    used = np.zeros(len(kept), dtype=bool)
    for item in items:
        used[min(item.first_frame, last) : item.first_frame + item.frames] = True
    places = np.flatnonzero(used)
    # The frame from which on the clips after each one need any.
    begins = [*itertools.accumulate((item.first_frame for item in reversed(items)), min)][-2::-1]
    held: dict[int, np.ndarray] = {}
    with readable(path):
        arriving = zip(places.tolist(), numbered_frames(path, index, kept[places].tolist(), step), strict=True)
        for item, begin in itertools.zip_longest(items, begins, fillvalue=last + 1):
            window = [min(item.first_frame + i, last) for i in range(item.frames)]
            while window[-1] not in held:
                place, frame = next(arriving)
                held[place] = resize_to_bucket(frame, (item.width, item.height))
                if place == places[-1]:
                    next(arriving, None)  # lets the index be denied by a file that goes on
            yield np.stack([held[place] for place in window])
            held = {place: frame for place, frame in held.items() if place >= min(begin, last)}


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
    """Return the clips of a video in the order in which they end, so that they can be cut while it is decoded."""
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
    windows = sorted(set(windows), key=lambda window: (sum(window), window))
    return [DatasetItem(source, *bucket, *bucket, first, length) for first, length in windows]


# -------------------------------------------------------------------------------------------------------- pixels
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


def _control_image(path: Path, bucket: tuple[int, int], config: ImageConfig) -> np.ndarray:
    with readable(path):
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
    with readable(path):
        return image_size(path)


@dataclass(frozen=True)
class VideoFacts:
    """What a video says of itself without being decoded; a damaged file may not keep it."""

    width: int  # pixels of the first frame, upright
    height: int
    frames: int  # counted by packets
    fps: float | None  # None for a folder of pictures, and where the file does not tell


def probe_video(path: Path) -> VideoFacts:
    """Return what a video file, or a folder of pictures, holds; only the first frame is decoded. Raises MediaError."""
    with readable(path):
        index = index_video(path)
        return VideoFacts(index.width, index.height, index.frames, frame_rate(path))
