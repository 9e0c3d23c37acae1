import itertools
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.config import DatasetConfig, ImageConfig, VideoConfig
from dataset.decoding import MediaError, decoded_frames, load_image
from dataset.items import Source
from dataset.media import (
    Clip,
    at_16_fps,
    frame_windows,
    plan_items,
    read_clips,
    require_fitting_controls,
    resample,
    resize_to_bucket,
)
from tests.media import drawing, write_pictures, write_video
from utils.errors import UserError


def video_config(**keys: object) -> VideoConfig:
    return VideoConfig(where="test", cache_directory=Path("c"), resolution=(96, 64), **keys)


def video(path: Path, controls: tuple[Path, ...] = ()) -> Source:
    return Source(path, "x", is_video=True, controls=controls)


def clips_of(source: Source, config: DatasetConfig) -> list[Clip]:
    return list(read_clips(source, config))


def frame_number(pixels: np.ndarray) -> int:
    """Return which frame of the drawing it is, by the left edge of the square."""
    return int(np.argmax(pixels[8:24, :, 0].mean(axis=0) > 115)) - 4


def test_windows_are_those_of_the_recorded_table(golden: Path):
    for row in json.loads((golden / "frames.json").read_text())["windows"]:
        options = [row.get("frame_stride", 1), row.get("frame_sample", 1), row.get("max_frames", 129)]
        windows = frame_windows(row["video_frames"], row["frame_extraction"], row["target_frames"], *options)
        assert sorted(map(list, windows)) == sorted(row["windows"]), row


def test_resampling_keeps_the_frames_of_the_recorded_table(golden: Path):
    for fps, frames, start, stop, kept in json.loads((golden / "frames.json").read_text())["fps"]:
        stop = float("inf") if stop is None else stop
        assert [i for time, i in at_16_fps(range(frames), fps) if (start or 0) <= time < stop] == kept


def test_below_16_frames_per_second_the_nearest_frame_is_repeated():
    assert list(resample(range(4), 8.0)) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert list(resample(range(6), 12.0)) == [0, 1, 1, 2, 3, 4, 4, 5]
    for fps in (1.0, 7.5, 12.0, 14.985, 15.0, 15.999):
        shown = list(resample(range(200), fps))
        assert shown == sorted(shown) and set(shown) == set(range(200))
        assert abs(len(shown) / 16 - 200 / fps) <= 0.5 / fps + 1 / 16
        assert all(abs(frame / fps - place / 16) <= 0.5 / fps + 1e-9 for place, frame in enumerate(shown))


def test_a_slow_video_keeps_its_speed(tmp_path: Path):
    path = write_video(tmp_path / "v.mp4", frames=10, fps=8)
    config = video_config(target_frames=(17,), source_fps=8.0)
    (clip,) = read_clips(video(path), config)
    assert [frame_number(pixels) for pixels in clip.pixels] == [i // 2 for i in range(17)]
    assert plan_items(video(path), config) == [clip.item]


def test_resizing_gives_the_recorded_pixels(golden: Path, recipe):
    for name, case in recipe.cases("resize", str(golden)).items():
        picture = recipe.picture(case["picture"], case["height"], case["width"], seed=case["seed"])
        resized = resize_to_bucket(picture, tuple(case["bucket"])).astype(int)
        difference = np.abs(resized - case["outputs"]["image"].numpy().astype(int))
        assert difference.max() <= 1 and (difference > 0).mean() <= 0.005, name


@pytest.mark.parametrize("source_fps", [None, 30.0])
@pytest.mark.parametrize(
    ("extraction", "keys"),
    [
        ("head", {}),
        ("chunk", {}),
        ("slide", {"frame_stride": 3}),
        ("uniform", {"frame_sample": 3}),
        ("full", {"max_frames": 11}),
    ],
)
def test_planning_without_decoding_finds_the_examples_that_reading_gives(tmp_path, extraction, keys, source_fps):
    path = write_video(tmp_path / "v.mp4", frames=23)
    config = video_config(frame_extraction=extraction, target_frames=(1, 5, 9), source_fps=source_fps, **keys)
    clips = clips_of(video(path), config)
    assert clips and plan_items(video(path), config) == [clip.item for clip in clips]


def test_a_clip_shows_the_frames_that_its_window_names(tmp_path: Path):
    path = write_video(tmp_path / "v.mp4", frames=30, fps=30)
    clips = clips_of(video(path), video_config(frame_extraction="chunk", target_frames=(5,), source_fps=30.0))
    kept = [0, 2, 4, 6, 8, 10, 12, 14, 16, 17, 19, 21, 23, 25, 27, 29]
    assert [clip.item.first_frame for clip in clips] == [0, 5, 10]
    for clip in clips:
        first = clip.item.first_frame
        assert [frame_number(pixels) for pixels in clip.pixels] == kept[first : first + 5]


def test_without_source_fps_every_frame_counts(tmp_path: Path):
    path = write_video(tmp_path / "v.mp4", frames=13, fps=60)
    (clip,) = clips_of(video(path), video_config(frame_extraction="full"))
    assert clip.item.frames == 13


def test_reading_stops_behind_the_last_frame_that_head_needs(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def endless(path: Path):
        for number in itertools.count():
            asked.append(number)
            yield partial(drawing, number)

    monkeypatch.setattr("dataset.media.coming_frames", endless)
    clips = clips_of(video(Path("v.mp4")), video_config(target_frames=(1, 5), source_fps=32.0))
    assert [frame_number(pixels) for pixels in clips[1].pixels] == [0, 2, 4, 6, 8] and asked[-1] == 8


def test_a_video_always_has_a_bucket_whatever_enable_bucket_says(tmp_path: Path):
    path = write_video(tmp_path / "v.mp4", frames=1, width=64, height=96)
    (clip,) = clips_of(video(path), video_config(enable_bucket=False))
    assert (clip.item.width, clip.item.height) == (64, 96) and clip.pixels.shape == (1, 96, 64, 3)


@pytest.mark.parametrize(("rotation", "corner"), [(90, (76, 8)), (-90, (4, 40)), (180, (40, 76))])
def test_a_rotated_video_is_turned_upright(tmp_path: Path, rotation: int, corner: tuple[int, int]):
    path = write_video(tmp_path / "v.mp4", frames=1, rotation=rotation)
    (frame,) = decoded_frames(path)
    assert tuple(np.argwhere(frame[..., 0] > 150).min(axis=0)[:2]) == corner
    (clip,) = clips_of(video(path), video_config())
    assert plan_items(video(path), video_config()) == [clip.item]


def test_a_folder_of_pictures_is_a_video(tmp_path: Path):
    folder = write_pictures(tmp_path / "take.1", {f"{i:03d}": (96, 64) for i in range(7)}, caption=None)
    (clip,) = clips_of(video(folder), video_config(target_frames=(5,)))
    assert clip.item.key == "take.1_00000-005" and clip.pixels.shape == (5, 64, 96, 3)


def test_a_control_video_that_is_too_short_stays_on_its_last_frame(tmp_path: Path):
    path = write_video(tmp_path / "v.mp4", frames=9)
    control = write_video(tmp_path / "c.mp4", frames=3)
    (clip,) = clips_of(video(path, (control,)), video_config(target_frames=(9,)))
    frames = clip.controls[0]
    assert frames.shape == clip.pixels.shape and (frames[2:] == frames[2]).all() and (frames[1] != frames[2]).any()


def control_config(**keys: object) -> ImageConfig:
    return ImageConfig(where="test", cache_directory=Path("c"), resolution=(96, 64), enable_bucket=True, **keys)


def test_a_control_picture_that_is_not_to_be_resized_is_cut_where_that_fits(tmp_path: Path):
    write_pictures(tmp_path, {"a": (96, 64), "control": (104, 70), "large": (192, 128)})
    source = Source(tmp_path / "a.png", "x", is_video=False, controls=(tmp_path / "control.png",))
    (clip,) = read_clips(source, control_config(no_resize_control=True))
    np.testing.assert_array_equal(clip.controls[0][0], drawing(0, 104, 70)[3:67, 4:100])
    (clip,) = read_clips(source, control_config(control_resolution=(96, 64)))
    assert clip.controls[0].shape == (1, 64, 96, 3)
    require_fitting_controls(control_config(no_resize_control=True), [source])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"no_resize_control": True},
            "large.png would be 192x128, but a.png 96x64; Wan needs both of one size. Leave no_",
        ),
        ({"control_resolution": (128, 128)}, "large.png would be 160x96, but a.png 96x64; Wan needs both of one size."),
    ],
)
def test_a_control_picture_that_would_not_fit_is_an_error_with_the_fix(tmp_path: Path, keys: dict, message: str):
    write_pictures(tmp_path, {"a": (96, 64), "large": (192, 128)})
    source = Source(tmp_path / "a.png", "x", is_video=False, controls=(tmp_path / "large.png",))
    with pytest.raises(UserError, match=re.escape(message)):
        require_fitting_controls(control_config(**keys), [source])
    with pytest.raises(MediaError, match="Wan needs both of one size"):
        list(read_clips(source, control_config(**keys)))
    require_fitting_controls(control_config(), [source])


def test_a_picture_is_turned_by_its_exif_tag(tmp_path: Path):
    picture = Image.fromarray(drawing(0))
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    picture.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), np.rot90(drawing(0), -1))


def test_alpha_is_dropped_and_16_bits_are_scaled_to_8(tmp_path: Path):
    transparent = np.dstack([drawing(0), np.zeros((64, 96), np.uint8)])
    Image.fromarray(transparent).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(load_image(tmp_path / "rgba.png"), drawing(0))
    Image.fromarray(np.full((4, 4), 257 * 200, np.uint16)).save(tmp_path / "deep.png")
    assert (load_image(tmp_path / "deep.png") == 200).all()


@pytest.mark.parametrize(
    ("name", "mode", "off"),
    [
        ("ä [1].jpg", "CMYK", 8),
        ("散歩 (2).png", "RGBA", 0),
        ("palette.png", "P", 8),
        ("x.webp", "RGB", 8),
        ("x.bmp", "RGB", 0),
        ("gray.jpg", "L", 3),
        ("gray and alpha.png", "LA", 0),
        ("two colours.png", "1", 0),
    ],
)
def test_pictures_of_every_kind_become_rgb(tmp_path: Path, name: str, mode: str, off: float):
    wanted = Image.fromarray(drawing(0)).convert(mode)
    wanted.save(tmp_path / name)
    shown = load_image(tmp_path / name)
    assert shown.dtype == np.uint8 and shown.shape == (64, 96, 3)
    assert np.abs(shown.astype(int) - np.array(wanted.convert("RGB"))).mean() <= off


def test_frames_of_a_folder_are_turned_upright_and_brought_to_the_first_ones_size(tmp_path: Path):
    folder = write_pictures(tmp_path / "frames [1] ü", {"a": (96, 64), "b": (192, 128)}, caption=None)
    sideways = Image.Exif()
    sideways[0x0112] = 6
    Image.fromarray(np.rot90(drawing(0))).save(folder / "c.png", exif=sideways)
    Image.fromarray(drawing(0)).save(folder / "d.jpg", quality=95)
    Image.fromarray(drawing(0)).convert("CMYK").save(folder / "e.jpeg", quality=95)
    (folder / "notes.txt").write_text("no frame")
    (clip,) = read_clips(video(folder), video_config(target_frames=(5,)))
    assert clip.pixels.shape == (5, 64, 96, 3)
    np.testing.assert_array_equal(clip.pixels[0], clip.pixels[2])
    for frame in (3, 4):
        assert np.abs(clip.pixels[frame].astype(int) - drawing(0)).mean() < 4


def test_what_cannot_be_read_is_one_line_with_the_path(tmp_path: Path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all" * 100)
    empty = tmp_path / "folder"
    empty.mkdir()
    for path in (broken, empty, tmp_path / "missing.mp4"):
        for read in (plan_items, clips_of):
            with pytest.raises(MediaError) as error:
                read(video(path), video_config())
            assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_whatever_a_decoder_raises_names_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pillow's AVIF decoder raises RuntimeError for a damaged file."""
    path = write_pictures(tmp_path, {"a": (64, 64)}) / "a.png"

    def fail(*_):
        raise RuntimeError("Failed to decode image")

    monkeypatch.setattr("dataset.media.Image.open", fail)
    with pytest.raises(MediaError, match="a.png: cannot be read .Failed to decode image"):
        clips_of(Source(path, "x", is_video=False), ImageConfig(where="test", cache_directory=tmp_path))


def test_a_video_shorter_than_all_target_lengths_gives_nothing(tmp_path: Path):
    path = write_video(tmp_path / "v.mp4", frames=4)
    assert clips_of(video(path), video_config(target_frames=(5, 9))) == []
