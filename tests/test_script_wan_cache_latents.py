import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import wan_cache_latents
from tests.media import write_jsonl, write_pictures, write_toml, write_video
from utils.errors import UserError

GENERAL = {"resolution": [64, 64], "caption_extension": ".txt", "enable_bucket": True, "batch_size": 2}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A dataset file over two pictures, two good videos and a broken one."""
    images = write_pictures(tmp_path / "images", {"a": (64, 64), "b": (80, 48)})
    videos = [write_video(tmp_path / f"{name}.mp4", frames=9, fps=30) for name in ("one", "two", "bad")]
    videos[-1].write_bytes(videos[-1].read_bytes()[:1500])
    listed = write_jsonl(tmp_path / "v.jsonl", [{"video_path": video, "caption": "a red square"} for video in videos])
    pictures = {"image_directory": images, "cache_directory": tmp_path / "cache_i"}
    clips = {"video_jsonl_file": listed, "cache_directory": tmp_path / "cache_v"}
    return write_toml(tmp_path / "data.toml", GENERAL, pictures, clips | {"target_frames": [1, 5], "source_fps": 30})


def error_of(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["wan_cache_latents.py", *map(str, arguments)])
    with pytest.raises(UserError) as error:
        wan_cache_latents.main()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_writes_complete_caches_names_the_broken_video_and_a_second_run_keeps_them(data, models, run_cli):
    command = ["wan_cache_latents.py", "--dataset_config", data, "--vae", models["vae"], "--device", "cpu"]
    done = run_cli(*command)
    assert done.returncode == 0, done.stderr
    assert "bad.mp4: cannot be read" in done.stderr and "6 cache files written, 0 kept, 1 failed" in done.stderr
    names = {path.name for folder in ("cache_i", "cache_v") for path in (data.parent / folder).glob("*.s*")}
    windows = [f"{name}_00000-00{n}_0080x0048_wan.safetensors" for name in ("one", "two") for n in (1, 5)]
    assert names == {"a_0064x0064_wan.safetensors", "b_0080x0048_wan.safetensors", *windows}
    tensors = load_file(data.parent / "cache_v" / windows[1])
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == {
        "latents_2x6x10_bfloat16": ((16, 2, 6, 10), torch.bfloat16)
    }
    again = run_cli(*command, "--skip_existing", "--batch_size", "1", "--num_workers", "1")
    assert again.returncode == 0 and "0 cache files written, 6 kept, 1 failed" in again.stderr


def test_clip_brings_the_condition_of_image_to_video(data: Path, models, run_cli):
    command = ["wan_cache_latents.py", "--dataset_config", data, "--vae", models["vae"], "--clip", models["clip"]]
    done = run_cli(*command, "--vae_dtype=float32", "--vae_cache_cpu", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    tensors = load_file(data.parent / "cache_v" / "two_00000-005_0080x0048_wan.safetensors")
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == {
        "latents_2x6x10_float32": ((16, 2, 6, 10), torch.float32),
        "latents_image_2x6x10_float32": ((20, 2, 6, 10), torch.float32),
        "clip_float32": ((257, 1280), torch.float16),
    }
    assert tensors["latents_image_2x6x10_float32"][:4].flatten(2).mean(2).tolist() == [[1, 0]] * 4


def test_what_is_missing_is_said_before_anything_loads(data: Path, models, monkeypatch, tmp_path: Path):
    assert "--dataset_config is missing" in error_of(monkeypatch)
    assert "--vae is missing" in error_of(monkeypatch, "--dataset_config", data)
    assert "no such file" in error_of(monkeypatch, "--dataset_config", data, "--vae", tmp_path / "vae.safetensors")
    given = ["--dataset_config", data, "--vae", models["vae"]]
    assert "--clip" in error_of(monkeypatch, *given, "--clip", tmp_path / "nowhere.pth")
    assert "--one_frame needs image datasets" in error_of(monkeypatch, *given, "--one_frame", "--device", "cpu")
    assert "--flf2v: the model sees CLIP features of both frames" in error_of(monkeypatch, *given, "--flf2v")
    both = error_of(monkeypatch, *given, "--flf2v", "--one_frame", "--clip", models["clip"])
    assert "--flf2v, --one_frame: are for different datasets" in both
    assert "needs video datasets" in error_of(monkeypatch, *given, "--flf2v", "--clip", models["clip"])
    assert "Did you mean '--skip_existing'?" in error_of(monkeypatch, *given, "--skip_exsting")
    assert "--batch_size 0: must be at least 1" in error_of(monkeypatch, *given, "--batch_size", 0)
    assert not (tmp_path / "cache_i").exists()


def test_weights_of_another_kind_are_refused_by_name(data: Path, models, monkeypatch):
    error = error_of(monkeypatch, "--dataset_config", data, "--vae", models["t5"], "--device", "cpu")
    assert str(models["t5"]) in error and "not the Wan2.1 VAE" in error


def test_debug_mode_shows_the_examples_and_needs_no_model(data: Path, monkeypatch, capsys):
    shown = ["wan_cache_latents.py", "--dataset_config", str(data), "--debug_mode"]
    monkeypatch.setattr(sys, "argv", [*shown, "video"])
    wan_cache_latents.main()
    names = {path.name for folder in ("cache_i", "cache_v") for path in (data.parent / folder / "preview").iterdir()}
    assert {"a_0064x0064_wan.png", "one_00000-005_0080x0048_wan.mp4"} <= names and len(names) == 6
    monkeypatch.setattr(sys, "argv", [*shown, "console", "--console_width", "8", "--console_num_images", "1"])
    wan_cache_latents.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("▀") for line in lines] == [8] * len(lines) and len(lines) == 4 + 2
