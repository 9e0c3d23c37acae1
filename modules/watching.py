"""What looks on while noise becomes a video: previews, and what is left of a run that is stopped."""

import contextlib
import logging

import cv2
import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from modules.outputs import Result, save_latent
from modules.solvers import Step
from modules.video_files import VideoFormat, video_writer
from wan.vae import WanVAE

logger = logging.getLogger(__name__)

_PREVIEW_FPS = 4  # a latent frame is four of the video's sixteen per second
_PREVIEW_PIXELS = 256  # along the longer side, at least
_PICTURES, _PICTURE_PIXELS = 32, 96  # to fit colours to


class Watcher(contextlib.AbstractContextManager):
    """Hears of each result that begins and of each step. Entered around all of them; told by its exit how it ended."""

    def begin(self, result: Result) -> None:
        """A result's first step is next."""

    def step(self, step: Step, clean: Tensor) -> None:
        """A step is done, whose velocity leads to these clean latents [16 f h w]."""

    def __exit__(self, *error: object) -> None:
        return None


class Previewer(Watcher):
    """Writes a small moving picture of the clean latents that a step aims at, without the VAE."""

    def __init__(self, every: int, colours: Tensor):
        self.every, self.colours = every, colours

    def begin(self, result: Result) -> None:
        self.path = result.files.beside("_preview.gif")

    def step(self, step: Step, clean: Tensor) -> None:
        if (step.index + 1) % self.every:
            return
        with video_writer(self.path, _PREVIEW_FPS, None, VideoFormat("gif")) as write:
            for frame in preview_frames(clean.float(), self.colours):
                write(frame)


class PartialKeeper(Watcher):
    """Saves the clean latents that the last complete step aimed at, where the run ends amid a video."""

    def __init__(self) -> None:
        self.result: Result | None = None
        self.last: tuple[Step, Tensor] | None = None

    def begin(self, result: Result) -> None:
        self.result, self.last = result, None

    def step(self, step: Step, clean: Tensor) -> None:
        self.last = step, clean

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None or self.last is None:
            return
        step, clean = self.last
        path = self.result.files.beside("_partial_latent.safetensors")
        metadata = None if self.result.metadata is None else {**self.result.metadata, "steps_done": step.index + 1}
        with contextlib.suppress(OSError):  # a full disk is what may have ended the run
            save_latent(path, clean, metadata)
            logger.warning("kept after %d steps: look at it with --latent_path %s", step.index + 1, path)


def preview_frames(latent: Tensor, colours: Tensor) -> np.ndarray:
    """Return latents [16 f h w] as frames uint8 [f H W 3], some pixels to each latent; colours: latent_colours()."""
    pixels = rearrange(latent, "c f h w -> f h w c") @ colours[:-1].to(latent) + colours[-1].to(latent)
    frames = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    height, width = frames.shape[1:3]
    scale = max(-(-_PREVIEW_PIXELS // max(height, width)), 1)
    size = (width * scale, height * scale)
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC) for frame in frames])


@torch.inference_mode()
def latent_colours(vae: WanVAE) -> Tensor:
    """Return the linear map [17 3] from 16 latents, and 1, to the mean colour in [-1, 1] of the pixels they stand for.

    Fitted by least squares to random smooth pictures that the VAE encodes, so it suits any weights.
    """
    generator = torch.Generator().manual_seed(0)
    rows, wanted = [], []
    for number in range(_PICTURES):
        grid = 1 + number % 8  # from one colour to eight patches along a side
        coarse = torch.rand((1, 3, grid, grid), generator=generator) * 2.4 - 1.2
        picture = F.interpolate(coarse, (_PICTURE_PIXELS,) * 2, mode="bicubic", align_corners=False).clamp(-1, 1)
        latent = vae.encode(rearrange(picture, "b c h w -> b c 1 h w"))[0].float().cpu()
        means = F.avg_pool2d(picture, _PICTURE_PIXELS // latent.shape[-1])[0]
        rows.append(rearrange(latent, "c 1 h w -> (h w) c"))
        wanted.append(rearrange(means, "c h w -> (h w) c"))
    known = torch.cat(rows)
    known = torch.cat([known, torch.ones(len(known), 1)], dim=1)
    return torch.linalg.lstsq(known, torch.cat(wanted)).solution
