"""Ends of a run before its time: Ctrl-C and SIGTERM, after the step that is being computed."""

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType

import psutil

from modules.hub import HubOptions
from modules.run_logs import LoggingOptions
from utils.options import secrets_in, without_secrets

logger = logging.getLogger(__name__)

_LAUNCHER = 5.0  # seconds in which another signal is that of torchrun, which hands on what it was sent


class Stop:
    """While it is entered, a first SIGINT or SIGTERM is noted and a second one interrupts at once."""

    def __init__(self) -> None:
        self.number = 0  # of the signal
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._since = number, time.monotonic()
            logger.warning("stopping after this step, with the state saved; once more to stop at once")
        elif number == self.number or time.monotonic() - self._since > _LAUNCHER:
            raise KeyboardInterrupt


def command_to_resume(state: Path) -> str:
    """Return the command that goes on from a state, as one would type it."""
    words = without_secrets(_typed(), secrets_in(HubOptions, LoggingOptions))
    # The state is here now, wherever the run itself went on from.
    words = [word for word in words if not word.startswith("--resume=") and word != "--resume_from_huggingface"]
    if "--resume" in words:
        place = words.index("--resume")
        del words[place : place + 2]
    command = [*words, "--resume", str(state)]
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


def _typed() -> list[str]:
    """Return the command that started the run: that of torchrun or accelerate, where one started this process."""
    if "LOCAL_RANK" in os.environ:
        with contextlib.suppress(psutil.Error):
            python, *words = psutil.Process(os.getppid()).cmdline() or [""]
            if words and sys.argv[0] in words:
                launcher = Path(words[0]).name
                return [launcher, *words[1:]] if launcher in ("torchrun", "accelerate") else ["python", *words]
    return ["python", *sys.argv]
