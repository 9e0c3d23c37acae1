"""Linear weights held as float8 (e4m3fn): cast as they are, or with a scale for every 64 inputs of a row."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448
BLOCK = 64  # inputs of a row that share a scale
SMALLEST_SCALE = 1e-8  # so that a block of zeros divides

# What stays as it is, beside biases: 2 % of the weights, which would add nearly as much error as the other 98 %.
KEPT = (
    "norm",
    "patch_embedding",
    "text_embedding",
    "time_embedding",
    "time_projection",
    "head",
    "modulation",
    "img_emb",
)


def is_quantized(name: str) -> bool:
    """Return whether a weight of the DiT is one that is held as float8: the linear layers of the blocks."""
    return "blocks" in name and name.endswith(".weight") and not any(part in name for part in KEPT)


def scale_name(weight_name: str) -> str:
    """Return the name under which the scales of a weight are kept."""
    return weight_name.removesuffix(".weight") + ".scale_weight"


def cast_weight(weight: Tensor) -> Tensor:
    """Return the weight rounded to float8. What is beyond its range saturates, and NaN becomes 0."""
    return weight.float().nan_to_num(nan=0.0).clamp_(-LARGEST, LARGEST).to(FLOAT8)


def quantize_weight(weight: Tensor, scale_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return the weight as float8 and its scales, in the dtype of the weight unless told otherwise.

    [O I] where I divides by 64: scales [O I/64 1]; other matrices: one a row, [O 1]; all else: one, [1].
    """
    groups = weight.float()
    if weight.ndim != 2:
        scale = groups.abs().amax().reshape(1)
    else:
        if weight.shape[1] % BLOCK == 0:
            groups = groups.unflatten(1, (-1, BLOCK))
        scale = groups.abs().amax(dim=-1, keepdim=True)
    scale = (scale / LARGEST).clamp(min=SMALLEST_SCALE)
    return cast_weight(groups / scale).view(weight.shape), scale.to(scale_dtype or weight.dtype)


def dequantize_weight(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return a float8 weight in the dtype of a computation, the scales multiplied back in."""
    if scale is None:
        return weight.to(dtype)
    if scale.ndim == 3:
        return (weight.to(dtype).unflatten(1, (-1, BLOCK)) * scale.to(dtype)).view(weight.shape)
    return weight.to(dtype) * scale.to(dtype)


def quantize(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a DiT's weights as --fp8_scaled holds them: float8 and scales in the blocks, all else as it was."""
    return {name: value for key, weight in state_dict.items() for name, value in quantized_tensors(key, weight)}


def quantized_tensors(
    name: str, weight: Tensor, scale_dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors that hold one weight under --fp8_scaled: itself, or its float8 form and scales."""
    if not is_quantized(name):
        yield name, weight
        return
    quantized, scale = quantize_weight(weight, scale_dtype)
    yield name, quantized
    yield scale_name(name), scale


def block_scales(scale: Tensor, shape: Sequence[int]) -> Tensor:
    """Return one scale for a whole matrix, [], or for each row, [O 1], as Float8Linear holds those of its blocks."""
    outputs, inputs = shape
    if inputs % BLOCK == 0:
        return scale.reshape(-1, 1, 1).expand(outputs, inputs // BLOCK, 1).clone()
    return scale.expand(outputs, 1).clone()


class Float8Linear(nn.Linear):
    """A frozen linear layer that holds its weight as float8 and computes in the dtype of its input."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, scaled: bool = False, **where):
        super().__init__(inputs, outputs, bias, **where)
        scales = block_scales(torch.empty((), **where), (outputs, inputs)) if scaled else None
        self.register_buffer("scale_weight", scales)

    def forward(self, x: Tensor) -> Tensor:
        return _DequantizedLinear.apply(x, self.weight, self.scale_weight, self.bias)


class _DequantizedLinear(torch.autograd.Function):
    """x W^T + b. Keeps the float8 weight for the backward pass, not the larger copy that it computed with."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return nn.functional.linear(x, dequantize_weight(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        return gradient @ dequantize_weight(weight, scale, gradient.dtype), None, None, None


def use_float8_linears(blocks: nn.Module, scaled: bool) -> None:
    """Replace the linear layers inside `blocks`, which have no data yet, by ones that take float8 weights."""
    for parent in list(blocks.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                layer = Float8Linear(
                    child.in_features, child.out_features, child.bias is not None, scaled, device=child.weight.device
                )
                setattr(parent, name, layer)
