import json
from pathlib import Path

import pytest

from dataset.buckets import bucket_sizes, choose_bucket


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
