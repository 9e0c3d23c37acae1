"""Weight files read tensor by tensor, and safetensors files written whole or not at all."""

import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.errors import UserError
from utils.files import atomic_path, require_file

_PICKLES = {".pth", ".pt", ".bin", ".ckpt"}
_SHARD = re.compile(r"^(?P<stem>.*?)(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors)$")
_SAFETENSORS_DTYPES = {
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


class Entry(NamedTuple):
    """What the header of a safetensors file says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # where in the file its bytes begin


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
            for shard in _shards(path, option):
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


def _shards(path: Path, option: str) -> list[Path]:
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
                _SAFETENSORS_DTYPES.get(entry["dtype"], torch.uint8),
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
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
