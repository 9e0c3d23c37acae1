"""LoHa, the elementwise product of two low-rank matrices: what `--network_module networks.loha` finds.

alpha / rank * (w1_a w1_b) * (w2_a w2_b), FedPara, arXiv:2108.06098 eq. 2: of rank up to rank^2 with as many numbers as
two LoRAs. Names and first weights are those of LyCORIS, so that learning rates mean the same.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import create
from networks.lora import Branch, Dropouts, alpha_of, kept_ranks


class LoHaBranch(Branch):
    """The update x -> alpha / rank * ((w1_a w1_b) * (w2_a w2_b)) x of one linear layer."""

    kind = "LoHa"
    parts = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
    at_zero = ("hada_w2_a",)

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float, dropouts: Dropouts | None = None):
        super().__init__(inputs, outputs, rank, alpha, dropouts)
        self.hada_w1_a = nn.Parameter(torch.randn(outputs, rank) * 0.1)
        self.hada_w1_b = nn.Parameter(torch.randn(rank, inputs))
        self.hada_w2_a = nn.Parameter(torch.zeros(outputs, rank))
        self.hada_w2_b = nn.Parameter(torch.randn(rank, inputs))

    @property
    def scratch(self) -> int:
        # The backward pass has both products, the gradient at the whole one, and one of these times another.
        return 4 * self.inputs * self.outputs * self.hada_w1_a.element_size()

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], dropouts: Dropouts) -> "LoHaBranch":
        (rank, inputs), outputs = parts["hada_w1_b"].shape, parts["hada_w1_a"].shape[0]
        branch = cls(inputs, outputs, rank, alpha_of(parts, rank), dropouts)
        branch.load(parts)
        return branch

    def forward(self, x: Tensor, multiplier: float = 1.0) -> Tensor:
        w1_a = self.hada_w1_a
        if self.training and self.dropouts.neuron:
            x = F.dropout(x, self.dropouts.neuron)
        if self.training and self.dropouts.rank:
            w1_a = w1_a * kept_ranks(self.rank, self.dropouts.rank, like=w1_a)
        scale = self.scale * multiplier
        return _HadamardLinear.apply(x, w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b, scale)

    @torch.no_grad()
    def norm(self) -> Tensor:
        product = (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b)
        return self.scale * torch.linalg.vector_norm(product, dtype=torch.float64)


class _HadamardLinear(torch.autograd.Function):
    """x -> scale * ((w1_a w1_b) * (w2_a w2_b)) x, which keeps x and the factors for its backward pass, no product.

    The matrix is as large as the layer's own weight; multiplied out again it costs as much as a few tokens more.
    It is made in the factors' dtype and rounded to that of x once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, w1_a, w1_b, w2_a, w2_b)
        ctx.scale = scale
        return F.linear(x, ((w1_a @ w1_b) * (w2_a @ w2_b) * scale).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1_a, w1_b, w2_a, w2_b = ctx.saved_tensors
        first, second = w1_a @ w1_b, w2_a @ w2_b
        of_x = grad @ (first * second * ctx.scale).to(grad.dtype) if ctx.needs_input_grad[0] else None
        product = (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(first.dtype) * ctx.scale
        of_first, of_second = product * second, product * first
        # t(), because the compiler of torch 2.6 takes one .T for another here.
        return of_x, of_first @ w1_b.t(), w1_a.t() @ of_first, of_second @ w2_b.t(), w2_a.t() @ of_second, None


create_network = partial(create.create_network, LoHaBranch)
create_network_from_weights = partial(create.create_network_from_weights, LoHaBranch)
load_weights = create.load_weights
