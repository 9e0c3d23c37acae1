"""Video to video: the latents of a video, noised as far as is asked for, in place of the noise that others start from.

A run of the solver's schedule begins at the step whose noise level is nearest to --strength (SDEdit, arXiv:2108.01073).
"""

import logging

import torch
from torch import Tensor

from modules.clips import read_clip
from modules.flow_matching import noised
from modules.latent_encoding import as_pixels
from modules.prompts import Request
from modules.solvers import sigma_schedule
from wan.vae import WanVAE

logger = logging.getLogger(__name__)


def first_step(request: Request, solver: str) -> int:
    """Return the number of the first step of a request; as many as it has where nothing is left to do."""
    if request.video is None:
        return 0
    _, sigmas = sigma_schedule(solver, request.steps, request.flow_shift, request.timesteps)
    return int((sigmas - request.strength).abs().argmin())


def log_start(request: Request, solver: str) -> None:
    """Log where a request begins that does not begin with noise."""
    if request.video is None:
        return
    first = first_step(request, solver)
    sigma = float(sigma_schedule(solver, request.steps, request.flow_shift, request.timesteps)[1][first])
    logger.info(
        "--strength %g: %s at noise level %.3g, %d of %d steps are left",
        *(request.strength, request.video.name, sigma, request.steps - first, request.steps),
    )


@torch.inference_mode()
def encode_video(request: Request, vae: WanVAE, frames: int, width: int, height: int) -> Tensor | None:
    """Return the latents [16 f h w] of the video that a request starts from, if there is one."""
    if request.video is None:
        return None
    return vae.encode(as_pixels(read_clip(request.video, frames, width, height, "--video_path"))[None])[0]


def start(request: Request, solver: str, noise: Tensor, latents: Tensor | None) -> tuple[Tensor, int]:
    """Return what a request starts from [16 f h w], and the number of its first step.

    noise [16 f h w]; latents: those of its video. At the very first step there is nothing left of them.
    """
    first = first_step(request, solver)
    if first == 0:
        return noise, 0
    _, sigmas = sigma_schedule(solver, request.steps, request.flow_shift, request.timesteps)
    x, _ = noised(latents[None].to(noise.device), noise[None], sigmas[first : first + 1].to(noise.device))
    return x[0], first
