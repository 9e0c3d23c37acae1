import random
import weakref
from pathlib import Path

import av
import numpy as np
import pytest

from dataset import decoding
from dataset.config import VideoConfig
from dataset.decoding import MediaError, MisnumberedError, counted, decoded_frames, index_video, numbered_frames
from dataset.items import Source
from dataset.media import Clip, frame_windows, read_clips, resample
from tests.media import write_pictures, write_scrolling

FRAMES = 260
OPEN_GOP = {"x264-params": "keyint=60:open-gop=1:bframes=5:b-pyramid=normal:ref=6:scenecut=0"}
INTRA_REFRESH = {"x264-params": "keyint=60:intra-refresh=1:bframes=3:ref=4"}
FILES = {
    "b_frames.mp4": ("libx264", {"g": "60", "bf": "3"}),
    "open_gop.mkv": ("libx264", OPEN_GOP),
    "open_gop.mp4": ("libx264", OPEN_GOP),
    "intra_refresh.mkv": ("libx264", INTRA_REFRESH),
    "transport.ts": ("libx264", {"g": "60"}),
    "hevc.mp4": ("libx265", {"preset": "ultrafast", "x265-params": "keyint=60:open-gop=1:bframes=4:log-level=none"}),
    "vp9.webm": ("libvpx-vp9", {"g": "60", "auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}),
    "untimed.avi": ("libx264", {"g": "60"}),
    "mpeg4.mp4": ("mpeg4", {"g": "60", "bf": "2"}),
}
JUMPED = ("b_frames.mp4", "open_gop.mkv", "open_gop.mp4", "transport.ts", "hevc.mp4", "vp9.webm", "uneven.mp4")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    written = {name: write_scrolling(folder / name, FRAMES, *how) for name, how in FILES.items()}
    return written | {"uneven.mp4": write_scrolling(folder / "uneven.mp4", FRAMES, uneven=True, options={"g": "60"})}


def plain_frames(path: Path) -> list[np.ndarray]:
    """Decode by PyAV alone, from the start."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def video_config(**keys: object) -> VideoConfig:
    return VideoConfig(where="test", cache_directory=Path("c"), resolution=(96, 64), **keys)


@pytest.mark.parametrize("name", [*FILES, "uneven.mp4"])
def test_a_frame_that_is_jumped_to_is_the_one_that_decoding_from_the_start_gives(files, name):
    path, every = files[name], plain_frames(files[name])
    assert len(every) == FRAMES and len({frame.tobytes() for frame in every}) == FRAMES
    index, steps = index_video(path), []
    denied = 0
    for trial in range(8):
        numbers = sorted(random.Random(trial).sample(range(FRAMES), 3))
        steps.clear()
        try:
            frames = list(numbered_frames(path, index, numbers, lambda: steps.append(1)))
        except MisnumberedError:
            denied += 1
            frames = list(numbered_frames(path, counted(path, index), numbers))
        for frame, number in zip(frames, numbers, strict=True):
            np.testing.assert_array_equal(frame, every[number])
    assert (len(index.times) > 0) == (name != "untimed.avi")
    # A picture that is refreshed bit by bit has no frame to begin with: the decoder leaves out what is not whole yet.
    assert (denied > 0) <= (name == "intra_refresh.mkv")
    if name in JUMPED:
        steps.clear()
        assert len(list(numbered_frames(path, index, [FRAMES - 1], lambda: steps.append(1)))) == 1
        assert len(steps) <= 80  # some seek to the key frame before the one they are asked for


@pytest.mark.parametrize(
    ("name", "source_fps"),
    [("open_gop.mp4", None), ("open_gop.mp4", 30.0), ("uneven.mp4", 24.0), ("untimed.avi", 59.94)],
)
@pytest.mark.parametrize(
    "keys",
    [
        {"frame_extraction": "uniform", "frame_sample": 3, "target_frames": (1, 5, 9)},
        {"frame_extraction": "slide", "frame_stride": 70, "target_frames": (5, 13)},
        {"frame_extraction": "slide", "frame_stride": 3, "target_frames": (1, 9)},
        {"frame_extraction": "chunk", "target_frames": (5, 25)},
    ],
)
def test_streamed_windows_are_those_cut_from_the_whole_video(files, name, keys, source_fps):
    config = video_config(source_fps=source_fps, **keys)
    whole = list(resample(plain_frames(files[name]), source_fps))
    windows = frame_windows(
        len(whole), config.frame_extraction, config.target_frames, config.frame_stride, config.frame_sample
    )
    clips = list(read_clips(Source(files[name], "x", True), config))
    assert sorted((clip.item.first_frame, clip.item.frames) for clip in clips) == sorted(windows)
    for clip in clips:
        first = clip.item.first_frame
        np.testing.assert_array_equal(clip.pixels, whole[first : first + clip.item.frames])


def test_only_what_is_wanted_is_decoded(files):
    config = video_config(frame_extraction="chunk", target_frames=(5,))
    source, steps = Source(files["b_frames.mp4"], "x", True), []
    every = list(read_clips(source, config))
    reading = read_clips(source, config, lambda item: item == every[-1].item, lambda: steps.append(1))
    (last,) = reading
    np.testing.assert_array_equal(last.pixels, every[-1].pixels)
    assert last.item == every[-1].item and len(steps) < FRAMES + 70  # all packets for the index, few frames


@pytest.mark.parametrize(
    "keys",
    [
        {"frame_extraction": "chunk", "target_frames": (5, 25)},
        {"frame_extraction": "slide", "frame_stride": 2, "target_frames": (25,)},
        {"frame_extraction": "uniform", "frame_sample": 40, "target_frames": (9, 25)},
    ],
)
def test_no_more_frames_are_held_than_the_longest_clip_has(files, monkeypatch, keys):
    alive = weakref.WeakSet()
    monkeypatch.setattr("dataset.media.resize_to_bucket", lambda frame, bucket: Tracked(frame, alive))
    peak = max(len(alive) for _ in read_clips(Source(files["b_frames.mp4"], "x", True), video_config(**keys)))
    assert 20 <= peak <= 25


class Tracked(np.ndarray):
    """A frame of which we can tell whether anybody holds it."""

    def __new__(cls, frame: np.ndarray, alive: weakref.WeakSet) -> "Tracked":
        tracked = frame.view(cls)
        alive.add(tracked)
        return tracked

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def test_the_control_of_a_window_is_cut_alike_and_stays_on_its_last_frame(files):
    config = video_config(frame_extraction="slide", frame_stride=100, target_frames=(5,))
    folder = write_pictures(files["b_frames.mp4"].parent / "control", {f"{i:03d}": (96, 64) for i in range(103)}, None)
    for control, shown in ((files["vp9.webm"], FRAMES), (folder, 103)):
        clips: list[Clip] = list(read_clips(Source(files["b_frames.mp4"], "x", True, (control,)), config))
        frames = list(decoded_frames(control))
        assert [clip.item.first_frame for clip in clips] == [0, 100, 200]
        for clip in clips:
            places = np.minimum(np.arange(5) + clip.item.first_frame, shown - 1)
            np.testing.assert_array_equal(clip.controls[0], [frames[place] for place in places])


def test_a_file_with_other_frames_than_its_index_says_is_decoded_from_the_start(files, monkeypatch):
    """As where a damaged packet gives no frame, or one packet gives two."""
    path = files["b_frames.mp4"]
    true = index_video(path)
    config = video_config(frame_extraction="uniform", frame_sample=3, target_frames=(5,))
    want = {clip.item: clip.pixels for clip in read_clips(Source(path, "x", True), config)}
    for times in (np.append(true.times, true.times[-1] + 512), true.times[:-1], np.delete(true.times, 2)):
        wrong = decoding.VideoIndex(true.width, true.height, len(times), times, true.entries)
        monkeypatch.setattr("dataset.media.index_video", lambda path, step, wrong=wrong: wrong)
        reading = read_clips(Source(path, "x", True), config)
        got, items = {}, None
        while items is None:
            try:
                clip = next(reading)
                got[clip.item] = clip.pixels
            except StopIteration as end:
                items = end.value
        assert items == list(want)
        for item in items:
            np.testing.assert_array_equal(got[item], want[item])


def test_a_video_with_a_damaged_frame_says_where(files, tmp_path: Path):
    data = bytearray(files["b_frames.mp4"].read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(400)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(data)
    with pytest.raises(MediaError, match=r"damaged.mp4: holds a damaged frame at \d+\.\d\d s"):
        list(decoded_frames(damaged))


def test_a_codec_that_nothing_decodes_is_one_line(files, tmp_path: Path):
    unknown = tmp_path / "unknown.mp4"
    unknown.write_bytes(files["b_frames.mp4"].read_bytes().replace(b"avc1", b"zzz9"))
    for config in (video_config(), video_config(frame_extraction="chunk")):
        with pytest.raises(MediaError, match=r"unknown.mp4: ") as error:
            list(read_clips(Source(unknown, "x", True), config))
        assert "\n" not in str(error.value)
