"""What a run leaves on the disk and can go on from: its files, those of its average, its states."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from torch.optim.lr_scheduler import LRScheduler

from modules.checkpoints import Checkpoints
from modules.disk import optimizer_bytes, tensor_bytes
from modules.ema import Average
from modules.milestones import FILE, STATE
from modules.preflight import Plan
from modules.recorder import Recorder
from modules.states import Progress, State, States, restore_optimizer, write_state

logger = logging.getLogger(__name__)


@dataclass
class Saver:
    """Knows all that has to be kept of a run; the first process alone writes it."""

    plan: Plan
    accelerator: Accelerator
    optimizer: AcceleratedOptimizer
    schedule: LRScheduler
    ema: Average | None
    generators: Mapping[str, torch.Generator]  # all that random numbers are drawn from on this process
    metadata: Mapping[str, str]  # of the files
    record: Recorder

    def __post_init__(self) -> None:
        options, self.trained = self.plan.options, self.plan.trained
        self.averaging = hasattr(self.optimizer.optimizer, "eval")  # schedule-free: what it trains is not what it means
        if self.ema and self.averaging:
            logger.warning(
                "--ema_decay: %s averages the weights already, and the files hold that average; "
                "NAME_ema.safetensors is the average of what it trains before that",
                type(self.optimizer.optimizer).__name__,
            )
        self.checkpoints = Checkpoints(
            options.saving,
            self.metadata,
            options.metadata.no_metadata,
            self.trained.file_dtype(),
            self.trained.hashed,
        )
        metadata = {**self.metadata, "ss_ema_decay": str(options.ema.ema_decay)}
        # It has the same list of what was written.
        self.ema_checkpoints = replace(self.checkpoints, metadata=metadata, suffix="_ema")
        self.states = States(options.states, options.saving)
        for keeper in (self.checkpoints, self.states, self.ema_checkpoints):
            keeper.before_delete = self.record.before_delete

    def shown(self) -> contextlib.AbstractContextManager[None]:
        """Return what makes the weights those that samples and validation see while it is entered."""
        return self.ema.shown() if self.ema and self.plan.options.ema.ema_for_samples else self.averaged()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """While it is entered the weights are those that an optimizer without a schedule averages."""
        if self.averaging:
            self.optimizer.optimizer.eval()
        yield
        if self.averaging:
            self.optimizer.optimizer.train()

    def save_file(self, series: str, number: int, step: int, epoch: int) -> None:
        """Save what is trained and, where there is an average, that; see Checkpoints.save().

        What is outdated then is deleted.
        """
        if not self.accelerator.is_main_process:
            return
        kinds = [(self.checkpoints, self.averaged), *([(self.ema_checkpoints, self.ema.shown)] if self.ema else [])]
        for files, shown in kinds:
            with shown():
                tensors = self.trained.tensors()
                self.record.save(
                    FILE,
                    step,
                    partial(files.save, tensors, series, number, step, epoch),
                    files.path(series, number),
                    tensor_bytes(tensors.values(), files.file_dtype),
                    files,
                    files.outdated(series, number),
                    last=series == "end",
                )

    def save_state(self, series: str, number: int, progress: Progress, early: bool = False) -> bool:
        """Save the state of the run and delete what is outdated then; called by all processes.

        Returns whether that was done, on the first one. progress: as far as the loop knows it. early: before its time,
        because the run ends here: deletes nothing, and a run that goes on does not log it.
        """
        every = gather_object([{name: each.get_state() for name, each in self.generators.items()}])
        saved = False
        if self.accelerator.is_main_process:
            if self.trained.stowed:
                self.trained.settle()
            path, outdated = self.states.path(series, number), None if early else self.states.outdated(series, number)
            tensors, optimizer = self.trained.tensors(), self.optimizer.optimizer

            def write() -> None:
                self.states.written.add(path.name)
                scaler = self.accelerator.scaler
                dictionaries = {
                    "optimizer": optimizer.state_dict(),
                    "scheduler": self.schedule.state_dict(),
                    **({"scaler": scaler.state_dict()} if scaler else {}),
                    **({"ema": self.ema.state_dict()} if self.ema else {}),
                }
                generators = {f"{rank}/{name}": state for rank, own in enumerate(every) for name, state in own.items()}
                written = tuple(sorted(self.states.written | self.checkpoints.written))
                whole = replace(progress, written=written, log_lines=self.record.log.lines)
                write_state(path, tensors, dictionaries, generators, whole)
                if outdated:
                    self.states.delete(outdated)

            average = self.ema.state_dict().values() if self.ema else ()
            needed = tensor_bytes((*tensors.values(), *average)) + optimizer_bytes(optimizer)
            saved = self.record.save(STATE, progress.step, write, path, needed, self.states, outdated, noted=not early)
        self.accelerator.wait_for_everyone()
        return saved

    def restore(self, state: State) -> None:
        """Make all that is kept here what it was when a state was saved."""
        self.trained.restore(state.tensors())
        restore_optimizer(self.optimizer.optimizer, state.load("optimizer"), state.path)
        self.schedule.load_state_dict(state.load("scheduler"))
        if self.accelerator.scaler and state.whole:
            self.accelerator.scaler.load_state_dict(state.load("scaler"))
        if self.ema and (average := state.load("ema", needed=False)):
            self.ema.load_state_dict(average)
        elif self.ema:
            logger.warning("--resume %s: holds no average of the weights, which begins anew", state.path)
        elif (state.path / "ema.bin").is_file():
            logger.warning("--resume %s: holds an average of the weights, which ends without --ema_decay", state.path)
        saved, rank = state.generators(), self.accelerator.process_index
        for name, generator in self.generators.items():
            if f"{rank}/{name}" in saved:
                generator.set_state(saved[f"{rank}/{name}"])
        written = state.progress.written
        self.states.written.update(name for name in written if name.endswith("-state"))
        self.checkpoints.written.update(name for name in written if not name.endswith("-state"))
        if self.accelerator.is_main_process:
            self.states.tidy()
