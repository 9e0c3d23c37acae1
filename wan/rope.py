"""Rotary position factors in three dimensions: frame, row and column of a token's patch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

TOKENS = 4096  # that are turned at a time
THETA = 10000.0


def rope_factors(
    head_dim: int,
    frames: int | Sequence[int],
    height: int,
    width: int,
    device: torch.device | str = "cpu",
    riflex: int | None = None,
) -> Tensor:
    """Return the rotation of each token, e^(i angle), for tokens in (frame, row, column) order: [L 1 D/2] complex64.

    frames: how many, or the temporal position of each one; height, width: of the token grid. A head's D/2 channel
    pairs are shared out to the axes as D/2 - 2 (D//6), D//6 and D//6; each axis restarts at its highest frequency.
    Angles in float64: in float32 that of frame 1000 would be off by 3e-5.
    riflex: number, from 1, of the frequency along time that becomes riflex_frequency() of the number of frames.
    """
    positions = range(frames) if isinstance(frames, int) else frames
    grid = torch.meshgrid(
        *(torch.tensor(list(axis), dtype=torch.float64) for axis in (positions, range(height), range(width))),
        indexing="ij",
    )
    side = head_dim // 6
    angles = []
    for position, pairs in zip(grid, (temporal_pairs(head_dim), side, side), strict=True):
        frequencies = THETA ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
        if riflex is not None and position is grid[0]:
            frequencies[riflex - 1] = riflex_frequency(len(positions))
        angles.append(position.reshape(-1, 1, 1) * frequencies)
    angle = torch.cat(angles, dim=-1)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64).to(device)


def riflex_frequency(frames: int) -> float:
    """Return the angle from one latent frame to the next by which a video of so many turns nine tenths of a circle.

    What a model learned to repeat after a period within the lengths it was trained on does then not repeat in a longer
    video (RIFLEx, arXiv:2502.15894).
    """
    return 0.9 * 2 * math.pi / frames


def temporal_pairs(head_dim: int) -> int:
    """Return how many of a head's D/2 channel pairs, each with a frequency of its own, tell the frame."""
    return head_dim // 2 - 2 * (head_dim // 6)


def rotate(x: Tensor, factors: Tensor) -> Tensor:
    """Return x [B L H D] with its neighbouring channel pairs turned by factors [L 1 D/2] or [B L 1 D/2].

    Computed in float32, returned in the dtype of x. factors may be real, [... D/2 2]: the same numbers, which compilers
    can make code for; uncompiled, the complex product takes a fraction of the time.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if factors.is_complex():
        turned = torch.view_as_real(torch.view_as_complex(pairs) * factors)
    else:
        (real, imaginary), (cos, sin) = pairs.unbind(-1), factors.unbind(-1)
        turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def rotate_(x: Tensor, factors: Tensor) -> Tensor:
    """Return what rotate() does, in the memory of x; only a few tokens at a time are float32 on the way."""
    for some, turns in zip(x.split(TOKENS, dim=1), factors.split(TOKENS, dim=-3), strict=True):
        some.copy_(rotate(some, turns))
    return x
