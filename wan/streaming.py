"""Where blocks compute, a GPU or a CPU as its double, and how bytes get there from main memory and back."""

import contextlib
import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from utils.devices import free_memory

logger = logging.getLogger(__name__)

_WORKSPACES = 256 << 20  # what libraries take on a GPU for themselves


_STAGED = 32 << 20  # bytes that travel at once from the disk to a GPU


class Device(Protocol):
    """Where blocks compute, and how their bytes get there."""

    where: torch.device

    def free(self) -> int:
        """Return how many more bytes tensors can take there; where swapping would save none, more than there can be."""

    def home(self, size: int) -> Tensor:
        """Return so many bytes of main memory, uint8."""

    def slot(self, size: int) -> Tensor:
        """Return so many bytes on the device, uint8, that start a storage of their own."""

    def copy(self, slot: Tensor, home: Tensor) -> Any:
        """Start a copy that overtakes no computation begun so far; return what to wait for."""

    def wait(self, copy: Any) -> None:
        """Let computation that begins from now on see the result of a copy."""

    def back(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Start copies to main memory, (home, tensor on the device) each, that overtake no computation begun so far.

        Copies are done one after the other, so that later ones find these homes as they are after this.
        """

    def settle(self) -> None:
        """Return once all copies are done and main memory can be read."""

    def mark(self) -> Any:
        """Return what receive() waits for so as not to overtake computation begun so far."""

    def receive(self, slot: Tensor, fill: Callable[[Tensor, int], None], mark: Any) -> Any:
        """Fill a slot, from another thread, and return what to wait for.

        fill(buffer, start) fills main memory with what the slot is to hold from `start` on.
        """


class CudaDevice:
    """A GPU. Copies have a stream of their own, and run beside the computation where main memory is page-locked."""

    def __init__(self, device: torch.device, pinned: bool):
        self.where, self.pinned = device, pinned
        self.stream = torch.cuda.Stream(device)
        self._staging: list[tuple[Tensor, torch.cuda.Event]] = []
        self._locked: list[Tensor] = []
        # The list keeps the memory until it is unlocked, whoever else has let go of it.
        weakref.finalize(self, _unlock, self.stream, self._locked)

    def free(self) -> int:
        return free_memory(self.where) - _WORKSPACES

    def home(self, size: int) -> Tensor:
        # Not torch's pinned memory: that comes in powers of two, half as much again for the blocks of the 14B.
        home = torch.empty(size, dtype=torch.uint8)
        if self.pinned:
            portable = 1
            self.pinned = int(torch.cuda.cudart().cudaHostRegister(home.data_ptr(), size, portable)) == 0
            if self.pinned:
                self._locked.append(home)
            else:
                logger.warning("block swap: the system page-locks no more main memory; computation waits for copies")
                with contextlib.suppress(RuntimeError):
                    torch.ones(1, device=self.where)  # a kernel, to collect the error, which the next one would raise
        return home

    def slot(self, size: int) -> Tensor:
        slot = torch.empty(size, dtype=torch.uint8, device=self.where)
        slot.record_stream(self.stream)  # the memory is not given to others while a copy is on its way
        return slot

    def copy(self, slot: Tensor, home: Tensor) -> torch.cuda.Event:
        self.stream.wait_stream(torch.cuda.current_stream(self.where))
        with torch.cuda.stream(self.stream):
            slot.copy_(home, non_blocking=True)
        return self.stream.record_event()

    def wait(self, copy: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.where).wait_event(copy)

    def back(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            for home, tensor in pairs:
                home.copy_(tensor, non_blocking=True)
                tensor.record_stream(self.stream)  # its memory is not given to others before that

    def settle(self) -> None:
        self.stream.synchronize()

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.where).record_event()

    def receive(self, slot: Tensor, fill: Callable[[Tensor, int], None], mark: torch.cuda.Event) -> torch.cuda.Event:
        with torch.cuda.device(self.where), torch.cuda.stream(self.stream):
            while len(self._staging) < 2:  # one is read into while the other is on its way
                buffer = torch.empty(_STAGED, dtype=torch.uint8, pin_memory=True)
                self._staging.append((buffer, torch.cuda.Event()))
            self.stream.wait_event(mark)
            for i, part in enumerate(slot.split(_STAGED)):
                buffer, sent = self._staging[i % 2]
                sent.synchronize()
                fill(buffer[: len(part)], i * _STAGED)
                part.copy_(buffer[: len(part)], non_blocking=True)
                sent.record(self.stream)
        return self.stream.record_event()


def _unlock(stream: torch.cuda.Stream, locked: Iterable[Tensor]) -> None:
    stream.synchronize()
    for home in locked:
        torch.cuda.cudart().cudaHostUnregister(home.data_ptr())


class CpuDevice:
    """A CPU: the same copies, which then save nothing, from main memory to main memory."""

    where = torch.device("cpu")

    def __init__(self, on_disk: bool = False):
        self.on_disk = on_disk

    def free(self) -> int:
        return free_memory(self.where) if self.on_disk else sys.maxsize

    def home(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def slot(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def copy(self, slot: Tensor, home: Tensor) -> None:
        slot.copy_(home)

    def wait(self, copy: None) -> None:
        pass

    def back(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        for home, tensor in pairs:
            home.copy_(tensor)

    def settle(self) -> None:
        pass

    def mark(self) -> None:
        pass

    def receive(self, slot: Tensor, fill: Callable[[Tensor, int], None], mark: None) -> None:
        fill(slot, 0)
