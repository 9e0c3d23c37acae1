"""Muon: momentum steps whose matrix is made orthogonal; for the weights of linear layers and convolutions."""

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Steps of equal size in all directions of a weight matrix (Jordan et al. 2024, "Muon").

    Weights with more than two axes are seen as matrices [outputs, everything else]. The step is scaled by
    sqrt(max(1, outputs / inputs)), so that one learning rate suits all shapes.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        state = PartialState()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            # Of several processes each makes its share of the steps, and nothing of the others'.
            steps = torch.zeros(sum(weight.numel() for weight in weights))
            parts = steps.split([weight.numel() for weight in weights])
            for number, (weight, part) in enumerate(zip(weights, parts, strict=True)):
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                if number % state.num_processes == state.process_index:
                    ahead = weight.grad.lerp(momentum, group["momentum"]).flatten(1)
                    gain = max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5
                    part.copy_((orthogonal(ahead) * gain).flatten())
            if state.num_processes > 1:
                steps = reduce(steps, reduction="sum")
            for weight, part in zip(weights, steps.split([weight.numel() for weight in weights]), strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(part.view_as(weight), alpha=-group["lr"])


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return the nearest matrix whose singular values are all about 1, by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
