import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dataset.cache import (
    batch_name,
    latent_files,
    latent_path,
    may_be_deleted,
    media_name,
    read_header,
    read_tensors,
    text_path,
    why_remake_latents,
    why_remake_text,
    write_latents,
    write_text,
)
from dataset.config import ImageConfig, VideoConfig
from dataset.items import DatasetItem, Source
from dataset.provenance import Making
from tests.media import write_pictures, write_video
from utils.errors import UserError

LATENTS = {"latents": torch.randn(16, 2, 8, 12)}


def image_config(folder: Path) -> ImageConfig:
    return ImageConfig(where="test", cache_directory=folder)


def video_config(folder: Path) -> VideoConfig:
    return VideoConfig(where="test", cache_directory=folder)


def picture(name: str = "a.b.png", caption: str = "x", size: tuple[int, int] = (100, 64)) -> DatasetItem:
    return DatasetItem(Source(Path(name), caption, is_video=False), 96, 64, *size)


def clip(name: str = "clip.a.mp4", first_frame: int = 26, frames: int = 5) -> DatasetItem:
    return DatasetItem(Source(Path(name), "x", is_video=True), 96, 64, 96, 64, first_frame, frames)


def test_file_names_tell_name_window_and_size(tmp_path: Path):
    images, videos = image_config(tmp_path), video_config(tmp_path)
    assert latent_path(images, picture()).name == "a.b_0100x0064_wan.safetensors"
    assert latent_path(images, picture(size=(12345, 7))).name == "a.b_12345x0007_wan.safetensors"
    assert latent_path(videos, clip()).name == "clip.a_00026-005_0096x0064_wan.safetensors"
    assert text_path(videos, clip().source.name).name == "clip.a_wan_te.safetensors"


def test_the_media_name_is_read_back_from_a_file_name(tmp_path: Path):
    for config, item in ((image_config(tmp_path), picture("a_1x2_ö.png")), (video_config(tmp_path), clip("x_0-1.mp4"))):
        assert media_name(config, latent_path(config, item)) == item.source.name
    videos = video_config(tmp_path)
    paths = {latent_path(videos, clip(name, 0, 13)): name for name in ("a.mp4", "a_00000-013.mp4")}
    assert {media_name(videos, path): name for path, name in paths.items()} == {Path(n).stem: n for n in paths.values()}
    assert media_name(image_config(tmp_path), Path("holiday_wan.safetensors")) is None
    assert media_name(video_config(tmp_path), Path("a_0096x0064_wan.safetensors")) is None


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("latents_21x60x104_bfloat16", "latents"),
        ("latents_image_1x8x8_float8_e4m3fn", "latents_image"),
        ("latents_control_1x8x8_float32", "latents_control"),
        ("clip_bfloat16", "clip"),
        ("f_indices_int32", "f_indices"),
        ("varlen_t5_bfloat16", "t5"),
    ],
)
def test_a_key_becomes_its_name_in_a_batch(key: str, name: str):
    assert batch_name(key) == name


def test_recorded_cache_files_have_the_names_keys_and_metadata_that_are_written_here(golden: Path, tmp_path: Path):
    """Read every recorded file, write its tensors again, and get the same file."""
    for recorded in sorted((golden / "cache").glob("*/*_wan.safetensors")):
        header = read_header(recorded)
        width, height = int(header.metadata["width"]), int(header.metadata["height"])
        frames = int(header.metadata.get("frame_count", 1))
        is_video = "frame_count" in header.metadata
        config = (video_config if is_video else image_config)(tmp_path)
        stem = media_name(config, recorded)
        first = int(recorded.name.split("_")[-3].split("-")[0]) if is_video else 0
        item = DatasetItem(Source(Path(f"{stem}.mp4"), "", is_video), width, height, width, height, first, frames)
        path = write_latents(config, item, read_tensors(recorded), torch.float32)
        assert path.name == recorded.name
        assert read_header(path).metadata == header.metadata
        want, got = load_file(recorded), load_file(path)
        assert got.keys() == want.keys()
        for key in want:
            assert got[key].dtype == want[key].dtype and torch.equal(got[key], want[key]), (recorded, key)


def test_latents_are_stored_in_their_dtype_and_clip_in_float16_under_the_same_suffix(tmp_path: Path):
    path = write_latents(image_config(tmp_path), picture(), LATENTS | {"clip": torch.randn(257, 8)}, torch.bfloat16)
    stored = load_file(path)
    assert stored["latents_2x8x12_bfloat16"].dtype == torch.bfloat16
    assert stored["clip_bfloat16"].dtype == torch.float16


def test_values_that_are_not_finite_become_0_with_a_warning(tmp_path: Path, caplog):
    latents = torch.ones(16, 1, 8, 12)
    latents[3, 0, 2, 1] = float("nan")
    path = write_latents(image_config(tmp_path), picture(), {"latents": latents}, torch.float32)
    assert read_tensors(path)["latents"].sum() == latents.numel() - 1
    assert "not finite" in caplog.text and "a.b_0100x0064" in caplog.text


def test_an_existing_text_file_keeps_its_other_tensors_and_metadata(tmp_path: Path):
    path = tmp_path / "a_wan_te.safetensors"
    old = {"varlen_t5_float32": torch.zeros(3, 4), "varlen_llm_bfloat16": torch.ones(2, 2)}
    save_file(old, path, {"architecture": "wan", "caption1": "old", "format_version": "1.0.1", "note": "kept"})
    write_text(image_config(tmp_path), Source(Path("a.png"), "new", False), torch.ones(5, 4, dtype=torch.bfloat16))
    assert load_file(path).keys() == {"varlen_t5_bfloat16", "varlen_llm_bfloat16"}
    metadata = {"architecture": "wan", "caption1": "new", "format_version": "1.0.1", "note": "kept"}
    assert read_header(path).metadata == metadata


def test_a_file_of_another_model_is_neither_replaced_nor_deleted(tmp_path: Path):
    config, item = image_config(tmp_path), picture()
    path = latent_path(config, item)
    save_file({"latents_1x8x12_float32": torch.zeros(1)}, path, {"architecture": "hunyuan_video"})
    before = path.read_bytes()
    with pytest.raises(UserError, match="is a cache file for hunyuan_video, not for wan"):
        write_latents(config, item, LATENTS, torch.float32)
    assert path.read_bytes() == before and not may_be_deleted(path, config)


def test_why_latents_are_to_be_cached_again(tmp_path: Path):
    config, item = image_config(tmp_path), picture()

    def why(names=("latents",), dtype=torch.float32, item=item) -> str | None:
        return why_remake_latents(config, item, names, dtype)

    assert why() == "not cached yet"
    path = write_latents(config, item, LATENTS, torch.float32)
    assert why() == "of another number of frames"
    path = write_latents(config, item, {"latents": LATENTS["latents"][:, :1]}, torch.float32)
    assert why() is None
    assert why(names=("latents", "latents_image", "clip")) == "without latents_image and clip"
    assert why(dtype=torch.bfloat16) == "in float32"
    other = DatasetItem(item.source, 64, 48, item.named_width, item.named_height)
    assert why(item=other) == "of another resolution"
    path.write_bytes(path.read_bytes()[:-1])
    assert why() == "damaged"


def test_latents_of_another_frame_rate_or_of_other_one_frame_indices_are_cached_again(tmp_path: Path):
    """Neither shows in a file's name or shapes; an older version told the rate under a key of its own."""
    config = replace(video_config(tmp_path / "cache"), video_directory=tmp_path)
    item = clip(str(write_video(tmp_path / "a.mp4", 5)))
    for written, wanted in ((None, 30.0), (30.0, 24.0), (30.0, None)):
        for older in (False, True):
            path = write_latents(
                replace(config, source_fps=written), item, LATENTS, torch.float32, None if older else Making()
            )
            if older and written:
                metadata = read_header(path).metadata | {"source_fps": f"{written:g}"}
                save_file(load_file(path), path, metadata)
            same, other = (
                why_remake_latents(replace(config, source_fps=fps), item, ["latents"], torch.float32, Making())
                for fps in (written, wanted)
            )
            told = not older or written
            assert (same, other) == (None, "of another source_fps" if told else None)
    config = replace(image_config(tmp_path), fp_1f_clean_indices=(0,), fp_1f_target_index=1)
    indices = {"f_indices": torch.tensor([0, 1])}
    write_latents(config, picture(), LATENTS | indices, torch.float32)
    wanted = ["latents", "f_indices"]
    assert why_remake_latents(config, picture(), wanted, torch.float32) is None
    config = replace(config, fp_1f_target_index=9)
    assert why_remake_latents(config, picture(), wanted, torch.float32) == "of other one-frame indices"


def test_why_a_text_is_to_be_cached_again(tmp_path: Path):
    source = Source(Path("a.png"), "one", False)
    path = text_path(image_config(tmp_path), source.name)
    assert why_remake_text(path, source) == "not cached yet"
    write_text(image_config(tmp_path), source, torch.zeros(2, 4))
    assert why_remake_text(path, source) is None
    assert why_remake_text(path, Source(Path("a.png"), "two", False)) == "caption changed"


def test_only_what_says_that_it_was_made_for_this_dataset_may_be_deleted(tmp_path: Path):
    images = write_pictures(tmp_path / "images", {"a": (100, 64)})
    config = replace(image_config(tmp_path / "cache"), image_directory=images)
    item = picture(str(images / "a.png"))
    ours = write_latents(config, item, LATENTS, torch.float32, Making())
    text = write_text(config, item.source, torch.zeros(2, 4), Making())
    assert may_be_deleted(ours, config) and may_be_deleted(text, config)
    others = (
        replace(image_config(tmp_path / "cache"), image_directory=tmp_path),
        replace(image_config(tmp_path / "cache"), image_jsonl_file=tmp_path / "images.jsonl"),
        replace(video_config(tmp_path / "cache"), video_directory=images),
    )
    assert not any(may_be_deleted(path, other) for path in (ours, text) for other in others)
    cut = tmp_path / "cache" / "b_0100x0064_wan.safetensors"
    cut.write_bytes(ours.read_bytes()[:-5])
    notes = tmp_path / "cache" / "c_0100x0064_wan.safetensors"
    notes.write_text("my notes")
    untold = write_latents(config, picture("d.png"), LATENTS, torch.float32)
    assert not any(may_be_deleted(path, config) for path in (cut, notes, untold))


def test_a_file_being_written_is_not_listed(tmp_path: Path):
    config = image_config(tmp_path / "[brackets]")
    assert latent_files(config) == []
    path = write_latents(config, picture(), LATENTS, torch.float32)
    path.with_name(f".{path.name}").write_bytes(b"")
    assert latent_files(config) == [path]


def test_recorded_file_names_of_windows_are_those_written_here(golden: Path):
    for row in json.loads((golden / "frames.json").read_text())["windows"]:
        config = video_config(Path())
        source = Source(Path(f"v{row['video_frames']}.mp4"), "", True)
        items = [DatasetItem(source, 32, 32, 32, 32, first, frames) for first, frames in row["windows"][:3]]
        assert sorted(latent_path(config, item).name for item in items) == sorted(row["cache_names"])
