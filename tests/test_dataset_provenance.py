"""A cache file says how it was made, and what has changed since then is told by that."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dataset.cache import read_header, text_path, why_remake_latents, why_remake_text, write_latents, write_text
from dataset.config import ImageConfig, VideoConfig
from dataset.items import DatasetItem, Source
from dataset.provenance import KEY, Making
from tests.media import write_pictures, write_video
from utils.errors import UserError
from utils.version import VERSION

LATENTS = {"latents": torch.zeros(16, 1, 8, 12)}


@pytest.fixture
def config(tmp_path: Path) -> ImageConfig:
    images = write_pictures(tmp_path / "data" / "images", {"a": (96, 64), "control": (96, 64)})
    return ImageConfig(where="test", cache_directory=tmp_path / "data" / "cache", image_directory=images)


def item(config: ImageConfig, caption: str = "x", controls: tuple[Path, ...] = ()) -> DatasetItem:
    return DatasetItem(Source(config.image_directory / "a.png", caption, False, controls), 96, 64, 96, 64)


def why(config: ImageConfig, item: DatasetItem, **making: object) -> str | None:
    return why_remake_latents(config, item, ["latents"], torch.float32, Making(**making))


def put(config: ImageConfig, item: DatasetItem, **making: object) -> Path:
    return write_latents(config, item, LATENTS, torch.float32, Making(**making))


def test_a_cache_says_how_it_was_made_under_one_key(config):
    made = put(config, item(config, controls=(config.image_directory / "control.png",)), models={"vae": "v"})
    recorded = json.loads(read_header(made).metadata[KEY])
    state = (config.image_directory / "a.png").stat()
    assert len(recorded["media"].pop("sha256")) == 32 and len(recorded["controls"][0].pop("sha256")) == 32
    assert recorded["controls"][0]["path"] == "../images/control.png"
    del recorded["controls"]
    assert recorded == {
        "version": VERSION,
        "dataset": "image ../images",
        "kind": "t2v",
        "models": {"vae": "v"},
        "media": {"path": "../images/a.png", "size": state.st_size, "mtime_ns": state.st_mtime_ns},
        "window": [0, 1],
        "bucket": [96, 64],
        "source_fps": None,
    }
    text = write_text(config, item(config).source, torch.zeros(2, 4), Making(models={"t5": "t"}))
    recorded = json.loads(read_header(text).metadata[KEY])
    assert len(recorded.pop("caption")) == 16
    assert recorded == {
        "version": VERSION,
        "dataset": "image ../images",
        "models": {"t5": "t"},
        "media": {"path": "../images/a.png"},
    }


def test_the_same_example_gives_the_same_bytes(config):
    """The library that writes the files puts metadata into an order of chance."""
    assert len({put(config, item(config), models={"vae": "v"}).read_bytes() for _ in range(8)}) == 1


def test_media_whose_content_is_the_same_match_whatever_their_time_and_place(config, tmp_path, monkeypatch):
    put(config, item(config))
    picture = config.image_directory / "a.png"
    with monkeypatch.context() as patch:
        patch.setattr("dataset.provenance.content_hash", lambda *_: pytest.fail("the file was read"))
        assert why(config, item(config)) is None
        shutil.copytree(tmp_path / "data", tmp_path / "moved")  # keeps times
        moved = replace(
            config, cache_directory=tmp_path / "moved" / "cache", image_directory=tmp_path / "moved" / "images"
        )
        assert why(moved, item(moved)) is None
    os.utime(picture, ns=(0, 0))
    assert why(config, item(config)) is None
    elsewhere = replace(config, image_directory=tmp_path / "elsewhere")
    shutil.copytree(config.image_directory, elsewhere.image_directory)
    assert why(elsewhere, item(elsewhere)) is None


def test_media_that_changed_are_told_also_where_size_or_time_are_the_same(config):
    put(config, item(config))
    picture = config.image_directory / "a.png"
    state, content = picture.stat(), bytearray(picture.read_bytes())
    content[-20] ^= 1
    picture.write_bytes(content)
    os.utime(picture, ns=(0, state.st_mtime_ns + 1))
    assert why(config, item(config)) == "the picture changed"
    picture.write_bytes(content + b"\0")
    os.utime(picture, ns=(0, state.st_mtime_ns))
    assert why(config, item(config)) == "the picture changed"


def test_what_changes_while_it_is_decoded_is_told_afterwards(config):
    making = Making()
    picture = config.image_directory / "a.png"
    making.media.look(picture)
    picture.write_bytes((config.image_directory / "control.png").read_bytes() + b"\0")
    write_latents(config, item(config), LATENTS, torch.float32, making)
    assert why(config, item(config)) == "the picture changed"


def test_controls_encoders_and_kind_are_compared(config):
    control = config.image_directory / "control.png"
    put(config, item(config, controls=(control,)), models={"vae": "v", "clip": "c"}, kind="i2v")
    with_control = item(config, controls=(control,))
    assert why(config, with_control, models={"vae": "v", "clip": "c"}, kind="i2v") is None
    assert why(config, with_control, models={"vae": "v"}) is None
    assert why(config, with_control, models={"vae": "w", "clip": "d"}) == "made with another VAE and CLIP"
    assert why(config, with_control, models={"vae": "v", "clip": "d"}) == "made with another CLIP"
    assert why(config, with_control, kind="one_frame") == "made for i2v"
    assert why(config, item(config)) == "other control files"
    control.write_bytes(b"")
    assert why(config, with_control) == "the control file changed"
    control.unlink()
    assert why(config, with_control) == "the control file changed"


def test_a_folder_of_frames_is_one_video(tmp_path: Path):
    frames = write_pictures(tmp_path / "walk", {"0": (96, 64), "1": (96, 64)}, caption=None)
    config = VideoConfig(where="test", cache_directory=tmp_path / "cache", video_jsonl_file=tmp_path / "v.jsonl")
    clip = DatasetItem(Source(frames, "x", True), 96, 64, 96, 64)
    put(config, clip)
    os.utime(frames / "0.png", ns=(0, 0))
    assert why(config, clip) is None
    (frames / "0.png").rename(frames / "2.png")
    assert why(config, clip) == "the video file changed"


def test_captions_and_text_encoders_are_compared(config):
    source = item(config).source
    path = text_path(config, source.name)
    write_text(config, source, torch.zeros(2, 4), Making(models={"t5": "t"}))
    assert why_remake_text(path, source, Making(models={"t5": "t"})) is None
    assert why_remake_text(path, source, Making(models={"t5": "u"})) == "made with another T5"
    assert why_remake_text(path, replace(source, caption="y"), Making(models={"t5": "t"})) == "caption changed"
    # Another program has encoded another caption and carried our metadata along.
    header = read_header(path)
    save_file(load_file(path), path, header.metadata | {"caption1": "y"})
    assert why_remake_text(path, replace(source, caption="y"), Making(models={"t5": "t"})) == "caption changed"


@pytest.mark.parametrize("value", ["", "no JSON", "[1]", "3", "{}", '{"media": 5, "models": [], "controls": {}}'])
def test_a_key_that_holds_something_else_ends_nothing(config, value):
    path = put(config, item(config), models={"vae": "v"})
    save_file(load_file(path), path, read_header(path).metadata | {KEY: value})
    expected = "made with another VAE" if value.startswith("{") and len(value) > 2 else None
    assert why(config, item(config), models={"vae": "v"}) == expected


def test_files_without_that_key_are_judged_by_what_they_hold(config):
    write_latents(config, item(config), LATENTS, torch.float32)
    os.utime(config.image_directory / "a.png", ns=(0, 0))
    assert why(config, item(config), models={"vae": "v"}) is None


def test_a_picture_and_a_video_do_not_share_a_cache(config, tmp_path):
    """In one dataset file no two datasets can have one cache folder; but there may be two dataset files."""
    videos = replace(config, image_directory=None)
    video = Source(write_video(tmp_path / "data" / "videos" / "a.mp4", 5), "y", True)
    write_text(config, item(config).source, torch.zeros(2, 4), Making())
    before = text_path(config, "a").read_bytes()
    refused = (
        lambda: why_remake_text(text_path(videos, "a"), video, Making()),
        lambda: write_text(videos, video, torch.zeros(2, 4), Making()),
    )
    for call in refused:
        with pytest.raises(UserError) as error:
            call()
        assert "a.png" in str(error.value) and "a.mp4 would share it" in str(error.value)
    assert text_path(config, "a").read_bytes() == before
    (config.image_directory / "a.png").unlink()
    assert why_remake_text(text_path(videos, "a"), video, Making()) == "caption changed"
