import importlib
import json
import os
import sys
import time
from pathlib import Path

import pytest

from modules.quarantine import write_quarantine
from tests.media import write_jsonl, write_pictures, write_toml, write_video
from utils.errors import UserError

GENERAL = {"resolution": [64, 64], "caption_extension": ".txt", "enable_bucket": True}


def listed(folder: Path) -> dict[str, str]:
    """Return {file name: reason} of the list in a cache folder."""
    lines = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(line.keys() == {"path", "reason"} for line in lines)
    return {Path(line["path"]).name: line["reason"] for line in lines}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A dataset file over videos of which each but the first has its own fault, and pictures of which one is bare."""
    names = ("good", "cut", "empty", "short", "unknown", "missing", *(["stuck"] if hasattr(os, "mkfifo") else []))
    videos = {name: tmp_path / f"{name}.mp4" for name in names}
    for name in ("good", "cut", "unknown"):
        write_video(videos[name], frames=5)
    write_video(videos["short"], frames=3)
    videos["cut"].write_bytes(videos["cut"].read_bytes()[:1500])
    videos["empty"].touch()
    videos["unknown"].write_bytes(videos["unknown"].read_bytes().replace(b"avc1", b"zzz9"))
    if "stuck" in videos:
        os.mkfifo(videos["stuck"])
    lines = write_jsonl(tmp_path / "v.jsonl", [{"video_path": path, "caption": "x"} for path in videos.values()])
    pictures = write_pictures(tmp_path / "images", {"a": (64, 64), "bare": (64, 64)})
    (pictures / "bare.txt").unlink()
    clips = {"video_jsonl_file": lines, "cache_directory": tmp_path / "v", "target_frames": [5]}
    images = {"image_directory": pictures, "cache_directory": tmp_path / "i"}
    return write_toml(tmp_path / "data.toml", GENERAL, clips, images)


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    importlib.import_module(script.removesuffix(".py")).main()


def test_every_bad_file_is_listed_with_its_reason_and_the_run_goes_on(data: Path, models, run_cli, monkeypatch):
    folder = data.parent
    command = ["wan_cache_latents.py", "--dataset_config", data, "--vae", models["vae"], "--device", "cpu"]
    start = time.monotonic()
    done = run_cli(*command, "--decode_timeout", "1", "--num_workers", "1")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 60  # nothing waits for the pipe that nobody writes to
    reasons = listed(folder / "v")
    expected = {"cut": "cannot be read", "empty": "cannot be read", "short": "is shorter than the 5 frames"}
    expected |= {"unknown": "", "missing": "cannot be read"}
    if hasattr(os, "mkfifo"):
        expected["stuck"] = "gave no frame for 1 seconds"
    assert reasons.keys() == {f"{name}.mp4" for name in expected}
    for name, reason in expected.items():
        assert reason in reasons[f"{name}.mp4"] and reasons[f"{name}.mp4"] in done.stderr
    assert listed(folder / "i") == {"bare.png": f"{folder / 'images' / 'bare.png'}: has no caption"}
    assert f"2 cache files written, 0 kept, {len(expected) + 1} failed" in done.stderr
    assert (folder / "v" / "good_00000-005_0080x0048_wan.safetensors").is_file()

    with pytest.raises(
        UserError, match=f"--strict: {len(expected) + 1} media files could not be used, the first: .*cut"
    ):
        run(monkeypatch, *command, "--decode_timeout", "1", "--skip_existing", "--strict")
    texts = ["wan_cache_text_encoder_outputs.py", "--dataset_config", data, "--t5", models["t5"], "--device", "cpu"]
    texts += ["--t5_tokenizer", models["tokenizer"], "--strict"]
    with pytest.raises(UserError, match="--strict: 1 media files could not be used, the first: .*bare.png"):
        run(monkeypatch, *texts)
    assert listed(folder / "v") == reasons

    # What works again leaves the list.
    for name in expected:
        (folder / f"{name}.mp4").unlink(missing_ok=True)
        write_video(folder / f"{name}.mp4", frames=5)
    (folder / "images" / "bare.txt").write_text("a red square")
    run(monkeypatch, *texts)
    assert not (folder / "i" / "quarantine.jsonl").exists() and listed(folder / "v") == reasons
    run(monkeypatch, *command, "--skip_existing", "--strict")
    assert not (folder / "v" / "quarantine.jsonl").exists()
    assert len(list((folder / "v").glob("*-005_0080x0048_wan.safetensors"))) == len(expected) + 1


def test_a_list_that_somebody_has_edited_is_no_error(tmp_path: Path):
    (tmp_path / "quarantine.jsonl").write_text('nonsense\n[1]\n{"path": "a.mp4", "reason": "cut"}\n')
    write_quarantine(tmp_path, {Path("b.mp4"): "b.mp4: has no caption"}, captions_only=True)
    assert listed(tmp_path) == {"a.mp4": "cut", "b.mp4": "b.mp4: has no caption"}
    write_quarantine(tmp_path, {}, captions_only=True)
    assert listed(tmp_path) == {"a.mp4": "cut"}
    write_quarantine(tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_a_time_limit_must_leave_time(data: Path, models, monkeypatch):
    with pytest.raises(UserError, match="--decode_timeout 0: must be more than 0 seconds"):
        run(
            monkeypatch, "wan_cache_latents.py", "--dataset_config", data, "--vae", models["vae"], "--decode_timeout", 0
        )
