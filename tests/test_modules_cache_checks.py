"""Training refuses caches that are no longer those of the dataset, before a model is loaded."""

import logging
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

import wan_train
import wan_train_network
from dataset.config import load_config
from dataset.items import captions_now
from dataset.loader import CachedDataset
from modules.cache_checks import changed_captions, check_fresh
from tests.media import write_jsonl, write_toml
from tests.test_dataset_loader import cached
from utils.errors import UserError


def folder_dataset(folder: Path, **keys: object) -> CachedDataset:
    """Return the dataset over three caches whose captions are `caption 0` to `caption 2`."""
    cached(folder / "cache", 3)
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for i in range(3):
        (images / f"a{i:02d}.txt").write_text(f" caption {i}\n")
    table = {"image_directory": images, "cache_directory": folder / "cache", "caption_extension": ".txt", **keys}
    return CachedDataset(load_config(write_toml(folder / "data.toml", {"resolution": 64}, table)), seed=0)


def test_captions_that_changed_are_counted_with_the_first_and_allowed_on_request(tmp_path, caplog):
    data = folder_dataset(tmp_path)
    check_fresh(data, allow_stale=False)
    for name in ("a01", "a02"):
        (tmp_path / "images" / f"{name}.txt").write_text("another")
    first = tmp_path / "cache" / "a01_0064x0064_wan.safetensors"
    line = f"latent caches whose caption is another one than when its text was cached: 2, the first is {first}"
    with pytest.raises(UserError) as error:
        check_fresh(data, allow_stale=False)
    assert str(error.value) == (
        f"{line}. Run wan_cache_text_encoder_outputs.py with --skip_existing, or train on the old one with "
        "--allow_stale."
    )
    with caplog.at_level(logging.WARNING):
        check_fresh(data, allow_stale=True)
    assert [record.message for record in caplog.records] == [f"--allow_stale: {line}"]


def test_neither_media_nor_captions_need_be_there(tmp_path):
    data = folder_dataset(tmp_path)
    (tmp_path / "images" / "a01.txt").unlink()
    check_fresh(data, allow_stale=False)
    shutil.rmtree(tmp_path / "images")
    check_fresh(data, allow_stale=False)


def test_captions_of_a_list_are_compared_whether_its_media_are_there_or_not(tmp_path):
    lines = [{"video_path": f"gone/{name}", "caption": f"caption {name}"} for name in ("a.mp4", "b.v1", "c.x.mkv")]
    table = {"video_jsonl_file": write_jsonl(tmp_path / "v.jsonl", lines), "cache_directory": tmp_path / "cache"}
    (config,) = load_config(write_toml(tmp_path / "data.toml", {"resolution": 64}, table | {"target_frames": [1]}))
    now = {"a": ("caption a.mp4",), "b.v1": ("caption b.v1",), "c.x": ("caption c.x.mkv",)}
    assert captions_now(config, []) == now
    config.jsonl_file.unlink()
    assert captions_now(config, []) == {}


def test_a_list_whose_caption_changed_is_told(tmp_path):
    cached(tmp_path / "cache", 2)
    lines = [{"image_path": f"gone/a{i:02d}.png", "caption": f"caption {i}"} for i in range(2)]
    lines[1]["caption"] = "another"
    table = {"image_jsonl_file": write_jsonl(tmp_path / "i.jsonl", lines), "cache_directory": tmp_path / "cache"}
    configs = load_config(write_toml(tmp_path / "data.toml", {"resolution": 64}, table))
    assert [path.name for path in changed_captions(CachedDataset(configs, 0))] == ["a01_0064x0064_wan.safetensors"]


def test_latents_without_text_are_refused_or_left_out(tmp_path, caplog):
    folder_dataset(tmp_path)
    text = tmp_path / "cache" / "a00_wan_te.safetensors"
    text.write_bytes(text.read_bytes()[:-1])
    (tmp_path / "cache" / "a02_wan_te.safetensors").unlink()
    data = CachedDataset(load_config(tmp_path / "data.toml"), seed=0)
    first = tmp_path / "cache" / "a00_0064x0064_wan.safetensors"
    with pytest.raises(UserError, match="latent caches without a text cache: 2, the first is ") as error:
        check_fresh(data, allow_stale=False)
    assert str(first) in str(error.value) and "leave them out with --allow_stale" in str(error.value)
    check_fresh(data, allow_stale=True)
    assert "--allow_stale: latent caches without a text cache: 2" in caplog.text and len(data) == 1


@pytest.mark.parametrize("script", [wan_train, wan_train_network])
def test_both_trainers_refuse_before_the_model_loads(tmp_path, golden, models, monkeypatch, caplog, script):
    caches = tmp_path / "cache"
    shutil.copytree(golden / "cache" / "t2v_images", caches)
    first = min(caches.glob("*_wan.safetensors"))
    (tmp_path / f"{first.name.rsplit('_', 2)[0]}.txt").write_text("quite another caption")
    table = {"image_directory": tmp_path, "cache_directory": caches, "caption_extension": ".txt"}
    data = write_toml(tmp_path / "data.toml", {"resolution": 64}, table)
    paths = {"--dit": models["dit_t2v"], "--dataset_config": data, "--output_dir": tmp_path / "out"}
    given = shlex.split("script --task t2v-1.3B --max_data_loader_n_workers 0 --output_name x --max_train_steps 1")
    given += [str(word) for pair in paths.items() for word in pair]
    monkeypatch.setattr("modules.trainer.load_dit", lambda *args, **kwargs: sys.exit("loaded"))
    for more, error, text in (
        ([], UserError, f"was cached: 1, the first is {first}."),
        (["--allow_stale"], SystemExit, "loaded"),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(sys, "argv", [*given, *more])
        with pytest.raises(error) as raised:
            script.main()
        assert text in str(raised.value)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "--allow_stale: latent caches whose caption" in caplog.text
