"""How large the video of a request is: in pixels and frames, as it is denoised, in latents."""

from torch import Tensor

from dataset.decoding import load_image
from modules.prompts import Request
from wan.conditioning import i2v_size
from wan.configs import WanConfig

VAE_PIXELS, VAE_FRAMES = 8, 4  # pixels to a latent each way, and frames


def output_size(request: Request) -> tuple[int, int]:
    """Return the (width, height) of the video: as asked for, or that area in the shape of the start image."""
    if request.image is None:
        return request.width, request.height
    height, width = load_image(request.image).shape[:2]
    return i2v_size(width, height, request.width * request.height)


def output_frames(request: Request, config: WanConfig) -> int:
    """Return the frames that are decoded: an end image that the model has no place for comes with four more."""
    return request.frames + (VAE_FRAMES if request.end_image is not None and "last" not in config.images else 0)


def denoised_frames(request: Request, config: WanConfig) -> int:
    """Return the frames of the video that is denoised: of one frame, its control pictures too, a latent frame each."""
    if request.one_frame:
        return VAE_FRAMES * len(request.one_frame.controls) + 1
    return output_frames(request, config)


def wanted_frames(request: Request, latent: Tensor) -> Tensor:
    """Return of denoised latents [16 f h w] those that are wanted: of one frame, without its control pictures."""
    return latent[:, request.one_frame.place, None] if request.one_frame else latent


def latent_size(frames: int, width: int, height: int) -> tuple[int, int, int]:
    """Return the frames, rows and columns of a video's latents."""
    return (frames - 1) // VAE_FRAMES + 1, height // VAE_PIXELS, width // VAE_PIXELS


def decoded_frame_count(latent: Tensor) -> int:
    """Return how many frames a latent [16 f h w] decodes to."""
    return VAE_FRAMES * (latent.shape[1] - 1) + 1
