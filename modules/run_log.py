"""The log of a training run: NAME_log.jsonl, one JSON object a line, which goes on exactly where a run goes on.

Every line has `kind`, `step` (optimizer steps done) and `time` (seconds since 1970). Kinds:

start       settings, data and what is trained; again where a run goes on with other settings
step        epoch, loss, average, learning rates as lr/NAME, grad_norm, seconds, memory_gb, examples; where the loss is
            no finite number steps_left_out: how many in a row
epoch       epoch, loss: the mean over its batches; the mean errors by timestep, as t0-100
validation  any numbers by name; each name is a curve of the report
sample      epoch, files beside the log, prompts, seconds
save        file
warning     text
stop, end   seconds of the run; of a stop its state, or the error
"""

import contextlib
import itertools
import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.files import write_whole

logger = logging.getLogger(__name__)

_WAITING = 1 << 20  # bytes of lines that wait for room on a full disk


class RunLog:
    """Appends to a run's log; every line is with the system, safe from the end of this process, once written.

    path: None for a process that writes none.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.lines = 0
        self._file = None
        self._failed = False  # to write a line
        self._lock = threading.Lock()  # uploads beside the training warn too

    def begin(self) -> None:
        """Begin a new log. One of an earlier run of the name, and its report, are kept under names with its time."""
        if self.path is None:
            return
        for path in (self.path, report_path(self.path)):
            if path.exists():
                when = time.strftime("%Y%m%d%H%M%S", time.localtime(path.stat().st_mtime))
                names = (f"{path.stem}_{when}{more or ''}{path.suffix}" for more in itertools.count(0, -1))
                kept = next(place for place in map(path.with_name, names) if not place.exists())
                os.replace(path, kept)
                logger.info("%s of an earlier run is now %s", path.name, kept)
        self._open()

    def go_on(self, lines: int | None, step: int) -> None:
        """Go on after so many lines of the log that is there; what follows them is moved to NAME_log_cut.jsonl.

        lines: None where a state does not tell: then after the last line of a step.
        """
        if self.path is None:
            return
        whole = [line for line in _raw_lines(self.path) if line.endswith(b"\n")]
        if lines is None:
            lines = max((n for n, line in enumerate(whole, 1) if _parsed(line).get("step", 0) <= step), default=0)
        kept, cut = whole[:lines], whole[lines:]
        if cut:
            with open(self.path.with_name(f"{self.path.stem}_cut.jsonl"), "ab") as file:
                file.writelines(cut)
        if self.path.exists():
            write_whole(self.path, kept)
        self.lines = len(kept)
        self._open()

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab", buffering=_WAITING)  # noqa: SIM115

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a line. Numbers that are not finite become null, which JSON has no other word for."""
        if self._file is None:
            return
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        try:
            with self._lock:
                self._file.write(json.dumps(_jsonable(line), ensure_ascii=False, allow_nan=False).encode() + b"\n")
                self.lines += 1
                self._file.flush()
        except OSError as error:  # a full disk: lines wait until there is room, and training does not
            if not self._failed:
                logger.warning("%s: cannot be written at present (%s)", self.path, error.strerror)
            self._failed = True

    @property
    def closed(self) -> bool:
        return self._file is None

    def sync(self) -> None:
        """Return once all lines are on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def log_path(folder: Path, name: str) -> Path:
    return folder / f"{name}_log.jsonl"


def report_path(log: Path) -> Path:
    """Return where the report on a log is written."""
    return log.with_name(f"{log.stem.removesuffix('_log')}_report.html")


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log; none where there is no file. A line that is cut off is left out."""
    for line in _raw_lines(path):
        if parsed := _parsed(line):
            yield parsed


def _raw_lines(path: Path) -> Iterator[bytes]:
    if path.is_file():
        with open(path, "rb") as file:
            yield from file


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_jsonable(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
