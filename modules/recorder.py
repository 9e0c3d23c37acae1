"""What a run tells of itself while it goes on: log, report, progress bar. All processes but the first are silent."""

import contextlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from modules.checkpoints import Checkpoints
from modules.disk import save_where_there_is_room
from modules.hub import Uploads
from modules.milestones import FILE, STATE, Ahead, milestones
from modules.preflight import Plan
from modules.progress_bar import RunBar
from modules.run_log import RunLog, log_path, read_log
from modules.run_report import Reporter
from modules.settings import groups_of, told
from modules.states import States
from modules.timestep_bins import in_words
from utils.errors import UserError

logger = logging.getLogger(__name__)

_BETWEEN = 60.0  # seconds between two epochs whose losses the console has: short ones would fill it
_PATIENCE = 5 * 3600.0  # seconds to wait for room for the last file; the other processes wait for six hours


class Recorder:
    """Keeps the log and the report of a run, and measures what its parts take."""

    def __init__(self, plan: Plan, first: bool, device: torch.device):
        saving = plan.options.saving
        self.plan, self.first, self.device = plan, first, device
        path = log_path(saving.output_dir, saving.output_name) if first else None
        self.log, self.reporter = RunLog(path), Reporter(path) if path else None
        hub = plan.options.hub
        self.uploads = Uploads(hub, self._warn) if first and hub.huggingface_repo_id else None
        self._step = 0
        self.bar: RunBar | None = None
        self._began = self._told = time.monotonic()

    def start(self, **facts: Any) -> None:
        """Begin the log, or go on with it; facts: more of the run for its first line."""
        plan = self.plan
        summary = plan.data.summary()
        values = {
            "name": plan.options.saving.output_name,
            "total_steps": plan.total_steps,
            "epochs": plan.epochs,
            "memory": "GPU memory" if self.device.type == "cuda" else "main memory",
            **facts,
            "dataset": {"items": summary.items, "batches": summary.batches, "buckets": summary.buckets},
            "settings": told(groups_of(plan.options, plan.trained.options)),
        }
        step = 0
        if plan.state:
            step = plan.state.progress.step
            self.log.go_on(plan.state.progress.log_lines, step)
            if self.log.path and _same(_started(self.log.path), values):
                return
        else:
            self.log.begin()
        self.log.write("start", step, **values)

    @contextlib.contextmanager
    def running(self, step: int) -> Iterator[RunBar]:
        """Yield the progress bar, which is closed also by an error, whose line would else stand at its end."""
        left = Ahead(milestones(self.plan)).after
        with RunBar(self.plan.total_steps, step, left, not self.first) as self.bar:
            yield self.bar

    def aside(self, kind: str) -> contextlib.AbstractContextManager[None]:
        """Count the time of the body as that of a file, a state or samples."""
        return self.bar.aside(kind) if self.bar else contextlib.nullcontext()

    def step(
        self,
        step: int,
        epoch: int,
        losses: Sequence[float],
        examples: int,
        norms: Sequence[Tensor] = (),
        **values: float,
    ) -> None:
        """Note an optimizer step; epoch: its number, from 1; losses: of its batches; norms: of its gradients' parts."""
        seconds, self._step = self.bar.step(), step
        if not self.first:
            return
        if norms:
            values["grad_norm"] = torch.stack([norm.float().to(self.device) for norm in norms]).norm().item()
        self.log.write(
            "step",
            step,
            epoch=epoch,
            loss=sum(losses) / len(losses),
            **values,
            examples=examples,
            seconds=round(seconds, 4),
            memory_gb=round(self._memory() / 1e9, 3),
        )

    def epoch(self, step: int, epoch: int, loss: float, means: Mapping[str, float]) -> None:
        """Note the losses of an epoch, all and by timestep; the console has those of one a minute, and of the last."""
        self.log.write("epoch", step, epoch=epoch, loss=loss, **means)
        now = time.monotonic()
        if epoch == self.plan.epochs or now - self._told >= _BETWEEN:
            self._told = now
            logger.info("epoch %d: loss by timestep: %s", epoch, in_words(means))

    def samples(
        self, step: int, epoch: int | None, files: Sequence[Path], prompts: Sequence[str], began: float
    ) -> None:
        """Note samples, and write the report; began: when, by time.monotonic()."""
        names = [_beside(path, self.plan.options.saving.output_dir) for path in files]
        seconds = round(time.monotonic() - began, 2)
        self.log.write("sample", step, epoch=epoch, files=names, prompts=list(prompts), seconds=seconds)
        self.report()

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Note validation losses, "loss/validation" and what follows it in the names of the others."""
        named = {name.removeprefix("loss/validation").strip("/") or "loss": value for name, value in values.items()}
        self.log.write("validation", step, **named)

    def save(
        self,
        kind: str,
        step: int,
        write: Callable[[], object],
        path: Path,
        needed: int,
        keeper: Checkpoints | States,
        outdated: Path | None,
        last: bool = False,
        noted: bool = True,
    ) -> bool:
        """Write a file or a state where there is room; return whether that was done. See save_where_there_is_room().

        last: the file at the end, for which room is waited for; UserError where it does not come.
        """

        def written() -> None:
            # Before it is written, so that a state tells the log's length with this very line.
            if kind == STATE and noted:
                self.log.write("save", step, file=path.name)
                self.log.sync()
            write()

        with self.aside(kind):
            done = save_where_there_is_room(
                *(written, path, needed, outdated, keeper.delete, _PATIENCE if last else 0.0),
                tell=partial(self.warn, step),
            )
            if done and kind == FILE:
                self.log.write("save", step, file=path.name)
            if done and self.uploads and (kind == FILE or self.plan.options.hub.save_state_to_huggingface):
                self.uploads.add(path)
        if last and not done:
            raise UserError(f"{path}: could not be saved, there was no room", "free some space before the next run")
        return done

    def warn(self, step: int, text: str, *values: Any) -> None:
        """Warn, on the console and in the log."""
        logger.warning(text, *values)
        self.log.write("warning", step, text=text % values)

    def _warn(self, text: str, *values: Any) -> None:
        self.warn(self._step, text, *values)

    def end(self, kind: str, step: int, **values: Any) -> None:
        """Note the end of the run, "end" or "stop", and write the report."""
        if self.uploads:
            self.uploads.finish()
        self.log.write(kind, step, seconds=round(time.monotonic() - self._began, 1), **values)
        self.report()
        self.log.close()

    def fail(self, step: int, error: BaseException) -> None:
        """Note why the run ends, unless its end is noted already."""
        if self.log.path and not self.log.closed:
            if self.uploads and isinstance(error, UserError):
                self.uploads.finish()
            why = str(error) or type(error).__name__
            self.log.write("stop", step, error=" ".join(why.split())[:500])
            self.report()
            self.log.close()

    def before_delete(self, path: Path) -> None:
        """Return once a file or a state can be deleted."""
        if self.uploads:
            self.uploads.wait_for(path)

    def report(self) -> None:
        if self.reporter:
            self.reporter.write()

    def _memory(self) -> int:
        """Return the bytes that tensors on the GPU took at most; on a CPU those of this process now."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return psutil.Process().memory_info().rss


def _started(path: Path) -> dict[str, Any]:
    return next((line for line in reversed(list(read_log(path))) if line.get("kind") == "start"), {})


def _same(line: dict[str, Any], values: dict[str, Any]) -> bool:
    """Return whether a line of the log has these values."""
    return all(json.dumps(line.get(name)) == json.dumps(value, default=str) for name, value in values.items())


def _beside(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def device_words(device: torch.device, processes: int) -> str:
    """Return a device as people know it: "NVIDIA H100, 2 processes"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
    return name + (f", {processes} processes" if processes > 1 else "")
