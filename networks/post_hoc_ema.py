"""The average of files that one training saved: made afterwards, as if it had been kept while the run went on."""

import contextlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from networks.formats import with_hashes
from utils.errors import UserError
from utils.options import option
from utils.safetensors_io import TensorFile, open_tensors

logger = logging.getLogger(__name__)

WIDEST = 1 / math.sqrt(12)  # sigma_rel of a power function whose exponent is 0: all of the past counts the same


@dataclass(frozen=True)
class AverageOptions:
    """how much the past counts"""

    beta: float = option(0.95, "share that the average of the files before keeps at each file")
    beta2: float | None = option(None, "the same at the last file, beta moves there evenly (default: --beta)")
    sigma_rel: float | None = option(
        None, "in place of beta: width of a power-function average relative to the run, above 0 and below 0.2887"
    )
    compat_musubi: bool = option(
        False, "with --sigma_rel: count files as musubi-tuner does, which gives the oldest file no weight"
    )


def shares(options: AverageOptions, files: int) -> list[float]:
    """Return what the average so far keeps of itself at each file after the first. Raises UserError for wrong numbers.

    sigma_rel: (1 - 1/t)^(gamma + 1) at file t, counted from 1 (arXiv:2312.02696, section 3.1).
    """
    for name in ("beta", "beta2"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < 1:
            raise UserError(f"--{name} {value:g}: must be from 0 to below 1")
    steps = files - 1
    if options.sigma_rel is not None:
        if not 0 < options.sigma_rel < WIDEST:
            raise UserError(
                f"--sigma_rel {options.sigma_rel:g}: must be greater than 0 and less than {WIDEST:.4f}",
                "0.05 to 0.25 are usual",
            )
        first = 1 if options.compat_musubi else 2
        power = gamma(options.sigma_rel) + 1
        return [(1 - 1 / (number + first)) ** power for number in range(steps)]
    last = options.beta if options.beta2 is None else options.beta2
    return [options.beta + (last - options.beta) * number / max(steps - 1, 1) for number in range(steps)]


def gamma(sigma_rel: float) -> float:
    """Return the exponent of the power function of a relative width.

    That is the root of sigma_rel^2 = (g + 1) / ((g + 2)^2 (g + 3)) that is not negative: arXiv:2312.02696, section 3.1.
    """
    inverse = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return max(root.real for root in roots if abs(root.imag) < 1e-9)


def weights(kept: Sequence[float]) -> list[float]:
    """Return how much each file counts in the average; they add up to 1."""
    counted = [1.0]
    for share in kept:
        counted = [share * weight for weight in counted] + [1 - share]
    return counted


def average(paths: Sequence[Path], kept: Sequence[float]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of the average of LoRA files, and its metadata.

    paths: in the order of training. kept: as shares() returns them. Sums are float32, results in the number format of
    the first file. alpha and what is no floating-point number are taken from the first file, metadata from the last.
    Raises UserError for files that do not belong together.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open_tensors(path, "path", "a LoRA file")) for path in paths]
        for file in files[1:]:
            _require_alike(files[0], file)
        averages = [file.path for file in files if "ss_ema_decay" in file.metadata]
        if 0 < len(averages) < len(files):
            raise UserError(f"{averages[0]}: is an average already, others are not", "leave out *_ema.safetensors")
        tensors = {key: _average(files, key, kept) for key in files[0].keys()}  # noqa: SIM118
        metadata = files[-1].metadata
    return tensors, with_hashes(tensors, metadata) if "sshs_model_hash" in metadata else metadata


def _average(files: Sequence[TensorFile], key: str, kept: Sequence[float]) -> Tensor:
    first = files[0].get(key)
    if not first.is_floating_point():
        return first.clone()
    if key.endswith(".alpha"):
        for file in files[1:]:
            if not torch.allclose(other := file.get(key).float(), first.float()):
                raise UserError(
                    f"{file.path}: {key} is {other.item():g}, but {first.item():g} in {files[0].path}",
                    "average files of one run",
                )
        return first.clone()
    total = first.float()
    for file, share in zip(files[1:], kept, strict=True):
        total = share * total + (1 - share) * file.get(key).float()
    return total.to(first.dtype)


def _require_alike(first: TensorFile, file: TensorFile) -> None:
    """Raise UserError unless two files have tensors of the same names and shapes."""
    fix = "average files of one run"
    if different := sorted(set(first.keys()) ^ set(file.keys())):
        raise UserError(
            f"{file.path}: has other tensors than {first.path}: {len(different)} are in one alone, e.g. {different[0]}",
            fix,
        )
    for key in first.keys():  # noqa: SIM118
        if first.shape(key) != file.shape(key):
            shapes = f"{list(file.shape(key))}, but {list(first.shape(key))} in {first.path}"
            raise UserError(f"{file.path}: {key} is {shapes}", fix)
