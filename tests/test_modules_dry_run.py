"""What a caching run says it would do, and that it does none of it."""

import logging
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import wan_cache_latents
import wan_cache_text_encoder_outputs
from dataset.cache import read_header
from dataset.config import DatasetConfig, load_config
from modules.caching import CachingOptions
from modules.dry_run import seconds_per_byte
from modules.latent_caching import cache_latents
from modules.latent_encoding import I2V, ONE_FRAME, T2V, LatentEncoders
from tests.media import write_jsonl, write_pictures, write_toml, write_video
from wan.clip import ImageEncoder, build_clip
from wan.vae import build_vae

DRY = CachingOptions(device="cpu", num_workers=1, dry_run=True)


def everything(folder: Path) -> dict[Path, tuple]:
    """Return what is in a folder and below it, with times and contents."""
    paths = [folder, *folder.rglob("*")]
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in paths}


def load(folder: Path, *tables: dict) -> list[DatasetConfig]:
    general = {"resolution": [64, 64], "caption_extension": ".txt", "enable_bucket": True}
    return load_config(write_toml(folder / "data.toml", general, *tables))


def test_a_dry_run_of_the_scripts_tells_all_and_does_nothing(tmp_path, models, monkeypatch, caplog):
    images = write_pictures(tmp_path / "images", {name: (64, 64) for name in "abc"})
    load(tmp_path, {"image_directory": images, "cache_directory": tmp_path / "cache"})
    given = ["--dataset_config", tmp_path / "data.toml", "--device", "cpu", "--skip_existing"]
    vae = ["--vae", models["vae"]]
    t5 = ["--t5", models["t5"], "--t5_tokenizer", models["tokenizer"]]

    def said(script, *options) -> str:
        caplog.clear()
        monkeypatch.setattr(sys, "argv", ["script", *map(str, given), *map(str, options)])
        with caplog.at_level(logging.INFO):
            script.main()
        return caplog.text

    before = everything(tmp_path)
    for script, weights in ((wan_cache_latents, vae), (wan_cache_text_encoder_outputs, t5)):
        text = said(script, *weights, "--dry_run")
        assert everything(tmp_path) == before
        assert "3 items: not cached yet" in text and "3 items, about 0." in text
        assert "dry run: nothing was written, changed or deleted" in text
        assert "3 cache files written" in said(script, *weights)
        before = everything(tmp_path)
    (images / "a.png").unlink()
    (images / "b.txt").write_text("another")
    (images / "c.png").write_bytes((images / "c.png").read_bytes() + b"more")
    before = everything(tmp_path)
    text = said(wan_cache_latents, *vae, "--dry_run")
    assert "1 item: the picture changed" in text
    assert re.search(r"would be deleted, .*a_0064x0064_wan.safetensors", text)
    text = said(wan_cache_text_encoder_outputs, *t5, "--dry_run", "--fp8_t5")
    assert "1 item: caption changed" in text and "1 item: made with another T5" in text
    assert re.search(r"would be deleted, .*a_wan_te.safetensors", text)
    assert everything(tmp_path) == before


@pytest.fixture(scope="module")
def encoders(recipe, golden) -> LatentEncoders:
    vae = build_vae(recipe.state_dict("vae", str(golden)))
    return LatentEncoders(vae, ImageEncoder(build_clip(recipe.state_dict("clip", str(golden)), torch.float32, heads=4)))


@pytest.mark.parametrize(("kind", "names"), [("t2v", T2V), ("i2v", I2V), ("control", T2V), ("one_frame", ONE_FRAME)])
def test_the_bytes_told_are_those_written(tmp_path, encoders, caplog, kind, names):
    tables = [{"image_directory": write_pictures(tmp_path / "images", {"a": (128, 128)})}]
    if kind == "one_frame":
        lines = [{"image_path": tmp_path / "images" / "a.png", "caption": "x"}]
        lines[0] |= {"control_path_0": lines[0]["image_path"], "control_path_1": lines[0]["image_path"]}
        tables = [{"image_jsonl_file": write_jsonl(tmp_path / "l.jsonl", lines)}]
        tables[0] |= {"fp_1f_clean_indices": [0, 2], "fp_1f_target_index": 1}
    elif kind == "control":
        tables[0] |= {"control_directory": tmp_path / "images"}
    else:
        (tmp_path / "v").mkdir()
        (tmp_path / "v" / "b.txt").write_text("x")
        write_video(tmp_path / "v" / "b.mp4", frames=5, width=128, height=128)
        tables += [
            {"video_directory": tmp_path / "v", "target_frames": [1, 5], "cache_directory": tmp_path / "cache_v"}
        ]
    tables = [table | {"cache_directory": tmp_path / f"cache{i}", "resolution": 128} for i, table in enumerate(tables)]
    configs = load(tmp_path, *tables)
    with caplog.at_level(logging.INFO):
        cache_latents(configs, lambda: pytest.fail("loaded"), torch.float32, DRY, names)
    told = [float(megabytes) for megabytes in re.findall(r"about ([\d.]+) MB", caplog.text)]
    cache_latents(configs, lambda: encoders, torch.float32, replace(DRY, dry_run=False), names)
    written = [sum(path.stat().st_size for path in config.cache_directory.iterdir()) for config in configs]
    # Features of the published CLIP; those of the recorded one are narrower.
    written = [
        size + ("clip" in names) * _missing_features(config) for size, config in zip(written, configs, strict=True)
    ]
    assert len(told) == len(written)
    for megabytes, size in zip(told, written, strict=True):
        assert abs(megabytes - size / 1e6) < 0.051 + 0.02 * size / 1e6


def _missing_features(config: DatasetConfig) -> int:
    headers = map(read_header, config.cache_directory.iterdir())
    shapes = [header.by_batch_name().get("clip", (0, 0)) for header in headers]
    return sum(torch.Size(shape[:-1]).numel() * (1280 - shape[-1]) * 2 for shape in shapes)


def test_the_pace_is_that_of_the_newest_run_of_files(tmp_path):
    assert seconds_per_byte(tmp_path / "nowhere") is None
    for number in range(10):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(b"x" * 100)
        moment = 2 * number if number < 5 else 100_000 + 3 * number
        os.utime(path, (moment, moment))
    assert seconds_per_byte(tmp_path) == pytest.approx(3 / 100)
    (tmp_path / "9.safetensors").unlink()
    assert seconds_per_byte(tmp_path) is None
