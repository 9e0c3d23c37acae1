"""Flow matching: which noise levels are trained, noised latents, and the velocity target."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from utils.errors import UserError
from utils.options import option

logger = logging.getLogger(__name__)

_MAX_REDRAWS = 1000
_SMALLEST_U = 1e-7  # keeps the normal quantile finite: |n| < 5.2


@dataclass(frozen=True)
class TimestepOptions:
    """timesteps"""

    timestep_sampling: str = option(
        "sigma",
        "how the noise levels of training are distributed",
        choices=(
            "sigma",
            "uniform",
            "sigmoid",
            "shift",
            "flux_shift",
            "flux2_shift",
            "qwen_shift",
            "krea2_shift",
            "ideogram4_shift",
            "logsnr",
            "qinglong_flux",
            "qinglong_qwen",
        ),
    )
    discrete_flow_shift: float = option(1.0, "shift of --timestep_sampling shift; above 1 trains more on noise")
    sigmoid_scale: float = option(1.0, "spread of the sigmoid and shift samplings")
    weighting_scheme: str = option(
        "none",
        "loss weight by noise level (sigma_sqrt, cosmap, min_snr), or density of --timestep_sampling sigma "
        "(logit_normal, mode)",
        choices=("logit_normal", "mode", "cosmap", "sigma_sqrt", "min_snr", "none"),
    )
    logit_mean: float = option(0.0, "mean of logit_normal and logsnr")
    logit_std: float = option(1.0, "deviation of logit_normal and logsnr")
    mode_scale: float = option(1.29, "scale of --weighting_scheme mode")
    min_timestep: int | None = option(None, "smallest timestep to train, from 0, clean (default: 0)")
    max_timestep: int | None = option(None, "largest timestep to train, to 1000, pure noise (default: 1000)")
    preserve_distribution_shape: bool = option(
        False, "with min or max timestep: draw again what falls outside, instead of compressing the distribution"
    )
    num_timestep_buckets: int | None = option(
        None, "spread the timesteps of an epoch evenly over this many equal parts of the distribution"
    )


def check_timesteps(options: TimestepOptions) -> None:
    """Raise UserError for bounds and scales that leave nothing to draw."""
    low, high = bounds(options)
    if not 0 <= low < high <= 1:
        raise UserError(
            f"--min_timestep {low * 1000:g} --max_timestep {high * 1000:g}: no timestep lies between them",
            "use 0 <= min < max <= 1000",
        )
    for name in ("discrete_flow_shift", "logit_std", "sigmoid_scale"):
        if getattr(options, name) <= 0:
            raise UserError(f"--{name} {getattr(options, name):g}: must be greater than 0")
    if options.num_timestep_buckets is not None and options.num_timestep_buckets < 1:
        raise UserError(f"--num_timestep_buckets {options.num_timestep_buckets}: must be at least 1")


def sample_timesteps(
    options: TimestepOptions,
    count: int,
    height: int,
    width: int,
    generator: torch.Generator,
    uniforms: Sequence[float] | None = None,
) -> Tensor:
    """Return t [count] in [0, 1], float32: how noisy each sample is; the DiT is told 1000 t.

    height, width: of the latents, for the samplings that look at the size. uniforms: numbers in [0, 1) to start from,
    where the caller spreads them over an epoch; otherwise they are drawn.
    """
    draw = _SAMPLINGS[options.timestep_sampling]
    given = None if uniforms is None else torch.tensor(uniforms, dtype=torch.float32)
    t = draw(options, _uniform(count, generator) if given is None else given, height, width, generator)
    low, high = bounds(options)
    if options.preserve_distribution_shape:
        t = _redrawn(t, low, high, lambda n: draw(options, _uniform(n, generator), height, width, generator))
    else:
        t = low + t * (high - low)
    if options.timestep_sampling == "sigma":
        # The whole timesteps of a table that has no 0.
        t = (t * 1000).ceil().clamp(min=1) / 1000
    return t


def one_sided(t: Tensor, boundary: float, draw: Callable[[int], Tensor]) -> Tensor:
    """Return t [n], of which those on another side of a boundary, 0 to 1, than the first one are drawn again.

    Until they are there: each t of many batches is distributed as if there was no boundary.
    """
    for _ in range(_MAX_REDRAWS):
        high = 1000 * t >= 1000 * boundary  # as the DiT is told, which may be rounded otherwise
        astray = high != high[0]
        if not astray.any():
            return t
        t[astray] = draw(int(astray.sum()))
    # The first one shows what can be drawn there, however seldom.
    return torch.where(astray, t[0], t)


def check_sides(options: TimestepOptions, boundary: float) -> None:
    """Raise UserError where the bounds leave nothing to train on one side of a boundary."""
    low, high = bounds(options)
    if low >= boundary:
        raise UserError(
            f"--min_timestep {low * 1000:g}: nothing is left for the low-noise model, below {boundary * 1000:g}",
            "train the other one alone, as --dit, or lower it",
        )
    if high < boundary:
        raise UserError(
            f"--max_timestep {high * 1000:g}: nothing is left for the high-noise model, from {boundary * 1000:g} on",
            "leave --dit_high_noise out, or raise it",
        )


def noised(latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the point x_t = (1 - t) x_0 + t e of the straight path and its velocity e - x_0, in float32.

    latents (x_0) and noise (e) [B C F H W]; t [B] from 0, clean, to 1, pure noise.
    Rectified flow, arXiv:2209.03003 eq. 1, with time running from data to noise.
    """
    latents, noise = latents.float(), noise.float()
    t = rearrange(t.float(), "b -> b 1 1 1 1")
    return (1 - t) * latents + t * noise, noise - latents


def bounds(options: TimestepOptions) -> tuple[float, float]:
    """Return between which t the timesteps of training lie."""
    low = 0 if options.min_timestep is None else options.min_timestep
    high = 1000 if options.max_timestep is None else options.max_timestep
    return low / 1000, high / 1000


def _redrawn(t: Tensor, low: float, high: float, draw: Callable[[int], Tensor]) -> Tensor:
    """Return t with everything outside [low, high] drawn again."""
    for _ in range(_MAX_REDRAWS):
        outside = (t < low) | (t > high)
        if not outside.any():
            return t
        t = t.masked_scatter(outside, draw(int(outside.sum())))
    logger.warning(
        "no timestep between %g and %g in %d draws: the nearest bound is used", low * 1000, high * 1000, _MAX_REDRAWS
    )
    return t.clamp(low, high)


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, device=generator.device)


def _normal(u: Tensor) -> Tensor:
    """Return the quantiles of the standard normal distribution at u in [0, 1]."""
    return math.sqrt(2) * torch.erfinv(2 * u.clamp(_SMALLEST_U, 1 - _SMALLEST_U) - 1)


def _shifted(t: Tensor, shift: float) -> Tensor:
    return shift * t / (1 + (shift - 1) * t)


def _sigma(options: TimestepOptions, u: Tensor, *_) -> Tensor:
    """Densities over noise levels of arXiv:2403.03206, section 3.1; read from the noisy end, as diffusers' table is."""
    if options.weighting_scheme == "logit_normal":
        u = torch.sigmoid(options.logit_mean + options.logit_std * _normal(u))
    elif options.weighting_scheme == "mode":
        u = 1 - u - options.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return 1 - u


def _sigmoid(options: TimestepOptions, u: Tensor, *_) -> Tensor:
    return torch.sigmoid(options.sigmoid_scale * _normal(u))


def _shift(options: TimestepOptions, u: Tensor, *_) -> Tensor:
    return _shifted(_sigmoid(options, u), options.discrete_flow_shift)


def _by_size(start: tuple[float, float], end: tuple[float, float], patch: int = 2) -> Callable[..., Tensor]:
    """Return a sampling whose shift is e to a power that is linear in the number of tokens of a frame.

    start, end: two points (tokens, power) of that line; patch: latent pixels along the side of a token.
    """

    def draw(options: TimestepOptions, u: Tensor, height: int, width: int, *_) -> Tensor:
        tokens = (height // patch) * (width // patch)
        slope = (end[1] - start[1]) / (end[0] - start[0])
        return _shifted(_sigmoid(options, u), math.exp(start[1] + slope * (tokens - start[0])))

    return draw


def _ideogram4(options: TimestepOptions, u: Tensor, height: int, width: int, *_) -> Tensor:
    centre = 0.5 * math.log(256 * height * width / 512**2)
    t = torch.sigmoid(centre + 1.5 * _normal(u))
    return t.clamp(1 - 1 / (1 + math.exp(-7.5)), 1 - 1 / (1 + math.exp(9)))


def _log_snr(mean: float, deviation: float, u: Tensor) -> Tensor:
    return torch.sigmoid(-(mean + deviation * _normal(u)) / 2)


def _logsnr(options: TimestepOptions, u: Tensor, *_) -> Tensor:
    return _log_snr(options.logit_mean, options.logit_std, u)


def _qinglong_flux(options: TimestepOptions, u: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """79 % as flux_shift, 11 % as logsnr, and 10 % almost clean."""
    d = _uniform(len(u), generator)
    noisy = torch.where(d < 0.79, _flux_shift(options, u, height, width), _logsnr(options, u))
    return torch.where(d < 0.9, noisy, _log_snr(5.36, 1.0, u))


def _qinglong_qwen(options: TimestepOptions, u: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """95 % as qwen_shift, and 5 % almost clean."""
    d = _uniform(len(u), generator)
    return torch.where(d < 0.95, _qwen_shift(options, u, height, width), _log_snr(5.36, 1.0, u))


_flux_shift = _by_size((256, 0.5), (4096, 1.15))
_qwen_shift = _by_size((256, 0.5), (8192, 0.9))
_SAMPLINGS: dict[str, Callable[..., Tensor]] = {
    "sigma": _sigma,
    "uniform": lambda options, u, *_: u,
    "sigmoid": _sigmoid,
    "shift": _shift,
    "flux_shift": _flux_shift,
    "flux2_shift": _by_size((256, 0.5), (4096, 1.15), patch=1),
    "qwen_shift": _qwen_shift,
    "krea2_shift": _by_size((256, 0.5), (6400, 1.15)),
    "ideogram4_shift": _ideogram4,
    "logsnr": _logsnr,
    "qinglong_flux": _qinglong_flux,
    "qinglong_qwen": _qinglong_qwen,
}
