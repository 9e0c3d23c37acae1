"""The loss of a predicted velocity: of which error, and what weighs how much in it."""

import logging
import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from utils.errors import UserError
from utils.options import option

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LossOptions:
    """the loss"""

    loss: str = option("mse", "of squared errors, or huber: outliers count linearly", choices=("mse", "huber"))
    huber_delta: float = option(1.0, "the error from which on --loss huber is linear; latents have a deviation of 1")
    min_snr_gamma: float = option(5.0, "the signal-to-noise ratio that --weighting_scheme min_snr stops at")


def check_loss(options: LossOptions, weighting_scheme: str) -> None:
    """Raise UserError for numbers that cannot be; warn of those that nothing uses."""
    uses = {"huber_delta": options.loss == "huber", "min_snr_gamma": weighting_scheme == "min_snr"}
    needs = {"huber_delta": "--loss huber", "min_snr_gamma": "--weighting_scheme min_snr"}
    for name, used in uses.items():
        value = getattr(options, name)
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name} {value:g}: must be greater than 0")
        if not used and value != getattr(LossOptions, name):
            logger.warning("--%s: ignored without %s", name, needs[name])


def flow_loss(
    prediction: Tensor,
    velocity: Tensor,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    options: LossOptions | None = None,
) -> Tensor:
    """Return the mean error of the predicted velocity [B C F H W], float32.

    weights [B]: of the samples, or None. mask [B 1 F H W] from 0 to 1, or None: how much each place counts in its
    sample, whose error is the mean weighted by it; a sample with a mask of zeros has the loss 0.
    """
    error = prediction.float() - velocity.float()
    options = options or LossOptions()
    error = error.square() if options.loss == "mse" else huber(error, options.huber_delta)
    if mask is not None:
        error = error * normalised(mask)
    if weights is not None:
        error = error * rearrange(weights, "b -> b 1 1 1 1")
    return error.mean()


def huber(error: Tensor, delta: float) -> Tensor:
    """Return e^2 of errors up to delta, and 2 delta |e| - delta^2 beyond: the squared error with straight arms.

    Twice the function of Huber, Robust Estimation of a Location Parameter, 1964, so that small errors count as in mse.
    """
    size = error.abs()
    return torch.where(size <= delta, error.square(), delta * (2 * size - delta))


def normalised(mask: Tensor) -> Tensor:
    """Return a mask [B 1 F H W] scaled to a mean of 1 over each sample; one of zeros stays so."""
    mean = mask.mean(dim=(1, 2, 3, 4), keepdim=True)
    return mask / mean.clamp(min=torch.finfo(mask.dtype).tiny)


@torch.no_grad()
def sample_errors(prediction: Tensor, velocity: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared error of each sample [B], float32, in the places that a mask [B 1 F H W] leaves."""
    error = (prediction.float() - velocity.float()).square()
    if mask is not None:
        error = error * normalised(mask)
    return error.mean(dim=(1, 2, 3, 4))


def loss_weights(scheme: str, t: Tensor, gamma: float = 5.0) -> Tensor | None:
    """Return the loss weight of each t [B], or None where all weigh the same.

    sigma_sqrt, cosmap: arXiv:2403.03206, section 3.1. min_snr: arXiv:2303.09556, section 3.4, whose weight of the error
    of x_0 is min(SNR, gamma). On the path x_t = (1 - t) x_0 + t e that ratio is ((1 - t) / t)^2, and x_0 = x_t - t v
    has t times the velocity's error: the latter's square weighs t^2 min(SNR, gamma) = min((1 - t)^2, gamma t^2).
    """
    if scheme == "sigma_sqrt":
        return t.clamp(min=1e-3) ** -2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * t + 2 * t**2))
    if scheme == "min_snr":
        return torch.minimum((1 - t) ** 2, gamma * t**2)
    return None
