"""LoKr, the Kronecker product of two matrices: what `--network_module networks.lokr` finds.

kron(w1, w2), with w2 = alpha / rank * w2_a w2_b where that is smaller (KronA, arXiv:2212.10650; LyCORIS,
arXiv:2309.14859). Names, first weights and the rule for w2 are those of LyCORIS, so that options mean the same.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import create
from networks.lora import Branch, Dropouts, alpha_of, kept_ranks


class LoKrBranch(Branch):
    """The update x -> kron(w1, w2) x of one linear layer.

    factor: w1 takes this part of the layer's inputs and outputs, or the largest divisor below; -1: parts of about the
    same size. w2 is of low rank, and alpha / rank counts, only if the rank is less than half its longer side.
    first, whole: the shape of w1, and whether w2 is not of low rank, where a file has decided that.
    """

    kind = "LoKr"
    parts = frozenset({"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"})
    at_zero = ("lokr_w2", "lokr_w2_b")
    arguments = ("factor",)

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rank: int,
        alpha: float,
        dropouts: Dropouts | None = None,
        factor: int = -1,
        first: tuple[int, int] | None = None,
        whole: bool | None = None,
    ):
        super().__init__(inputs, outputs, rank, alpha, dropouts)
        first = first or (smaller_part(outputs, factor), smaller_part(inputs, factor))
        second = (outputs // first[0], inputs // first[1])
        self.lokr_w1 = nn.Parameter(torch.empty(first))
        nn.init.kaiming_uniform_(self.lokr_w1, a=math.sqrt(5))
        self.whole = rank >= max(second) / 2 if whole is None else whole
        if self.whole:
            self.scale = 1.0
            self.lokr_w2 = nn.Parameter(torch.zeros(second))
        else:
            self.lokr_w2_a = nn.Parameter(torch.empty(second[0], rank))
            self.lokr_w2_b = nn.Parameter(torch.zeros(rank, second[1]))
            nn.init.kaiming_uniform_(self.lokr_w2_a, a=math.sqrt(5))

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], dropouts: Dropouts) -> "LoKrBranch":
        whole, first = "lokr_w2" in parts, tuple(parts["lokr_w1"].shape)
        if whole:
            second, rank = parts["lokr_w2"].shape, max(round(alpha_of(parts, 1)), 1)
        else:
            second = (parts["lokr_w2_a"].shape[0], parts["lokr_w2_b"].shape[1])
            rank = parts["lokr_w2_b"].shape[0]
        outputs, inputs = (a * b for a, b in zip(first, second, strict=True))
        branch = cls(inputs, outputs, rank, alpha_of(parts, rank), dropouts, first=first, whole=whole)
        branch.load(parts)
        return branch

    def load(self, parts: Mapping[str, Tensor]) -> None:
        super().load(parts)
        if self.whole:
            self.scale = 1.0

    def forward(self, x: Tensor, multiplier: float = 1.0) -> Tensor:
        if self.training and self.dropouts.neuron:
            x = F.dropout(x, self.dropouts.neuron)
        w2 = self.second(self.dropouts.rank if self.training else 0.0)
        return _KroneckerLinear.apply(x, self.lokr_w1, w2, self.scale * multiplier)

    def second(self, dropout: float = 0.0) -> Tensor:
        """Return w2 multiplied out; dropout: of a rank, or of a column where it has none."""
        left = self.lokr_w2 if self.whole else self.lokr_w2_a
        if dropout:
            left = left * kept_ranks(left.shape[1], dropout, like=left)
        return left if self.whole else left @ self.lokr_w2_b

    @torch.no_grad()
    def norm(self) -> Tensor:
        return self.scale * self.lokr_w1.double().norm() * self.second().double().norm()


def smaller_part(size: int, factor: int) -> int:
    """Return the smaller one of two numbers whose product is `size`.

    One of them is `factor` where that divides; else the smaller is the largest divisor that does not exceed it, nor the
    root of `size`. -1 stands for the root.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor)
    limit = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    return next(number for number in range(limit, 0, -1) if size % number == 0)


class _KroneckerLinear(torch.autograd.Function):
    """x -> scale * kron(w1, w2) x as w1 X w2^T, X being x folded; it keeps x, w1 and w2 for its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, w1, w2)
        ctx.scale = scale
        folded = x.unflatten(-1, (w1.shape[1], w2.shape[1]))
        return (w1.to(x.dtype) @ (folded @ (w2 * scale).to(x.dtype).T)).flatten(-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2 = ctx.saved_tensors
        small1, small2 = w1.to(x.dtype), (w2 * ctx.scale).to(x.dtype)
        folded = x.unflatten(-1, (w1.shape[1], w2.shape[1])).flatten(0, -3)
        grad = grad.unflatten(-1, (w1.shape[0], w2.shape[0])).flatten(0, -3)
        between = small1.T @ grad  # the gradient at X w2^T
        of_x = (between @ small2).reshape(x.shape) if ctx.needs_input_grad[0] else None
        of_w1 = torch.einsum("nab,ncb->ac", grad, folded @ small2.T).to(w1.dtype)
        of_w2 = (between.flatten(0, 1).T @ folded.flatten(0, 1)).to(w2.dtype) * ctx.scale
        return of_x, of_w1, of_w2, None


create_network = partial(create.create_network, LoKrBranch)
create_network_from_weights = partial(create.create_network_from_weights, LoKrBranch)
load_weights = create.load_weights
