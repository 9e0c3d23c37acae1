"""The state of a run on the disk: complete or absent, checked by hashes, and all that a run needs to go on exactly.

A folder NAME-000001-state, NAME-step00000002-state or NAME-state, as musubi-tuner names and, of the first three files,
fills it:

model.safetensors      what is trained
optimizer.bin          the optimizer's state_dict
scheduler.bin          the learning-rate schedule's; scaler.bin that of float16's loss scale, where there is one
ema.bin                the average of what is trained, where there is one
random.safetensors     the states of all random number generators of all processes
progress.json          how far the run is
manifest.json          the SHA-256 of each of these
"""

import contextlib
import json
import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dataset.loader import CachedDataset
from modules.checkpoints import SavingOptions, ending, given_up, own
from utils.errors import UserError
from utils.files import remove_leftovers
from utils.identity import file_hash
from utils.options import option
from utils.safetensors_io import open_tensors, save_file_atomically

logger = logging.getLogger(__name__)

MODEL, RANDOM, PROGRESS, MANIFEST = "model.safetensors", "random.safetensors", "progress.json", "manifest.json"
_NAMES = r"(-\d{6}|-step\d{8}|)-state"
_ENDING = re.compile(_NAMES)
_BEGUN = rf"{_NAMES}\.[0-9a-f]{{8}}\.(tmp|old)"


@dataclass(frozen=True)
class StateOptions:
    """resuming"""

    save_state: bool = option(False, "save the state of the run beside each file, and at its end")
    save_state_on_train_end: bool = option(False, "save it at the end alone")
    save_last_n_epochs_state: int | None = option(None, "as --save_last_n_epochs, for states (default: the same)")
    save_last_n_steps_state: int | None = option(None, "as --save_last_n_steps, for states (default: the same)")
    resume: str | None = option(
        None, "go on from this state as if never stopped; latest: the newest complete one of --output_name"
    )


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int  # optimizer steps
    epoch: int  # complete epochs
    batches: int = 0  # of the next epoch, on each process
    losses: tuple[float, ...] = ()  # of the last batches, for the average that is shown
    epoch_losses: tuple[float, ...] = ()  # of the batches of the unfinished epoch
    epoch_bins: tuple[tuple[float, int], ...] = ()  # the sum and number of its errors in each bin of timesteps
    seed: int | None = None
    processes: int = 1
    epoch_batches: int | None = None  # batches of an epoch, of all processes
    data: str | None = None  # hash of what is in an epoch and in which order
    optimizer: str | None = None  # its class
    written: tuple[str, ...] = ()  # names of the files and states so far, which rotate
    log_lines: int | None = None  # of the run's log so far


@dataclass
class States:
    """Which states a run writes, and which of them it keeps."""

    options: StateOptions
    saving: SavingOptions
    written: set[str] = field(default_factory=set)  # only what this run wrote is ever deleted
    before_delete: Callable[[Path], None] = lambda path: None

    def path(self, series: str, number: int = 0) -> Path:
        """Return the state of a step, of an epoch (from 1) or of the end; series: "step", "epoch" or "end"."""
        return self.saving.output_dir / f"{self.saving.output_name}{ending(series, number)}-state"

    def outdated(self, series: str, number: int) -> Path | None:
        """Return the state that is given up once that of a step or an epoch is there, if it is this run's."""
        saving, options = self.saving, self.options
        every, last, other = {
            "step": (saving.save_every_n_steps, options.save_last_n_steps_state, saving.save_last_n_steps),
            "epoch": (saving.save_every_n_epochs, options.save_last_n_epochs_state, saving.save_last_n_epochs),
        }.get(series, (None, None, None))
        last = other if last is None else last
        return own(self.path(series, given_up(series, number, every, last)), self.written) if every and last else None

    def tidy(self) -> None:
        """Delete what a run of this name that was killed had begun to write, or had replaced already."""
        folder, begun = self.saving.output_dir, re.compile(rf"\.{re.escape(self.saving.output_name)}{_BEGUN}")
        left = [path for path in sorted(folder.iterdir()) if path.is_dir() and begun.fullmatch(path.name)]
        for path in left:
            shutil.rmtree(path)
        for path in (*left, *remove_leftovers(folder)):
            logger.info("removed, left by a run that was killed: %s", path)

    def delete(self, path: Path) -> None:
        self.before_delete(path)
        if path.is_dir():
            # Away at once, or what is left of it after a crash would look like a state.
            gone = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
            os.replace(path, gone)
            shutil.rmtree(gone)
            logger.info("deleted %s", path)
        self.written.discard(path.name)


@dataclass(frozen=True)
class State:
    """A state on the disk that is complete."""

    path: Path
    progress: Progress
    whole: bool = True  # with progress and random numbers, which other programs do not write

    def tensors(self) -> dict[str, Tensor]:
        with open_tensors(self.path / MODEL, "--resume") as file:
            return {key: file.get(key).clone() for key in file.keys()}  # noqa: SIM118

    def load(self, name: str, needed: bool = True) -> Any:
        """Return what optimizer.bin, scheduler.bin, scaler.bin or ema.bin holds, on the CPU.

        needed: else None for a file that is not there.
        """
        path = self.path / f"{name}.bin"
        if not needed and not path.is_file():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
            raise UserError(f"--resume {self.path}: {path.name} cannot be read ({reason})") from None

    def generators(self) -> dict[str, Tensor]:
        """Return the states of random number generators, by "process/name"."""
        if not self.whole:
            return {}
        with open_tensors(self.path / RANDOM, "--resume") as file:
            return {key: file.get(key).clone() for key in file.keys()}  # noqa: SIM118


def write_state(
    path: Path,
    tensors: Mapping[str, Tensor],
    dictionaries: Mapping[str, Any],
    generators: Mapping[str, Tensor],
    progress: Progress,
) -> None:
    """Write a state into a folder that appears when it is complete; one that has the name goes then, and not before.

    dictionaries: what optimizer.bin, scheduler.bin ... hold, by name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        save_file_atomically({key: tensor.detach().cpu() for key, tensor in tensors.items()}, temporary / MODEL)
        save_file_atomically(dict(generators), temporary / RANDOM)
        for name, value in dictionaries.items():
            with open(temporary / f"{name}.bin", "wb") as file:
                torch.save(value, file)
                file.flush()
                os.fsync(file.fileno())
        _write_json(temporary / PROGRESS, asdict(progress))
        _write_json(temporary / MANIFEST, {file.name: file_hash(file) for file in sorted(temporary.iterdir())})
        if path.exists():
            old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error.__context__, OSError):  # a full disk, which torch.save() tells of in words of its own
            raise error.__context__ from None
        raise
    logger.info("saved %s", path)


def check_states(options: StateOptions) -> None:
    """Raise UserError for numbers that cannot be."""
    for name in ("save_last_n_epochs_state", "save_last_n_steps_state"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")


def find_state(resume: str | None, folder: Path | None, name: str | None) -> State | None:
    """Return the state that --resume names, whose files are all there and unchanged; None where it is not given.

    folder, name: of the trained files, among whose states "latest" looks.
    """
    if resume is None:
        return None
    if resume == "latest":
        for path in states_of(folder, name):
            if (reason := why_broken(path)) is None:
                return read_state(path)
            logger.warning("%s is passed over: %s", path, reason)
        raise UserError(f"--resume latest: {folder} holds no complete state of {name}", "leave it out to begin anew")
    path = Path(resume)
    if not path.is_dir():
        near = states_of(folder, name)
        fix = f"the newest of {name} is {near[0]}" if near else "name the folder that ends in -state"
        raise UserError(f"--resume {resume}: no such folder", fix)
    if reason := why_broken(path):
        before = next((other for other in states_of(path.parent, name, path) if why_broken(other) is None), None)
        raise UserError(f"--resume {resume}: {reason}", f"the one before it is {before}" if before else "")
    return read_state(path)


def states_of(folder: Path | None, name: str | None, before: Path | None = None) -> list[Path]:
    """Return the states of a run's name in a folder, the newest first; only those older than `before`."""
    if folder is None or not folder.is_dir():
        return []
    saved: dict[Path, float] = {}
    for path in folder.iterdir():
        if path.is_dir() and name and path.name.startswith(name) and _ENDING.fullmatch(path.name[len(name) :]):
            with contextlib.suppress(FileNotFoundError):  # a run that goes on has given it up meanwhile
                saved[path] = path.stat().st_mtime
    latest = math.inf if before is None else before.stat().st_mtime
    return sorted((path for path, time in saved.items() if time < latest), key=saved.get, reverse=True)


def why_broken(path: Path) -> str | None:
    """Return what is wrong with a state's files, or None. A state without a manifest is another program's."""
    for name in (MODEL, "optimizer.bin", "scheduler.bin"):
        if not (path / name).is_file():
            return f"{name} is missing, so it is no state, or not a complete one"
    if not (path / MANIFEST).is_file():
        return f"{MANIFEST} is missing" if (path / PROGRESS).is_file() else None
    try:
        hashes = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in hashes.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if file_hash(path / name) != expected:
                return f"{name} is not what was saved (its hash differs)"
    except (ValueError, AttributeError):
        return f"{MANIFEST} is damaged"
    except FileNotFoundError:
        return "it is gone, given up by a run that goes on"
    return None


def read_state(path: Path) -> State:
    """Return a state whose files are known to be whole."""
    if (path / PROGRESS).is_file():
        content = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        known = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
        return State(path, Progress(**known))
    bare = State(path, Progress(0, 0), whole=False)
    logger.warning(
        "--resume %s: was written by another program: weights, optimizer and schedule are taken from it; it does not "
        "say how far the run was, so an epoch begins anew, nor where its random numbers were",
        path,
    )
    return State(path, Progress(int(bare.load("scheduler").get("last_epoch", 0)), 0), whole=False)


def check_fit(state: State, shapes: Mapping[str, torch.Size] | None, optimizer: str) -> None:
    """Raise UserError for the state of another network or optimizer; shapes: see Trained.expected_shapes()."""
    if state.progress.optimizer not in (None, optimizer):
        raise UserError(
            f"--resume {state.path}: its optimizer is {state.progress.optimizer}, --optimizer_type is {optimizer}",
            "use the options of the run that saved it",
        )
    if shapes is not None:
        with open_tensors(state.path / MODEL, "--resume") as file:
            check_shapes({key: torch.Size(file.shape(key)) for key in file.keys()}, shapes)  # noqa: SIM118


def check_shapes(saved: Mapping[str, torch.Size], shapes: Mapping[str, torch.Size]) -> None:
    """Raise UserError unless a state has the names and shapes that a run's tensors have."""
    if wrong := sorted(shapes.keys() ^ saved.keys()):
        raise UserError(
            f"--resume: the state is of another network or model: {len(wrong)} of its tensors differ, e.g. {wrong[0]}",
            "use the options of the run that saved it",
        )
    for name, shape in saved.items():
        if shape != shapes[name]:
            raise UserError(
                f"--resume: {name} is {tuple(shape)} in the state, here {tuple(shapes[name])}",
                "use the --network_dim and other options of the run that saved it",
            )


def position(progress: Progress, data: CachedDataset, processes: int) -> int:
    """Return how many batches of its next epoch each process leaves out when a run goes on.

    By the share of the epoch that has been seen where data or processes are not those of the state, with a warning.
    """
    if (progress.data, progress.processes) == (data.digest(), processes):
        return progress.batches
    if not progress.epoch_batches:
        return 0
    share = min(progress.batches * progress.processes / progress.epoch_batches, 1.0)
    left_out = round(share * len(data)) // processes
    logger.warning(
        "--resume: data or number of processes are not those of the state: epoch %d goes on after %.0f %% of its "
        "batches, in another order",
        progress.epoch + 1,
        100 * share,
    )
    return left_out


def restore_optimizer(optimizer: Optimizer, saved: Mapping[str, Any], where: Path) -> None:
    """Give an optimizer a saved state. Its tensors keep their formats, which torch would make those of the weights."""
    sizes = [[len(group["params"]) for group in groups] for groups in (optimizer.param_groups, saved["param_groups"])]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"--resume {where}: its optimizer has {sum(sizes[1])} weights in {len(sizes[1])} groups, "
            f"this run {sum(sizes[0])} in {len(sizes[0])}",
            "use the options of the run that saved it",
        )
    try:
        optimizer.load_state_dict(saved)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"--resume {where}: its optimizer does not fit ({error})",
            "use the --optimizer_type of the run that saved it",
        ) from None
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, number in zip(group["params"], saved_group["params"], strict=True):
            for name, value in unpacked(saved["state"].get(number, {})):
                if isinstance(value, Tensor):
                    held = optimizer.state[parameter][name]
                    optimizer.state[parameter][name] = value.to(held.device)


def unpacked(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what an optimizer keeps of a weight, by name; bitsandbytes saves some of it in a dictionary of its own."""
    for name, value in state.items():
        yield from value.items() if isinstance(value, Mapping) else [(name, value)]


def _write_json(path: Path, content: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
