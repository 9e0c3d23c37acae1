"""The files of a training run: names, metadata, precision, and which of them are kept."""

import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from networks.formats import with_hashes
from utils.devices import parse_dtype
from utils.errors import UserError
from utils.options import option
from utils.safetensors_io import save_file_atomically

logger = logging.getLogger(__name__)

# What musubi-tuner's metadata have no entry for: as JSON, task, precision and what else the result depends on.
OWN_KEY = "wan_tuner"
# What a file says of itself with --no_metadata: enough to load it.
_MINIMUM = ("ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")


@dataclass(frozen=True)
class SavingOptions:
    """saving"""

    output_dir: Path | None = option(None, "folder for the trained files")
    output_name: str | None = option(None, "their name, without a suffix")
    save_every_n_epochs: int | None = option(None, "save after every N epochs, as NAME-000001.safetensors")
    save_every_n_steps: int | None = option(None, "save after every N steps, as NAME-step00000001.safetensors")
    save_last_n_epochs: int | None = option(None, "of the files saved by epoch, keep only the last N")
    save_last_n_steps: int | None = option(None, "of the files saved by step, keep only those of the last N steps")
    save_precision: str | None = option(
        None,
        "number format of the files (default: float for a LoRA, for a fine-tuned DiT that of the file it started from)",
        choices=("float", "fp32", "fp16", "bf16"),
    )


@dataclass(frozen=True)
class MetadataOptions:
    """what the files say of themselves"""

    no_metadata: bool = option(False, "leave out how the file was trained")
    training_comment: str | None = option(None, "a comment")
    metadata_title: str | None = option(None, "title (default: the output name)")
    metadata_author: str | None = option(None, "author")
    metadata_description: str | None = option(None, "description")
    metadata_license: str | None = option(None, "license")
    metadata_tags: str | None = option(None, "tags, separated by commas")
    metadata_reso: str | None = option(None, "resolution it is meant for, W,H or N (default: 1280,720)")
    metadata_arch: str | None = option(None, "architecture (default: wan2.1, or wan2.2 for the A14B tasks)")


def check_saving(
    saving: SavingOptions, metadata: MetadataOptions, dit: Path | None = None, resumed: bool = False
) -> None:
    """Raise UserError when the result could not be saved, or in place of the DiT; warn about files to be replaced.

    resumed: the files that are there may be those of this very run.
    """
    if saving.output_dir is None:
        raise UserError("--output_dir is missing", "name the folder for the trained files: --output_dir PATH")
    if not saving.output_name:
        raise UserError("--output_name is missing", "name the trained files: --output_name TEXT")
    if Path(saving.output_name).name != saving.output_name:
        raise UserError(f"--output_name {saving.output_name}: is a path", "put the folder into --output_dir")
    if saving.output_name in (".", "..") or any(letter in '<>:"|?*\\' for letter in saving.output_name):
        raise UserError(
            f"--output_name {saving.output_name}: not every system can write that", "use letters and digits"
        )
    for name in ("save_every_n_epochs", "save_every_n_steps", "save_last_n_epochs", "save_last_n_steps"):
        value = getattr(saving, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    _resolution(metadata.metadata_reso)
    try:
        saving.output_dir.mkdir(parents=True, exist_ok=True)
        probe = saving.output_dir / f".write_test_{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output_dir {saving.output_dir}: cannot be written to ({error.strerror})") from None
    own = [path.name for path in saving.output_dir.iterdir() if _is_of(saving.output_name, path)]
    if dit is not None and dit.name in own and dit.parent.resolve() == saving.output_dir.resolve():
        raise UserError(f"--output_name {saving.output_name}: {dit} could be replaced", "choose another name or folder")
    if own and not resumed:
        logger.warning(
            "%s holds files of this name already (%s); those of equal names are going to be replaced",
            saving.output_dir,
            ", ".join(sorted(own)[:3]) + (", ..." if len(own) > 3 else ""),
        )


def _is_of(name: str, path: Path) -> bool:
    """Tell whether a file, or a state, has a name that a run called `name` writes."""
    ending = path.name.removeprefix(name)
    return path.name.startswith(name) and bool(re.fullmatch(r"(-\d+|-step\d+|)(-state|(_ema)?\.safetensors)", ending))


@dataclass
class Checkpoints:
    """Writes the files of a run and deletes those that `save_last_n_*` gives up."""

    options: SavingOptions
    metadata: Mapping[str, str]  # without what changes from file to file
    no_metadata: bool = False
    dtype: torch.dtype = torch.float32  # of the tensors, where the options ask for no other
    hashed: bool = True  # with hashes of the tensors, for which all of them are copied in memory
    written: set[str] = field(default_factory=set)  # names; only what this run wrote is ever deleted
    before_delete: Callable[[Path], None] = lambda path: None
    suffix: str = ""  # of the names

    def save(self, tensors: Mapping[str, Tensor], series: str, number: int, step: int, epoch: int) -> Path:
        """Save after a step or an epoch, or at the end, and delete what is outdated then; return the file.

        series, number: which file this is, as for path(). step, epoch: how many are complete.
        """
        path = self._save(tensors, self.path(series, number), step, epoch)
        if (outdated := self.outdated(series, number)) is not None:
            self.delete(outdated)
        return path

    def path(self, series: str, number: int = 0) -> Path:
        """Return the file of a step, of an epoch (from 1) or of the end; series: "step", "epoch" or "end"."""
        return self.options.output_dir / f"{self.options.output_name}{ending(series, number)}{self.suffix}.safetensors"

    def outdated(self, series: str, number: int) -> Path | None:
        """Return the file of this run that --save_last_n_* gives up for that of a step or an epoch, if any."""
        options = self.options
        every, last = {
            "step": (options.save_every_n_steps, options.save_last_n_steps),
            "epoch": (options.save_every_n_epochs, options.save_last_n_epochs),
        }.get(series, (None, None))
        return own(self.path(series, given_up(series, number, every, last)), self.written) if every and last else None

    def delete(self, path: Path) -> None:
        self.before_delete(path)
        path.unlink(missing_ok=True)
        self.written.discard(path.name)
        logger.info("deleted %s", path)

    @property
    def file_dtype(self) -> torch.dtype:
        """The dtype of the tensors in files."""
        return parse_dtype(self.options.save_precision) if self.options.save_precision else self.dtype

    def _save(self, tensors: Mapping[str, Tensor], path: Path, step: int, epoch: int) -> Path:
        stored = {name: tensor.detach().to("cpu", self.file_dtype) for name, tensor in tensors.items()}
        now = time.time()
        metadata = {**self.metadata, "ss_steps": str(step), "ss_epoch": str(epoch), "ss_training_finished_at": str(now)}
        metadata["modelspec.date"] = datetime.fromtimestamp(now).isoformat(timespec="seconds")
        if self.no_metadata:
            left_out = {key for key in metadata if key == OWN_KEY or key.startswith("ss_")} - {*_MINIMUM}
            metadata = {key: text for key, text in metadata.items() if key not in left_out}
        save_file_atomically(stored, path, with_hashes(stored, metadata) if self.hashed else metadata)
        self.written.add(path.name)
        logger.info("saved %s", path)
        return path


def ending(series: str, number: int) -> str:
    """Return how the names of a run's files and states go on after --output_name; series: "step", "epoch" or "end"."""
    return {"step": f"-step{number:08d}", "epoch": f"-{number:06d}", "end": ""}[series]


def given_up(series: str, number: int, every: int, last: int) -> int:
    """Return the step, or epoch, whose file goes once that of `number` is saved; last: --save_last_n_*."""
    return (number - last - 1) // every * every if series == "step" else number - every * last


def own(path: Path, written: Collection[str]) -> Path | None:
    """Return a path if this run has written it: nothing else is ever deleted."""
    return path if path.name in written else None


def model_metadata(
    options: MetadataOptions, name: str, family: str, kind: str, timestep_range: tuple[int | None, int | None]
) -> dict[str, str]:
    """Return the modelspec.* entries.

    family: "wan2.1"; kind: "/lora", or "" for a DiT; timestep_range: the bounds of training, where there are any.
    """
    low, high = timestep_range
    entries = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{options.metadata_arch or family}{kind}",
        "implementation": "https://github.com/Wan-Video/Wan2.1",
        "title": options.metadata_title or name,
        "resolution": _resolution(options.metadata_reso),
        "author": options.metadata_author,
        "description": options.metadata_description,
        "license": options.metadata_license,
        "tags": options.metadata_tags,
    }
    if low is not None or high is not None:
        entries["timestep_range"] = f"{low or 0},{1000 if high is None else high}"
    return {f"modelspec.{key}": text for key, text in entries.items() if text is not None}


def training_metadata(values: Mapping[str, Any]) -> dict[str, str]:
    """Return ss_* entries of named values: structures as JSON, all else as Python writes it."""
    return {f"ss_{name}": _text(value) for name, value in values.items()}


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def _resolution(text: str | None) -> str:
    """Return "1024,768" as "1024x768" and "960" as "960x960"."""
    parts = (text or "1280,720").split(",")
    if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"--metadata_reso {text}: not a resolution", "write W,H or N, such as 832,480")
    numbers = [int(part) for part in parts]
    return f"{numbers[0]}x{numbers[-1]}"


def new_session() -> dict[str, Any]:
    """Return what tells this run from others. Not drawn from the run's seed: two equal runs are two sessions."""
    return {"session_id": secrets.randbelow(2**32), "training_started_at": time.time()}
