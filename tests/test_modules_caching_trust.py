"""What --skip_existing keeps and why not, what is deleted, and what is named and left."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dataset.cache import read_header
from dataset.provenance import KEY
from modules.caching import CachingOptions
from tests.caching_runs import MODELS, OPTIONS, Runs, make_runs

SKIPPING = replace(OPTIONS, skip_existing=True)


@pytest.fixture
def runs(recipe, golden, tmp_path) -> Runs:
    """Return runs over pictures a to d and videos x to z that have been cached once."""
    made = make_runs(tmp_path, recipe, golden)
    made.run()
    return made


def said(runs: Runs, caplog: pytest.LogCaptureFixture, options: CachingOptions = SKIPPING) -> list[str]:
    """Return the lines that a run says."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        runs.run(options)
    return [record.message for record in caplog.records]


def times(runs: Runs) -> dict[str, int]:
    return {name: (runs.folder / name).stat().st_mtime_ns for name in runs.files()}


def test_a_run_says_why_it_makes_what_again_in_a_line_for_each_reason(runs, caplog, monkeypatch):
    assert said(runs, caplog) == []
    before = times(runs)
    for name in "ab":
        path = runs.folder / "images" / f"{name}.png"
        path.write_bytes(path.read_bytes() + b"more")
        (path.with_suffix(".txt")).write_text("another caption")
    video = runs.folder / "videos" / "x.mp4"
    video.write_bytes(video.read_bytes() + b"more")
    (runs.folder / "i" / "c_wan_te.safetensors").write_bytes(b"torn")
    os.utime(runs.folder / "videos" / "y.mp4", ns=(0, 0))
    assert said(runs, caplog) == [
        "10 items: the video file changed",
        "2 items: the picture changed",
        "2 items: caption changed",
        "1 item: damaged",
    ]
    made = {name for name, time in times(runs).items() if time != before[name]}
    assert len(made) == 15 and not any("/y_" in name or "/z_" in name for name in made)
    monkeypatch.setitem(MODELS, "vae", "another VAE")
    assert said(runs, caplog) == ["34 items: made with another VAE"]
    assert said(runs, caplog) == []


def test_what_matches_is_not_decoded(runs, caplog, monkeypatch):
    monkeypatch.setattr("modules.latent_caching.read_clips", lambda *_: pytest.fail("a file was decoded"))
    monkeypatch.setattr("dataset.provenance.content_hash", lambda *_: pytest.fail("a file was read"))
    assert said(runs, caplog) == []


def test_files_of_another_program_are_kept_with_one_note(runs, caplog):
    before = {}
    for name in runs.files():
        path = runs.folder / name
        if name.startswith("i/"):
            metadata = {key: value for key, value in read_header(path).metadata.items() if key != KEY}
            save_file(load_file(path), path, metadata)
        before[name] = path.read_bytes()
    latents, texts = said(runs, caplog)
    assert latents.startswith("4 items: the cache files do not tell how they were made") and "a_0048x0048" in latents
    assert texts.startswith("4 items: the cache files do not tell how they were made") and "a_wan_te" in texts
    assert runs.files() == before


def test_only_files_of_this_dataset_are_deleted_after_they_were_listed(runs, caplog):
    folder = runs.folder / "i"
    kinds = ("_0048x0048_wan.safetensors", "_wan_te.safetensors")
    for name in "abc":
        (runs.folder / "images" / f"{name}.png").unlink()
    for kind in kinds:
        untold = folder / f"a{kind}"
        metadata = {key: value for key, value in read_header(untold).metadata.items() if key != KEY}
        save_file(load_file(untold), untold, metadata)
        (folder / f"b{kind}").write_bytes((folder / f"b{kind}").read_bytes()[:-1])
        (folder / f"holiday{kind}").write_text("my own file")
        other = read_header(folder / f"d{kind}").metadata
        other[KEY] = other[KEY].replace("image images", "image others").replace("image ../images", "image ../others")
        save_file(load_file(folder / f"d{kind}"), folder / f"other{kind}", other)
    before = runs.files()
    keeping = said(runs, caplog, replace(SKIPPING, keep_cache=True))
    assert runs.files() == before and sum(line.startswith("no longer used, ") for line in keeping) == 2
    lines = said(runs, caplog)
    gone = {f"i/c{kind}" for kind in kinds}
    assert before.keys() - runs.files().keys() == gone
    assert [line for line in lines if line.startswith("to be deleted, ")] == [
        f"to be deleted, no media file of the dataset belongs to it: {runs.folder / name}" for name in sorted(gone)
    ]
    for kind in kinds:
        left = ", ".join(f"{name}{kind}" for name in ("a", "b", "holiday", "other"))
        assert any(line.startswith(str(folder)) and line.endswith(f": {left}") for line in lines), lines


def test_what_another_run_has_deleted_already_is_no_error(runs, monkeypatch):
    (runs.folder / "images" / "a.png").unlink()
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: (unlink(path, True), unlink(path, missing_ok)))
    runs.run(SKIPPING)
    assert not (runs.folder / "i" / "a_wan_te.safetensors").exists()
