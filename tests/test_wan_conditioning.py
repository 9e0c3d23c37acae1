import cv2
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataset.media import resize_to_bucket
from tests import tiny
from wan.conditioning import (
    control_condition,
    first_and_end_condition,
    first_frame_condition,
    first_last_condition,
    frame_mask,
    i2v_size,
)
from wan.vae import build_vae


@pytest.fixture(scope="module")
def vae():
    return build_vae(tiny.state_dict("vae"))


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


# ------------------------------------------------------------------------------------------- against recorded ones
@pytest.fixture(scope="module")
def recorded_vae(recipe, golden):
    return build_vae(recipe.state_dict("vae", golden))


def picture(recipe, name, height, width, frames=0):
    """A recorded picture [H W 3], or its frames [F H W 3], uint8."""
    return recipe.picture(f"gen/{name}", height, width, frames=frames, seed=101)


def pixels(image, width, height):
    """A picture resized as the original resizes start and end images, in [-1, 1]."""
    shrinks = height < image.shape[0]
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    return as_pixels(resized)


def as_pixels(image):
    return torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1


SIZES = {"start": (60, 80), "end": (96, 70), "square": (64, 64), "big": (200, 300)}
RECORDED = ["i2v", "i2v_9", "i2v_big_picture", "i2v_end_image", "flf2v", "flf2v_without_end"]


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_conditions_are_reproduced(name, recipe, golden, recorded_vae):
    case = recipe.cases("conditioning", golden)[name]
    arguments = case["args"]
    height, width = arguments["video_size"]
    start = picture(recipe, arguments["image_path"], *SIZES[arguments["image_path"]])
    width, height = i2v_size(start.shape[1], start.shape[0], width * height)
    first, frames = pixels(start, width, height), arguments["video_length"]
    if arguments["end_image_path"]:
        end = pixels(picture(recipe, "end", *SIZES["end"]), width, height)
        function = first_last_condition if case["task"] == "flf2v-14B" else first_and_end_condition
        y = function(recorded_vae, first, end, frames)
    else:
        y = first_frame_condition(recorded_vae, first, frames)
    want = case["outputs"]["y"]
    assert y.shape == want.shape and y.dtype == torch.float32
    assert y.shape[1] * y.shape[2] * y.shape[3] // 4 == case["tokens"]
    assert (y - want).norm() / want.norm() < 1e-3


@pytest.mark.parametrize("name", ["t2v_fun_control", "i2v_fun_control"])
def test_recorded_control_conditions_are_reproduced(name, recipe, golden, recorded_vae):
    case = recipe.cases("conditioning", golden)[name]
    want = case["outputs"]["y"]
    height, width = 8 * want.shape[2], 8 * want.shape[3]
    frames = picture(recipe, "control", 50, 66, frames=9)
    video = torch.stack([as_pixels(resize_to_bucket(frame, (width, height))) for frame in frames], dim=1)
    y = None
    if case["args"].get("image_path"):
        y = first_frame_condition(recorded_vae, pixels(picture(recipe, "start", *SIZES["start"]), width, height), 9)
    got = control_condition(recorded_vae.encode(video[None])[0], y)
    assert got.shape == want.shape
    assert (got - want).norm() / want.norm() < 1e-3


# ------------------------------------------------------------------------------------------------------------ size
@pytest.mark.parametrize(
    ("image", "area", "size"),
    [
        ((832, 480), 480 * 832, (832, 480)),
        ((1024, 768), 480 * 832, (720, 544)),
        ((1920, 1080), 480 * 832, (832, 464)),
        ((1920, 1080), 720 * 1280, (1280, 720)),
        ((1000, 1000), 480 * 832, (624, 624)),
        ((480, 832), 480 * 832, (480, 832)),
    ],
)
def test_the_video_takes_the_shape_of_its_start_image(image, area, size):
    assert i2v_size(*image, area) == size


@given(st.integers(1, 200), st.integers(1, 200))
def test_an_image_of_the_size_asked_for_keeps_it(columns, rows):
    assert i2v_size(16 * columns, 16 * rows, 256 * columns * rows) == (16 * columns, 16 * rows)


@given(st.integers(1, 10000), st.integers(1, 10000), st.integers(256, 4_000_000))
def test_sizes_are_multiples_of_16_and_no_larger_than_asked_for(width, height, area):
    w, h = i2v_size(width, height, area)
    assert w % 16 == h % 16 == 0 and min(w, h) >= 16
    assert w * h <= area or min(w, h) == 16


# ------------------------------------------------------------------------------------------------------------ mask
def test_a_first_frame_marks_all_channels_of_the_first_latent():
    mask = frame_mask([0], 9, 2, 3)
    assert mask.shape == (4, 3, 2, 3)
    assert mask[:, 0].eq(1).all() and mask[:, 1:].eq(0).all()


def test_a_last_frame_marks_only_the_last_channel_of_the_last_latent():
    mask = frame_mask([0, 8], 9, 1, 1)[..., 0, 0]
    assert mask.T.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]]


def test_the_mask_of_an_image_is_all_ones():
    assert torch.equal(frame_mask([0], 1, 2, 2), torch.ones(4, 1, 2, 2))


# ---------------------------------------------------------------------------------------------------- conditions
def test_the_other_frames_of_a_condition_are_grey(vae, images):
    video = torch.zeros(1, 3, 5, 16, 24)
    video[0, :, 0] = images[0]
    y = first_frame_condition(vae, images[0], 5)
    assert torch.equal(y[4:], vae.encode(video)[0]) and torch.equal(y[:4], frame_mask([0], 5, 2, 3))
    video[0, :, 4] = images[1]
    y = first_last_condition(vae, images[0], images[1], 5)
    assert torch.equal(y[4:], vae.encode(video)[0]) and torch.equal(y[:4], frame_mask([0, 4], 5, 2, 3))


def test_an_end_image_of_other_models_is_one_more_latent_frame(vae, images):
    y = first_and_end_condition(vae, images[0], images[1], 5)
    assert torch.equal(y[:, :2], first_frame_condition(vae, images[0], 5))
    assert torch.equal(y[:, 2:], first_frame_condition(vae, images[1], 1))


def test_a_frame_count_that_is_not_4n_plus_1_is_refused(vae, images):
    with pytest.raises(AssertionError, match="6"):
        first_frame_condition(vae, images[0], 6)


def test_control_latents_come_before_those_of_the_images_that_are_shown(vae, images):
    control = torch.randn(16, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(control_condition(control), torch.cat([control, torch.zeros_like(control)]))
    y = first_last_condition(vae, images[0], images[1], 9)
    both = control_condition(control, y, shown=(0, 2))
    assert torch.equal(both[:16], control)
    assert torch.equal(both[16:, [0, 2]], y[4:, [0, 2]]) and both[16:, 1].eq(0).all()
    assert control_condition(control, y)[16:, 1:].eq(0).all()
