"""Swapped blocks that have no place in main memory: a thread reads them from the disk, ahead of their use."""

import contextlib
import itertools
import queue
import tempfile
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import torch
from torch import Tensor

from utils.errors import UserError
from wan.memory import aligned


class Place(NamedTuple):
    """Where the bytes of a tensor are on the disk."""

    path: Path  # of a weight file, or the folder of the file for what is not in one as it is needed
    file: BinaryIO
    start: int
    size: int
    dtype: torch.dtype
    shape: torch.Size


class Receiver(Protocol):
    """Where blocks compute: a wan.streaming.Device."""

    def mark(self) -> Any: ...

    def receive(self, slot: Tensor, fill: Any, mark: Any) -> Any: ...

    def wait(self, copy: Any) -> None: ...


class Disk:
    """Tensors by name that are on the disk, and the thread that reads them.

    A tensor that a weight file holds as it is needed is read from there. All others (cast, quantised, changed by a
    LoRA) are written, once, to a file without a name, which is gone when it is closed, however the program ends.
    Files are read, not mapped: what is missing in a mapped file kills the process, and its pages count as its memory.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.bytes_written = self.bytes_read = 0
        self._places: dict[str, Place] = {}
        self._files: dict[Path, BinaryIO] = {}
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        thread = threading.Thread(target=_work, args=(self._jobs,), name="weights from the disk", daemon=True)
        thread.start()
        weakref.finalize(self, _close, self._jobs, thread, self._files)

    def keep(self, name: str, tensor: Tensor, place: tuple[Path, int] | None = None) -> None:
        """Have a tensor on the disk; place: which file holds it bit by bit, and from where on."""
        if place is None:
            path, start = self.folder, self._write(tensor)
        else:
            path, start = place
            if path not in self._files:
                self._files[path] = open(path, "rb", buffering=0)  # noqa: SIM115, closed by _close()
        self._places[name] = Place(path, self._files[path], start, tensor.nbytes, tensor.dtype, tensor.shape)

    def stand_ins(self) -> dict[str, Tensor]:
        """Return for each tensor one of its dtype and shape that takes no memory to speak of and reads as NaN.

        To be called when all are there: small pieces of memory that are made between large ones keep the system from
        getting back what the large ones have taken.
        """
        return {name: stand_in(place.dtype, place.shape) for name, place in self._places.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Place:
        return self._places[name]

    def start(self, job: Any) -> Future:
        """Have the thread call job(); its result, or what it raised, comes with the future."""
        future: Future = Future()
        self._jobs.put((future, job))
        return future

    def read(self, place: Place, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes of a tensor from an offset on."""
        done = 0
        try:
            place.file.seek(place.start + offset)
            while done < len(buffer):
                count = place.file.readinto(buffer[done:])
                if not count:
                    raise OSError("the file has become shorter")
                done += count
        except (OSError, ValueError) as error:
            raise UserError(
                f"--weights_on_disk: {place.path} cannot be read any more ({error})",
                "leave the weights where they are until the end",
            ) from None
        self.bytes_read += done

    def _write(self, tensor: Tensor) -> int:
        """Write a tensor's bytes at the end of the nameless file and return where they begin."""
        view = memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        try:
            if self.folder not in self._files:
                self._files[self.folder] = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
            file = self._files[self.folder]
            start = file.seek(0, 2)
            done = 0
            while done < len(view):
                done += file.write(view[done:])
        except OSError as error:
            raise UserError(
                f"--weights_on_disk: {self.folder} takes no more weights ({error.strerror or error})",
                "name another folder with --weights_on_disk_dir",
            ) from None
        self.bytes_written += done
        return start


class DiskHome:
    """The weights of a block while it is not on the device: on the disk."""

    def __init__(self, disk: Disk, names: Sequence[str], tensors: Sequence[Tensor], device: Receiver):
        self.disk, self.device = disk, device
        for name, tensor in zip(names, tensors, strict=True):
            if name not in disk:
                disk.keep(name, tensor)
        self.places = [disk[name] for name in names]
        ends = itertools.accumulate((aligned(place.size) for place in self.places), initial=0)
        self.starts = list(ends)[:-1]
        self.stand_ins = [stand_in(tensor.dtype, tensor.shape) for tensor in tensors]
        self.show(tensors)

    def show(self, tensors: Sequence[Tensor]) -> None:
        """Make the block's tensors what they are while it is not on the device."""
        for tensor, absent in zip(tensors, self.stand_ins, strict=True):
            tensor.data = absent

    def send(self, slot: Tensor) -> Future:
        """Start to bring the weights into a slot; return what to wait for."""
        return self.disk.start(partial(self.device.receive, slot, self.fill, self.device.mark()))

    def wait(self, copy: Future) -> None:
        """Let computation that begins from now on see the weights in the slot."""
        self.device.wait(copy.result())

    def fill(self, buffer: Tensor, start: int) -> None:
        """Fill the buffer, uint8, with the block's packed bytes from `start` on."""
        view, end = memoryview(buffer.numpy()), start + len(buffer)
        for begins, place in zip(self.starts, self.places, strict=True):
            first, last = max(start, begins), min(end, begins + place.size)
            if first < last:
                self.disk.read(place, first - begins, view[first - start : last - start])


def stand_in(dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Return a tensor in main memory that is one NaN, seen everywhere."""
    return torch.full((dtype.itemsize,), 255, dtype=torch.uint8).view(dtype)[0].expand(shape)


def _work(jobs: queue.SimpleQueue) -> None:
    """Do jobs until there is None; of what they need nothing is kept alive while none is there."""
    while (entry := jobs.get()) is not None:
        future, job = entry
        try:
            future.set_result(job())
        except BaseException as error:  # whoever waits for the job raises it
            future.set_exception(error)
        del entry, future, job


def _close(jobs: queue.SimpleQueue, thread: threading.Thread, files: dict[Path, BinaryIO]) -> None:
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join(timeout=10)
    for file in files.values():
        with contextlib.suppress(OSError):
            file.close()
