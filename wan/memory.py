"""How much memory a step of the DiT takes, from sizes alone: its weights, and what is alive beside them at its peak."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from wan.fp8 import QuantizedLinear, replace_linears
from wan.model import KEPT_BELOW, WanModel, WanShape
from wan.rope import TOKENS

ALIGNMENT = 256  # bytes, which kernels read fastest from
FLOAT32 = torch.float32.itemsize  # of the residual stream and of what norms and rotation compute in

# What is alive at the peak of a block, counted on a CPU (tests/test_wan_memory.py): in values per token and channel,
# (in the dtype of linear layers, in float32). Without gradients, where results take the place of what they are made of:
LEAN_ATTENTION = (4, 0)  # of d: the input, q, k, v
LEAN_ROTATION = (0, 2)  # of d, besides, of some tokens at a time
LEAN_NORM = (5, 0)  # of d: the input, q, k before and after its norm, what the norm computes on the way
LEAN_MLP = (2, 0)  # of d: the norm and the output
# In training:
ATTENTION = (6, 3)  # of d: the input and its norm, q, k, v, one of them rotated, the other being rotated
MLP = (1, 2)  # of d: the residual stream before and after attention, the norm
MLP_HIDDEN = 2  # of ffn_dim, in the dtype of linear layers: before and after the GELU
SAVED = (8, 1)  # of d: what a block keeps for its backward pass (wan/checkpointing.py), with a LoRA on each layer
SAVED_HIDDEN = 1  # of ffn_dim
SAVED_OF_CONTEXT = (2, 0)  # of d, in values per row of text and of pictures
BACKWARD = (3, 3)  # of d: gradients on their way through a block
OPTIMIZED = 4 * FLOAT32  # bytes of a number in training: itself, its gradient, two averages of the optimizer
ADAPTED_LAYERS = 12  # linear layers of a block, each of which keeps the activations of a LoRA's rank twice


@dataclass(frozen=True)
class Step:
    """What the DiT computes at once, as far as it takes memory."""

    grid: tuple[int, int, int]  # frames, rows and columns of the latents
    batch: int = 1
    passes: int = 1  # predictions that a guided step asks for
    kept: int = 0  # of them, those whose blocks' sum is kept from step to step (wan/block_reuse.py)
    trained: int = 0  # numbers of a LoRA on all linear layers of the blocks, to which a backward pass leads
    rank: int = 0  # of that LoRA
    checkpointing: bool = False
    scratch: int = 0  # bytes that a layer of the LoRA takes while it computes


def step_bytes(shape: WanShape, step: Step, dtype: torch.dtype, quantized: bool = False, waiting: int = 0) -> int:
    """Return about how many bytes a step takes beside the DiT's weights: no less.

    dtype: that linear layers compute in. quantized: their weights are held in another. waiting: how many bytes the
    predictions of a guided step may take that wait for their turn at a block. Attention never holds its logits, as all
    kernels do.
    """
    half, tokens = dtype.itemsize, step.batch * math.prod(step.grid) // math.prod(shape.patch)

    def values(counts: tuple[int, int], hidden: int = 0, rows: int = tokens) -> int:
        return rows * (shape.dim * (counts[0] * half + counts[1] * FLOAT32) + hidden * shape.ffn_dim * half)

    residual = tokens * shape.dim * FLOAT32
    forward = max(values(ATTENTION), values(MLP, MLP_HIDDEN))
    rotation = values(LEAN_ROTATION, rows=min(tokens, step.batch * TOKENS))
    lean = max(values(LEAN_ATTENTION) + rotation, values(LEAN_NORM), values(LEAN_MLP, hidden=1))
    # A quantised weight is turned into the dtype of the computation, and there multiplied by its scales.
    dequantized = 2 * shape.dim * max(shape.dim, shape.ffn_dim) * half if quantized else 0
    if step.trained:
        saved = values(SAVED, SAVED_HIDDEN) + values(SAVED_OF_CONTEXT, rows=step.batch * context_rows(shape))
        saved += 2 * ADAPTED_LAYERS * step.rank * tokens * half
        kept = shape.blocks * residual + saved if step.checkpointing else shape.blocks * saved
        peak = kept + max(values(BACKWARD, MLP_HIDDEN), forward - saved) + dequantized + step.scratch
        peak += OPTIMIZED * step.trained
    else:
        peak = lean + dequantized
    time = 6 * shape.dim * (shape.dim + step.batch) * FLOAT32  # weights that make modulation of it, before the blocks
    turns = (step.passes - 1) * residual
    shared = _shared_bytes(shape, step, half) + step.kept * residual
    return residual + max(peak, time) + shared + (turns if turns <= waiting else 0)


def _shared_bytes(shape: WanShape, step: Step, half: int) -> int:
    """Return what is there for all blocks: latents, rotary factors, text and pictures, keys and values of these."""
    tokens = math.prod(step.grid) // math.prod(shape.patch)
    factors = tokens * shape.dim // shape.heads * FLOAT32
    patches = 2 * step.batch * tokens * math.prod(shape.patch) * (shape.in_channels + shape.out_channels) * FLOAT32
    seen = context_rows(shape)
    context = step.batch * half * (4 * seen * shape.dim + shape.text_length * shape.text_dim)
    if not step.trained and tokens <= KEPT_BELOW * seen:
        context += 2 * shape.blocks * seen * shape.dim * half
    return factors + patches + step.passes * context


def context_rows(shape: WanShape) -> int:
    """Return how many rows of text and pictures a video sees at most."""
    return shape.text_length + (0 if shape.clip_dim is None else shape.image_tokens or 257)


def weight_bytes(
    shape: WanShape, dtype: torch.dtype, make: Callable[..., QuantizedLinear] | None = None
) -> tuple[int, int]:
    """Return the bytes of one block's weights, packed, and of all weights outside the blocks.

    make: see replace_linears(); None where linear layers hold their weights in `dtype`.
    """
    with torch.device("meta"):
        model = WanModel(shape)
    block = model.blocks[0]
    del model.blocks
    if make:
        replace_linears(block, make)
    return held_bytes(block, dtype), held_bytes(model, dtype)


def held_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes of a module's tensors, each aligned, once those that are not quantised are in a dtype."""
    sizes = {}
    for owner in module.modules():
        for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            quantized = isinstance(owner, QuantizedLinear) and name != "bias"
            sizes[id(tensor)] = aligned(tensor.numel() * (tensor.dtype if quantized else dtype).itemsize)
    return sum(sizes.values())


def aligned(size: int) -> int:
    """Return a number of bytes rounded up to where the next tensor may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT
