"""--blocks_to_swap auto: as few blocks in main memory as free memory allows, and more of them once it runs out."""

import contextlib
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from utils.devices import release_memory
from utils.errors import UserError
from wan.block_swap import Ring, SwapOptions, slots_for, streamed_blocks
from wan.fp8 import QuantizedLinear
from wan.memory import Step, step_bytes, weight_bytes
from wan.model import WanModel, WanShape
from wan.streaming import Device

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

_FIX = "use float8 weights, a smaller or shorter video, in training --gradient_checkpointing"
_MARGIN = 1.05  # for what is lost between the pieces that memory is given out in
_ASKED = re.compile(r"Tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)")
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def choose_swap(
    options: SwapOptions,
    shape: WanShape,
    dtype: torch.dtype,
    device: Device,
    steps: Sequence[Step],
    make: Callable[..., QuantizedLinear] | None = None,
) -> SwapOptions:
    """Return the options with the number of blocks that auto stands for, and log how it came about.

    device: with nothing of the DiT on it yet. steps: what is going to be computed, the largest of which has to fit.
    make: what makes linear layers that hold their weights in another format, if any does.
    """
    block, rest = weight_bytes(shape, dtype, make)
    free = device.free()

    def working(swapped: int) -> int:
        waiting = block if swapped else 0
        return max((step_bytes(shape, step, dtype, make is not None, waiting) for step in steps), default=0)

    swapped = smallest_swap(shape.blocks, block, options.block_swap_ring_size, lambda n: rest + working(n), free)
    chosen = replace(options, blocks_to_swap=swapped)
    if free == sys.maxsize:
        logger.info("--blocks_to_swap auto: none, swapping saves nothing on a CPU, whose memory is main memory")
        return chosen
    weights = rest + (shape.blocks - swapped + chosen.slots) * block
    logger.info(
        "--blocks_to_swap auto: %d of %d blocks; free are %.2f GB, weights on the device take %.2f GB, "
        "a step at most about %.2f GB",
        *(swapped, shape.blocks, free / 1e9, weights / 1e9, working(swapped) / 1e9),
    )
    if (weights + working(swapped)) * _MARGIN > free:
        logger.warning("--blocks_to_swap auto: by this estimate memory is too short even with all blocks swapped")
    return chosen


def smallest_swap(blocks: int, block_bytes: int, ring_size: int | None, others: Callable[[int], int], free: int) -> int:
    """Return the smallest number of blocks to swap with which the rest fits into the free bytes, or all blocks.

    others: the bytes that all but the blocks take when so many are swapped.
    """
    for swapped in range(blocks):
        resident = blocks - swapped + slots_for(swapped, ring_size)
        if (resident * block_bytes + others(swapped)) * _MARGIN <= free:
            return swapped
    return blocks


class AutoSwap:
    """Streams more blocks through a ring whenever memory does not suffice, and computes again what has failed.

    option, fix: what asks for it, and what else helps.
    """

    def __init__(self, ring: Ring, ring_size: int | None = None, option: str = "--blocks_to_swap", fix: str = _FIX):
        self.ring, self.ring_size, self.option, self.fix = ring, ring_size, option, fix
        self.alone = True  # no other process takes part in what is computed, and would have to try again too
        self._more = 0  # blocks that the last widening has added

    def watch(self, model: WanModel) -> None:
        """Make a model's predictions ones that are tried again."""
        compute = model.velocities
        model.velocities = lambda *args: self.retry(partial(compute, *args))
        model.auto_swap = self

    def retry(self, compute: Callable[[], Result], restore: Callable[[], None] = lambda: None) -> Result:
        """Return what compute() returns; restore: undoes what a failed attempt has changed.

        Raises UserError where memory does not suffice with all blocks swapped.
        """
        line = ""
        while True:
            try:
                if line:
                    self.widen(line)
                    restore()
                return compute()
            except RuntimeError as error:
                if not ran_out_of_memory(error):
                    raise
                # No more of it: the error holds the tensors of the attempt, which are to go first.
                line = str(error)

    def widen(self, line: str) -> None:
        """Swap more blocks, at least as many as hold the memory that was asked for in vain; line: of the error."""
        ring, blocks = self.ring, len(self.ring.tensors)
        swapped = len(ring.numbers)
        if swapped == blocks:
            raise UserError(
                f"not enough GPU memory ({_short(line)}), with all {blocks} blocks swapped",
                f"{self.fix}; docs/memory.md lists what saves how much",
            )
        if not self.alone:
            raise UserError(
                f"not enough GPU memory ({_short(line)}), and several processes cannot try again",
                f"give {self.option} a number, more than {swapped}",
            )
        # Twice as many as the last time, so that it does not take many attempts.
        self._more = max(1, math.ceil(_asked(line) / ring.block_bytes), 2 * self._more)
        # As many as there are slots would free nothing.
        target = min(max(swapped, self.ring_size or 2) + self._more, blocks)
        resident = [number for number in range(blocks) if number not in ring.numbers]
        added = [resident[i] for i in streamed_blocks(len(resident), target - swapped)]
        logger.warning(
            "not enough GPU memory (%s): %s auto swaps %d blocks instead of %d and computes this again",
            *(_short(line), self.option, target, swapped),
        )
        release_memory(ring.device.where)
        ring.stream([*ring.numbers, *added], slots_for(target, self.ring_size))
        release_memory(ring.device.where)


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error says that a device has too little memory."""
    return isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


@contextlib.contextmanager
def auto_recommended(options: SwapOptions) -> Iterator[None]:
    """Recommend --blocks_to_swap auto, in a UserError, where the body runs out of memory without it."""
    try:
        yield
    except RuntimeError as error:
        if options.auto or not ran_out_of_memory(error):
            raise
        fix = "use --blocks_to_swap auto; docs/memory.md lists what else saves some"
        raise not_enough_memory(error, options.blocks_to_swap, fix) from None


def not_enough_memory(error: RuntimeError, swapped: int | str, fix: str) -> UserError:
    """Return what a person is told of too little memory; swapped: --blocks_to_swap."""
    given = f" with --blocks_to_swap {swapped}" if swapped else ""
    return UserError(f"not enough GPU memory{given} ({_short(str(error))})", fix)


def _short(line: str) -> str:
    """Return an error of torch without what follows: the memory of every process."""
    return line.partition(". GPU ")[0]


def _asked(line: str) -> int:
    """Return how many bytes were asked for in vain, 0 where the error does not say."""
    match = _ASKED.search(line)
    return int(float(match[1]) * _UNITS[match[2]]) if match else 0
