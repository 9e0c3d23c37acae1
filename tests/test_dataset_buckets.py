import json
from pathlib import Path

import pytest

from dataset.buckets import bucket_sizes, choose_bucket, control_size, nearest_size


def test_buckets_are_those_of_the_recorded_choices(golden: Path):
    recorded = json.loads((golden / "buckets.json").read_text())
    for resolution, enable_bucket, no_upscale, size, bucket in recorded["rows"]:
        if 0 not in bucket:  # the original's answer for very thin pictures
            assert list(choose_bucket(tuple(resolution), enable_bucket, no_upscale, tuple(size))) == bucket
    for name, sizes in recorded["lists"].items():
        width, height = map(int, name.split("x"))
        assert [list(size) for size in bucket_sizes((width, height))] == sizes


@pytest.mark.parametrize("size", [(10, 700), (700, 10), (1, 1)])
def test_a_picture_thinner_than_16_pixels_still_has_a_bucket(size: tuple[int, int]):
    assert min(choose_bucket((512, 512), True, True, size)) == 16


@pytest.mark.parametrize(
    ("resolution", "size", "found"),
    [
        ((1024, 1024), (1920, 1080), (1360, 768)),
        ((512, 512), (800, 1200), (416, 624)),
        ((512, 512), (3000, 500), (1248, 208)),
        ((32, 32), (10_000, 10), (64, 16)),
    ],
)
def test_the_size_of_nearest_ratio_is_that_of_known_examples(resolution, size, found):
    assert nearest_size(resolution, size) == found


@pytest.mark.parametrize(
    ("no_resize", "resolution", "size", "found"),
    [
        (False, None, (500, 333), (96, 64)),
        (True, None, (500, 333), (496, 320)),
        (False, (512, 512), (500, 333), (624, 416)),
        (True, (512, 512), (500, 333), (496, 320)),
        (True, (256, 256), (500, 333), (304, 208)),
    ],
)
def test_a_control_picture_has_the_size_of_its_picture_unless_the_dataset_says_otherwise(
    no_resize, resolution, size, found
):
    assert control_size(no_resize, resolution, size, bucket=(96, 64)) == found
