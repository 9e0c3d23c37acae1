"""Videos that a generation is told to follow or to start from, read to its size."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from dataset.decoding import MediaError, coming_frames, decoded_frames
from dataset.media import resize_to_bucket
from utils.errors import UserError
from utils.files import require_file


def read_clip(path: Path, frames: int, width: int, height: int, option: str) -> np.ndarray:
    """Return the first frames of a video or a folder of pictures, scaled and cropped: uint8 [F H W 3]."""
    with _readable(path, option):
        read = list(itertools.islice(decoded_frames(path), frames))
    if len(read) < frames:
        raise UserError(
            f"{option} {path}: {len(read)} frames, the video is to have {frames}",
            fix="use a longer one or a smaller --video_length",
        )
    return np.stack([resize_to_bucket(frame, (width, height)) for frame in read])


def count_frames(path: Path, option: str, most: int) -> int:
    """Return how many frames a video, a picture or a folder of pictures has, counted up to a number."""
    if not path.is_dir():
        require_file(path, option, "a video")
    with _readable(path, option):
        frames = sum(1 for _ in itertools.islice(coming_frames(path), most))
    if not frames:
        raise UserError(f"{option} {path}: holds no frames", "use an mp4 file")
    return frames


@contextlib.contextmanager
def _readable(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except (MediaError, av.error.FFmpegError, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{option} {path}: cannot be read ({error})", fix="use an mp4 file") from None
