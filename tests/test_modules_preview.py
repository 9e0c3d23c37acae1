import io
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dataset.config import DatasetConfig, load_config
from dataset.items import find_sources
from dataset.media import read_clips
from modules.preview import PreviewOptions, preview
from tests.media import drawing, write_jsonl, write_pictures, write_toml, write_video
from utils.errors import UserError

GENERAL = {"resolution": [96, 64], "caption_extension": ".txt", "enable_bucket": True}


@pytest.fixture
def configs(tmp_path: Path) -> list[DatasetConfig]:
    """A video with a control video, and a picture with two control pictures."""
    write_video(tmp_path / "v" / "a b.mp4", frames=30, fps=30)
    (tmp_path / "v" / "a b.txt").write_text("x")
    write_video(tmp_path / "c" / "a b.mp4", frames=12, width=192, height=128)
    pictures = write_pictures(tmp_path, {"p": (100, 70), "q": (64, 64), "r": (80, 64)})
    line = {"image_path": "p.png", "control_path_0": "q.png", "control_path_1": "r.png", "caption": "y"}
    videos = {"video_directory": tmp_path / "v", "control_directory": tmp_path / "c", "target_frames": [9]}
    one_frame = {"image_jsonl_file": write_jsonl(pictures / "l.jsonl", [line]), "fp_1f_clean_indices": [0, 2]}
    datasets = [
        videos | {"cache_directory": tmp_path / "cv", "source_fps": 30},
        one_frame | {"cache_directory": tmp_path / "ci", "fp_1f_target_index": 1},
    ]
    return load_config(write_toml(tmp_path / "data.toml", GENERAL, *datasets))


def test_video_writes_what_the_model_will_see_with_its_controls(configs, tmp_path: Path):
    preview(configs, PreviewOptions(debug_mode="video"))
    stem = "a b_00000-009_0096x0064_wan"
    assert {path.name for path in (tmp_path / "cv" / "preview").iterdir()} == {f"{stem}.mp4", f"{stem}_control_0.mp4"}
    (clip,) = read_clips(find_sources(configs[0])[0], configs[0])
    for name, pixels in ((stem, clip.pixels), (f"{stem}_control_0", clip.controls[0])):
        with av.open(str(tmp_path / "cv" / "preview" / f"{name}.mp4")) as container:
            assert container.streams.video[0].average_rate == 16
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert frames.shape == pixels.shape and np.abs(frames.astype(int) - pixels).mean() < 6
    (clip,) = read_clips(find_sources(configs[1])[0], configs[1])
    written = {path.name: np.array(Image.open(path)) for path in (tmp_path / "ci" / "preview").iterdir()}
    stem = "p_0100x0070_wan"
    for name, pixels in ((stem, clip.pixels), (f"{stem}_control_0", clip.controls[0])):
        np.testing.assert_array_equal(written[f"{name}.png"], pixels[0])
    assert len(written) == 3


def test_console_draws_first_last_and_control_without_asking_where_a_number_is_given(configs, capsys):
    preview(configs, PreviewOptions(debug_mode="console", console_width=6, console_num_images=1))
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("▀") for line in lines] == [6] * 12  # 3 pictures of 2 lines for each of two datasets


def test_console_takes_the_keys_and_the_end_of_input(configs, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for typed, pictures in (("q\n", 3), ("d\nq\n", 6), ("", 3), ("\n\n", 6)):
        monkeypatch.setattr(sys, "stdin", Terminal(typed))
        preview(configs, PreviewOptions(debug_mode="console", console_width=6))
        assert capsys.readouterr().out.count("▀") == pictures * 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"debug_mode": "console"},
            "there is no terminal to ask. Give --console_num_images N, or use --debug_mode video.",
        ),
        ({"debug_mode": "console", "console_width": 0}, "--console_width 0: must be at least 1."),
        ({"debug_mode": "console", "console_num_images": -1}, "--console_num_images -1: must be at least 0."),
        ({"debug_mode": "image"}, "there is no display. Use --debug_mode video or console."),
    ],
)
def test_what_cannot_be_shown_here_is_one_line_with_what_to_use(configs, options, message, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(UserError) as error:
        preview(configs, PreviewOptions(**options))
    assert str(error.value).endswith(message) and "\n" not in str(error.value)


def test_an_encoding_without_half_blocks_is_one_line(configs, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(UserError, match="encoding ascii has no half blocks. Set PYTHONIOENCODING=utf-8"):
        preview(configs, PreviewOptions(debug_mode="console", console_num_images=1))


def test_windows_show_first_last_and_controls_and_take_the_keys(configs, monkeypatch):
    shown: list[np.ndarray] = []
    keys = iter("xxdq")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("cv2.imshow", lambda title, picture: shown.append(picture))
    monkeypatch.setattr("cv2.waitKey", lambda delay: ord(next(keys)))
    monkeypatch.setattr("cv2.destroyAllWindows", lambda: None)
    preview(configs, PreviewOptions(debug_mode="image"))
    assert len(shown) == 4 and next(keys, None) is None
    first = shown[0][..., ::-1].astype(int)  # windows take blue first
    assert np.abs(first - drawing(0)).mean() < 12


def test_an_opencv_without_windows_is_one_line(configs, monkeypatch):
    import cv2

    def fail(title: str, picture: np.ndarray) -> None:
        raise cv2.error("The function is not implemented")

    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("cv2.imshow", fail)
    with pytest.raises(UserError, match="opens no windows .* Use --debug_mode video or console"):
        preview(configs, PreviewOptions(debug_mode="image"))
