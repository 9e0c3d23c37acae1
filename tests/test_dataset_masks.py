"""Masks of pictures and videos: from files or alpha channels, through the caches, to the loss."""

import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from dataset.cache import latent_files, read_header, read_tensors, write_text
from dataset.config import load_config
from dataset.decoding import MediaError
from dataset.items import find_sources
from dataset.loader import CachedDataset, load_batch
from dataset.masks import latent_mask
from dataset.media import read_clips
from modules.caching import CachingOptions
from modules.dataset_page import as_html
from modules.dataset_report import HEADER, examine
from modules.latent_caching import cache_latents
from modules.latent_encoding import ONE_FRAME_WITHOUT_CLIP, T2V, LatentEncoders
from modules.preview import PreviewOptions, preview
from tests.media import drawing, write_jsonl, write_pictures, write_toml, write_video
from tests.test_modules_caching import encoders  # noqa: F401
from utils.errors import UserError

GENERAL = {"resolution": [96, 64], "caption_extension": ".txt", "enable_bucket": True}
SKIP = CachingOptions(device="cpu", num_workers=1, skip_existing=True)


def left_half(width: int = 96, height: int = 64) -> np.ndarray:
    """Return a mask [H W] whose left half is white."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 255
    return mask


def write_mask(path: Path, mask: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)
    return path


def clips(path: Path, *tables: dict) -> list[np.ndarray]:
    """Return the masks of the clips that a dataset file gives."""
    (config,) = load_config(write_toml(path, GENERAL, *tables))
    return [clip.mask for source in find_sources(config) for clip in read_clips(source, config)]


def test_a_latent_mask_is_the_mean_over_pixels_and_over_the_frames_that_share_it():
    mask = np.random.default_rng(0).integers(0, 256, (9, 16, 24), dtype=np.uint8)
    found = latent_mask(mask)
    assert found.shape == (1, 3, 2, 3) and found.dtype == torch.float32
    for frame, frames in enumerate((slice(0, 1), slice(1, 5), slice(5, 9))):
        for row in range(2):
            for column in range(3):
                part = mask[frames, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                assert found[0, frame, row, column].item() == pytest.approx(part.mean() / 255, abs=1e-6)
    assert torch.equal(latent_mask(np.full((5, 8, 8), 255, np.uint8)), torch.ones(1, 2, 1, 1))


def test_a_mask_is_cut_as_its_picture_is(tmp_path: Path):
    """A picture that marks its mask's places in red: where the mask is white, the cropped picture is red."""
    picture = np.zeros((300, 200, 3), np.uint8)
    picture[40:180, 30:90, 0] = 255
    (tmp_path / "i").mkdir()
    Image.fromarray(picture).save(tmp_path / "i" / "a.png")
    (tmp_path / "i" / "a.txt").write_text("x")
    for size in ((200, 300), (100, 150)):  # a mask may be of another size, of the same shape
        small = Image.fromarray(picture[..., 0]).resize(size, Image.Resampling.BOX)
        write_mask(tmp_path / "m" / "a.png", np.asarray(small))
        table = {"image_directory": tmp_path / "i", "mask_directory": tmp_path / "m"}
        (config,) = load_config(write_toml(tmp_path / "d.toml", GENERAL, table))
        (clip,) = read_clips(find_sources(config)[0], config)
        assert clip.mask.shape == clip.pixels.shape[:3]
        assert np.abs(clip.mask.astype(int) - clip.pixels[..., 0]).mean() < 4
    write_mask(tmp_path / "m" / "a.png", left_half(300, 100))
    with pytest.raises(MediaError, match="the mask is 300x100, but a.png 200x300: not one shape"):
        list(read_clips(find_sources(config)[0], config))


def test_an_alpha_channel_is_a_mask_and_a_picture_without_one_counts_wholly(tmp_path: Path):
    folder = write_pictures(tmp_path / "i", {"a": (96, 64), "b": (96, 64), "c": (96, 64)})
    Image.fromarray(np.dstack([drawing(0), left_half()])).save(folder / "a.png")
    Image.fromarray(np.dstack([drawing(0), left_half()])).convert("LA").save(folder / "b.png")
    a, b, c = clips(tmp_path / "d.toml", {"image_directory": folder, "alpha_mask": True})
    assert (a[0] == left_half()).all() and (b[0] == left_half()).all() and (c == 255).all()
    write_mask(tmp_path / "m" / "a.png", 255 - left_half())  # a file wins
    table = {"image_directory": folder, "alpha_mask": True, "mask_directory": tmp_path / "m"}
    assert (clips(tmp_path / "d.toml", table)[0][0] == 255 - left_half()).all()
    assert clips(tmp_path / "d.toml", {"image_directory": folder}) == [None] * 3


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    write_video(tmp_path / "v" / "a.mp4", 30)
    (tmp_path / "v" / "a.txt").write_text("x")
    return tmp_path


@pytest.mark.parametrize("extraction", [{"target_frames": [5]}, {"target_frames": [5], "frame_extraction": "chunk"}])
def test_a_video_has_a_still_mask_or_a_moving_one_that_goes_with_its_frames(videos: Path, extraction: dict):
    table = {"video_directory": videos / "v", "mask_directory": videos / "m", **extraction}
    write_mask(videos / "m" / "a.png", left_half())
    for mask in clips(videos / "d.toml", table):
        assert mask.shape == (5, 64, 96) and (mask == left_half()).all()
    (videos / "m" / "a.png").unlink()
    # White grows by a column of 3 pixels a frame; it is shorter than the video, and stays on its last frame.
    frames = [np.where(np.arange(96) < 3 * (i + 1), 255, 0)[None].repeat(64, 0).astype(np.uint8) for i in range(12)]
    with av.open(str(videos / "m" / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=16)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "gray"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        container.mux(stream.encode())
    found = clips(videos / "d.toml", table)
    for number, mask in enumerate(found):
        for i, frame in enumerate(mask):
            white = (frame > 127).all(axis=0).sum()
            assert white == 3 * (min(5 * number + i, 11) + 1)
    (videos / "m" / "a.mkv").unlink()
    for i, frame in enumerate(frames):  # a folder of pictures
        write_mask(videos / "m" / "a" / f"{i:02d}.png", frame)
    assert [(mask > 127).sum() for mask in clips(videos / "d.toml", table)] == [(m > 127).sum() for m in found]


def test_files_without_a_mask_are_counted_and_none_at_all_is_an_error(tmp_path: Path, caplog):
    folder = write_pictures(tmp_path / "i", {"a": (96, 64), "b": (96, 64)})
    table = {"image_directory": folder, "mask_directory": tmp_path / "m"}
    write_mask(tmp_path / "m" / "a.png", left_half())
    masks = clips(tmp_path / "d.toml", table)
    assert (masks[0][0] == left_half()).all() and (masks[1] == 255).all()
    assert f"of which all counts: 1, the first {folder / 'b.png'}" in caplog.text
    (tmp_path / "m" / "a.png").rename(tmp_path / "m" / "z.png")
    with pytest.raises(UserError, match="none of the 2 images has a mask in .* Call that of a.png a.png, for example"):
        clips(tmp_path / "d.toml", table)
    with pytest.raises(UserError, match="mask_directory .*: no such folder"):
        clips(tmp_path / "d.toml", table | {"mask_directory": tmp_path / "n"})


def test_masks_go_beside_the_latents_and_are_known_to_have_changed(tmp_path: Path, encoders: LatentEncoders, caplog):  # noqa: F811
    caplog.set_level("INFO")
    folder = write_pictures(tmp_path / "i", {"a": (96, 64), "b": (96, 64)})
    table = {"image_directory": folder, "cache_directory": tmp_path / "c"}
    masked = table | {"mask_directory": tmp_path / "m"}
    write_mask(tmp_path / "m" / "a.png", left_half())

    def written(table: dict) -> list[str]:
        configs = load_config(write_toml(tmp_path / "d.toml", GENERAL, table))
        done = cache_latents(configs, lambda: encoders, torch.float32, SKIP)
        return [path.name[0] for path in done.written]

    assert written(table) == ["a", "b"] and written(masked) == ["a", "b"] and written(masked) == []
    assert "2 items: without latents_mask" in caplog.text
    path = tmp_path / "c" / "a_0096x0064_wan.safetensors"
    (key,) = [key for key in read_header(path).shapes if "mask" in key]
    assert key == "latents_mask_1x8x12_float32"
    # musubi-tuner reads it as one more tensor of the batch: less its number format and its size.
    assert re.sub(r"_[^_]*$", "", re.sub(r"_(float32|bfloat16)$", "", key)) == "latents_mask"
    assert torch.equal(read_tensors(path)["latents_mask"], latent_mask(left_half()[None]))
    write_mask(tmp_path / "m" / "a.png", 255 - left_half())
    assert written(masked) == ["a"] and "1 item: the mask changed" in caplog.text
    write_mask(tmp_path / "m" / "b.png", np.zeros((64, 96), np.uint8))
    assert written(masked) == ["b"] and "the mask of b is black all over: nothing is learned" in caplog.text
    assert written(table) == []  # masks that are there do not hurt
    assert written(table | {"alpha_mask": True}) == ["a", "b"]


def cached(folder: Path, encoders: LatentEncoders, table: dict, names=T2V) -> CachedDataset:  # noqa: F811
    """Cache a dataset with texts of zeros, and return what training makes of it."""
    configs = load_config(write_toml(folder / "d.toml", GENERAL, table))
    cache_latents(configs, lambda: encoders, torch.float32, SKIP, names)
    for source in find_sources(configs[0]):
        write_text(configs[0], source, torch.zeros(2, 64))
    return CachedDataset(configs, 0)


def test_training_takes_the_masks_that_the_dataset_file_asks_for(tmp_path: Path, encoders: LatentEncoders):  # noqa: F811
    folder = write_pictures(tmp_path / "i", {"a": (96, 64), "b": (96, 64)})
    table = {"image_directory": folder, "cache_directory": tmp_path / "c", "batch_size": 2}
    masked = table | {"mask_directory": tmp_path / "m"}
    write_mask(tmp_path / "m" / "a.png", left_half())
    plain = cached(tmp_path, encoders, table)
    assert plain[0].mask is None
    with pytest.raises(UserError, match="mask_directory: no mask is in 2 of 2 caches, .* Run wan_cache_latents.py"):
        CachedDataset(load_config(write_toml(tmp_path / "d.toml", GENERAL, masked)), 0)
    (config,), items = (data := cached(tmp_path, encoders, masked)).configs, data.items[0]
    half = latent_mask(left_half()[None])
    batch = load_batch(items, config)
    assert torch.equal(batch.mask, torch.stack([half, torch.ones_like(half)]))  # both in one batch
    (least,) = load_config(write_toml(tmp_path / "d.toml", GENERAL, masked | {"mask_min_weight": 0.25}))
    assert torch.equal(load_batch(items, least).mask[0], 0.25 + 0.75 * half)
    again = CachedDataset(load_config(write_toml(tmp_path / "d.toml", GENERAL, table)), 0)
    assert again[0].mask is None and again.digest() == plain.digest()


def test_a_list_names_masks_and_one_frame_training_repeats_them(tmp_path: Path, encoders: LatentEncoders):  # noqa: F811
    folder = write_pictures(tmp_path / "i", {"a": (96, 64), "b": (96, 64)})
    mask = write_mask(tmp_path / "m.png", left_half())
    lines = [{"image_path": folder / f"{name}.png", "caption": "x", "control_path": folder / "b.png"} for name in "ab"]
    lines[0]["mask_path"] = mask
    table = {"cache_directory": tmp_path / "c", "fp_1f_clean_indices": [0], "fp_1f_target_index": 1}
    table["image_jsonl_file"] = write_jsonl(tmp_path / "l.jsonl", lines)
    data = cached(tmp_path, encoders, table, ONE_FRAME_WITHOUT_CLIP)
    half = latent_mask(left_half()[None])
    masks = [load_batch([item], data.configs[0]).mask[0] for item in data.items[0]]
    assert torch.equal(masks[0], half.expand(1, 2, -1, -1)) and torch.equal(masks[1], torch.ones_like(masks[0]))
    del lines[0]["mask_path"]
    write_jsonl(tmp_path / "l.jsonl", lines)
    data = cached(tmp_path, encoders, table, ONE_FRAME_WITHOUT_CLIP)
    assert load_batch(data.items[0], data.configs[0]).mask is None and len(latent_files(data.configs[0])) == 2


def test_the_report_and_the_preview_show_masks(tmp_path: Path, encoders: LatentEncoders):  # noqa: F811
    folder = write_pictures(tmp_path / "i", {"a": (96, 64), "b": (96, 64)})
    write_mask(tmp_path / "m" / "a.png", left_half())
    table = {"image_directory": folder, "cache_directory": tmp_path / "c", "mask_directory": tmp_path / "m"}
    data = cached(tmp_path, encoders, table)
    report = examine(data.configs, T2V, torch.float32, thumbnails=True)
    a, b = report.datasets[0].files
    assert a.notes == () and b.notes == ("no mask: all of it counts",)
    tensors = read_tensors(a.clips[0].cache)
    assert a.clips[0].size - HEADER == sum(tensor.nbytes for tensor in tensors.values())
    assert as_html(report).count('alt="mask"') == 2
    preview(data.configs, PreviewOptions(debug_mode="video"))
    shown = np.asarray(Image.open(tmp_path / "c" / "preview" / "a_0096x0064_wan_mask.png"))
    assert (shown == left_half()[..., None]).all()
