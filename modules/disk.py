"""Room on the disk: what a run will write, and saves that wait for room or are left out rather than end it."""

import errno
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from modules.checkpoints import Checkpoints
from modules.dataset_report import in_bytes
from modules.milestones import FILE, STATE, Milestone
from modules.optimizers import OptimizerOptions, make_optimizer
from modules.preflight import Plan
from modules.states import States, unpacked
from modules.trained import shapes_of
from utils.devices import parse_dtype
from utils.errors import UserError
from wan.model import WanModel

logger = logging.getLogger(__name__)

_HEADERS = 1 << 16  # bytes of names, shapes and metadata of a file, about
_FULL = (errno.ENOSPC, errno.EDQUOT)
_EVERY = 10.0  # seconds between two looks for room
_TELL = 600.0  # seconds between two lines that say that there is none


# ------------------------------------------------------------------------------------------------------- before a run
def sizes(plan: Plan, device: torch.device) -> dict[str, int]:
    """Return about how many bytes a file and a state take, by kind of milestone."""
    shapes = plan.trained.expected_shapes()
    if shapes is None:
        with torch.device("meta"):
            shapes = shapes_of(WanModel(plan.shape).state_dict())
        held = plan.dtype.itemsize
    else:
        held = torch.float32.itemsize
    numbers = sum(shape.numel() for shape in shapes.values())
    precision = plan.options.saving.save_precision
    file = numbers * (parse_dtype(precision) if precision else plan.trained.file_dtype()).itemsize + _HEADERS
    if plan.options.ema.ema_decay:  # saved beside, and in the state as it is
        file, held = 2 * file, held + torch.float32.itemsize
    moments = moment_bytes(plan.options.optimizer, device, plan.trained.shapes)
    return {FILE: file, STATE: round(numbers * (held + moments)) + 2 * _HEADERS}


def moment_bytes(options: OptimizerOptions, device: torch.device, shapes: Sequence[tuple[int, ...]]) -> float:
    """Return how many bytes an optimizer keeps for each number, by a step with small weights of these shapes."""
    weights = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    optimizer, _ = make_optimizer(options, [{"params": weights, "lr": options.learning_rate}])
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    if hasattr(optimizer, "train"):
        optimizer.train()
    optimizer.step()
    return optimizer_bytes(optimizer) / sum(weight.numel() for weight in weights)


def check_room(plan: Plan, planned: Sequence[Milestone], size: Mapping[str, int]) -> str:
    """Return in a line what the run will write at most at a time, and what is free.

    Raises UserError where not even one file and one state fit; too little room for all of them is a warning.
    """
    folder = plan.options.saving.output_dir
    free = shutil.disk_usage(folder).free
    kinds = {each.kind for each in planned}
    least = sum(size[kind] for kind in (FILE, STATE) if kind in kinds)
    if least > free:
        what = "a file and a state" if STATE in kinds else "a file"
        raise UserError(
            f"--output_dir {folder}: {what} of this run take {in_bytes(least)}, the disk has {in_bytes(free)} free",
            "free some space, or choose a folder on another disk",
        )
    most = peak_bytes(plan, planned, size)
    line = f"at most {in_bytes(most)} at a time, {in_bytes(free)} are free"
    if most > free:
        logger.warning(
            "--output_dir %s: all files and states of this run take %s, the disk has %s free; keep fewer with "
            "--save_last_n_epochs or --save_last_n_steps, or save less often",
            *(folder, in_bytes(most), in_bytes(free)),
        )
    return line


def peak_bytes(plan: Plan, planned: Sequence[Milestone], size: Mapping[str, int]) -> int:
    """Return the most bytes that the files and states of a run take at a time, besides those already there."""
    saving, states = plan.options.saving, plan.options.states
    keepers = {FILE: Checkpoints(saving, {}), STATE: States(states, saving)}
    there: set[Path] = set()
    now = most = 0
    for each in planned:
        if each.kind not in size:
            continue
        keeper = keepers[each.kind]
        path = keeper.path(each.series, each.number)
        there.add(path)
        keeper.written.add(path.name)
        now += size[each.kind]
        most = max(most, now)
        outdated = keeper.outdated(each.series, each.number)
        if outdated in there:
            there.remove(outdated)
            now -= size[each.kind]
    return most


# ------------------------------------------------------------------------------------------------------ during a run
def tensor_bytes(tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> int:
    """Return the bytes of a file of tensors; dtype: that they are saved in, where it is not their own."""
    return _HEADERS + sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in tensors)


def optimizer_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of all that an optimizer keeps."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for _, value in unpacked(state)
        if isinstance(value, Tensor)
    )


def save_where_there_is_room(
    write: Callable[[], Path],
    path: Path,
    needed: int,
    spare: Path | None = None,
    delete: Callable[[Path], None] = Path.unlink,
    patience: float = 0.0,
    tell: Callable[..., None] = logger.warning,
) -> bool:
    """Write a file or a state, and return whether that was done; where there is no room, that is told in a line.

    write: does it; what an older one of the name holds stays until it is done. spare: what is deleted anyway once this
    is written, and goes by delete() before where that makes the room. patience: seconds to wait for room.
    """
    since = told = time.monotonic()
    first = True
    while True:
        free = shutil.disk_usage(path.parent).free
        if free < needed and spare is not None and free + _size(spare) >= needed:
            delete(spare)
            spare, free = None, shutil.disk_usage(path.parent).free
        if free >= needed:
            try:
                write()
                return True
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                free = shutil.disk_usage(path.parent).free
        now = time.monotonic()
        waits = now - since < patience
        if first or now - told >= _TELL:
            ending = "waiting for room; Ctrl-C gives it up" if waits else "training goes on without it"
            tell(
                "%s is not saved: it takes %s, the disk has %s free; %s", path, in_bytes(needed), in_bytes(free), ending
            )
            first, told = False, now
        if not waits:
            return False
        time.sleep(_EVERY)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*") if path.is_dir() else []
    return sum(file.stat().st_size for file in files if file.is_file())
