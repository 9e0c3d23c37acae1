"""Which condition a latent cache holds: that of the first frame, or of the first and the last one (--flf2v)."""

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from dataset.cache import read_header, read_tensors
from dataset.config import DatasetConfig, load_config
from dataset.items import find_sources
from dataset.media import read_clips
from modules.caching import CachingOptions, CachingResult
from modules.conditions import encode_condition, encode_pictures
from modules.generation_options import LoraOptions, Models, RunOptions
from modules.latent_caching import cache_latents
from modules.latent_encoding import I2V, I2V_WITHOUT_CLIP, ONE_FRAME, T2V, LatentEncoders
from modules.prompts import PromptOptions, make_request
from tests import tiny
from tests.media import write_jsonl, write_pictures, write_toml, write_video
from utils.errors import UserError
from wan.clip import ClipOptions, load_clip
from wan.configs import TASKS
from wan.dit_file import DitOptions
from wan.t5 import T5Options
from wan.vae import VaeOptions, build_vae

GENERAL = {"resolution": [64, 64], "caption_extension": ".txt", "enable_bucket": True}
QUIET = CachingOptions(device="cpu", num_workers=1)
SKIPPING = CachingOptions(device="cpu", num_workers=1, skip_existing=True)
BOTH = ("first", "last")


@pytest.fixture(scope="module")
def encoders(models: dict[str, Path]) -> LatentEncoders:
    return LatentEncoders(build_vae(tiny.state_dict("vae")), load_clip(models["clip"], torch.float32))


def videos(folder: Path, frames: dict[str, int], **keys: object) -> list[DatasetConfig]:
    paths = [write_video(folder / f"{name}.mp4", count) for name, count in frames.items()]
    listed = write_jsonl(folder / "v.jsonl", [{"video_path": path, "caption": "a red square"} for path in paths])
    dataset = {"video_jsonl_file": listed, "cache_directory": folder / "cache", "target_frames": [5, 9], **keys}
    return load_config(write_toml(folder / "data.toml", GENERAL, dataset))


def cache(configs, load, names=I2V, images=("first",), options=SKIPPING) -> CachingResult:
    return cache_latents(configs, load, torch.float32, options, names, images=images)


def not_loaded() -> None:
    pytest.fail("the encoders were loaded although there was nothing to encode")


def test_the_condition_of_first_and_last_frame_is_bit_by_bit_that_of_generation(tmp_path: Path, encoders, models):
    configs = videos(tmp_path, {"a": 9, "b": 9}, batch_size=2)
    assert len(cache(configs, lambda: encoders, images=BOTH).written) == 4
    given = Models(
        *(TASKS["flf2v-14B"], torch.device("cpu"), DitOptions(), VaeOptions(), T5Options()),
        *(ClipOptions(models["clip"]), LoraOptions(), RunOptions()),
    )
    for source in find_sources(configs[0]):
        for clip in read_clips(source, configs[0]):
            paths = [tmp_path / f"{name}.png" for name in BOTH]
            for path, frame in zip(paths, (clip.pixels[0], clip.pixels[-1]), strict=True):
                Image.fromarray(frame).save(path)
            count, height, width = clip.pixels.shape[:3]
            pictures = dict(zip(("image_path", "end_image_path"), paths, strict=True))
            asked = PromptOptions("x", video_size=(height, width), video_length=count, **pictures)
            request = make_request(asked, given.config)
            name = f"{source.name}_00000-{count:03d}_{width:04d}x{height:04d}_wan.safetensors"
            cached = read_tensors(tmp_path / "cache" / name)
            assert torch.equal(cached["latents_image"], encode_condition(request, encoders.vae, given.config))
            (features,) = encode_pictures([request], given)
            assert cached["clip"].dtype == torch.float16 and cached["clip"].shape == features.shape == (2, 257, 1280)
            # A batch of pictures is multiplied in another order than one picture.
            torch.testing.assert_close(cached["clip"], features.half(), rtol=1e-3, atol=1e-3)
            assert (cached["clip"][0] != cached["clip"][1]).any()


def test_the_mask_marks_the_last_frame_in_the_last_channel_of_the_last_latent(tmp_path: Path, encoders):
    (path,) = cache(videos(tmp_path, {"a": 9}, target_frames=[9]), lambda: encoders, images=BOTH).written
    header = read_header(path)
    assert header.by_batch_name()["latents_image"] == (20, *header.by_batch_name()["latents"][1:])
    mask = read_tensors(path)["latents_image"][:4].flatten(2)
    assert mask.mean(2).T.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("names", [I2V, I2V_WITHOUT_CLIP], ids=["clip", "i2v"])
def test_skip_existing_tells_caches_of_first_frames_from_those_of_first_and_last_ones(
    tmp_path: Path, encoders, names, caplog
):
    configs = videos(tmp_path, {"a": 9})
    caplog.set_level(logging.INFO)
    cache(configs, lambda: encoders, names)
    assert len(cache(configs, lambda: encoders, images=BOTH).written) == 2
    assert len(cache(configs, not_loaded, images=BOTH).kept) == 2
    assert len(cache(configs, not_loaded, T2V).kept) == 2  # trained without looking at the condition
    assert len(cache(configs, lambda: encoders, names).written) == 2
    assert "2 items: with the last frame" in caplog.text
    assert len(cache(configs, not_loaded, names).kept) == 2
    reason = "without the last frame" if names == I2V else "without clip"
    assert f"2 items: {reason}" in caplog.text


def test_skip_existing_tells_one_frame_caches_from_those_of_plain_pictures(tmp_path: Path, encoders, caplog):
    plain = {"image_directory": write_pictures(tmp_path / "a", {"a": (64, 64)}), "cache_directory": tmp_path / "cache"}
    keys = {"fp_1f_clean_indices": [0], "fp_1f_target_index": 1}
    controls = {"control_directory": write_pictures(tmp_path / "controls", {"a": (64, 64)}), **keys}
    pictures = load_config(write_toml(tmp_path / "plain.toml", GENERAL, plain))
    one_frame = load_config(write_toml(tmp_path / "one.toml", GENERAL, plain | controls))
    caplog.set_level(logging.INFO)
    assert cache(one_frame, lambda: encoders, ONE_FRAME).written
    assert cache(one_frame, not_loaded, ONE_FRAME).kept
    assert cache(pictures, lambda: encoders, I2V).written and "1 item: of one-frame training" in caplog.text
    assert cache(pictures, not_loaded, I2V).kept
    assert cache(one_frame, lambda: encoders, ONE_FRAME).written and "1 item: without f_indices" in caplog.text


def test_what_has_no_last_frame_besides_the_first_is_refused_before_anything_is_read(tmp_path: Path):
    images = {"image_directory": write_pictures(tmp_path / "images", {"a": (64, 64)}), "cache_directory": tmp_path}
    pictures = load_config(write_toml(tmp_path / "data.toml", GENERAL, images))
    with pytest.raises(UserError, match="dataset 1: --flf2v needs video datasets, a picture has no last frame"):
        cache(pictures, not_loaded, images=BOTH)
    with pytest.raises(UserError, match=r"target_frames = \[1, 5\]: --flf2v needs a last frame .* Give 5 or more"):
        cache(videos(tmp_path, {"a": 9}, target_frames=[1, 5]), not_loaded, images=BOTH)
    with pytest.raises(UserError, match="max_frames = 4: --flf2v needs a last frame"):
        cache(videos(tmp_path, {"a": 9}, frame_extraction="full", max_frames=4), not_loaded, images=BOTH)


def test_a_video_of_a_single_clip_of_one_frame_is_left_out_and_named(tmp_path: Path, encoders):
    configs = videos(tmp_path, {"long": 9, "short": 4}, frame_extraction="full")
    for _ in range(2):
        result = cache(configs, lambda: encoders, images=BOTH)
        assert len(result.written) + len(result.kept) == 1
        (reason,) = result.failed.values()
        assert reason == f"{tmp_path / 'short.mp4'}: gives one frame, but --flf2v needs at least 5"
