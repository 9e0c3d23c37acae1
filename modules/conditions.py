"""What the DiT sees of a request besides its text: pictures, a control video, a video to start from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.decoding import load_image
from modules.clips import read_clip
from modules.generation_options import Models
from modules.latent_encoding import as_pixels
from modules.one_frame import encode_controls
from modules.prompts import Request
from modules.sizes import output_frames, output_size
from modules.video_to_video import encode_video
from utils.devices import compute_dtype
from wan.clip import load_clip
from wan.conditioning import (
    control_condition,
    first_and_end_condition,
    first_frame_condition,
    first_last_condition,
)
from wan.configs import WanConfig
from wan.vae import WanVAE


@dataclass(frozen=True)
class Condition:
    """What the DiT sees besides text and noise."""

    y: Tensor | None = None  # [C f h w]: mask, image, control
    image_features: Tensor | None = None  # [1 257 1280], or [2 257 1280] for a first and a last picture
    frame_indices: Sequence[int] | None = None  # where in time the f latent frames are, if not at 0 to f-1
    video: Tensor | None = None  # [16 f h w]: the latents to start from


def encode_pictures(requests: Sequence[Request], models: Models) -> list[Tensor | None]:
    """Return the CLIP features of each request's pictures, [n 257 1280]; None where the model sees none.

    A model for a first and a last picture sees both; others have no place for the features of an end image.
    """
    config = models.config
    if not (config.clip and config.images):
        return [None] * len(requests)
    pictures = [[request.image, request.end_image][: len(config.images)] for request in requests]
    different = dict.fromkeys(path for paths in pictures for path in paths)
    dtype = compute_dtype(torch.float16, models.device)
    clip = models.kept("clip", lambda: load_clip(models.clip.clip, dtype, models.device))
    encoded = {
        path: clip.encode(as_pixels(load_image(path))[None])[0]
        for path in tqdm(different, desc="encoding pictures", unit="picture")
    }
    return [torch.stack([encoded[path] for path in paths]) for paths in pictures]


def encode_conditions(
    requests: Sequence[Request], features: Sequence[Tensor | None], vae: WanVAE, config: WanConfig
) -> list[Condition]:
    """Return what the DiT sees of each request's pictures and control video, and the video that it starts from."""
    progress = tqdm(requests, desc="encoding conditions", unit="video")
    return [
        Condition(
            encode_condition(request, vae, config),
            image_features,
            request.one_frame.indices if request.one_frame else None,
            encode_video(request, vae, output_frames(request, config), *output_size(request)),
        )
        for request, image_features in zip(progress, features, strict=True)
    ]


@torch.inference_mode()
def encode_condition(request: Request, vae: WanVAE, config: WanConfig) -> Tensor | None:
    """Return the channels [C f h w] that the DiT sees beside the noise: of pictures, of a control video, if any."""
    width, height = output_size(request)
    if request.one_frame:
        return encode_controls(request.one_frame, vae, width, height)
    y = None
    if config.images:
        first = picture_pixels(request.image, width, height)
        if request.end_image is None:
            y = first_frame_condition(vae, first, request.frames)
        else:
            lay_out = first_last_condition if "last" in config.images else first_and_end_condition
            y = lay_out(vae, first, picture_pixels(request.end_image, width, height), request.frames)
    if config.control:
        frames = read_control(request.control, request.frames, width, height)
        y = control_condition(vae.encode(as_pixels(frames)[None])[0], y)
    return y


def picture_pixels(path: Path, width: int, height: int) -> Tensor:
    """Return a picture as pixels [3 H W] in [-1, 1], stretched to the size, not cropped."""
    picture = load_image(path)
    shrinking = height < picture.shape[0]
    resized = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC)
    return as_pixels(resized[None])[:, 0]


def read_control(path: Path, frames: int, width: int, height: int) -> np.ndarray:
    """Return the first frames of a control video or folder of pictures, scaled and cropped: uint8 [F H W 3]."""
    return read_clip(path, frames, width, height, "--control_path")
