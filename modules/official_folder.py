"""--ckpt_dir: the files of an official repository of Wan2.1 or Wan2.2 by the names that they have there."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from utils.errors import UserError
from utils.options import option
from wan.clip import FILE as CLIP_FILE
from wan.clip import ClipOptions
from wan.configs import WanConfig
from wan.dit_file import DitOptions
from wan.pair import PairOptions
from wan.t5 import T5Options
from wan.vae import VaeOptions

logger = logging.getLogger(__name__)

T5_FILE, TOKENIZER, VAE_FILE = "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl", "Wan2.1_VAE.pth"
DIT_FILES = "diffusion_pytorch_model*.safetensors"
LOW, HIGH = "low_noise_model", "high_noise_model"  # folders of Wan2.2, each with such files
Pair = TypeVar("Pair", bound=PairOptions)


@dataclass(frozen=True)
class FolderOptions:
    """the official folder"""

    ckpt_dir: Path | None = option(
        None, "folder of an official repository, such as Wan2.1-T2V-14B: models that no option names are taken from it"
    )


def from_folder(
    folder: Path | None,
    config: WanConfig,
    dit: DitOptions,
    pair: Pair,
    vae: VaeOptions,
    t5: T5Options,
    clip: ClipOptions,
) -> tuple[DitOptions, Pair, VaeOptions, T5Options, ClipOptions]:
    """Return the options with the files of a folder in place of those that are not given, each of which is logged.

    Raises UserError for what is no folder, or holds none of these files.
    """
    if folder is None:
        return dit, pair, vae, t5, clip
    if not folder.is_dir():
        raise UserError(f"--ckpt_dir {folder}: no such folder", "check the path")
    found = {
        "t5": _there(folder / T5_FILE),
        "t5_tokenizer": _there(folder / TOKENIZER),
        "vae": _there(folder / VAE_FILE),
        "clip": _there(folder / CLIP_FILE) if config.clip and config.images else None,
        "dit": _dit_in(folder / LOW) or _dit_in(folder) if config.boundary is not None else _dit_in(folder),
        # The one model that is named is not made a pair by one that happens to be there.
        "dit_high_noise": _dit_in(folder / HIGH) if config.boundary is not None and dit.dit is None else None,
    }
    if not any(found.values()):
        names = f"{T5_FILE}, {VAE_FILE}, {DIT_FILES}"
        raise UserError(f"--ckpt_dir {folder}: holds none of {names}", "name the models one by one: --dit, --vae, --t5")
    filled = []
    for group in (dit, pair, vae, t5, clip):
        taken = {
            name: path for name, path in found.items() if path and hasattr(group, name) and getattr(group, name) is None
        }
        for name, path in taken.items():
            logger.info("--ckpt_dir: --%s %s", name, path)
        filled.append(replace(group, **taken))
    return tuple(filled)


def _there(path: Path) -> Path | None:
    return path if path.exists() else None


def _dit_in(folder: Path) -> Path | None:
    """Return the DiT's file in a folder, or the first of its parts."""
    return next(iter(sorted(folder.glob(DIT_FILES))), None)
