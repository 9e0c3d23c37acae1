"""What the DiT predicts of a batch, under the conditions that its task has."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dataset.loader import Batch
from wan.configs import WanConfig


@dataclass(frozen=True)
class Told:
    """How the DiT is told where and how noisy the latents are: as they are, or as musubi-tuner tells it."""

    places: bool = True  # the places in time of one-frame caches; else frames count from 0
    timestep_offset: float = 0.0  # on top of 1000 t


def as_told(compat_musubi: bool, timestep_sampling: str) -> Told:
    """Return how the DiT is told with --compat_musubi, or without."""
    if not compat_musubi:
        return Told()
    return Told(places=False, timestep_offset=0.0 if timestep_sampling == "sigma" else 1.0)


def predict(dit: nn.Module, config: WanConfig, batch: Batch, x_t: Tensor, t: Tensor, told: Told = Told()) -> Tensor:
    """Return the velocity [B 16 F H W] predicted at x_t [B 16 F H W] and t [B] under a batch's conditions."""
    features = batch.clip if config.clip and config.images else None
    if features is not None:
        # Pictures of one video one after the other.
        features = features.reshape(-1, *features.shape[-2:])
    indices = None if batch.frame_indices is None or not told.places else batch.frame_indices.tolist()
    y = condition_latents(config, batch)
    return dit(x_t, 1000 * t + told.timestep_offset, batch.text, y=y, image_features=features, frame_indices=indices)


def condition_latents(config: WanConfig, batch: Batch) -> Tensor | None:
    """Return the channels that the DiT sees beside the noisy latents, [B 20 F H W] or [B 32 F H W], if any.

    A Fun-Control model sees the control video and, without the mask, the latents of the first frame or nothing.
    """
    if not config.control:
        return batch.latents_image if config.images else None
    picture = torch.zeros_like(batch.latents_control)
    if config.images:
        picture[:, :, 0] = batch.latents_image[:, 4:, 0]
    return torch.cat([batch.latents_control, picture], dim=1)
