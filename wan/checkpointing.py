"""What the blocks of a DiT in training keep for the backward pass: as little as is cheap, or their input alone."""

import contextlib
import itertools
import logging
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from wan.model import WanModel
from wan.recompute import RandomState, keeping, recomputing, saving
from wan.streaming import CpuDevice, CudaDevice, Device

logger = logging.getLogger(__name__)

WIDE = 3  # times as wide as the tokens: an MLP beside which the results of three layers of a block are not kept too
_ATTENTION = ("attention", "attn", "flash")  # of the names of kernels


def save_memory(
    model: WanModel, checkpointing: bool, offload: "Offload | None" = None, keep_attention: bool = False
) -> None:
    """Make the model's blocks keep less for the backward pass; outputs and gradients stay the same.

    Without `checkpointing` that costs little time: only what is cheap is computed again. With it all of a block is,
    from its input; offload: has the inputs wait in main memory; keep_attention: but for its self-attention.
    """
    if checkpointing:
        model.run_block = partial(run_again_later, offload=offload, keep_attention=keep_attention)
    else:
        wide = model.shape.ffn_dim > WIDE * model.shape.dim
        model.run_block = partial(run_lean, layers=wide)


def run_lean(block: nn.Module, *args: Any, layers: bool = False) -> Tensor:
    """Return what a block computes, its cheap parts being computed again in the backward pass; layers: and more."""
    if not torch.is_grad_enabled():
        return block(*args)
    with recomputing(layers):
        return block(*args)


def run_again_later(
    block: nn.Module, x: Tensor, *args: Any, offload: "Offload | None" = None, keep_attention: bool = False
) -> Tensor:
    """Return what a block computes, all of it being computed again in the backward pass."""
    if not torch.is_grad_enabled():
        return block(x, *args)
    return Run(block, x, args, offload, keep_attention).first(x)


class Run:
    """A block and what it was given: enough to run it again for what its backward pass needs.

    As torch.utils.checkpoint does, but inside of it the cheap parts are computed again once more, so that the block in
    turn needs half the memory; and its input may be elsewhere meanwhile.
    """

    def __init__(self, block: nn.Module, x: Tensor, args: tuple, offload: "Offload | None", keep_attention: bool):
        self.block, self.args, self.trained = block, args, x.requires_grad
        self.small = x.numel() / 16
        self.x = offload.store(x) if offload else x.detach()
        self.random = RandomState(x.device)
        self.again = [] if keep_attention else None
        self.count = 0  # what the backward pass will ask for, by number
        self.saved: dict[int, Tensor] = {}

    def first(self, x: Tensor) -> Tensor:
        """Return what the block computes, keeping nothing more."""
        with self._keeping(self._record), saving(self._later), recomputing():
            return self.block(x, *self.args)

    def tensor(self, number: int) -> Tensor:
        """Return a tensor that the first run would have saved."""
        if number not in self.saved:
            self._run_again()
        return self.saved.pop(number)

    def _later(self, tensor: Tensor) -> "Later | None":
        if self._is_small(tensor):
            return None
        self.count += 1
        return Later(self, self.count - 1)

    def _run_again(self) -> None:
        x = self.x if isinstance(self.x, Tensor) else self.x.tensor()
        numbers = itertools.count()
        self.saved = {}

        def pack(tensor: Tensor) -> Tensor | None:
            if self._is_small(tensor):
                return None
            number = next(numbers)
            self.saved[number] = tensor.detach()
            if number + 1 == self.count:
                raise _Enough
            return self.saved[number]

        replays = iter(self.again or ())
        with (
            torch.enable_grad(),
            self.random.restored(),
            self._keeping(lambda: next(replays)),
            saving(pack),
            recomputing(),
            contextlib.suppress(_Enough),
        ):
            self.block(x.detach().requires_grad_(self.trained), *self.args)
        assert len(self.saved) == self.count, f"{len(self.saved)} tensors to save, {self.count} the first time"

    def _is_small(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a gate or a statistic, for which alone the block need not run to its end."""
        return not tensor.requires_grad and tensor.numel() < self.small

    def _keeping(self, enter: Callable) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.again is None else keeping(enter)

    def _record(self) -> contextlib.AbstractContextManager:
        first, again = create_selective_checkpoint_contexts(_attention_is_kept)
        self.again.append(again)
        return first


class Later:
    """A tensor that the backward pass gets from a second run."""

    def __init__(self, run: Run, number: int):
        self.run, self.number = run, number

    def tensor(self) -> Tensor:
        return self.run.tensor(self.number)


class _Enough(Exception):
    """All that is to be saved has been."""


def _attention_is_kept(context: Any, operator: Any, *args: Any, **named: Any) -> CheckpointPolicy:
    named_so = any(word in str(operator) for word in _ATTENTION)
    return CheckpointPolicy.MUST_SAVE if named_so else CheckpointPolicy.PREFER_RECOMPUTE


class Offload:
    """Inputs of blocks that wait in main memory, and come back one ahead of the backward pass.

    Their places in main memory are used again as soon as the backward pass is through with them.
    """

    def __init__(self, device: Callable[[], Device]):
        self._make, self._size = device, -1
        self._last: weakref.ref[Away] | None = None
        self.bytes_away = self.bytes_back = 0

    def store(self, x: Tensor) -> "Away":
        """Return what stands for x, which is on its way to main memory."""
        if x.nbytes > self._size:
            # Places of one size, that of the largest so far: the locked ones of a smaller size would pile up.
            self.device, self._free, self._size = self._make(), [], x.nbytes
        place = self._free.pop() if self._free else self.device.home(self._size)
        away = Away(self, self.device, place, x, self._last and self._last())
        weakref.finalize(away, self._free.append, place).atexit = False
        self._last = weakref.ref(away)
        self.bytes_away += x.nbytes
        return away


class Away:
    """A tensor that is in main memory."""

    def __init__(self, offload: Offload, device: Device, place: Tensor, x: Tensor, before: "Away | None"):
        self.offload, self.device, self.place = offload, device, place[: x.nbytes]
        self.shape, self.dtype, self.before = x.shape, x.dtype, before and weakref.ref(before)
        self.coming: tuple[Tensor, Any] | None = None
        device.back([(self.place, x.detach().contiguous().view(torch.uint8).view(-1))])

    def tensor(self) -> Tensor:
        """Return it, on the device again, the one stored before it being on its way."""
        self.fetch()
        before = self.before and self.before()
        if before:
            before.fetch()
        (slot, copy), self.coming = self.coming, None
        self.device.wait(copy)
        return slot.view(self.dtype).view(self.shape)

    def fetch(self) -> None:
        """Start the copy back to the device."""
        if self.coming is None:
            slot = self.device.slot(self.place.nbytes)
            self.coming = slot, self.device.copy(slot, self.place)
            self.offload.bytes_back += slot.nbytes


def offloading(device: torch.device, pinned: bool = True) -> Offload:
    """Return what offloads from a device."""
    if device.type == "cuda":
        return Offload(partial(CudaDevice, device, pinned))
    logger.warning("--gradient_checkpointing_cpu_offload: saves nothing on a CPU, whose memory is main memory")
    return Offload(CpuDevice)
