"""DiT weight file > model ready to run: which model it is, key names, dtype, fp8, weight deltas, device."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.errors import UserError
from utils.safetensors_io import open_tensors
from wan.attention import describe_attention
from wan.auto_swap import AutoSwap, choose_swap
from wan.block_swap import SwapOptions, stream_blocks, streamed_blocks, streaming_device
from wan.compiling import CompileOptions, compile_blocks
from wan.configs import WanConfig
from wan.disk import Disk
from wan.dit_file import DitTensors, check_dit_names, check_formats, checked_shape, dit_shape, empty_dit, listed
from wan.fp8 import FLOAT8, FastFloat8Linear, Float8Linear, QuantizedLinear, check_fp8_fast, replace_linears
from wan.memory import Step
from wan.model import WanModel, WanShape
from wan.quantize import FORMATS
from wan.streaming import Device
from wan.weights import InMemory

logger = logging.getLogger(__name__)

SLICE = 1 << 19  # elements that are quantised at a time on a CPU
Deltas = Mapping[str, Callable[[], Tensor]]


def load_dit(
    path: Path | str | None,
    config: WanConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    deltas: Deltas | None = None,
    attn_mode: str = "torch",
    split_attn: bool = False,
    fp8: bool = False,
    fp8_scaled: bool = False,
    fp8_fast: bool = False,
    quantize: str | None = None,
    swap: SwapOptions | None = None,
    residual_dtype: torch.dtype = torch.float32,
    option: str = "--dit",
    hold: Callable[[WanModel, Sequence[int], int, Device], None] | None = None,
    compiling: CompileOptions | None = None,
    steps: Sequence[Step] = (),
    disable_numpy_memmap: bool = False,
) -> WanModel:
    """Return the DiT of a file, frozen, on the device, with linear layers that compute in `dtype`.

    deltas: by a weight's official name, what is added to it, as a function, so that only one is in memory at a time;
    added in float32 before the weight is cast or quantised. fp8: hold the blocks' linear weights as float8;
    fp8_scaled: with a scale for each 64 inputs; fp8_fast: with one for each row, and multiply them as float8. quantize:
    hold them as int8 or nf4. swap: the blocks that are held in main memory, none of which is ever on the device as a
    whole but by its place in the ring; hold: what makes the model run with them there, where they are not going to stay
    as they are. compiling: whether and how its blocks are compiled, in the first pass and not here. residual_dtype: of
    what flows from block to block. Peak memory is the model and a few tensors, or one swapped block.
    disable_numpy_memmap: read the file plainly, not mapped into memory. steps: what is going to be computed, for a swap
    that is auto to choose a number by; the model's `auto_swap` raises it where memory does not suffice after all.
    """
    swap = asked = swap or SwapOptions()
    streaming = streaming_device(device, swap) if swap.blocks_to_swap else None
    with open_tensors(path, option, "the DiT's weights") as file:
        tensors = DitTensors(file, f"{option} {path}")
        shape = checked_shape(tensors, config)
        check_formats(tensors, fp8, fp8_scaled, fp8_fast, quantize)
        linears = block_linears(shape, dtype, device, fp8, fp8_scaled or tensors.has_scales, fp8_fast, quantize)
        if asked.auto:
            swap = choose_swap(asked, shape, dtype, streaming, steps, linears(0))
        swapped = streamed_blocks(shape.blocks, swap.blocks_to_swap)
        disk = Disk(swap.weights_on_disk_dir or Path(path).parent) if swap.weights_on_disk and streaming else None
        mapped = not disable_numpy_memmap
        model = _assemble(tensors, shape, dtype, device, deltas or {}, linears, swapped, disk, mapped)
    model.attn_mode, model.split_attn, model.residual_dtype = attn_mode, split_attn, residual_dtype
    head_dim = shape.dim // shape.heads
    logger.info("attention: %s", describe_attention(attn_mode, torch.device(device), dtype, head_dim))
    if compiling and compiling.compile:
        compile_blocks(model, compiling)
    if hold and swapped:
        hold(model, swapped, swap.slots, streaming)
    elif streaming:
        ring = stream_blocks(model, swapped, swap.slots, streaming, disk)
        if asked.auto:
            AutoSwap(ring, asked.block_swap_ring_size).watch(model)
    return model


def build_dit(
    state_dict: Mapping[str, Tensor], heads: int | None = None, dtype: torch.dtype = torch.float32
) -> WanModel:
    """Return the DiT with the given weights, frozen, on the CPU; heads: one for each 128 channels unless given."""
    tensors = DitTensors(InMemory(state_dict))
    shape = dit_shape(tensors, heads)
    check_dit_names(tensors, shape)
    return _assemble(tensors, shape, dtype, "cpu", {})


def block_linears(
    shape: WanShape,
    dtype: torch.dtype,
    device: torch.device | str,
    fp8: bool,
    scaled: bool = False,
    fast: bool = False,
    quantize: str | None = None,
) -> Callable[[int], Callable[..., QuantizedLinear] | None]:
    """Return what makes the linear layers of the block of a number, None where they hold weights in `dtype`."""
    if quantize:
        return lambda number: FORMATS[quantize]
    if not fp8:
        return lambda number: None
    if not fast:
        return lambda number: partial(Float8Linear, scaled=scaled, scale_dtype=dtype)
    row_scales = check_fp8_fast(torch.device(device))
    # Where tokens come in and where they go out rounding does the most harm.
    inner = range(1, shape.blocks - 1)
    return lambda number: partial(FastFloat8Linear, fast=number in inner, row_scales=row_scales)


def _assemble(
    tensors: DitTensors,
    shape: WanShape,
    dtype: torch.dtype,
    device: torch.device | str,
    deltas: Deltas,
    linears: Callable[[int], Callable[..., QuantizedLinear] | None] = lambda number: None,
    swapped: Sequence[int] = (),
    disk: Disk | None = None,
    mapped: bool = True,
) -> WanModel:
    """Return the model with its tensors read one by one, each changed, cast and placed before the next.

    linears: see block_linears(). swapped: numbers of the blocks whose tensors stay in main memory, or on the disk. They
    are changed and quantised on the device all the same, for the same bits.
    """
    if unknown := [name for name in deltas if name not in tensors]:
        raise UserError(
            f"{tensors.where}: a LoRA changes weights that this model lacks: {listed(unknown)}",
            "use a LoRA that was trained for this kind of model",
        )
    model = empty_dit(shape).requires_grad_(False)
    for number, block in enumerate(model.blocks):
        if make := linears(number):
            replace_linears(block, make)
    in_main_memory = tuple(f"blocks.{number}." for number in swapped)
    on_disk = in_main_memory if disk else ()
    # At once, before anything is computed: what is freed between two tensors of a model mostly fits neither of them.
    for name in tensors:
        if not name.startswith(on_disk):
            _allocate(model, name, dtype, "cpu" if name.startswith(in_main_memory) else device)
    hidden = None if logger.isEnabledFor(logging.INFO) else True  # by processes that leave the log to the first one
    total = len(list(tensors))
    with tqdm(total=total, desc="loading the DiT", unit=" tensors", leave=False, disable=hidden) as progress:
        for name, tensor in tensors.each(mapped):
            delta = _delta(name, tensor, deltas, tensors.where)
            if name.startswith(on_disk):
                _allocate(model, name, dtype, "cpu")
            _place(model, name, tensor, tensors.scale(name), delta, device)
            if name.startswith(on_disk):
                _leave_on_disk(model, name, disk, (tensor.dtype, tensors.place(name)) if delta is None else None)
            progress.update()
    if disk is not None:
        model.load_state_dict(disk.stand_ins(), strict=False, assign=True)
    return model.requires_grad_(False).eval()


def _delta(name: str, weight: Tensor, deltas: Deltas, where: str) -> Tensor | None:
    """Return what is added to a weight, None where that is nothing."""
    if name not in deltas:
        return None
    delta = deltas[name]()
    if delta.shape != weight.shape:
        raise UserError(
            f"{where}: a LoRA for weights of {tuple(delta.shape)} does not fit {name} of {tuple(weight.shape)}",
            "use a LoRA that was trained for a model of this size",
        )
    return delta


def _place(
    model: WanModel,
    name: str,
    tensor: Tensor,
    scale: Tensor | None,
    delta: Tensor | None,
    device: torch.device | str,
) -> None:
    """Fill a tensor of the model with tensor * scale + delta, computed on the device.

    On a CPU slice by slice: memory that is taken anew for each step of a whole tensor costs more time than the steps.
    """
    layer, names = _holding(model, name)
    places, encoded = [getattr(layer, own_name) for own_name in names], len(names) > 1
    kept = encoded and tensor.dtype == layer.weight.dtype == FLOAT8 and delta is None
    if encoded or scale is not None or delta is not None:
        tensor, scale, delta = (None if x is None else x.to(device) for x in (tensor, scale, delta))
    count = len(tensor)
    only_cast = scale is None and delta is None and (not encoded or layer.scale_weight is None)
    step = count if only_cast or tensor.is_cuda else max(SLICE // tensor[0].numel() // 64, 1) * 64
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        value, factor = tensor[rows], scale if scale is None or scale.ndim == 0 else scale[rows]
        if kept:
            factor = torch.ones(()) if factor is None else factor
            values = (value, factor if places[1] is None else factor.view(-1, *[1] * (places[1].ndim - 1)))
        else:
            value = value if factor is None else value.float() * factor
            value = value if delta is None else value.float() + delta[rows].float()
            values = layer.encode(value) if encoded else (value,)
        for place, part in zip(places, values, strict=True):
            if place is not None:
                place[rows.start * len(place) // count : rows.stop * len(place) // count].copy_(part)


def _leave_on_disk(
    model: WanModel, name: str, disk: Disk, found: tuple[torch.dtype, tuple[Path, int] | None] | None
) -> None:
    """Have on the disk, and no more in memory, what a tensor of the file has become.

    found: its dtype and place in the file, where nothing has been added to it.
    """
    layer, names = _holding(model, name)
    for own_name in names:
        held, full_name = getattr(layer, own_name), f"{name.rpartition('.')[0]}.{own_name}"
        if held is None:
            continue
        # What is still the very tensor of the file need not be written once more.
        as_found = found is not None and full_name == name and held.dtype == found[0]
        disk.keep(full_name, held, found[1] if as_found else None)
        _renew(layer, own_name, held.dtype, "meta")


def _holding(model: WanModel, name: str) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the layer that holds a tensor of the file, and the names there of what it is held as."""
    owner, _, own_name = name.rpartition(".")
    layer = model.get_submodule(owner)
    encoded = isinstance(layer, QuantizedLinear) and own_name == "weight"
    return layer, ("weight", "scale_weight") if encoded else (own_name,)


def _allocate(model: WanModel, name: str, dtype: torch.dtype, device: torch.device | str) -> None:
    """Give memory to what holds a tensor of the file; dtype: of all but weights that are held in fewer bits."""
    layer, names = _holding(model, name)
    for own_name in names:
        if (empty := getattr(layer, own_name)) is not None:
            _renew(layer, own_name, empty.dtype if len(names) > 1 else dtype, device)


def _renew(layer: nn.Module, name: str, dtype: torch.dtype, device: torch.device | str) -> None:
    """Make a parameter or buffer an empty one of the same shape."""
    old = getattr(layer, name)
    tensor = torch.empty_like(old, dtype=dtype, device=device)
    setattr(layer, name, nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor)
