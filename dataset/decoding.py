"""Pictures and frames of videos, decoded: frames far apart without those between, where that changes none of them."""

import contextlib
import os
import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from dataset.items import IMAGE_SUFFIXES, media_in

# Frames that are decoded one after the other rather than jumped over.
_NEAR = 48
# Of a decoder. More would take cores from an encoder on the CPU, and memory: each keeps a frame, of every video that is
# being decoded.
_THREADS = max(1, min(4, (os.cpu_count() or 1) // 2))


class MediaError(Exception):
    """A media file cannot be used; the message says which, and why."""


class MisnumberedError(MediaError):
    """The frames of a video do not come as its index says, so that they must be counted by decoding them."""

    def __init__(self, path: Path | str):
        super().__init__(f"{path}: its frames do not come in the order that the file tells")


@dataclass(frozen=True)
class VideoIndex:
    """What a video holds, as its packets tell without being decoded.

    times: of each frame, in the order in which they are shown, in the stream's own unit; empty where packets do not
    tell which frame they are. entries: (number of the frame, time to seek to) where decoding can begin: that frame and
    all shown after it are the very ones that decoding from the start gives.
    """

    width: int  # of the first frame, upright; in pixels
    height: int
    frames: int
    times: Sequence[int] = ()
    entries: Sequence[tuple[int, int]] = ()


def no_step() -> None:
    """Take note of a step of reading, by default not at all."""


# ------------------------------------------------------------------------------------------------------- pictures
def load_image(path: Path) -> np.ndarray:
    """Return a picture as uint8 RGB [H W 3], turned upright by its EXIF tag; an alpha channel is dropped."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion would clip instead of scale
            image = Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8))
        return np.array(image.convert("RGB"))


def load_alpha(path: Path) -> np.ndarray | None:
    """Return how opaque a picture is, uint8 [H W], upright like its pixels; None where nothing in it is transparent."""
    with Image.open(path) as image:
        if not image.has_transparency_data:
            return None
        return np.array(ImageOps.exif_transpose(image).convert("RGBA").getchannel("A"))


def image_size(path: Path) -> tuple[int, int]:
    """Return (width, height) of an upright picture from its header."""
    with Image.open(path) as image:
        sideways = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 are turned by 90 degrees
        return image.size[::-1] if sideways else image.size


def _folder_frames(path: Path) -> list[Path]:
    frames = media_in(path, IMAGE_SUFFIXES)
    if not frames:
        raise MediaError(f"{path}: the folder holds no images")
    return frames


# --------------------------------------------------------------------------------------------------------- videos
def decoded_frames(path: Path) -> Iterator[np.ndarray]:
    """Yield the frames of a video, or of a folder of images, as uint8 RGB [H W 3], turned upright."""
    return (pixels() for pixels in coming_frames(path))


def coming_frames(path: Path) -> Iterator[Callable[[], np.ndarray]]:
    """Yield for each frame what returns its pixels: those that nobody calls for cost no more than their decoding."""
    if path.is_dir():
        yield from (partial(load_image, frame) for frame in _folder_frames(path))
        return
    with _opened(path) as (container, stream):
        pixels = _Pixels()
        for packet in container.demux(stream):
            yield from (partial(pixels, frame) for frame in _undamaged(packet, container))


def index_video(path: Path, step: Callable[[], None] = no_step) -> VideoIndex:
    """Return what a video, or a folder of images, holds; of frames only the first is decoded, all packets are read.

    step: called now and then. frames counts packets, which an odd file may not keep where times is empty. Raises
    MediaError for a file without frames, and what the decoders raise.
    """
    if path.is_dir():
        frames = _folder_frames(path)
        return VideoIndex(*image_size(frames[0]), len(frames))
    with _opened(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise MediaError(f"{path}: holds no frames")
        size = (first.height, first.width) if round(first.rotation / 90) % 2 else (first.width, first.height)
    times, sound, entries, count = array("q"), True, [], 0
    with _opened(path) as (container, stream):
        nal_length = _nal_length(stream)
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            step()
            if packet.is_discard:  # what an edit list cuts away, as phones do: it is decoded, but not shown
                sound = False
                continue
            count += 1
            if packet.pts is None or packet.is_corrupt:
                sound = False
            else:
                times.append(packet.pts)
                if packet.is_keyframe and _begins_anew(bytes(packet), stream.codec.name, nal_length):
                    entries.append((packet.pts, packet.pts if packet.dts is None else min(packet.pts, packet.dts)))
    times = np.unique(np.frombuffer(times, dtype=np.int64)) if times else np.empty(0, np.int64)
    if not sound or len(times) != count or first.pts != times[0]:
        return VideoIndex(*size, count)
    entries = [(bisect_left(times, shown), seek) for shown, seek in sorted(entries)]
    return VideoIndex(*size, count, times, entries)


def frame_rate(path: Path) -> float | None:
    """Return the frames per second that a video file tells, or None; a folder of pictures tells none."""
    if path.is_dir():
        return None
    with _opened(path) as (_, stream):
        return float(stream.average_rate or 0) or None


def counted(path: Path, index: VideoIndex, step: Callable[[], None] = no_step) -> VideoIndex:
    """Return an index whose frames are counted by decoding them all; it has no times."""
    with _opened(path) as (container, stream):
        frames = 0
        for packet in container.demux(stream):
            step()
            frames += len(_undamaged(packet, container))
    return VideoIndex(index.width, index.height, frames)


def numbered_frames(
    path: Path, index: VideoIndex, numbers: Iterable[int], step: Callable[[], None] = no_step
) -> Iterator[np.ndarray]:
    """Yield the frames of a video with these rising numbers, uint8 RGB [H W 3], turned upright.

    Frames between two numbers far apart are jumped over where the index has entries. Raises MisnumberedError where a
    frame is not the one that the index names, or the file ends before or after its last frame.
    """
    if path.is_dir():
        frames = _folder_frames(path)
        for number in numbers:
            step()
            yield load_image(frames[number])
        return
    entry_frames = [frame for frame, _ in index.entries]
    with _opened(path) as (container, stream):
        pixels, decoded, following = _Pixels(), _numbered(container, stream, index), 0
        for number in numbers:
            nearest = bisect_right(entry_frames, number) - 1
            if nearest >= 0 and entry_frames[nearest] > following + _NEAR:
                container.seek(index.entries[nearest][1], stream=stream)
                decoded, following = _numbered(container, stream, index, sought=True), -1
            while following <= number:
                at, frame = next(decoded, (None, None))
                step()
                if at is None or (following >= 0 and at != following) or at > number:
                    raise MisnumberedError(path)
                following = at + 1
            yield pixels(frame)
        if following == index.frames and next(decoded, None) is not None:
            raise MisnumberedError(path)


def _numbered(
    container: av.container.InputContainer, stream: av.VideoStream, index: VideoIndex, sought: bool = False
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield (number, frame) from where the container stands: the start, or an entry of the index."""
    if not len(index.times):
        yield from enumerate(frame for packet in container.demux(stream) for frame in _undamaged(packet, container))
        return
    known = {int(index.times[frame]) for frame, _ in index.entries}
    begin = None
    for packet in container.demux(stream):
        if begin is None:
            if sought and packet.pts not in known:
                raise MisnumberedError(container.name)
            begin = packet.pts if sought else index.times[0]
        for frame in _undamaged(packet, container):
            if frame.pts is None:
                raise MisnumberedError(container.name)
            if frame.pts < begin:  # shown before the entry, and so of frames that were not decoded
                continue
            number = bisect_left(index.times, frame.pts)
            if number == len(index.times) or index.times[number] != frame.pts:
                raise MisnumberedError(container.name)
            yield number, frame


def _undamaged(packet: av.Packet, container: av.container.InputContainer) -> list[av.VideoFrame]:
    """Return the frames that a packet completes; raises MediaError where one is filled in for want of good data."""
    frames = packet.decode()
    if damaged := next((frame for frame in frames if frame.is_corrupt), None):
        place = "" if damaged.time is None else f" at {damaged.time:.2f} s"
        raise MediaError(f"{container.name}: holds a damaged frame{place}")
    return frames


class _Pixels:
    """Converts the frames of one video."""

    def __init__(self):
        self.reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """Return uint8 RGB [H W 3], turned by the display matrix, whose angle counts counter-clockwise in degrees."""
        pixels = self.reformatter.reformat(frame, format="rgb24").to_ndarray()
        quarters = round(frame.rotation / 90) % 4
        return np.ascontiguousarray(np.rot90(pixels, quarters)) if quarters else pixels


# -------------------------------------------------------------------------------------------- where decoding can begin
def _begins_anew(data: bytes, codec: str, nal_length: int) -> bool:
    """Tell whether a key frame, and all that is shown after it, are decoded without anything before it.

    That a container calls it a key frame is not enough for H.264, where pictures after it may refer to earlier ones:
    it must be an IDR picture or carry a recovery point message that promises exactness at once.
    """
    if codec == "h264":
        for unit in _nal_units(data, nal_length):
            kind = unit[0] & 31
            if kind == 5 or (kind == 6 and unit[1:2] == b"\x06" and unit[3:4] and unit[3] >> 6 == 3):
                return True
        return False
    if codec == "hevc":
        return any(16 <= unit[0] >> 1 & 63 <= 21 for unit in _nal_units(data, nal_length))
    return codec in ("vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d", "mjpeg", "png", "ffv1", "prores")


def _nal_length(stream: av.VideoStream) -> int:
    """Return how many bytes tell the length of each unit of H.264 and H.265; 0 where start codes part them."""
    extra = stream.codec_context.extradata or b""
    place = {"h264": 4, "hevc": 21}.get(stream.codec.name, 0)
    return (extra[place] & 3) + 1 if place and len(extra) > place and extra[0] == 1 else 0


def _nal_units(data: bytes, nal_length: int) -> Iterator[bytes]:
    if not nal_length:
        yield from (unit for unit in re.split(b"\0\0\1", data)[1:] if unit)
        return
    start = 0
    while start + nal_length < len(data):
        size = int.from_bytes(data[start : start + nal_length], "big")
        start += nal_length
        if unit := data[start : start + min(size, 64)]:
            yield unit
        start += size


# ---------------------------------------------------------------------------------------------------------- opening
@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open a video for decoding; raises MediaError where there is nothing to decode."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise MediaError(f"{path}: holds no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise MediaError(f"{path}: is in a codec that cannot be decoded")
        _refuse_cut_off(path, container, stream)
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = _THREADS
        yield container, stream


def _refuse_cut_off(path: Path, container: av.container.InputContainer, stream: av.VideoStream) -> None:
    """Raise MediaError where the index of an mp4 or mov file names frames behind the file's end.

    A copy that broke off is read up to there, often without an error, and its last frame may be damaged.
    """
    if "mp4" in container.format.name.split(","):
        missing = sum(entry.pos + entry.size > container.size for entry in stream.index_entries)
        if missing:
            raise MediaError(f"{path}: is cut off, {missing} frames are missing")


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
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
