"""Whether files are the same: hashes of their contents, of large weight files by samples."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from utils.safetensors_io import shards_of

_DIGITS = 32  # of a SHA-256 in hexadecimal, 128 bits
_ENDS, _SAMPLE, _SAMPLES = 1 << 20, 1 << 16, 64  # bytes, bytes, how many


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def content_hash(path: Path, step: Callable[[], None] = lambda: None) -> str:
    """Return a hash of a file's bytes, or of the names and bytes of the files in a folder. Raises OSError.

    step: called now and then.
    """
    digest = hashlib.sha256()
    for file in _files(path):
        if file != path:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
                step()
    return digest.hexdigest()[:_DIGITS]


def size_and_time(path: Path) -> tuple[int, int]:
    """Return the bytes and the time of the last change, in ns, of a file or of a folder's files. Raises OSError."""
    states = [file.stat() for file in _files(path)]
    times = [state.st_mtime_ns for state in states]
    # A folder's own time tells of a file that got another name.
    return sum(state.st_size for state in states), max([path.stat().st_mtime_ns, *times])


def weights_identity(path: Path, option: str) -> str:
    """Return what tells a weight file, with its shards, from others, after reading a few MB of it at most.

    Hashed are its size, its first and last MiB, which hold the table of tensors of every format, and 64 samples of
    64 KiB between. Raises UserError for shards that are missing.
    """
    digest = hashlib.sha256()
    for shard in shards_of(Path(path), option):
        size = shard.stat().st_size
        digest.update(f"{size}\0".encode())
        with open(shard, "rb") as file:
            for start, length in _pieces(size):
                file.seek(start)
                digest.update(file.read(length))
    return digest.hexdigest()[:_DIGITS]


def seed_of(text: str) -> int:
    """Return a seed of 63 bits that a text decides, the same everywhere and always; file names may hold any bytes."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "little") >> 1


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of what is read of a weight file: all of one that is little larger than the samples."""
    if size <= 2 * _ENDS + 2 * _SAMPLES * _SAMPLE:
        yield 0, size
        return
    yield 0, _ENDS
    between = size - 2 * _ENDS
    for number in range(_SAMPLES):
        yield _ENDS + between * number // _SAMPLES, _SAMPLE
    yield size - _ENDS, _ENDS


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
