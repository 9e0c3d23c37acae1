import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dataset.cache import read_header, write_latents
from dataset.config import DatasetConfig, load_config
from dataset.media import plan_items
from dataset.provenance import KEY
from modules.caching import CachingOptions, CachingResult
from modules.latent_caching import cache_latents
from modules.latent_encoding import I2V, ONE_FRAME, T2V, LatentEncoders, as_pixels
from modules.text_caching import cache_texts
from tests.media import write_jsonl, write_pictures, write_toml, write_video
from utils.errors import UserError
from wan.clip import ImageEncoder, build_clip
from wan.t5 import TextEncoder, build_t5
from wan.tokenizer import load_tokenizer
from wan.vae import build_vae

GENERAL = {"resolution": [64, 64], "caption_extension": ".txt", "enable_bucket": True}
QUIET = CachingOptions(device="cpu", num_workers=2)


@pytest.fixture(scope="module")
def encoders(recipe, golden: Path) -> LatentEncoders:
    vae = build_vae(recipe.state_dict("vae", str(golden)))
    return LatentEncoders(vae, ImageEncoder(build_clip(recipe.state_dict("clip", str(golden)), torch.float32, heads=4)))


@pytest.fixture(scope="module")
def text_encoder(recipe, golden: Path) -> TextEncoder:
    t5 = build_t5(recipe.state_dict("t5", str(golden)), torch.float32)
    return TextEncoder(t5, load_tokenizer(golden / "tokenizer"))


def pictures_config(folder: Path, sizes: dict[str, tuple[int, int]], **keys: object) -> list[DatasetConfig]:
    images = write_pictures(folder / "images", sizes)
    dataset = {"image_directory": images, "cache_directory": folder / "cache", **keys}
    return load_config(write_toml(folder / "data.toml", GENERAL, dataset))


def not_loaded() -> None:
    pytest.fail("the encoder was loaded although there was nothing to encode")


def cache_names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("plan", "names"),
    [("t2v", T2V), ("i2v", I2V), ("one_frame", ONE_FRAME), ("one_frame_two", ONE_FRAME), ("control", T2V)],
)
def test_caches_equal_the_recorded_ones(golden, tmp_path, encoders, text_encoder, plan, names):
    shutil.copytree(golden / "dataset", tmp_path / "dataset")
    for path in (tmp_path / "dataset").glob("*.jsonl"):
        path.write_text(path.read_text().replace("<GOLDEN>", tmp_path.as_posix()))
    index = json.loads((golden / "cache_index.json").read_text())
    (tmp_path / "data.toml").write_text(index["plans"][plan]["toml"].replace("<GOLDEN>", tmp_path.as_posix()))
    configs = load_config(tmp_path / "data.toml")
    cache_latents(configs, lambda: encoders, torch.float32, QUIET, names)
    if plan == "t2v":
        cache_texts(configs, lambda: text_encoder, QUIET, torch.float32)
    written = sorted(path for config in configs for path in config.cache_directory.iterdir())
    recorded = [golden / path.relative_to(tmp_path) for path in written]
    assert recorded == sorted(file for folder in {path.parent for path in recorded} for file in folder.iterdir())
    for path, other in zip(written, recorded, strict=True):
        metadata = read_header(path).metadata
        assert metadata.pop(KEY) and metadata == read_header(other).metadata
        got, want = load_file(path), load_file(other)
        assert got.keys() == want.keys()
        for key in want:
            limit = 2e-3 if "clip" in key else 1e-2 if "movie" in path.name and "latents" in key else 1e-4
            assert got[key].dtype == want[key].dtype and got[key].shape == want[key].shape
            error = (got[key].double() - want[key].double()).norm() / want[key].double().norm().clamp_min(1e-9)
            assert error <= limit, (path.name, key, float(error))


def test_examples_encoded_together_equal_those_encoded_alone(tmp_path: Path, encoders):
    sizes = {"a": (64, 64), "b": (80, 48), "c": (64, 64), "d": (64, 64)}
    together = pictures_config(tmp_path / "1", sizes, batch_size=2)
    cache_latents(together, lambda: encoders, torch.float32, QUIET, I2V)
    alone = pictures_config(tmp_path / "2", sizes, batch_size=1)
    cache_latents(alone, lambda: encoders, torch.float32, QUIET, I2V)
    assert cache_names(tmp_path / "1") == cache_names(tmp_path / "2") and len(cache_names(tmp_path / "1")) == 4
    for path in (tmp_path / "1" / "cache").iterdir():
        other = load_file(tmp_path / "2" / "cache" / path.name)
        for key, tensor in load_file(path).items():
            torch.testing.assert_close(tensor, other[key], rtol=2e-3 if "clip" in key else 1e-4, atol=1e-4)


def test_an_unreadable_video_among_good_ones_is_named_and_its_caches_stay(tmp_path: Path, encoders, caplog):
    for name in "ab":
        write_video(tmp_path / "v" / f"{name}.mp4", frames=5)
        (tmp_path / "v" / f"{name}.txt").write_text("x")
    dataset = {"video_directory": tmp_path / "v", "cache_directory": tmp_path / "cache", "target_frames": [5]}
    configs = load_config(write_toml(tmp_path / "data.toml", GENERAL, dataset))
    cache_latents(configs, lambda: encoders, torch.float32, QUIET)
    names = cache_names(tmp_path)
    (tmp_path / "v" / "b.mp4").write_bytes(b"damaged" * 99)
    result = cache_latents(configs, lambda: encoders, torch.float32, QUIET)
    with caplog.at_level(logging.INFO):
        result.report()
    assert [path.name for path in result.written] == names[:1] and list(result.failed) == [tmp_path / "v" / "b.mp4"]
    assert cache_names(tmp_path) == names
    assert f"failed: {tmp_path / 'v' / 'b.mp4'}" in caplog.text
    assert "1 cache files written, 0 kept, 1 failed" in caplog.text


def test_when_nothing_can_be_cached_the_first_reason_is_the_error(tmp_path: Path):
    write_video(tmp_path / "short.mp4", frames=3)
    lines = [{"video_path": tmp_path / name, "caption": "x"} for name in ("short.mp4", "missing.mp4")]
    dataset = {"video_jsonl_file": write_jsonl(tmp_path / "v.jsonl", lines), "cache_directory": tmp_path / "cache"}
    configs = load_config(write_toml(tmp_path / "data.toml", GENERAL, dataset | {"target_frames": [5]}))
    with pytest.raises(UserError, match="files that failed: 2, the first: .*short.mp4: is shorter than the 5 frames"):
        cache_latents(configs, not_loaded, torch.float32, QUIET).report()


def test_skip_existing_reads_no_media_and_loads_no_encoder(tmp_path: Path, encoders, text_encoder, monkeypatch):
    configs = pictures_config(tmp_path, {"a": (64, 64), "b": (80, 48)})
    cache_latents(configs, lambda: encoders, torch.bfloat16, QUIET)
    cache_texts(configs, lambda: text_encoder, QUIET)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "cache").iterdir()}
    skipping = CachingOptions(device="cpu", num_workers=2, skip_existing=True)
    monkeypatch.setattr("modules.latent_caching.read_clips", lambda *_: not_loaded())
    latents = cache_latents(configs, not_loaded, torch.bfloat16, skipping)
    texts = cache_texts(configs, not_loaded, skipping)
    assert len(latents.kept) == len(texts.kept) == 2 and not latents.written and not texts.written
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before


def test_what_cannot_work_is_said_before_the_encoder_loads(tmp_path: Path):
    configs = pictures_config(tmp_path, {"a": (64, 64)})
    few = CachingOptions(device="cpu", num_workers=-1)
    for run in (
        lambda: cache_latents(configs, not_loaded, torch.float32, few),
        lambda: cache_texts(configs, not_loaded, few),
    ):
        with pytest.raises(UserError, match="--num_workers -1: must be 0 or more"):
            run()
    (tmp_path / "cache").touch()
    for run in (
        lambda: cache_latents(configs, not_loaded, torch.float32, QUIET),
        lambda: cache_texts(configs, not_loaded, QUIET),
    ):
        with pytest.raises(UserError, match="cache_directory .*cache is a file, not a folder"):
            run()


def test_a_run_that_was_stopped_leaves_complete_caches_and_the_next_one_goes_on(tmp_path: Path, encoders, monkeypatch):
    configs = pictures_config(tmp_path, {name: (64, 64) for name in "abc"})
    written = []

    def write_two(*given: object) -> Path:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(write_latents(*given))
        return written[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("modules.latent_caching.write_latents", write_two)
        cache_latents(configs, lambda: encoders, torch.float32, QUIET)
    assert cache_names(tmp_path) == ["a_0064x0064_wan.safetensors", "b_0064x0064_wan.safetensors"]
    skipping = CachingOptions(device="cpu", num_workers=1, skip_existing=True)
    result = cache_latents(configs, lambda: encoders, torch.float32, skipping)
    assert sorted(result.kept) == sorted(written) and len(result.written) == 1


def test_skip_existing_makes_again_what_no_longer_fits(tmp_path: Path, encoders, caplog):
    write_video(tmp_path / "v" / "a.mp4", frames=13)
    (tmp_path / "v" / "a.txt").write_text("x")
    dataset = {"video_directory": tmp_path / "v", "cache_directory": tmp_path / "cache"}
    chunks = dataset | {"target_frames": [5], "frame_extraction": "chunk"}
    configs = load_config(write_toml(tmp_path / "data.toml", GENERAL, chunks))
    cache_latents(configs, lambda: encoders, torch.float32, QUIET)
    first, second = sorted((tmp_path / "cache").iterdir())
    kept = first.stat().st_mtime_ns
    second.write_bytes(second.read_bytes()[:-1])
    skipping = CachingOptions(device="cpu", num_workers=1, skip_existing=True)
    with caplog.at_level(logging.INFO):
        result = cache_latents(configs, lambda: encoders, torch.float32, skipping)
    assert (result.kept, result.written) == ([first], [second]) and first.stat().st_mtime_ns == kept
    assert "1 item: damaged" in caplog.text
    with_condition = cache_latents(configs, lambda: encoders, torch.float32, skipping, I2V)
    assert len(with_condition.written) == 2 and not with_condition.kept


def test_a_cache_that_a_hasty_plan_does_not_know_is_not_deleted(tmp_path: Path, encoders, monkeypatch):
    """Packets are counted in place of frames; where a packet holds two frames, the plan is too short."""
    write_video(tmp_path / "v" / "a.mp4", frames=13)
    (tmp_path / "v" / "a.txt").write_text("x")
    dataset = {"video_directory": tmp_path / "v", "cache_directory": tmp_path / "cache"}
    chunks = dataset | {"target_frames": [5], "frame_extraction": "chunk"}
    configs = load_config(write_toml(tmp_path / "data.toml", GENERAL, chunks))
    cache_latents(configs, lambda: encoders, torch.float32, QUIET)
    names = cache_names(tmp_path)
    monkeypatch.setattr("modules.latent_caching.plan_items", lambda *given: plan_items(*given)[:1])
    skipping = CachingOptions(device="cpu", skip_existing=True)
    result = cache_latents(configs, not_loaded, torch.float32, skipping)
    assert len(result.kept) == 2 and cache_names(tmp_path) == names and not result.deleted


def test_a_changed_caption_is_encoded_again_and_equal_captions_once(tmp_path: Path, text_encoder, monkeypatch):
    configs = pictures_config(tmp_path, {"a": (64, 64), "b": (64, 64), "c": (64, 64)})
    asked: list[str] = []

    class Counting(TextEncoder):
        def encode(self, prompts: list[str]) -> list[torch.Tensor]:
            asked.extend(prompts)
            return super().encode(prompts)

    counting = Counting(text_encoder.model, text_encoder.tokenizer)
    cache_texts(configs, lambda: counting, QUIET)
    assert asked == ["a red square"] and len(cache_names(tmp_path)) == 3
    (tmp_path / "images" / "b.txt").write_text("a blue square")
    result = cache_texts(configs, lambda: counting, CachingOptions(device="cpu", skip_existing=True))
    assert asked == ["a red square", "a blue square"] and len(result.kept) == 2
    assert read_header(tmp_path / "cache" / "b_wan_te.safetensors").metadata["caption1"] == "a blue square"


def test_a_caption_of_several_datasets_is_encoded_once_and_batches_are_of_like_length(tmp_path: Path, text_encoder):
    folders = [write_pictures(tmp_path / name, {f"{name}{i}": (64, 64) for i in range(5)}) for name in "xy"]
    captions = ["a red square", "a " * 30, "on", "a " * 29, "red"]
    for folder in folders:
        for i, caption in enumerate(captions):
            (folder / f"{folder.name}{i}.txt").write_text(caption)
    configs = load_config(
        write_toml(tmp_path / "d.toml", GENERAL, *({"image_directory": folder} for folder in folders))
    )
    batches: list[list[str]] = []

    class Noting(TextEncoder):
        def encode(self, prompts: list[str]) -> list[torch.Tensor]:
            batches.append(prompts)
            return super().encode(prompts)

    noting = Noting(text_encoder.model, text_encoder.tokenizer)
    result = cache_texts(configs, lambda: noting, CachingOptions(device="cpu", batch_size=2))
    assert len(result.written) == 10 and sorted(sum(batches, [])) == sorted(caption.strip() for caption in captions)
    lengths = [text_encoder.lengths(batch) for batch in batches]
    assert sum(lengths, []) == sorted(sum(lengths, [])) and list(map(len, batches)) == [2, 2, 1]
    for folder in folders:
        stored = load_file(folder / f"{folder.name}1_wan_te.safetensors")["varlen_t5_bfloat16"]
        assert len(stored) == max(map(max, lengths)) and torch.equal(
            stored, load_file(folders[0] / "x1_wan_te.safetensors")["varlen_t5_bfloat16"]
        )


def test_only_complete_caches_of_media_that_are_gone_are_deleted(tmp_path: Path, encoders, text_encoder):
    configs = pictures_config(tmp_path, {"a": (64, 64), "b": (64, 64), "c": (64, 64)})
    cache_latents(configs, lambda: encoders, torch.float32, QUIET)
    cache_texts(configs, lambda: text_encoder, QUIET)
    for name in "bc":
        (tmp_path / "images" / f"{name}.png").unlink()
    cut = tmp_path / "cache" / "c_0064x0064_wan.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    (tmp_path / "cache" / "notes.safetensors").write_text("mine")
    everything = cache_names(tmp_path)
    keeping = CachingOptions(device="cpu", keep_cache=True)
    assert cache_latents(configs, lambda: encoders, torch.float32, keeping).deleted == []
    assert cache_texts(configs, lambda: text_encoder, keeping).deleted == [] and cache_names(tmp_path) == everything
    cache_latents(configs, lambda: encoders, torch.float32, QUIET)
    cache_texts(configs, lambda: text_encoder, QUIET)
    gone = {"b_0064x0064_wan.safetensors", "b_wan_te.safetensors", "c_wan_te.safetensors"}
    assert set(everything) - set(cache_names(tmp_path)) == gone


def test_one_frame_needs_its_keys_in_the_dataset_file(tmp_path: Path):
    configs = pictures_config(tmp_path, {"a": (64, 64)})
    with pytest.raises(UserError, match="--one_frame needs image datasets with fp_1f_clean_indices"):
        cache_latents(configs, not_loaded, torch.float32, QUIET, ONE_FRAME)


def test_pixels_are_minus_one_for_black_and_one_for_white():
    frames = np.zeros((2, 4, 6, 3), np.uint8)
    frames[1, ..., 2] = 255
    pixels = as_pixels(frames)
    assert pixels.shape == (3, 2, 4, 6) and pixels.dtype == torch.float32
    assert pixels[:, 0].unique().tolist() == [-1] and pixels[2, 1].unique().tolist() == [1]


def test_a_run_that_did_nothing_is_an_error():
    with pytest.raises(UserError, match="nothing could be cached"):
        CachingResult().report()
