"""Frames as animated files, written while they come: mp4, webm, gif and png, each with its metadata inside."""

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from utils.errors import UserError
from utils.files import atomic_path

FrameWriter = Callable[[np.ndarray], None]
os.environ.setdefault("SVT_LOG", "1")  # of AV1's encoder, which else prints its settings
_SMALL = 256  # pixels
_PNG_IHDR_END = 33  # signature, then the first chunk
_GIF_HEADER = 13


@dataclass(frozen=True)
class Encoding:
    """How frames become a stream. CRF: constant quality instead of a bit rate, lower is better and larger."""

    codec: str
    pixels: str
    crf: int | None = None  # where none is asked for; None for formats that have no such thing
    highest_crf: int = 0
    options: Mapping[str, str] | None = None


# Small pictures stay small, and noise and fine detail stay visible.
VIDEO_FORMATS = {
    "mp4": Encoding("libx264", "yuv420p", 16, 51, {"preset": "medium"}),
    "webm": Encoding("libvpx-vp9", "yuv420p", 20, 63, {"b": "0", "row-mt": "1", "deadline": "good", "cpu-used": "2"}),
    "gif": Encoding("gif", "pal8"),
    "png": Encoding("apng", "rgb24"),
}
# H.264 has ten bits too, but next to no player shows them; VP9's encoder is often built without.
_TEN_BITS = {
    "mp4": Encoding("libx265", "yuv420p10le", 16, 51, {"preset": "medium", "x265-params": "log-level=error"}),
    "webm": Encoding("libsvtav1", "yuv420p10le", 20, 63, {"preset": "6"}),
}


@dataclass(frozen=True)
class VideoFormat:
    """The kind of file that frames become."""

    name: str = "mp4"
    crf: int | None = None
    ten_bit: bool = False  # frames are uint16 then

    @property
    def encoding(self) -> Encoding:
        return (_TEN_BITS if self.ten_bit else VIDEO_FORMATS)[self.name]

    def check(self) -> None:
        """Raise UserError for what the kind of file cannot have."""
        if self.ten_bit and self.name not in _TEN_BITS:
            raise UserError(f"--ten_bit: {self.name} files have 8 bits a colour", "use --video_format mp4 or webm")
        if self.crf is None:
            return
        encoding = self.encoding
        if encoding.crf is None:
            raise UserError(f"--crf {self.crf}: {self.name} files have no quality to choose", "leave it out")
        if not 0 <= self.crf <= encoding.highest_crf:
            raise UserError(
                f"--crf {self.crf}: must be from 0, the best, to {encoding.highest_crf}", f"try {encoding.crf}"
            )


MP4 = VideoFormat()


@contextlib.contextmanager
def video_writer(
    path: Path, fps: int, text: str | None = None, video_format: VideoFormat = MP4
) -> Iterator[FrameWriter]:
    """Yield a function that takes frames [H W 3], uint8 or for ten bits uint16, and encodes each at once.

    The file has its name once it is whole. text: becomes its comment.
    """
    container_name = {"png": "apng"}.get(video_format.name, video_format.name)
    # bitexact: without a random number in the file.
    options = {"mp4": {"movflags": "+faststart"}, "png": {"plays": "0"}, "webm": {"fflags": "+bitexact"}}
    with atomic_path(path) as temporary:
        with av.open(str(temporary), "w", container_name, options=options.get(video_format.name, {})) as container:
            if text:
                container.metadata["comment"] = text
            encode: Callable[[np.ndarray | None], None] | None = None

            def write(frame: np.ndarray) -> None:
                nonlocal encode
                if encode is None:
                    make = _palette_encoder if video_format.name == "gif" else _encoder
                    encode = make(container, fps, *frame.shape[:2], video_format)
                encode(frame)

            yield write
            if encode is not None:
                encode(None)
        if text and video_format.name in _INSERTIONS:
            temporary.write_bytes(_INSERTIONS[video_format.name](temporary.read_bytes(), text))


def _encoder(
    container: av.container.OutputContainer, fps: int, height: int, width: int, video_format: VideoFormat
) -> Callable[[np.ndarray | None], None]:
    """Return a function that encodes a frame, and with None what the encoder still holds."""
    encoding = video_format.encoding
    options = dict(encoding.options or {})
    if encoding.crf is not None:
        options["crf"] = str(encoding.crf if video_format.crf is None else video_format.crf)
    if encoding.codec == "libx264" and min(height, width) < _SMALL:
        options["x264-params"] = "mbtree=0"  # which reads past small pictures: no two files were the same
    stream = container.add_stream(encoding.codec, rate=fps, options=options)
    stream.height, stream.width, stream.pix_fmt = height, width, encoding.pixels
    if encoding.codec == "libx265":
        stream.codec_context.codec_tag = "hvc1"  # by which Apple's players know it
    yuv = encoding.pixels.startswith("yuv")
    if yuv:
        bt709 = 1
        stream.codec_context.colorspace = bt709
        stream.codec_context.color_primaries = bt709
        stream.codec_context.color_trc = bt709
        stream.codec_context.color_range = ColorRange.MPEG

    def encode(frame: np.ndarray | None) -> None:
        picture = None if frame is None else _picture(frame)
        if picture is not None and yuv:
            picture = picture.reformat(
                format=encoding.pixels, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
        container.mux(stream.encode(picture))

    return encode


def _palette_encoder(
    container: av.container.OutputContainer, fps: int, height: int, width: int, _: VideoFormat
) -> Callable[[np.ndarray | None], None]:
    """Return _encoder()'s function for gif: each frame gets the 256 colours that suit it."""
    stream = container.add_stream("gif", rate=fps)
    stream.height, stream.width, stream.pix_fmt = height, width, "pal8"
    graph, time_base = av.filter.Graph(), Fraction(1, fps)
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=time_base)
    split, palette = graph.add("split"), graph.add("palettegen", "stats_mode=single")
    use, sink = graph.add("paletteuse", "new=1"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    written = 0

    def drain() -> None:
        with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
            while True:
                container.mux(stream.encode(graph.pull()))

    def encode(frame: np.ndarray | None) -> None:
        nonlocal written
        if frame is None:
            graph.push(None)
            drain()
            container.mux(stream.encode())
            return
        picture = _picture(frame)
        picture.pts, picture.time_base = written, time_base
        written += 1
        graph.push(picture)
        drain()

    return encode


def _picture(frame: np.ndarray) -> av.VideoFrame:
    pixels = "rgb48le" if frame.dtype == np.uint16 else "rgb24"
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=pixels)


# ------------------------------------------------------------------------------- texts that FFmpeg does not write
def _in_png(content: bytes, text: str) -> bytes:
    """Return an (animated) PNG with a text chunk `comment` behind its header (PNG specification, 11.3.4.5)."""
    data = b"iTXt" + b"comment\0\0\0\0\0" + text.encode()
    chunk = (len(data) - 4).to_bytes(4, "big") + data + zlib.crc32(data).to_bytes(4, "big")
    return content[:_PNG_IHDR_END] + chunk + content[_PNG_IHDR_END:]


def _in_gif(content: bytes, text: str) -> bytes:
    """Return a GIF with a comment before its first frame (GIF89a specification, section 24)."""
    flags = content[10]
    start = _GIF_HEADER + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    data = text.encode()
    blocks = b"".join(bytes([len(part)]) + part for part in (data[i : i + 255] for i in range(0, len(data), 255)))
    return content[:start] + b"\x21\xfe" + blocks + b"\0" + content[start:]


_INSERTIONS = {"png": _in_png, "gif": _in_gif}


def read_comment(path: Path) -> dict[str, Any] | None:
    """Return the metadata in a video's or picture's comment; None where there are none. Raises OSError."""
    from PIL import Image, UnidentifiedImageError

    if path.suffix.lower() in (".png", ".gif"):
        try:
            with Image.open(path) as image:
                text = image.info.get("comment")
        except UnidentifiedImageError:
            return None
    else:
        try:
            with av.open(str(path)) as container:
                found = {name.lower(): value for name, value in container.metadata.items()}
                text = found.get("comment")
        except av.error.FFmpegError:
            return None
    try:
        content = json.loads(text.decode() if isinstance(text, bytes) else text)
    except (TypeError, ValueError):
        return None
    return content if isinstance(content, dict) else None
