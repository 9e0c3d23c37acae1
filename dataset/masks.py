"""Masks: how much each place of a picture or video counts in the loss, from files or alpha channels."""

from pathlib import Path

import cv2
import numpy as np
import torch
from einops import reduce
from PIL import Image, ImageOps
from torch import Tensor

from dataset.config import DatasetConfig
from dataset.decoding import MediaError, load_image, readable
from dataset.items import IMAGE_SUFFIXES, Source


def is_masked(config: DatasetConfig) -> bool | None:
    """Tell whether training weighs a dataset's examples by masks; None: of a list those whose caches have one."""
    if config.alpha_mask:
        return True
    return None if config.jsonl_file else config.mask_directory is not None


def moving_mask(source: Source) -> Path | None:
    """Return the video, or folder of pictures, that is a video's mask, or None where that is a picture or nothing."""
    mask = source.mask
    return None if mask is None or (mask.suffix.lower() in IMAGE_SUFFIXES and not mask.is_dir()) else mask


def still_mask(source: Source, config: DatasetConfig, size: tuple[int, int]) -> np.ndarray:
    """Return the mask picture of a file as uint8 [H W], in the file's own size (width, height): 255 counts, 0 does not.

    That is the mask file, else the picture's alpha channel where the dataset asks for it, else all counts.
    """
    if source.mask is not None:
        with readable(source.mask):
            mask = gray(load_image(source.mask))
        require_shape(source, (mask.shape[1], mask.shape[0]), size)
        return mask if mask.shape == size[::-1] else cv2.resize(mask, size, interpolation=cv2.INTER_AREA)
    alpha = None
    if config.alpha_mask:
        with readable(source.path):
            alpha = load_alpha(source.path)
    return np.full(size[::-1], 255, np.uint8) if alpha is None else alpha


def require_shape(source: Source, mask: tuple[int, int], size: tuple[int, int]) -> None:
    """Raise MediaError where a mask (width, height) has not the shape of its picture or video, to within a pixel."""
    if abs(mask[0] * size[1] - mask[1] * size[0]) > max(*mask, *size):
        raise MediaError(
            f"{source.mask}: the mask is {mask[0]}x{mask[1]}, but {source.path.name} {size[0]}x{size[1]}: not one shape"
        )


def load_alpha(path: Path) -> np.ndarray | None:
    """Return a picture's alpha channel as uint8 [H W], turned upright, or None where it has none."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if not image.has_transparency_data:
            return None
        return np.array(image.convert("RGBA").getchannel("A"))


def gray(frames: np.ndarray) -> np.ndarray:
    """Return frames uint8 [... 3] as the mean of their colours, uint8 [...]."""
    return (frames.sum(axis=-1, dtype=np.uint16) // 3).astype(np.uint8)


def latent_mask(mask: np.ndarray) -> Tensor:
    """Return a mask uint8 [F H W], F = 4 n + 1, as what places of the latents are worth in [0, 1], float32 [1 f h w].

    The mean over its 8x8 pixels and over the frames that share it: the first one alone, then four each.
    """
    places = reduce(torch.from_numpy(mask).float() / 255, "f (h y) (w x) -> f h w", "mean", y=8, x=8)
    later = reduce(places[1:], "(f four) h w -> f h w", "mean", four=4)
    return torch.cat([places[:1], later])[None]


def weights_of(masks: Tensor, config: DatasetConfig) -> Tensor:
    """Return cached masks [B 1 f h w] as what places weigh in the loss: black has the dataset's mask_min_weight."""
    return config.mask_min_weight + (1 - config.mask_min_weight) * masks
