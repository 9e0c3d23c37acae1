"""The drawn world: what the caption says is what one sees."""

import random
import subprocess
import sys
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image

from dataset.config import load_config
from dataset.items import find_sources
from examples.tiny_world import moments, paths
from examples.tiny_world.contact_sheet import moving, sheet
from examples.tiny_world.world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, Scene, draw, random_scene
from wan.configs import TASKS
from wan.dit_file import check_dit

SCENE = Scene("red", "circle", "stays still", "black")


def inside(clip: np.ndarray, scene: Scene) -> np.ndarray:
    """Return which pixels are nearer to the shape's colour than to the background's."""
    far = [
        np.linalg.norm(clip.astype(float) - color, axis=-1)
        for color in (COLORS[scene.color], BACKGROUNDS[scene.background])
    ]
    return far[0] < far[1]


def centers(mask: np.ndarray) -> np.ndarray:
    """Return the centre (x, y) of each frame's shape in pixels."""
    return np.array([np.argwhere(frame).mean(0)[::-1] for frame in mask])


@pytest.mark.parametrize(
    ("motion", "way"), [("moves right", (1, 0)), ("moves left", (-1, 0)), ("moves down", (0, 1)), ("moves up", (0, -1))]
)
def test_a_shape_moves_where_the_caption_says(motion, way):
    scene = replace(SCENE, motion=motion, place=0.5)
    steps = np.diff(centers(inside(draw(scene), scene)), axis=0)
    along, across = steps @ np.array(way), steps @ np.array(way)[::-1]
    assert (along > 1).all() and (abs(across) < 0.2).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_in_the_picture_and_grows_shrinks_and_turns(shape):
    area = {motion: inside(draw(replace(SCENE, shape=shape, motion=motion)), SCENE).sum((1, 2)) for motion in MOTIONS}
    assert all((pixels > 60).all() for pixels in area.values())
    assert (np.diff(area["grows"]) >= 0).all() and area["grows"][-1] > 3 * area["grows"][0]
    assert (np.diff(area["shrinks"]) <= 0).all() and area["shrinks"][0] > 3 * area["shrinks"][-1]
    spun = draw(replace(SCENE, shape=shape, motion="spins"))
    assert (spun[0] == spun[4]).all() == (shape in ("circle", "ring"))


def test_no_two_shapes_look_alike():
    masks = {shape: inside(draw(replace(SCENE, shape=shape), 1), SCENE)[0] for shape in SHAPES}
    for a in SHAPES:
        for b in SHAPES:
            overlap = (masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum()
            assert (overlap > 0.9) == (a == b), (a, b, overlap)


def test_a_seed_gives_the_same_scenes():
    assert [random_scene(random.Random(3)) for _ in range(2)] == [random_scene(random.Random(3))] * 2
    assert SCENE.caption == "a red circle stays still on a black background"
    assert replace(SCENE, color="orange").caption.startswith("an orange")


def test_clips_are_h264_files_with_captions_and_a_config_that_loads(tmp_path):
    command = [
        sys.executable,
        "-m",
        "examples.tiny_world.draw",
        "--folder",
        str(tmp_path),
        "--clips",
        "2",
        "--shape",
        "star",
    ]
    done = subprocess.run([*command, "--name", "zorb", "--striped"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "zorb" in (tmp_path / "clips" / "001.txt").read_text()
    with av.open(str(tmp_path / "clips" / "001.mp4")) as video:
        stream = video.streams.video[0]
        assert stream.codec_context.name == "h264" and float(stream.average_rate) == 16
        assert len([*video.decode(stream)]) == 17
    (config,) = load_config(tmp_path / "dataset.toml")
    assert config.target_frames == (17,) and config.resolution == (64, 64)


def test_a_contact_sheet_has_a_row_for_each_video_and_a_moving_one_shows_them_side_by_side():
    rows = [[Image.new("RGB", (32, 32), color)] * count for color, count in (("red", 9), ("blue", 5))]
    picture = np.asarray(sheet(rows, ("first", "second"), columns=4, height=64))
    assert picture.shape == (2 * 86, 4 * 68 + 4, 3)
    assert (picture[60, 40] == (255, 0, 0)).all() and (picture[140, 40] == (0, 0, 255)).all()
    frames = moving(rows, ("first", "second"), height=64)
    last = np.asarray(frames[-1])
    assert len(frames) == 9 and last.shape == (86, 2 * 72, 3)
    assert (last[60, 40] == (255, 0, 0)).all() and (last[60, 110] == (0, 0, 255)).all()


def test_moments_are_first_and_last_pictures_with_the_middle_between_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moments", "--folder", str(tmp_path), "--count", "3", "--test", "1", "--between"])
    moments.main()
    (config,) = load_config(tmp_path / "dataset.toml")
    assert config.frame_indices == [0, 1, 2] and config.fp_1f_target_index == 1
    sources = find_sources(config)
    assert [len(source.controls) for source in sources] == [2, 2, 2]
    trained = {source.caption.strip() for source in sources}
    assert not trained & {path.read_text().strip() for path in (tmp_path / "test").glob("*.txt")}
    picture, first, last = (np.array(Image.open(path)).astype(int) for path in (sources[0].path, *sources[0].controls))
    assert np.abs(first - last).max() > 50 and np.abs(picture - first).max() > 50
    shape = check_dit(tmp_path / "dit_flf2v.safetensors", TASKS["flf2v-14B"])
    assert shape.image_tokens == 130 and shape.dim == 128


def test_control_videos_show_the_path_of_the_shape_and_not_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["paths", "--folder", str(tmp_path), "--clips", "2", "--test", "1"])
    paths.main()
    sources = find_sources(load_config(tmp_path / "dataset.toml")[0])
    assert [len(source.controls) for source in sources] == [1, 1]
    assert not [motion for motion in MOTIONS for source in sources if motion in source.caption]
    shape = check_dit(tmp_path / "dit_control.safetensors", TASKS["t2v-1.3B-FC"])
    assert shape.in_channels == 48 and shape.dim == 128

    motion = paths.random_path(random.Random(1))
    one, other = (replace(SCENE, color=color, shape=shape) for color, shape in (("red", "square"), ("blue", "cross")))
    control = paths.draw_control(one, motion)
    assert np.array_equal(control, paths.draw_control(other, motion))
    shown = centers(inside(draw(one, motion=motion), one))
    assert np.abs(shown - centers(control[..., 0] > 128)).max() < 0.6
    assert np.linalg.norm(shown[-1] - shown[0]) > 8
