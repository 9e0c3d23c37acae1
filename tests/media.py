"""Real media files for tests, written on the spot: H.264 videos, pictures, JSONL lists."""

import json
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image


def drawing(frame: int, width: int = 96, height: int = 64) -> np.ndarray:
    """Return a picture uint8 [H W 3]: a red square on blue, one pixel further right in each frame."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 2] = 120
    left = 4 + frame
    picture[8:24, left : left + 16] = (230, 30, 20)
    return picture


def write_video(
    path: Path, frames: int, width: int = 96, height: int = 64, fps: int = 16, rotation: float | None = None
) -> Path:
    """Write an H.264 file of the drawing and return its path; rotation: degrees that a player is to turn it by."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for i in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(drawing(i, width, height), format="rgb24")))
        container.mux(stream.encode())
    return path


def write_scrolling(
    path: Path, frames: int, codec: str = "libx264", options: dict[str, str] | None = None, uneven: bool = False
) -> Path:
    """Write a video of noise that scrolls, no frame like another, cut every 70 frames; uneven: at a varying rate."""
    random = np.random.default_rng(0)
    scene = random.integers(0, 255, (60, 80, 3), np.uint8).repeat(4, axis=0).repeat(4, axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(30), options=options or {})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        time = 0
        for i in range(frames):
            if i % 70 == 0:
                scene = np.ascontiguousarray(scene[::-1])
            top, left = 2 * i % 170, 3 * i % 220
            frame = av.VideoFrame.from_ndarray(scene[top : top + 64, left : left + 96].copy(), format="rgb24")
            time += int(random.integers(10, 90)) if uneven else 33
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_pictures(folder: Path, sizes: dict[str, tuple[int, int]], caption: str | None = "a red square") -> Path:
    """Write one PNG a name with the given (width, height), and its caption unless that is None; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (width, height) in sizes.items():
        Image.fromarray(drawing(0, width, height)).save(folder / f"{name}.png")
        if caption is not None:
            (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    return folder


def write_jsonl(path: Path, records: Iterable[dict]) -> Path:
    """Write one JSON object a line and return the path."""
    path.write_text("".join(json.dumps({k: str(v) for k, v in r.items()}) + "\n" for r in records), encoding="utf-8")
    return path


def write_toml(path: Path, general: dict, *datasets: dict) -> Path:
    """Write a dataset file and return its path."""
    tables = [("[general]", general), *(("[[datasets]]", dataset) for dataset in datasets)]
    lines = []
    for heading, table in tables:
        lines += [heading, *(f"{key} = {_toml(value)}" for key, value in table.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _toml(value: object) -> str:
    return json.dumps(str(value) if isinstance(value, Path) else value)
