"""Compare the DiT's forward pass with diffusers', and with the plain twin of two_way.py, on the same weights.

python -m bench.dit
python -m bench.dit --quick
python -m bench.dit --device cuda --dtype bf16
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bench.measure import TWO_WAY, Row, Setting, compared, main
from bench.two_way import plain_twin
from tests.diffusers_dit import diffusers_dit, padded
from tests.tiny import state_dict
from wan.loading import build_dit
from wan.model import WanModel


@dataclass(frozen=True)
class Size:
    """A DiT and what it works on."""

    dim: int
    ffn: int
    heads: int
    blocks: int
    text_dim: int
    grid: tuple[int, int, int]  # latent frames, rows, columns


SIZES = {  # and the goals, against diffusers and against two-way
    "d=256, 4 blocks, S=128": (Size(256, 1024, 2, 4, 256, (2, 16, 16)), 0.5, 0.4),
    "d=256, 4 blocks, S=1040": (Size(256, 1024, 2, 4, 256, (5, 26, 32)), 0.85, 0.8),
    "d=1536, ffn 8960, 2 blocks, S=480": (Size(1536, 8960, 12, 2, 4096, (2, 24, 40)), 0.9, 0.9),
}


def both(size: Size, setting: Setting) -> tuple[WanModel, nn.Module]:
    """Return our DiT and diffusers' of a size, with the same random weights."""
    weights = state_dict("dit_t2v", dim=size.dim, ffn=size.ffn, blocks=size.blocks, text=size.text_dim)
    weights = {name: tensor.to(setting.dtype) for name, tensor in weights.items()}
    ours = build_dit(weights, size.heads, setting.dtype).to(setting.device)
    return ours, diffusers_dit(weights, ours.shape).to(setting.device)


def inputs(size: Size, setting: Setting, rows: int = 60) -> tuple[Tensor, list[Tensor]]:
    """Return noisy latents [1 16 f h w] and the embedding [rows text_dim] of one prompt."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, *size.grid, generator=generator).to(setting.device)
    return x, [torch.randn(rows, size.text_dim, generator=generator).to(setting.device, setting.dtype)]


@torch.no_grad()
def rows(setting: Setting) -> Iterator[Row]:
    for name, (size, *goals) in list(SIZES.items())[: 2 if setting.quick else None]:
        (ours, theirs), (x, text) = both(size, setting), inputs(size, setting)
        timestep = torch.tensor([500.0], device=setting.device)
        run_ours = partial(ours, x, timestep, text)
        run_theirs = partial(velocity_of_theirs, theirs, x.to(setting.dtype), timestep, text)
        run_twin = partial(plain_twin(ours), x, timestep, text)
        others = {"": (run_theirs, goals[0]), TWO_WAY: (run_twin, goals[1])}
        yield from compared(f"DiT forward, {name}", run_ours, others, setting)


def velocity_of_theirs(dit: nn.Module, x: Tensor, timestep: Tensor, text: list[Tensor]) -> Tensor:
    return dit(x, timestep, padded(text), return_dict=False)[0].float()


if __name__ == "__main__":
    main(__doc__, {"dit": rows})
