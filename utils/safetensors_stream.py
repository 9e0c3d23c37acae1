"""Safetensors files that are written tensor by tensor, so that they need not fit into memory."""

import json
import math
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import atomic_path
from utils.safetensors_io import SAFETENSORS_DTYPES

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def save_stream(
    entries: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterable[tuple[str, Tensor]],
    path: Path,
    metadata: Mapping[str, str],
    option: str,
) -> None:
    """Write tensors under a temporary name as they come, and rename the file once it is on the disk.

    entries: the dtype and shape of each; they may come in another order. Raises UserError, which names the option,
    where the disk has too little room, before anything is written.
    """
    header, end = {"__metadata__": dict(metadata)}, 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors are to be aligned
    path.parent.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(path.parent).free, 8 + len(text) + end
    if needed > free:
        raise UserError(f"{option} {path}: {needed:,} bytes are needed, the disk has {free:,} free", "free some space")
    left = set(entries)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors:
            dtype, shape = entries[name]
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape)), name
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))
            left.remove(name)
        assert not left, f"{len(left)} tensors are missing"
