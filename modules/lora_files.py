"""LoRA files that are merged into a DiT while it loads: which, how strongly, and which of their layers."""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from networks.formats import added_shapes, deltas, read_layers, read_lora
from networks.lora import lora_name
from utils.errors import UserError
from utils.options import option
from wan.configs import WanConfig
from wan.loading import Deltas
from wan.model import WanModel, WanShape

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file and what of it counts."""

    path: Path
    multiplier: float = 1.0
    include: re.Pattern | None = None  # searched in the keys of the default format
    exclude: re.Pattern | None = None
    option: str = "--lora_weight"

    @property
    def name(self) -> str:
        return f"{self.option} {self.path}"

    def read(self) -> dict[str, Tensor]:
        """Return the tensors of the layers that the patterns leave, with keys of the default format.

        Raises UserError where none is left, and for a file that is no LoRA.
        """
        layers = read_layers(read_lora(self.path, self.option)[0], self.name)
        keys = {path: [f"{lora_name(path)}.{part}" for part in parts] for path, parts in layers.items()}
        left = {path: parts for path, parts in layers.items() if self._wanted(keys[path])}
        if not left:
            which = " and ".join(
                f"--{word}_patterns {pattern.pattern}"
                for word, pattern in (("include", self.include), ("exclude", self.exclude))
                if pattern is not None
            )
            raise UserError(
                f"{which}: none of the {len(layers)} layers of {self.path} is left",
                f"patterns are searched in keys such as {next(iter(keys.values()))[0]}",
            )
        if len(left) < len(layers):
            logger.info("%s: %d of %d layers", self.name, len(left), len(layers))
        return {f"{lora_name(path)}.{part}": tensor for path, parts in left.items() for part, tensor in parts.items()}

    def _wanted(self, keys: Sequence[str]) -> bool:
        if self.include is not None and not any(self.include.search(key) for key in keys):
            return False
        return self.exclude is None or not any(self.exclude.search(key) for key in keys)


@dataclass(frozen=True)
class LoraOptions:
    """LoRA"""

    lora_weight: tuple[Path, ...] = option(
        (), "LoRA files of any key format, LoHa and LoKr too, merged into the DiT while it loads"
    )
    lora_multiplier: tuple[float, ...] = option((), "strength of each LoRA in turn; those left out have 1.0")
    lora_weight_high_noise: tuple[Path, ...] = option((), "the same for --dit_high_noise, which gets these alone")
    lora_multiplier_high_noise: tuple[float, ...] = option((), "their strengths")
    include_patterns: tuple[str, ...] = option(
        (), "a regular expression for each LoRA in turn: only layers in whose keys it is found", metavar="REGEX"
    )
    exclude_patterns: tuple[str, ...] = option((), "the same: not those in whose keys it is found", metavar="REGEX")
    save_merged_model: Path | None = option(
        None, "write --dit with its LoRA files merged to this .safetensors file, and do nothing else"
    )
    lycoris: bool = option(False, "accepted for musubi-tuner's command lines: files of LyCORIS are known by their keys")

    def files(self) -> list[LoraFile]:
        """Return the LoRA files of --dit."""
        return self._files("")

    def high_noise_files(self) -> list[LoraFile]:
        """Return those of --dit_high_noise."""
        return self._files("_high_noise")

    def _files(self, suffix: str) -> list[LoraFile]:
        paths, multipliers = getattr(self, f"lora_weight{suffix}"), getattr(self, f"lora_multiplier{suffix}")
        missing = len(paths) - len(multipliers)
        if missing < 0:
            raise UserError(
                f"--lora_multiplier{suffix}: {len(multipliers)} numbers for {len(paths)} LoRA files",
                fix=f"give one number for each --lora_weight{suffix}",
            )
        for multiplier in multipliers:
            if not math.isfinite(multiplier):
                raise UserError(
                    f"--lora_multiplier{suffix} {multiplier}: not a usable number", fix="1.0 is full strength"
                )
        most = max(len(self.lora_weight), len(self.lora_weight_high_noise))
        names = ("include_patterns", "exclude_patterns")
        include, exclude = (_patterns(name, getattr(self, name), most) for name in names)
        return [
            LoraFile(path, *more, option=f"--lora_weight{suffix}")
            for path, *more in zip(paths, (*multipliers, *[1.0] * missing), include, exclude, strict=False)
        ]


def _patterns(name: str, texts: Sequence[str], count: int) -> list[re.Pattern | None]:
    """Return so many compiled patterns; those that are not given are None."""
    if len(texts) > count:
        raise UserError(f"--{name}: {len(texts)} for {count} LoRA files", "give one for each --lora_weight")
    found: list[re.Pattern | None] = [None] * count
    for number, text in enumerate(texts):
        try:
            found[number] = re.compile(text)
        except re.error as error:
            raise UserError(f"--{name} {text}: not a regular expression ({error})", 'e.g. "blocks_[23]\\d_"') from None
    return found


def lora_deltas(files: Sequence[LoraFile]) -> Deltas | None:
    """Return what the LoRA files add to the DiT's weights together; None for no files."""
    return deltas([(file.read(), file.multiplier, file.name) for file in files]) if files else None


def check_loras(files: Sequence[LoraFile], shape: WanShape, config: WanConfig) -> None:
    """Raise UserError for a LoRA that cannot be read, or that was made for another model than one of this shape."""
    if not files:
        return
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in WanModel(shape).named_parameters()}
    fix = f"use a LoRA that was trained for {config.name}"
    for file in files:
        sizes = added_shapes(file.read(), file.name)
        unknown = sorted(sizes.keys() - shapes.keys())
        if unknown:
            more = f"{len(unknown)} of its {len(sizes)} layers are not in the DiT"
            raise UserError(f"{file.name}: {more}, e.g. {unknown[0]}", fix)
        for name, size in sizes.items():
            if size != shapes[name]:
                raise UserError(
                    f"{file.name}: made for a model of another size: {name} is {size}, not {shapes[name]}", fix
                )
