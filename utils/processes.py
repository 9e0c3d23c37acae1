"""Processes that torchrun or accelerate launch has started for one run: who is first, what it tells, how all end."""

import contextlib
import io
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from utils.devices import default_device
from utils.errors import UserError, explain

T = TypeVar("T")
_PATIENCE = timedelta(hours=6)  # the others wait while the first one alone encodes
_AT_THE_END = 25  # seconds to wait for the process that says why all end; torchrun kills after 30


class Processes:
    """This process and those that work with it; alone unless told otherwise."""

    def __init__(self, rank: int = 0, count: int = 1, store: dist.Store | None = None):
        self.rank, self.count = rank, count
        self._store = store
        self._together = count > 1

    @property
    def is_first(self) -> bool:
        """Return whether this is the process that logs, shows progress and writes files."""
        return self.rank == 0

    def device(self, name: str | None) -> torch.device:
        """Return the device that --device names for this process: of several, each has the GPU of its own number."""
        if self.count == 1:
            return default_device(name)
        own, here = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", self.count))
        gpus = torch.cuda.device_count()
        if own < gpus and name != "cpu":
            torch.cuda.set_device(own)  # first, or trying a device would take memory of another process's
        device = default_device(name)
        if device.type != "cuda":
            return device
        if device.index is not None:
            raise UserError(
                f"--device {name}: each of the {self.count} processes has a GPU of its own",
                "leave it out, and choose GPUs with the environment variable CUDA_VISIBLE_DEVICES",
            )
        if here > gpus:
            raise UserError(f"{here} processes: there are {gpus} CUDA devices, one for each is needed", "start fewer")
        if not dist.is_nccl_available():
            raise UserError(f"{self.count} processes: this torch has no NCCL, by which GPUs exchange", "use Linux")
        return torch.device("cuda", own)

    def first(self, make: Callable[[], T]) -> T:
        """Return what make() returns in the first process, on all of them; tensors come to the others on the CPU.

        What it raises ends all processes.
        """
        if self.count == 1:
            return make()
        if not self.is_first:
            with answered():
                return _received()
        try:
            value = make()
        except BaseException:
            with contextlib.suppress(RuntimeError):
                _send((False, None))
            raise
        with answered():
            _send((True, value))
        return value

    def exchange(self, value: T) -> list[T]:
        """Return what each process passes in, in their order, on all of them; tensors come on the CPU."""
        if self.count == 1:
            return [value]
        content = _packed(value)
        with answered():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
            dist.all_gather(sizes, torch.tensor([len(content)]))
            longest = int(max(sizes))
            contents = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.count)]
            dist.all_gather(contents, torch.nn.functional.pad(content, (0, longest - len(content))))
        return [_unpacked(content[: int(size)]) for content, size in zip(contents, sizes, strict=True)]

    def leave(self) -> None:
        """Wait for all processes and part from them: each goes on by itself."""
        if self._together:
            # Held until the group is gone: a thread of the group that lets go of it last needs the GIL, and torch 2.6
            # waits for that thread without giving the GIL up.
            met = torch.zeros(1)
            with answered():
                dist.all_reduce(met)
            dist.destroy_process_group()
            self._together = False

    def end(self, error: BaseException) -> NoReturn:
        """End this process after an error. The first of all that have one says why, and gives the exit code.

        At once: what Python and CUDA tidy up when a script ends may wait for processes that are no longer there.
        """
        code = 1
        with contextlib.suppress(Exception):  # of the store, which may have gone with the process that kept it
            if not isinstance(error, _Ended) and self._store.add("failures", 1) == 1:
                code = _explained(error)
                self._store.set("exit code", str(code))
            else:
                self._store.wait(["exit code"], timedelta(seconds=_AT_THE_END))
                code = int(self._store.get("exit code"))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """End all processes after Ctrl-C, when the first one has kept what it has.

        To finish its step it needs the answers of the others, so these go on until it is through.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends one of its own beside that of the terminal
        if self.is_first:
            raise KeyboardInterrupt
        threading.Thread(target=self.end, args=[_Ended()], daemon=True).start()


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Yield this process and those that were started with it, which end together: one line, one exit code."""
    # All of what torchrun sets: schedulers of clusters set some of it for single processes too.
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys():
        yield Processes()
        return
    store, rank, count = next(dist.rendezvous("env://", timeout=_PATIENCE))
    processes = Processes(rank, count, dist.PrefixStore("run", store))
    signal.signal(signal.SIGINT, processes.interrupt)
    if rank > 0:
        logging.disable(logging.WARNING)
    try:
        # NCCL for what is on a GPU and gloo for what is not.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", store), rank=rank, world_size=count, timeout=_PATIENCE
        )
        yield processes
        processes.leave()
    except BaseException as error:
        processes.end(error)


@contextlib.contextmanager
def answered(certainly: bool = True) -> Iterator[None]:
    """Make the failure of an exchange, which is that of another process, an error in one line.

    certainly: what happens here is an exchange; otherwise it is told by the error whether it was one.
    """
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError" or not (certainly or _is_of_exchange(error)):
            raise
        what = re.sub(r"^\[\S*\] ", "", str(error).splitlines()[0]).partition(". ")[0]
        raise UserError(
            f"another process of this run has ended or does not answer ({what})",
            "the report of torchrun says which; one that got signal 9 may have run out of main memory",
        ) from error


def _is_of_exchange(error: RuntimeError) -> bool:
    words = ("gloo", "connection closed by peer", "connection reset by peer", "timed out waiting")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


class _Ended(Exception):
    """The first process has an error, and says so itself."""


def _packed(value: Any) -> torch.Tensor:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def _unpacked(content: torch.Tensor) -> Any:
    # Whole objects, which no file could bring in here: they are from the processes of this very run.
    return torch.load(io.BytesIO(content.numpy().tobytes()), map_location="cpu", weights_only=False)


def _send(value: Any) -> None:
    content = _packed(value)
    dist.broadcast(torch.tensor([len(content)]), 0)
    dist.broadcast(content, 0)


def _received() -> Any:
    size = torch.zeros(1, dtype=torch.int64)
    dist.broadcast(size, 0)
    content = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(content, 0)
    done, value = _unpacked(content)
    if not done:
        raise _Ended
    return value


def _explained(error: BaseException) -> int:
    """Say why the run ends; return its exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    code = explain(error)
    if code is None:
        traceback.print_exception(error)
    return 1 if code is None else code
