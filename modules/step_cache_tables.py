"""What is known of the published weights for predictions that are used again: polynomials, curves, usual settings."""

from dataclasses import dataclass

from wan.configs import WanConfig
from wan.model import WanShape

# Pixels of a frame between 832x480 and 1280x720, as many times the one as the other is times it.
_BETWEEN_SIZES = 606_600


@dataclass(frozen=True)
class Known:
    """What was measured with some weights; None and empty where nothing was."""

    # TeaCache's polynomials, the highest power first: of the time embedding's projection, and of the embedding itself.
    ret: tuple[float, ...] = ()
    plain: tuple[float, ...] = ()
    teacache_threshold: float | None = None
    # MagCache's curve: how long the blocks' sum is at each step by what it was the step before.
    curve: tuple[float, ...] = ()
    magcache_threshold: float | None = None
    magcache_k: int | None = None


# fmt: off
_CURVE_T2V = (
    1.0, 1.0124, 1.00166, 0.99791, 0.99682, 0.99634, 0.99567, 0.99416, 0.99578, 0.9957, 0.99511, 0.99535,
    0.99552, 0.99541, 0.9954, 0.99489, 0.99518, 0.99484, 0.99481, 0.99415, 0.99419, 0.99396, 0.99388, 0.99349,
    0.99309, 0.9927, 0.99228, 0.99171, 0.99137, 0.99068, 0.99005, 0.98944, 0.98849, 0.98758, 0.98644, 0.98504,
    0.9836, 0.98202, 0.97977, 0.97717, 0.9741, 0.97003, 0.96538, 0.9593, 0.95086, 0.94013, 0.92402, 0.90241,
    0.86821, 0.81838,
)
_CURVE_I2V = (
    1.0, 0.98783, 0.97559, 0.98311, 0.98202, 0.9888, 0.98762, 0.98957, 0.99052, 0.99383, 0.98857, 0.99065,
    0.98845, 0.99057, 0.98957, 0.98601, 0.98823, 0.98756, 0.98808, 0.98721, 0.98571, 0.98543, 0.98157, 0.98411,
    0.97952, 0.98149, 0.9774, 0.97825, 0.97355, 0.97085, 0.97056, 0.96588, 0.96113, 0.9567, 0.94961, 0.93973,
    0.93217, 0.91878, 0.90955, 0.92617,
)
# fmt: on

# By the published weights. Measured by the authors of TeaCache and of MagCache, with the official sampling.
KNOWN = {
    "t2v-1.3B": Known(
        ret=(-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2),
        plain=(2.39676752e3, -1.31110545e3, 2.01331979e2, -8.29855975, 1.37887774e-1),
        teacache_threshold=0.08,
        curve=_CURVE_T2V,
        magcache_threshold=0.12,
        magcache_k=4,
    ),
    "t2v-14B": Known(
        ret=(-3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1),
        plain=(-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
        teacache_threshold=0.2,
    ),
    "i2v-14B-480P": Known(
        ret=(2.57151496e5, -3.54229917e4, 1.40286849e3, -1.35890334e1, 1.32517977e-1),
        plain=(-3.02331670e2, 2.23948934e2, -5.25463970e1, 5.87348440, -2.01973289e-1),
        teacache_threshold=0.26,
        curve=_CURVE_I2V,
        magcache_threshold=0.24,
        magcache_k=6,
    ),
    "i2v-14B-720P": Known(
        ret=(8.10705460e3, 2.13393892e3, -3.72934672e2, 1.66203073e1, -4.17769401e-2),
        plain=(-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
        teacache_threshold=0.3,
    ),
}


def published_name(config: WanConfig, shape: WanShape, file_name: str, pixels: int) -> str:
    """Return which row of KNOWN weights are, or would be: the task, for i2v-14B with the size they are made for.

    That is in the name of the file as it is published, else the nearer one of a frame of so many pixels. A model of
    other sizes than the task's is none of them: "".
    """
    if (shape.dim, shape.ffn_dim, shape.blocks) != (config.dim, config.ffn_dim, config.blocks):
        return ""
    if config.name == "i2v-14B":
        size = next((size for size in ("480P", "720P") if size in file_name.upper()), None)
        return f"{config.name}-{size or ('480P' if pixels < _BETWEEN_SIZES else '720P')}"
    return "t2v-14B" if config.name == "t2i-14B" else config.name


def for_steps(curve: tuple[float, ...], steps: int) -> tuple[float, ...]:
    """Return a curve for another number of steps: that of the nearest step, the ends being the ends."""
    if len(curve) == steps:
        return curve
    if steps == 1:
        return curve[-1:]
    return tuple(curve[round(i * (len(curve) - 1) / (steps - 1))] for i in range(steps))
