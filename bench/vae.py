"""Compare the VAE's encoding and decoding with diffusers' on the same weights.

diffusers runs the layers one by one over chunks of frames, as other trainers do: there is no twin beside it.

python -m bench.vae
python -m bench.vae --device cuda --dtype bf16
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from bench.measure import Row, Setting, distance, main, timed_pairs
from tests.diffusers_vae import diffusers_vae
from tests.tiny import state_dict
from wan.vae import LATENT_MEAN, LATENT_STD, build_vae

SIZES = {  # base width, frames, height, width; goals of encoding and decoding
    "width 32, an image of 128x128": (32, 1, 128, 128, 0.45, None),
    "width 32, 17 frames of 64x64": (32, 17, 64, 64, 0.9, 0.9),
    "width 96, an image of 256x256": (96, 1, 256, 256, 0.45, None),
    "width 96, 17 frames of 64x64": (96, 17, 64, 64, 0.9, 0.9),
}


@torch.no_grad()
def rows(setting: Setting) -> Iterator[Row]:
    for name, (base, frames, height, width, *goals) in list(SIZES.items())[: 2 if setting.quick else None]:
        ours = build_vae(state_dict("vae", dim=base), setting.dtype).to(setting.device)
        theirs = diffusers_vae(ours).to(setting.device, setting.dtype)
        generator = torch.Generator().manual_seed(0)
        pixels = (torch.rand(1, 3, frames, height, width, generator=generator) * 2 - 1).to(setting.device)
        latents = ours.encode(pixels)
        for what, run_ours, run_theirs, goal in (
            ("encode", partial(ours.encode, pixels), partial(encoded_by_theirs, theirs, pixels), goals[0]),
            ("decode", partial(ours.decode, latents), partial(decoded_by_theirs, theirs, latents), goals[1]),
        ):
            mine, other, ratio = timed_pairs(run_ours, run_theirs, setting.pairs)
            yield Row(f"VAE, {what}, {name}", mine, other, ratio, goal, "s", distance(run_ours(), run_theirs()))


def statistics(device: torch.device) -> list[Tensor]:
    return [torch.tensor(values, device=device)[:, None, None, None] for values in (LATENT_MEAN, LATENT_STD)]


@torch.no_grad()
def encoded_by_theirs(vae: nn.Module, pixels: Tensor) -> Tensor:
    mean, std = statistics(pixels.device)
    return (vae.encode(pixels.to(vae.dtype)).latent_dist.mean.float() - mean) / std


@torch.no_grad()
def decoded_by_theirs(vae: nn.Module, latents: Tensor) -> Tensor:
    mean, std = statistics(latents.device)
    return vae.decode((latents * std + mean).to(vae.dtype)).sample.float().clamp(-1, 1)


if __name__ == "__main__":
    main(__doc__, {"vae": rows})
