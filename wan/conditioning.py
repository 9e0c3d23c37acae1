"""Pictures and control videos > what the DiT sees of them: masks and latents, laid out frame by frame."""

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor

FRAMES_PER_LATENT = 4


class VideoEncoder(Protocol):
    """The part of the VAE that conditions need."""

    def encode(self, pixels: Tensor) -> Tensor: ...


def i2v_size(image_width: int, image_height: int, area: int) -> tuple[int, int]:
    """Return the (width, height) in pixels of a video in the shape of its start image: multiples of 16, about `area`.

    The official formula, sqrt(area x aspect ratio) rounded down to 16 pixels, in whole numbers: in floating point an
    image of exactly 832 x 480 would become 832 x 464.
    """
    height = 16 * math.isqrt(area * image_height // (256 * image_width))
    width = 16 * math.isqrt(area * image_width // (256 * image_height))
    return max(width, 16), max(height, 16)


def frame_mask(given: Iterable[int], frames: int, height: int, width: int) -> Tensor:
    """Return the mask [4 f h w] that marks the given frames of a video by 1, each latent frame's four as channels.

    frames = 4n + 1; the first one stands alone and counts for all four channels of the first latent frame.
    """
    mask = torch.zeros(frames)
    mask[list(given)] = 1
    mask = torch.cat([mask[:1].repeat(FRAMES_PER_LATENT - 1), mask])
    mask = rearrange(mask, "(f four) -> four f", four=FRAMES_PER_LATENT)
    return repeat(mask, "four f -> four f h w", h=height, w=width)


def first_frame_condition(vae: VideoEncoder, image: Tensor, frames: int) -> Tensor:
    """Return the condition y [20 f h w] of image to video: mask, then latents of the image followed by grey frames.

    image [3 H W] in [-1, 1]; frames = 4n + 1.
    """
    return _condition(vae, {0: image}, frames)


def first_last_condition(vae: VideoEncoder, first: Tensor, last: Tensor, frames: int) -> Tensor:
    """Return the condition y [20 f h w] of first and last frame to video, with grey frames in between.

    first, last [3 H W] in [-1, 1]; frames = 4n + 1. Of the last latent frame only the last channel is marked.
    """
    return _condition(vae, {0: first, frames - 1: last}, frames)


def first_and_end_condition(vae: VideoEncoder, image: Tensor, end: Tensor, frames: int) -> Tensor:
    """Return the condition y [20 f+1 h w] that leads an image-to-video model, which knows no end image, towards one.

    image, end [3 H W] in [-1, 1]. The end image is encoded alone, as a latent frame behind those of the video.
    """
    latent = vae.encode(rearrange(end, "c h w -> 1 c 1 h w"))[0].float()
    mask = torch.ones_like(latent[:FRAMES_PER_LATENT])
    return torch.cat([first_frame_condition(vae, image, frames), torch.cat([mask, latent])], dim=1)


def one_frame_condition(
    controls: Sequence[Tensor], grey: Tensor, place: int, masks: Sequence[Tensor | None] | None = None
) -> Tensor:
    """Return the condition y [20 F h w] of one frame among F - 1 control pictures, all of them encoded alone.

    controls: latents z [16 1 h w] in order of time; grey [16 1 h w]: those of a mid-grey picture, which stands in the
    place of the frame that is to be made. masks: for each control m [h w] from 0 to 1, or None for 1 everywhere. What a
    mask hides is as if it were not given: a control's channels are m, four times, and m z + (1 - m) grey.
    """
    columns = []
    for z, m in zip(controls, masks or [None] * len(controls), strict=True):
        if m is None:
            columns.append(torch.cat([torch.ones_like(z[:FRAMES_PER_LATENT]), z]).float())
            continue
        m = m.to(z.device)
        shown = (m * z.float()) + (1 - m) * grey.float()
        columns.append(torch.cat([repeat(m, "h w -> four 1 h w", four=FRAMES_PER_LATENT), shown]))
    columns.insert(place, torch.cat([torch.zeros_like(grey[:FRAMES_PER_LATENT]), grey]).float())
    return torch.cat(columns, dim=1)


def control_condition(control: Tensor, y: Tensor | None = None, shown: Iterable[int] = (0,)) -> Tensor:
    """Return the condition [32 f h w] of a Fun-Control model: latents of the control video, then of the images.

    control [16 f h w]; y [20 f h w]: the condition of the same images without control, or None for text to video.
    shown: the latent frames that hold an image; of the others, the model gets zeros. There are no mask channels.
    """
    images = torch.zeros_like(control)
    if y is not None:
        frames = list(shown)
        images[:, frames] = y[FRAMES_PER_LATENT:, frames].to(control)
    return torch.cat([control, images])


def _condition(vae: VideoEncoder, images: dict[int, Tensor], frames: int) -> Tensor:
    """Return mask and latents [20 f h w] of a video that shows images at some frames, and mid-grey at all others."""
    some = next(iter(images.values()))
    assert frames % FRAMES_PER_LATENT == 1, frames
    video = torch.zeros(1, 3, frames, *some.shape[1:], device=some.device)
    for frame, image in images.items():
        video[0, :, frame] = image
    latents = vae.encode(video)[0].float()
    mask = frame_mask(images, frames, *latents.shape[2:]).to(latents.device)
    return torch.cat([mask, latents])
