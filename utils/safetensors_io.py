"""Weight files read tensor by tensor, and safetensors files written whole or not at all."""

import io
import itertools
import json
import math
import mmap
import os
import pickle
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from utils.errors import UserError
from utils.files import atomic_path, require_file

_PICKLES = {".pth", ".pt", ".bin", ".ckpt"}
_SHARD = re.compile(r"^(?P<stem>.*?)(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors)$")
# The format's names of dtypes (https://github.com/huggingface/safetensors#format).
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


_CAN_RELEASE = sys.platform == "linux"


class Entry(NamedTuple):
    """A tensor in a safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # of its bytes in the file
    size: int  # in bytes


class TensorFile:
    """The tensors of a weight file and its shards by name, read one at a time. Use as a context manager."""

    def __init__(self, path: Path, option: str):
        self.path, self.option = path, option
        self.metadata: dict[str, str] = {}
        self._in_memory: dict[str, Tensor] = {}
        self._readers: dict[str, safe_open] = {}
        self._headers: dict[str, Entry] = {}
        self._paths: dict[str, Path] = {}
        if path.suffix.lower() in _PICKLES:
            self._in_memory = _load_pickle(path, option)
        else:
            for shard in shards_of(path, option):
                self._open(shard)

    def _open(self, path: Path) -> None:
        header, metadata = _read_header(path, self.option)
        self.metadata = {**metadata, **self.metadata}
        try:
            reader = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise _broken(path, self.option, str(error)) from None
        self._headers.update(header)
        self._paths.update(dict.fromkeys(header, path))
        self._readers.update(dict.fromkeys(header, reader))

    def keys(self) -> list[str]:
        return list(self._in_memory) or list(self._headers)

    def __contains__(self, key: str) -> bool:
        return key in self._in_memory or key in self._headers

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._in_memory[key].shape) if key in self._in_memory else self._headers[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return self._in_memory[key].dtype if key in self._in_memory else self._headers[key].dtype

    def get(self, key: str) -> Tensor:
        """Return one tensor; it may be a view of the file mapped into memory."""
        return self._in_memory[key] if key in self._in_memory else self._readers[key].get_tensor(key)

    def place(self, key: str) -> tuple[Path, int] | None:
        """Return the file and where in it a tensor's bytes begin; None for a pickle's."""
        return None if key in self._in_memory else (self._paths[key], self._headers[key].start)

    def each(self, keys: Iterable[str], mapped: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors with their keys in the order of the file; each is gone once the next one is asked for.

        mapped: as views of the file mapped into memory, whose pages are given back at once, where the system can do
        that: those that have been looked at would count as memory of this process. Else by plain reads into two
        buffers, one while the tensor in the other is in use.
        """
        if self._in_memory:
            yield from ((key, self._in_memory[key]) for key in keys)
            return
        ordered = sorted(keys, key=lambda key: (self._paths[key], self._headers[key].start))
        for path, part in itertools.groupby(ordered, key=self._paths.get):
            with open(path, "rb", buffering=0) as file:
                yield from (self._each_mapped if mapped and _CAN_RELEASE else self._each_read)(file, list(part))

    def _each_mapped(self, file: io.FileIO, keys: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        # Of which a copy would be made by whoever wrote to it. Not closed, but let go of with the last tensor.
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for key, next_key in itertools.zip_longest(keys, keys[1:]):
            if next_key:
                _advise(pages, mmap.MADV_WILLNEED, self._headers[next_key])
            entry = self._checked(key)
            data = torch.empty(0, dtype=torch.uint8)
            if entry.size:
                data = torch.frombuffer(pages, dtype=torch.uint8, count=entry.size, offset=entry.start)
            yield key, data.view(entry.dtype).view(entry.shape)
            _advise(pages, mmap.MADV_DONTNEED, entry)

    def _each_read(self, file: io.FileIO, keys: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        largest = max(self._headers[key].size for key in keys)
        buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(2)]
        with ThreadPoolExecutor(1) as reader:
            coming: tuple[str, Future[Tensor]] | None = None
            for key, buffer in zip(keys, itertools.cycle(buffers), strict=False):
                here, coming = coming, (key, reader.submit(self._read, file, key, buffer))
                if here:
                    yield here[0], here[1].result()
            if coming:
                yield coming[0], coming[1].result()

    def _checked(self, key: str) -> Entry:
        """Return where a tensor is, or raise UserError for one that torch has no number format for."""
        entry = self._headers[key]
        if entry.size != entry.dtype.itemsize * math.prod(entry.shape):
            raise UserError(
                f"{self.option} {self._paths[key]}: {key} is in a number format that is not supported",
                "use a bf16, fp16 or fp32 file",
            )
        return entry

    def _read(self, file: io.FileIO, key: str, buffer: Tensor) -> Tensor:
        """Return a tensor as a view of a buffer that it is read into."""
        entry = self._checked(key)
        data = buffer[: entry.size]
        file.seek(entry.start)
        view, done = memoryview(data.numpy()), 0
        while done < entry.size:  # one read takes no more than 2 GiB
            count = file.readinto(view[done:])
            if not count:
                raise _broken(self._paths[key], self.option, f"{key} ends too early")
            done += count
        return data.view(entry.dtype).view(entry.shape)

    def close(self) -> None:
        self._in_memory, self._readers = {}, {}

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_tensors(path: Path | str | None, option: str, what: str = "a weight file") -> TensorFile:
    """Open a .safetensors file (with all its -00001-of-0000N shards) or a .pth pickle of tensors.

    Pickles are read with weights_only and mapped into memory. Raises UserError for what is missing, truncated, of
    another format, or a pickle that holds more than tensors.
    """
    return TensorFile(require_file(path, option, what), option)


def read_metadata(path: Path | str, option: str = "file") -> dict[str, str]:
    """Return the metadata in the header of a safetensors file."""
    return _read_header(Path(path), option)[1]


def save_file_atomically(
    tensors: Mapping[str, Tensor], path: Path | str, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file under a temporary name and rename it once it is on the disk.

    Raises OSError, also when the disk is full, which the library reports as an error of its own.
    """
    with atomic_path(Path(path)) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """Return the parts of a safetensors file of these tensors, the same bytes every time.

    The library writes the metadata in an order of chance.
    """
    content = memoryview(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(bytes(content[8:start]))}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors are to be aligned
    return [struct.pack("<Q", len(text)), text, content[start:]]


def _advise(pages: mmap.mmap, advice: int, entry: Entry) -> None:
    """Tell the system what becomes of the pages that a tensor is on."""
    start = entry.start // mmap.PAGESIZE * mmap.PAGESIZE
    pages.madvise(advice, start, entry.start + entry.size - start)


def shards_of(path: Path, option: str) -> list[Path]:
    """Return the parts of a weight file, or the file itself; UserError for missing ones."""
    match = _SHARD.match(path.name)
    if not match:
        return [path]
    count = int(match["count"])
    shards = [path.with_name(f"{match['stem']}{n:05d}-of-{count:05d}{match['suffix']}") for n in range(1, count + 1)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(
            f"{option} {path}: {len(missing)} of {count} parts are missing: {', '.join(missing[:3])}",
            f"put them into {path.parent}",
        )
    return shards


def _read_header(path: Path, option: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return ({key: entry}, metadata) of a safetensors file whose data are all there."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if length < 2 or length > 100_000_000:
            raise UserError(f"{option} {path}: not a safetensors file{_foreign_kind(start)}", _CHECK)
        header_bytes = file.read(length)
    if len(header_bytes) < length:
        raise _broken(path, option, f"the header says {length} bytes, the file has {size}")
    try:
        header = json.loads(header_bytes)
        metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        table = {
            key: Entry(
                SAFETENSORS_DTYPES.get(entry["dtype"], torch.uint8),
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for key, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{option} {path}: not a safetensors file", _CHECK) from None
    if 8 + length + end > size:
        raise _broken(path, option, f"{8 + length + end:,} bytes are expected, {size:,} are there")
    return table, metadata


def _broken(path: Path, option: str, why: str) -> UserError:
    return UserError(f"{option} {path}: the file is truncated or damaged ({why})", "copy or download it again")


_CHECK = "check the path, or download it again"


def _foreign_kind(start: bytes) -> str:
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return " but a torch pickle; give it the suffix .pth"
    if start[:1] in (b"<", b"{"):
        return " but text; was a web page saved instead of the file?"
    if start.startswith(b"version"):
        return " but a Git LFS pointer; fetch the file itself"
    return ""


def _load_pickle(path: Path, option: str) -> dict[str, Tensor]:
    """Return the tensors of a torch pickle, mapped into memory where its format allows."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        raise UserError(f"{option} {path}: not a torch file but safetensors", "give it the suffix .safetensors")
    if start[:2] != b"PK" and start[:1] != b"\x80":
        raise UserError(f"{option} {path}: not a torch file{_foreign_kind(start)}", _CHECK)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how pickles are made, before one is refused
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "Unsupported" in str(error) or "global" in str(error).lower():
            raise UserError(
                f"{option} {path}: the pickle holds more than tensors and could run code, so it is not opened",
                "use a file from a source you trust, as .safetensors",
            ) from None
        raise _broken(path, option, "not a torch file") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _broken(path, option, str(error).splitlines()[0][:120]) from None
    for wrapper in ("state_dict", "model_state_dict", "module"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{option} {path}: holds no named tensors", "give the weights of a model")
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}
