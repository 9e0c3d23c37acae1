"""Safetensors files written tensor by tensor: what the library reads, whole or not at all."""

import shutil
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from utils.errors import UserError
from utils.safetensors_stream import save_stream

TENSORS = {
    "a": torch.randn(3, 5),
    "ä": torch.randn(2, 3).to(torch.bfloat16),
    "c": torch.randn(7).to(torch.float8_e4m3fn),
    "empty": torch.zeros(0, 4),
    "turned": torch.arange(6, dtype=torch.int64).view(2, 3).T,
    "scalar": torch.tensor(2.0, dtype=torch.float16),
}
ENTRIES = {name: (tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()}


def test_the_library_reads_what_was_written_in_any_order(tmp_path):
    path = tmp_path / "new" / "x.safetensors"
    save_stream(ENTRIES, reversed(TENSORS.items()), path, {"say": "grün"}, "--out")
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].float(), tensor.float())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"say": "grün"}


def test_what_fails_on_the_way_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("before")
    for broken in (list(TENSORS.items())[1:], [("a", torch.zeros(1))]):
        with pytest.raises(AssertionError):
            save_stream(ENTRIES, broken, path, {}, "--out")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_too_little_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(100))
    with pytest.raises(UserError, match=r"--out .*x\.safetensors: .* bytes are needed, the disk has 100 free"):
        save_stream(ENTRIES, TENSORS.items(), tmp_path / "x.safetensors", {}, "--out")
    assert not list(tmp_path.iterdir())
