"""Gradients that several processes average."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn

_BUNDLE = 1 << 26  # numbers that travel in one go


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace each gradient by its mean over all processes; a branch that was dropped counts as a gradient of 0.

    Small ones travel together, up to some hundred MiB, which take as much memory again while they do.
    """
    bundle: list[nn.Parameter] = []
    for number, parameter in enumerate(parameters, 1):
        bundle.append(parameter)
        if number == len(parameters) or sum(p.numel() for p in bundle) > _BUNDLE:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bundle]
            flat = accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), reduction="mean")
            for p, mean in zip(bundle, flat.split([grad.numel() for grad in grads]), strict=True):
                p.grad = mean.view_as(p)
            bundle = []
