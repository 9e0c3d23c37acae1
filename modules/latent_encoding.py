"""Pixels > VAE and CLIP > the tensors of latent cache files, by what is to be trained."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from dataset.config import ImageConfig
from dataset.masks import latent_mask
from dataset.media import Clip
from utils.devices import compute_dtype
from wan.clip import ClipOptions, ImageEncoder, load_clip
from wan.conditioning import first_frame_condition, first_last_condition, one_frame_condition
from wan.vae import VaeOptions, WanVAE, load_vae

logger = logging.getLogger(__name__)

# The tensors of a latent cache file, by what is to be trained. Wan2.2's image-to-video models know no CLIP.
# Those of a model for a first and a last frame are called like those for a first frame.
T2V = ("latents",)
I2V_WITHOUT_CLIP = ("latents", "latents_image")
I2V = ("latents", "latents_image", "clip")
ONE_FRAME_WITHOUT_CLIP = ("latents", "latents_image", "f_indices")
ONE_FRAME = ("latents", "latents_image", "f_indices", "clip")

# The frames of a clip that its condition can show, by the names in WanConfig.images.
SHOWN = {"first": 0, "last": -1}


@dataclass(frozen=True)
class LatentEncoders:
    """What turns pixels into the tensors of a latent cache file."""

    vae: WanVAE
    clip: ImageEncoder | None


def load_latent_encoders(
    vae: VaeOptions, clip: ClipOptions, dtype: torch.dtype, device: torch.device
) -> LatentEncoders:
    """Return the VAE, and CLIP where its weights are given, ready to encode on a device.

    dtype: of the VAE on a GPU; a CPU computes in float32, where it is faster than in 16 bits.
    """
    computing = torch.float32 if device.type == "cpu" else dtype
    loaded_vae = load_vae(vae.vae, computing, device, vae.vae_cache_cpu, vae.tile)
    return LatentEncoders(
        vae=loaded_vae,
        clip=load_clip(clip.clip, compute_dtype(torch.float16, device), device) if clip.clip else None,
    )


@torch.no_grad()
def encode_clips(
    encoders: LatentEncoders, clips: Sequence[Clip], names: Sequence[str], images: Sequence[str] = ("first",)
) -> list[dict[str, Tensor]]:
    """Return for each clip the tensors of its cache file; the clips must have one shape.

    names: of latents [16 f h w], latents_image [20 f h w] and clip, the features of the frames that images names:
    [257 D] of the first one, [2 257 D] of the first and the last one. latents_control [16 f h w] is added where the
    clips have controls, latents_mask [1 f h w] where they have masks.
    """
    pixels = torch.stack([as_pixels(clip.pixels) for clip in clips])
    tensors = {"latents": encoders.vae.encode(pixels)}
    shown = [pixels[:, :, SHOWN[name]] for name in images]
    if "latents_image" in names:
        condition = first_last_condition if "last" in images else first_frame_condition
        frames = pixels.shape[2]
        tensors["latents_image"] = torch.stack(
            [condition(encoders.vae, *pictures, frames) for pictures in zip(*shown, strict=True)]
        )
    if "clip" in names:
        features = [encoders.clip.encode(pictures) for pictures in shown]
        tensors["clip"] = features[0] if len(features) == 1 else torch.stack(features, dim=1)
    if clips[0].controls:
        tensors["latents_control"] = encoders.vae.encode(torch.stack([as_pixels(clip.controls[0]) for clip in clips]))
    if clips[0].mask is not None:
        tensors["latents_mask"] = torch.stack([_mask(clip) for clip in clips])
    return [{name: tensor[i] for name, tensor in tensors.items()} for i in range(len(clips))]


@torch.no_grad()
def encode_one_frame(encoders: LatentEncoders, clip: Clip, config: ImageConfig) -> dict[str, Tensor]:
    """Return the tensors of a one-frame cache file: a picture and its N control pictures as frames of one latent video.

    latents [16 N+1 h w] and latents_image [20 N+1 h w] hold the frames in the order of f_indices [N+1], each encoded
    alone; latents_image shows the controls (mask 1) and is grey in the picture's place (mask 0). clip [N 257 D] are the
    features of the controls. latents_mask [1 N+1 h w] is the picture's mask in every frame.
    """
    picture = as_pixels(clip.pixels)
    controls = [as_pixels(control) for control in clip.controls]
    picture_latent, grey, *control_latents = encoders.vae.encode(
        torch.stack([picture, torch.zeros_like(picture), *controls])
    )
    indices = config.frame_indices
    place = indices.index(config.fp_1f_target_index)
    frames = [*control_latents[:place], picture_latent, *control_latents[place:]]
    tensors = {
        "latents": torch.cat(frames, dim=1),
        "latents_image": one_frame_condition(control_latents, grey, place),
        "f_indices": torch.tensor(indices),
    }
    if encoders.clip is not None:
        tensors["clip"] = encoders.clip.encode(torch.stack([control[:, 0] for control in controls]))
    if clip.mask is not None:
        tensors["latents_mask"] = _mask(clip).expand(-1, len(indices), -1, -1)
    return tensors


def _mask(clip: Clip) -> Tensor:
    """Return a clip's mask [1 f h w]; warn of one from which nothing is learned."""
    mask = latent_mask(clip.mask)
    if not mask.any():
        logger.warning("%s: the mask of %s is black all over: nothing is learned", clip.item.source.path, clip.item.key)
    return mask


def as_pixels(frames: np.ndarray) -> Tensor:
    """Return uint8 frames [F H W 3] or one picture [H W 3] as pixels [3 F H W] or [3 H W] in [-1, 1], float32.

    In float32 whatever the VAE computes in: in bfloat16 the division would quantise the picture.
    """
    return rearrange(torch.from_numpy(frames), "... c -> c ...") / 127.5 - 1
