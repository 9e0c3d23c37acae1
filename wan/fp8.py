"""Linear weights held as float8 (e4m3fn): cast, or with a scale for every 64 inputs of a row or for a whole row."""

import contextlib
from collections.abc import Callable, Mapping
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from utils.errors import UserError

Decode = Callable[[Tensor, Tensor | None, torch.dtype], Tensor]
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


def saturated(weight: Tensor) -> Tensor:
    """Return the weight within the range of float8: what is beyond is cut off, and NaN becomes 0."""
    least, most = torch.aminmax(weight.detach())
    if least >= -LARGEST and most <= LARGEST:  # not so of NaN
        return weight
    return weight.float().nan_to_num(nan=0.0).clamp_(-LARGEST, LARGEST)


def cast_weight(weight: Tensor) -> Tensor:
    """Return the weight rounded to float8. What is beyond its range saturates, and NaN becomes 0."""
    return saturated(weight).to(FLOAT8)


def quantize_weight(
    weight: Tensor, scale_dtype: torch.dtype | None = None, block: int | None = BLOCK
) -> tuple[Tensor, Tensor]:
    """Return the weight as float8 and its scales, in the dtype of the weight unless told otherwise.

    [O I] where I divides by the block: scales [O I/64 1]; other matrices, or without blocks: one a row, [O 1]; all
    else: one, [1].
    """
    groups = weight.float()
    if weight.ndim != 2:
        scale = groups.abs().amax().reshape(1)
    else:
        if block and weight.shape[1] % block == 0:
            groups = groups.unflatten(1, (-1, block))
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
    held = {}
    for name, weight in state_dict.items():
        held[name] = weight
        if is_quantized(name):
            held[name], held[scale_name(name)] = quantize_weight(weight)
    return held


class QuantizedLinear(nn.Linear):
    """A frozen linear layer that holds its weight in fewer bits, `weight` and `scale_weight`."""

    def __init__(self, inputs: int, outputs: int, bias: bool, weight: Tensor, scale: Tensor | None):
        nn.Module.__init__(self)  # nn.Linear's draws a weight
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs, device=weight.device), requires_grad=False) if bias else None
        self.register_buffer("scale_weight", scale)

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what the weight and its scales hold of some rows [n I], maybe in a wider dtype.

        As many rows as a multiple of 64, or the last ones.
        """
        raise NotImplementedError

    @staticmethod
    def decode(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the weight [O I] in the dtype of a computation."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs for x, computed in its dtype."""
        return _DecodedLinear.apply(x, self.weight, self.scale_weight, self.bias, self.decode)


class _DecodedLinear(torch.autograd.Function):
    """x W^T + b. Keeps the weight as it is held for the backward pass, not the larger copy that it computed with."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, decode: Decode) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.decode = decode
        return nn.functional.linear(x, decode(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        weight, scale = ctx.saved_tensors
        return gradient @ ctx.decode(weight, scale, gradient.dtype), None, None, None, None


class Float8Linear(QuantizedLinear):
    """Float8, as it is or with a scale for every 64 inputs of a row."""

    decode = staticmethod(dequantize_weight)

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool = True,
        scaled: bool = False,
        scale_dtype: torch.dtype = torch.float32,
        **where,
    ):
        scales = (outputs, inputs // BLOCK, 1) if inputs % BLOCK == 0 else (outputs, 1)
        scale = torch.empty(scales, dtype=scale_dtype, **where) if scaled else None
        super().__init__(inputs, outputs, bias, torch.empty(outputs, inputs, dtype=FLOAT8, **where), scale)

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return (saturated(rows), None) if self.scale_weight is None else quantize_weight(rows, torch.float32)


class FastFloat8Linear(QuantizedLinear):
    """Float8 with a scale for each row; inputs are rounded to float8 too, and the product is one of float8 matrices.

    fast: whether they are; else it computes as the other layers do, which it also does where it has to. row_scales: see
    product_of_float8().
    """

    decode = staticmethod(dequantize_weight)

    def __init__(
        self, inputs: int, outputs: int, bias: bool = True, fast: bool = True, row_scales: bool = True, **where
    ):
        weight, scale = torch.empty(outputs, inputs, dtype=FLOAT8, **where), torch.empty(outputs, 1, **where)
        super().__init__(inputs, outputs, bias, weight, scale)
        self.fast, self.row_scales = fast and inputs % 16 == outputs % 16 == 0, row_scales

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return quantize_weight(rows, torch.float32, block=None)

    def forward(self, x: Tensor) -> Tensor:
        if not self.fast:
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)
        out = product_of_float8(*round_rows(rows), self.weight, self.scale_weight, self.bias, self.row_scales)
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows [M I] as float8, and their scales [M 1], float32: powers of two, so that scaling rounds nothing."""
    least, most = x.aminmax(dim=-1, keepdim=True)
    exponent = torch.frexp(torch.maximum(-least, most).float() / LARGEST).exponent
    exponent = exponent.clamp(min=-14)  # what float16 holds
    one = torch.ones_like(exponent, dtype=torch.float32)
    return (x * torch.ldexp(one, -exponent).to(x.dtype)).to(FLOAT8), torch.ldexp(one, exponent)


def product_of_float8(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, row_scales: bool
) -> Tensor:
    """Return (x x_scale) (weight scale)^T + bias [M O], bfloat16; x [M I] and weight [O I] float8, scales [M 1], [O 1].

    row_scales: whether torch's kernel takes scales of rows; where it does not they are multiplied in afterwards, which
    is the same up to rounding and takes another pass over the output.
    """
    weight = weight.t()
    bias = None if bias is None else bias.to(torch.bfloat16)
    how = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    if row_scales:
        return torch._scaled_mm(x, weight, scale_a=x_scale, scale_b=scale.t(), bias=bias, **how)
    one = torch.ones((), device=x.device)
    out = torch._scaled_mm(x, weight, scale_a=one, scale_b=one, **how).mul_(x_scale).mul_(scale.t())
    return out if bias is None else out.add_(bias)


@lru_cache
def takes_row_scales(device: torch.device) -> bool | None:
    """Return whether the product of float8 matrices takes scales of rows on a device, None without such one."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return None
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(32, 32, generator=generator).to(device) for _ in range(2))
    expected = rows @ weight.t()
    for row_scales in (True, False):
        with contextlib.suppress(RuntimeError):  # what other builds of torch and other cards say
            held = quantize_weight(weight, torch.float32, block=None)
            out = product_of_float8(*round_rows(rows), *held, None, row_scales)
            if (out - expected).norm() < 0.1 * expected.norm():
                return row_scales
    return None


def check_fp8_fast(device: torch.device) -> bool:
    """Return whether products take scales of rows, or raise UserError where there are none of float8 matrices."""
    row_scales = takes_row_scales(device)
    if row_scales is None:
        what = torch.cuda.get_device_name(device) if device.type == "cuda" else f"torch {torch.__version__} on {device}"
        raise UserError(
            f"--fp8_fast: {what} has no product of float8 matrices, which needs compute capability 8.9 or newer",
            "leave --fp8_fast out",
        )
    return row_scales


def use_float8_linears(blocks: nn.Module, scaled: bool) -> None:
    """Replace the linear layers inside `blocks`, which have no data yet, by ones that take float8 weights."""
    replace_linears(blocks, partial(Float8Linear, scaled=scaled))


def replace_linears(blocks: nn.Module, make: Callable[..., QuantizedLinear]) -> None:
    """Replace the linear layers inside `blocks`, which have no data yet, by make(inputs, outputs, bias, device=...)."""
    for parent in list(blocks.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                layer = make(child.in_features, child.out_features, child.bias is not None, device=child.weight.device)
                setattr(parent, name, layer)
