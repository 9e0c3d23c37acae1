"""Bucket sizes: to which width and height a picture or video is resized."""

import math

STEP = 16  # the VAE's 8 pixels times the DiT's patch of 2


def bucket_sizes(resolution: tuple[int, int]) -> list[tuple[int, int]]:
    """Return all (width, height) with about the area of `resolution`, each a multiple of 16, ascending."""
    area = resolution[0] * resolution[1]
    side = math.isqrt(area)
    sizes = set()
    for width in range(_floor(side // 2), side + STEP, STEP):
        height = _floor(area // width)
        sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def choose_bucket(
    resolution: tuple[int, int], enable_bucket: bool, no_upscale: bool, size: tuple[int, int]
) -> tuple[int, int]:
    """Return the (width, height) in pixels that something of `size` (width, height) is resized to.

    Without buckets that is `resolution` itself; else the bucket of the nearest width/height ratio, or with
    `no_upscale` the own size rounded down to 16 where it has no more area than `resolution`.
    """
    if not enable_bucket:
        return resolution
    width, height = size
    if no_upscale and width * height <= resolution[0] * resolution[1]:
        return max(STEP, _floor(width)), max(STEP, _floor(height))
    # min() keeps the first of equals, which is the narrower one.
    return min(bucket_sizes(resolution), key=lambda bucket: abs(width / height - bucket[0] / bucket[1]))


def nearest_size(resolution: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the (width, height), multiples of 16, about the area of `resolution`, nearest to the ratio of `size`."""
    area, ratio = resolution[0] * resolution[1], size[0] / size[1]
    widest = _floor(area // STEP)
    ideal = min(max(STEP, _floor(int(math.sqrt(area * ratio)))), widest)
    widths = range(max(STEP, ideal - 2 * STEP), min(widest, ideal + 2 * STEP) + 1, STEP)
    return min(((w, _floor(area // w)) for w in widths), key=lambda found: abs(found[0] / found[1] - ratio))


def control_size(
    no_resize: bool, resolution: tuple[int, int] | None, size: tuple[int, int], bucket: tuple[int, int]
) -> tuple[int, int]:
    """Return the (width, height) that a control picture of `size` gets beside a picture that gets `bucket`.

    That is the same bucket, unless the dataset says otherwise: `resolution`, the area of controls, and `no_resize`,
    which cuts a control to multiples of 16 (where both are given, one of no more area than `resolution`).
    """
    if not no_resize and resolution is None:
        return bucket
    if resolution is not None and (not no_resize or size[0] * size[1] > resolution[0] * resolution[1]):
        return nearest_size(resolution, size)
    return max(STEP, _floor(size[0])), max(STEP, _floor(size[1]))


def _floor(value: int) -> int:
    return value - value % STEP
