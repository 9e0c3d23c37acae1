"""Several processes that run a script's main() together, without waiting for their imports."""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed import TCPStore
from tqdm import tqdm

from utils.errors import run_script

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="tests.forked needs os.fork")


def fork(main: Callable[[], None], folder: Path, processes: int) -> tuple[list[int], str]:
    """Run a script's main() by several processes, as torchrun does; return their exit codes and all that they said.

    They have their imports already, which take torchrun's some seconds. What they say goes through files in the folder.
    """
    tqdm.set_lock(threading.RLock())  # no semaphore, which all would share, and one that is killed never let go of
    for last in (False, True):
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("fork")
        files = [folder / f"{rank}.txt" for rank in range(processes)]
        started = [
            context.Process(target=_forked, args=(main, rank, processes, store.port, file))
            for rank, file in enumerate(files)
        ]
        for process in started:
            process.start()
        deadline = time.monotonic() + 60
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [process.is_alive() for process in started]
        for process in started:
            process.kill()
        if not any(hung):
            break
        # What a thread of the tests held when this process was forked is never let go of there: once more, then.
        assert not last, "a process did not end"
    lines = "".join(path.read_text() for path in files).splitlines(keepends=True)
    # torch 2.8 greets every process.
    return [process.exitcode for process in started], "".join(line for line in lines if not line.startswith("[Gloo] "))


def _forked(main: Callable[[], None], rank: int, processes: int, port: int, said: Path) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    names |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in names.items()})
    with open(said, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        run_script(main)
        os._exit(0)  # not on into what belongs to the process that was forked
