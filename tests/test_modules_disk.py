"""Room on the disk: what is planned is what is written, and a full disk costs a save, not a run."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from modules import disk
from modules.checkpoints import Checkpoints
from modules.disk import check_room, peak_bytes, save_where_there_is_room, sizes
from modules.milestones import FILE, STATE, milestones
from modules.run_log import read_log
from modules.states import States, find_state
from tests.test_modules_trainer import trainer  # noqa: F401
from utils.errors import UserError

Usage = namedtuple("Usage", "total used free")


def bytes_in(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("optimizer", ["AdamW", "adamw8bit --network_dim 64", "adafactor --network_dim 32"])
def test_sizes_are_those_of_the_files_and_states_that_come(trainer, optimizer):  # noqa: F811
    run = trainer(f"--max_train_steps 1 --save_state_on_train_end --optimizer_type {optimizer} --learning_rate 1e-3")
    told = sizes(run.plan, torch.device("cpu"))
    run.run()
    folder = run.plan.options.saving.output_dir
    assert told[FILE] == pytest.approx((folder / "name.safetensors").stat().st_size, rel=0.3, abs=disk._HEADERS)
    state = bytes_in(folder / "name-state")
    assert state * 0.75 < told[STATE] < state * 1.3 + 2 * disk._HEADERS


@pytest.mark.parametrize(
    "options",
    [
        "--save_every_n_steps 2 --save_last_n_steps 4 --save_state --save_last_n_steps_state 1",
        "--save_every_n_epochs 1 --save_last_n_epochs 1 --save_every_n_steps 3 --save_state_on_train_end",
    ],
)
def test_the_planned_peak_is_what_is_there_at_most(trainer, monkeypatch, options):  # noqa: F811
    run = trainer(f"--max_train_epochs 2 {options}")
    folder, most = run.plan.options.saving.output_dir, [0]

    def look():
        files = len([*folder.glob("*.safetensors")])
        states = len([path for path in folder.glob("name*-state") if path.is_dir()])
        most[0] = max(most[0], 1000 * files + 7 * states)

    for keeper in (Checkpoints, States):
        delete = keeper.delete
        monkeypatch.setattr(keeper, "delete", lambda self, path, delete=delete: look() or delete(self, path))
    run.run()
    look()
    assert peak_bytes(run.plan, milestones(run.plan), {FILE: 1000, STATE: 7}) == most[0]


def test_a_disk_without_room_for_one_save_is_refused_and_one_without_room_for_all_is_told(
    trainer,  # noqa: F811
    monkeypatch,
    caplog,
):
    options = "--max_train_steps 9 --save_every_n_steps 3 --save_state"
    plan = trainer(options).plan
    planned, size = milestones(plan), sizes(plan, torch.device("cpu"))
    one, every = size[FILE] + size[STATE], peak_bytes(plan, planned, size)
    assert every == 4 * one
    for free, refused, told in ((one - 1, True, False), (every - 1, False, True), (every, False, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(0, 0, free))
        caplog.clear()
        if refused:
            monkeypatch.setattr("modules.trainer.load_dit", lambda *args, **kwargs: pytest.fail("the model was loaded"))
            with pytest.raises(UserError, match="--output_dir .*: a file and a state of this run take .* free"):
                trainer(options)
        else:
            check_room(plan, planned, size)
        assert ("keep fewer with --save_last_n_epochs" in caplog.text) == told


def test_what_rotates_out_goes_first_where_that_makes_the_room_and_only_there(tmp_path, monkeypatch):
    old = tmp_path / "old"
    for free, gone in ((99, True), (89, False), (100, False)):
        old.write_bytes(b"x" * 10)
        room = [free]
        monkeypatch.setattr(shutil, "disk_usage", lambda path, room=room: Usage(0, 0, room[0]))

        def delete(path, room=room):
            room[0] += 10
            path.unlink()

        done = save_where_there_is_room(lambda: None, tmp_path / "new", 100, old, delete)
        assert done == (free >= 90) and old.exists() != gone


def test_a_write_that_fails_for_other_reasons_fails(tmp_path):
    def write():
        raise OSError(errno.EIO, "broken")

    with pytest.raises(OSError, match="broken"):
        save_where_there_is_room(write, tmp_path / "new", 1)


def test_the_last_file_is_waited_for_and_no_longer_than_agreed(tmp_path, monkeypatch):
    now, lines = [0.0], []

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(disk, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 1))

    def tell(text, *values):
        lines.append(text % values)

    assert not save_where_there_is_room(lambda: None, tmp_path / "new", 10**9, patience=1500, tell=tell)
    assert now[0] == 1500 and len(lines) == 3
    assert "takes 1 GB, the disk has 1 bytes free; waiting for room" in lines[0]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own, of 6 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root alone")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("known", [True, False])
def test_a_full_disk_costs_saves_and_no_training_and_the_last_file_waits_for_room(
    trainer,  # noqa: F811
    small_disk,
    monkeypatch,
    caplog,
    known,
):
    options = "--max_train_steps 4 --network_dim 16 --learning_rate 1e-3"
    trainer(f"{options} --output_dir {small_disk.parent / 'straight'}").run()
    run = trainer(f"{options} --save_every_n_steps 1 --save_state --output_dir {small_disk}")
    filler, step = small_disk / "filler", run.record.step
    if not known:  # as under a quota, which the free space does not tell
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10**12))

    def fill(number, *values, **more):
        if number == 2:
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                while file.write(b"x" * 4096):
                    pass
        step(number, *values, **more)

    run.record.step = fill
    monkeypatch.setattr(disk, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: filler.unlink()))
    run.run()
    names = sorted(path.name for path in small_disk.iterdir())
    assert names == [
        "name-state",
        "name-step00000001-state",
        "name-step00000001.safetensors",
        "name.safetensors",
        "name_log.jsonl",
        "name_report.html",
    ]
    assert find_state("latest", small_disk, "name").progress.step == 4
    last, want = (load_file(folder / "name.safetensors") for folder in (small_disk, small_disk.parent / "straight"))
    assert all(torch.equal(last[key], want[key]) for key in want)
    lines = list(read_log(small_disk / "name_log.jsonl"))
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4] and lines[-1]["kind"] == "end"
    warnings = [line["text"] for line in lines if line["kind"] == "warning"]
    assert len(warnings) == 7 and "name-step00000002.safetensors is not saved: it takes " in warnings[0]
    assert "; training goes on without it" in warnings[0] and "; waiting for room" in warnings[-1]
