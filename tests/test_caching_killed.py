"""Caching runs that are killed, run out of disk, or run at once leave nothing but whole files."""

import errno
import logging
import os
from dataclasses import replace

import pytest

from dataset.cache import read_header
from tests.caching_runs import OPTIONS, Runs, kill_at_random, make_runs
from tests.forked import needs_fork
from utils.errors import UserError

SKIPPING = replace(OPTIONS, skip_existing=True)


@pytest.fixture
def runs(recipe, golden, tmp_path) -> Runs:

    return make_runs(tmp_path, recipe, golden)


@needs_fork
def test_after_random_kills_a_clean_pass_gives_the_files_of_an_undisturbed_run(runs: Runs, caplog):
    runs.run()
    undisturbed = runs.files()
    assert len(undisturbed) == 4 + 4 + 3 * (9 + 1) + 3
    for config in runs.configs:
        for path in config.cache_directory.iterdir():
            path.unlink()
    killed, _ = kill_at_random(runs, 8)
    assert killed == 8
    for name in runs.files():
        if not name.endswith(".unfinished"):
            read_header(runs.folder / name)
    runs.run(SKIPPING)
    assert runs.files() == undisturbed


@needs_fork
def test_a_leftover_of_a_killed_run_is_removed_by_the_next_one(runs: Runs, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: os.kill(os.getpid(), 9))
        process = runs.start()
        process.join()
    (left,) = runs.files()
    assert process.exitcode == -9 and left.endswith(".unfinished")
    with caplog.at_level(logging.INFO):
        runs.run(SKIPPING)
    assert f"removed, left by a run that was killed: {runs.folder / left}" in caplog.text
    assert left not in runs.files()


@needs_fork
def test_two_runs_at_once_on_one_cache_folder_give_whole_files(runs: Runs):
    runs.run()
    alone = runs.files()
    (runs.folder / "images" / "d.png").unlink()  # both find its caches stale
    for options in (OPTIONS, SKIPPING):
        both = [runs.start(options), runs.start(options)]
        for process in both:
            process.join()
        assert [process.exitcode for process in both] == [0, 0]
        assert runs.files() == {name: content for name, content in alone.items() if not name.startswith("i/d_")}


def test_a_full_disk_ends_the_run_in_one_line_and_earlier_files_are_valid(runs: Runs, monkeypatch):
    written = []

    def room_for_three(_):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(True)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", room_for_three)
        with pytest.raises(UserError, match=r"_wan.safetensors: [\d,]+ bytes are needed, but the disk has [\d,]+ free"):
            runs.run()
    files = runs.files()
    assert len(files) == 3
    for name in files:
        read_header(runs.folder / name)
    runs.run(SKIPPING)
    kept = runs.files()
    assert files == {name: kept[name] for name in files} and len(kept) == 41
