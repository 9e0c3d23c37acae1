"""Files: there when needed, complete once named; weight files read lazily and refused in one line."""

import errno
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.exc
import torch._inductor.exc
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT
from utils.devices import default_device
from utils.errors import UserError, run_script
from utils.files import atomic_path, remove_leftovers, require_file, require_writable_folder, write_whole
from utils.identity import _pieces, weights_identity
from utils.safetensors_io import open_tensors, read_metadata, save_file_atomically, to_bytes
from utils.version import VERSION


def line(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_file_has_its_name_only_when_complete(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a.txt"]
    with atomic_path(path) as temporary:
        temporary.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    save_file_atomically({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("named", [True, False])
def test_an_error_while_writing_names_the_file_and_not_its_temporary_name(tmp_path, named):
    path = tmp_path / "a.png"
    with pytest.raises(OSError) as error, atomic_path(path) as temporary:
        raise OSError(28, "No space left on device", *([str(temporary)] if named else []))
    assert error.value.filename == str(path) and not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="no picture"), atomic_path(path):
        raise OSError("no picture")


def test_a_missing_path_is_named_with_the_nearest_file(tmp_path):
    (tmp_path / "wan_vae.safetensors").write_bytes(b"x")
    assert "Did you mean 'wan_vae.safetensors'" in line(
        lambda: require_file(tmp_path / "wan_vea.safetensors", "--vae", "")
    )
    assert "is a folder" in line(lambda: require_file(tmp_path, "--vae", "the weights"))
    assert "no folder" in line(lambda: require_file(tmp_path / "x" / "y", "--vae", "the weights"))
    assert line(lambda: require_file(None, "--vae", "the VAE")) == "--vae is missing. Give the VAE: --vae PATH."
    (tmp_path / "empty").touch()
    assert "is empty" in line(lambda: require_file(tmp_path / "empty", "--vae", "the weights"))


def test_a_folder_that_cannot_hold_files_is_named_with_the_reason(tmp_path):
    assert require_writable_folder(tmp_path / "new" / "folder", "cache_directory").is_dir()
    assert not list((tmp_path / "new" / "folder").iterdir())
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"cache_directory {folder}: {tmp_path / 'file'} is a file, not a folder. Choose another folder." == line(
            lambda folder=folder: require_writable_folder(folder, "cache_directory")
        )


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (PermissionError(errno.EACCES, "x", "a.txt"), "a.txt: there is no permission to read or write it. Change"),
        (OSError(errno.EROFS, "x", "a.txt"), "a.txt: cannot be written (the file system is read-only). Choose"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total of 8 GiB."),
            "not enough GPU memory (CUDA out of memory. Tried to allocate 20.00 MiB). See docs/memory.md",
        ),
        (
            torch._dynamo.exc.Unsupported("Data-dependent branching\n  Explanation: pages of it"),
            "a block of the DiT could not be compiled (Data-dependent branching). Run without --compile and",
        ),
        (
            torch._inductor.exc.CppCompileError(["g++", "x.cpp"], "Python.h: No such file\ncompilation terminated"),
            "a block of the DiT could not be compiled (Python.h: No such file). Run without --compile and",
        ),
        (UserError("--vae x: what is it?", "use y"), "--vae x: what is it? Use y."),
    ],
)
def test_what_people_can_mend_ends_a_script_in_one_line(monkeypatch, capsys, error, text):
    def main():
        raise error

    monkeypatch.setattr("utils.errors.set_up_logging", lambda: None)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as end:
        run_script(main)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count("\n") == 1 and printed.startswith(f"script.py: error: {text}")


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "x"), RuntimeError("a defect")])
def test_a_defect_keeps_its_traceback(monkeypatch, error):
    def main():
        raise error

    monkeypatch.setattr("utils.errors.set_up_logging", lambda: None)
    with pytest.raises(type(error)):
        run_script(main)


@pytest.mark.parametrize("name", ["graphics", "cuda:99", "meta", "mps" if sys.platform == "linux" else "xpu"])
def test_a_device_that_cannot_compute_is_refused(name):
    assert line(lambda: default_device(name)).startswith(f"--device {name}: ")


def test_tensors_and_metadata_come_back(tmp_path):
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(4, dtype=torch.bfloat16)}
    save_file_atomically(tensors, tmp_path / "x.safetensors", {"num_heads": "3"})
    torch.save({"state_dict": tensors}, tmp_path / "x.pth")
    for name in ("x.safetensors", "x.pth"):
        with open_tensors(tmp_path / name, "--dit") as file:
            assert sorted(file.keys()) == ["a", "b"] and "a" in file
            assert file.shape("a") == (2, 3) and file.dtype("b") == torch.bfloat16
            assert all(torch.equal(file.get(key), tensors[key]) for key in tensors)
    assert read_metadata(tmp_path / "x.safetensors") == {"num_heads": "3"}


def test_all_shards_are_read_and_a_missing_one_is_named(tmp_path):
    for n in (1, 2, 3):
        save_file({f"k{n}": torch.full((2,), n)}, tmp_path / f"m-0000{n}-of-00003.safetensors")
    with open_tensors(tmp_path / "m-00002-of-00003.safetensors", "--dit") as file:
        assert sorted(file.keys()) == ["k1", "k2", "k3"] and file.get("k3")[0] == 3
    (tmp_path / "m-00003-of-00003.safetensors").unlink()
    text = line(lambda: open_tensors(tmp_path / "m-00001-of-00003.safetensors", "--dit"))
    assert "1 of 3 parts are missing: m-00003-of-00003.safetensors" in text


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    path = tmp_path / "whole.safetensors"
    save_file({"a": torch.randn(100)}, path)
    whole = path.read_bytes()
    for length in (3, 8, 20, len(whole) - 1):
        (tmp_path / "part.safetensors").write_bytes(whole[:length])
        text = line(lambda: open_tensors(tmp_path / "part.safetensors", "--dit"))
        assert "--dit" in text and "part.safetensors" in text
    torch.save({"a": torch.randn(1000)}, tmp_path / "whole.pth")
    (tmp_path / "part.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-1000])
    assert "truncated or damaged" in line(lambda: open_tensors(tmp_path / "part.pth", "--t5"))


def test_what_is_not_safetensors_is_called_by_its_kind(tmp_path):
    path = tmp_path / "x.safetensors"
    torch.save({"a": torch.zeros(1)}, path)
    assert "a torch pickle" in line(lambda: open_tensors(path, "--vae"))
    path.write_text("<!DOCTYPE html><html></html>")
    assert "web page" in line(lambda: open_tensors(path, "--vae"))
    path.write_text("version https://git-lfs.github.com/spec/v1")
    assert "Git LFS pointer" in line(lambda: open_tensors(path, "--vae"))
    header = json.dumps({"a": {"dtype": "F32"}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert "not a safetensors file" in line(lambda: open_tensors(path, "--vae"))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("this-must-not-appear",)


def test_a_pickle_with_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, "new.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"a": Evil()}))
    for name in ("new.pth", "old.pth"):
        text = line(lambda name=name: open_tensors(tmp_path / name, "--t5"))
        assert "run code" in text
    assert not (tmp_path / "this-must-not-appear").exists()


def test_what_is_not_a_torch_file_is_called_by_its_kind(tmp_path):
    path = tmp_path / "x.pth"
    save_file({"a": torch.zeros(1)}, path)
    assert "not a torch file but safetensors. Give it the suffix .safetensors." in line(
        lambda: open_tensors(path, "--vae")
    )
    path.write_text("<!DOCTYPE html><html></html>")
    assert "not a torch file but text; was a web page saved instead of the file? Check the path" in line(
        lambda: open_tensors(path, "--vae")
    )


def test_a_pickle_without_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "x.pth")
    assert "no named tensors" in line(lambda: open_tensors(tmp_path / "x.pth", "--t5"))


@pytest.mark.skipif(sys.platform != "linux", reason="a file size limit stands in for a full disk")
def test_a_disk_that_is_full_is_one_line_and_leaves_nothing_behind(tmp_path):
    code = f"""
import resource, signal, torch
from utils.errors import run_script
from utils.safetensors_io import save_file_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
run_script(lambda: save_file_atomically({{"a": torch.zeros(10_000)}}, {str(tmp_path / "a.safetensors")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "a.safetensors: cannot be written (the file would be too large)" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mapped", [True, False])
def test_tensors_are_read_one_after_the_other_with_the_values_that_they_have_alone(tmp_path, mapped):
    tensors = {f"t{i}": torch.randn(i, 3, generator=torch.Generator().manual_seed(i)) for i in range(5)}
    tensors |= {"half": torch.ones(7).half(), "float8": torch.ones(5).to(torch.float8_e4m3fn)}
    names = sorted(tensors)
    for number, part in enumerate((names[:3], names[3:]), start=1):
        save_file({name: tensors[name] for name in part}, tmp_path / f"x-{number:05d}-of-00002.safetensors")
    with open_tensors(tmp_path / "x-00002-of-00002.safetensors", "--x") as file:
        found = {name: tensor.clone() for name, tensor in file.each((x for x in names if x != "t3"), mapped)}
        assert list(file.each([], mapped)) == []
    assert found.keys() == tensors.keys() - {"t3"}
    for name, tensor in found.items():
        assert tensor.dtype == tensors[name].dtype and torch.equal(tensor.float(), tensors[name].float())


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    with open_tensors(path, "--x") as file:
        os.truncate(path, 2000)
        assert f"--x {path}: the file is truncated" in line(lambda: list(file.each(["a"], mapped=False)))


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from utils.files import write_whole
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
write_whole(Path({str(tmp_path / "a.safetensors")!r}), [b"half"])
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode != 0
    (left,) = tmp_path.iterdir()
    others = [tmp_path / name for name in ("a.safetensors", ".b.1234.unfinished", ".c.tmp", "d.12345678.unfinished")]
    for path in others:
        path.write_bytes(b"mine")
    if sys.platform == "win32":
        os.utime(left, (0, 0))
    assert remove_leftovers(tmp_path, dry_run=True) == [left] and left.exists()
    assert remove_leftovers(tmp_path) == [left] and not left.exists()
    assert all(path.read_bytes() == b"mine" for path in others)
    assert remove_leftovers(tmp_path / "nowhere") == []


def test_what_a_living_process_writes_is_no_leftover(tmp_path, monkeypatch):
    seen = []

    def look(_):
        seen.append(([path.name for path in tmp_path.iterdir()], remove_leftovers(tmp_path)))

    monkeypatch.setattr("os.fsync", look)
    write_whole(tmp_path / "a.bin", [b"12", memoryview(b"3")])
    ((names, removed),) = seen
    assert len(names) == 1 and names[0].startswith(".a.") and removed == []
    assert (tmp_path / "a.bin").read_bytes() == b"123" and os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks to take there")
def test_a_name_that_was_removed_before_it_was_locked_is_not_written_to(tmp_path, monkeypatch):
    import fcntl

    lock, taken = fcntl.flock, []

    def after_a_removal(file, how):
        if not taken:
            taken.append(True)
            for path in tmp_path.iterdir():
                path.unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", after_a_removal)
    write_whole(tmp_path / "a.bin", [b"123"])
    assert os.listdir(tmp_path) == ["a.bin"] and taken


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_is_told_with_the_bytes_needed_and_free(tmp_path, monkeypatch, number):
    (tmp_path / "a.bin").write_bytes(b"before")

    def full(_):
        raise OSError(number, "full")

    monkeypatch.setattr("os.fsync", full)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=123_456))
    text = line(lambda: write_whole(tmp_path / "a.bin", [b"x" * 1000, b"y" * 1000]))
    assert text.startswith(f"{tmp_path / 'a.bin'}: 2,000 bytes are needed, but the disk has 123,456 free.")
    assert (tmp_path / "a.bin").read_bytes() == b"before" and os.listdir(tmp_path) == ["a.bin"]


def test_bytes_of_tensors_are_those_that_the_library_reads_and_aligned(tmp_path):
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(5, dtype=torch.int32), "ö": torch.ones(3).half()}
    for length in range(9):
        parts = to_bytes(tensors, {"z": "ö" * length, "a": '"{}\n'})
        write_whole(tmp_path / "x.safetensors", parts)
        assert len(parts[1]) % 8 == 0
        loaded = load_file(tmp_path / "x.safetensors")
        assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[key], tensors[key]) for key in tensors)
        assert read_metadata(tmp_path / "x.safetensors") == {"z": "ö" * length, "a": '"{}\n'}


def test_weight_files_are_told_apart_by_a_few_megabytes(tmp_path, monkeypatch):
    tensors = {f"t{i}": torch.full((1 << 18,), float(i)) for i in range(40)}  # 1 MiB each
    same, other = tmp_path / "same.safetensors", tmp_path / "other.safetensors"
    save_file(tensors, tmp_path / "x.safetensors")
    shutil.copy(tmp_path / "x.safetensors", same)
    save_file({**tensors, "t17": torch.ones(1 << 18)}, other)
    identities = {path.name: weights_identity(path, "--vae") for path in tmp_path.iterdir()}
    assert identities["x.safetensors"] == identities["same.safetensors"] != identities["other.safetensors"]
    assert sum(length for _, length in _pieces(10 << 30)) == 6 << 20
    for n in (1, 2):
        save_file({f"k{n}": torch.zeros(4)}, tmp_path / f"m-0000{n}-of-00002.safetensors")
    whole = weights_identity(tmp_path / "m-00001-of-00002.safetensors", "--t5")
    assert whole == weights_identity(tmp_path / "m-00002-of-00002.safetensors", "--t5")
    save_file({"k2": torch.ones(4)}, tmp_path / "m-00002-of-00002.safetensors")
    assert whole != weights_identity(tmp_path / "m-00001-of-00002.safetensors", "--t5")


def test_files_tell_the_version_that_the_project_is_installed_as():
    assert f'version = "{VERSION}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
