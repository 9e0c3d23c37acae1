"""Linear weights held in the 8-bit and 4-bit formats of bitsandbytes, which are looser or tighter than float8."""

import torch
from torch import Tensor

from utils.errors import UserError
from wan.fp8 import QuantizedLinear
from wan.model import WanShape

BLOCK = 64  # weights that share a scale in nf4; also those that a row of the 4-bit kernels is a multiple of


class Int8Linear(QuantizedLinear):
    """8-bit integers with a scale for each row: what LLM.int8() holds, with inputs that are not rounded."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, **where):
        weight = torch.empty(outputs, inputs, dtype=torch.int8, **where)
        super().__init__(inputs, outputs, bias, weight, torch.empty(outputs, 1, **where))

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        from bitsandbytes.functional import int8_vectorwise_quant

        # The kernel for GPUs takes nothing but float16. On a CPU there is no need to round first.
        integers, largest, _ = int8_vectorwise_quant(rows.half() if rows.is_cuda else rows.float())
        return integers, largest.float()[:, None] / 127

    @staticmethod
    def decode(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype).mul_(scale)


class NF4Linear(QuantizedLinear):
    """Two weights in a byte, each one of 16 quantiles of the normal distribution, with a scale for every 64."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, **where):
        weight = torch.empty(outputs, inputs // 2, dtype=torch.uint8, **where)
        super().__init__(inputs, outputs, bias, weight, torch.empty(outputs * inputs // BLOCK, **where))

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(rows.float(), blocksize=BLOCK, quant_type="nf4")
        return packed.view(len(rows), -1), state.absmax

    @staticmethod
    def decode(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        # As rows of one block each: the kernel for CPUs takes a block to end with its row.
        shape = torch.Size((len(scale), BLOCK))
        state = QuantState(absmax=scale, shape=shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
        return dequantize_4bit(weight.view(-1, 1), state).view(len(weight), -1)


FORMATS: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "nf4": NF4Linear}


def check_quantize(name: str | None, shape: WanShape, device: torch.device) -> None:
    """Raise UserError unless bitsandbytes can hold the blocks of such a DiT in the format on this device."""
    if name is None:
        return
    try:
        import bitsandbytes
    except ImportError:
        raise UserError(f"--quantize {name}: bitsandbytes is not installed", "pip install bitsandbytes") from None
    sizes = (shape.dim * shape.dim, shape.dim * shape.ffn_dim)
    if name == "nf4" and any(size % BLOCK for size in sizes):
        raise UserError(
            f"--quantize nf4: weights of {shape.dim} and {shape.ffn_dim} channels do not divide into blocks of {BLOCK}",
            "use --quantize int8",
        )
    weight = torch.linspace(-1, 1, 64 * BLOCK).view(64, BLOCK).to(device)
    layer = FORMATS[name](64, 64, device="meta")
    try:
        found = layer.decode(*layer.encode(weight), torch.float32)
        works = bool((found - weight).norm() < 0.2 * weight.norm())
    except (RuntimeError, NotImplementedError, AttributeError, ValueError, TypeError):  # what older versions say
        works = False
    if not works:
        raise UserError(
            f"--quantize {name}: bitsandbytes {bitsandbytes.__version__} does not work on {device}",
            "pip install --upgrade bitsandbytes",
        )
