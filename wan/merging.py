"""A DiT's file with something added to its weights > another such file."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from utils.devices import FLOAT8
from utils.errors import UserError
from utils.files import require_safetensors_output
from utils.safetensors_io import open_tensors
from utils.safetensors_stream import save_stream
from wan.configs import WanConfig
from wan.dit_file import DitTensors, checked_shape
from wan.loading import Deltas

logger = logging.getLogger(__name__)


def check_merged(path: Path, dit: Path, option: str) -> None:
    """Raise UserError for a path that a merged DiT cannot be written to; warn of a file that is replaced."""
    require_safetensors_output(path, option)
    if path.exists() and path.resolve() == Path(dit).resolve():
        raise UserError(f"{option} {path}: is --dit itself", "choose another name")
    if path.exists():
        logger.warning("%s exists and is replaced", path)


def merge_dit(
    path: Path, config: WanConfig, deltas: Deltas, target: Path, metadata: Mapping[str, str], option: str
) -> None:
    """Write the DiT of a file (or of its parts) with `deltas` added, tensor by tensor, under the official names.

    Sums are float32, and rounded to the tensor's own dtype; float8 weights, with their scales if there are any, become
    bfloat16. metadata: what else the file says besides what the source says of the model. Peak memory is a few tensors.
    """
    with open_tensors(path, "--dit", "the DiT's weights") as file:
        tensors = DitTensors(file, f"--dit {path}")
        shape = checked_shape(tensors, config)
        own = ("ss_", "sshs_", "modelspec.")  # what a file says of its own training and tensors
        inherited = {key: text for key, text in file.metadata.items() if not key.startswith(own)}
        entries = {name: (_written(tensors.get(name).dtype), tensors.shape(name)) for name in tensors}

        def merged() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tqdm(tensors.each(), total=len(entries), desc="merging", unit=" tensors"):
                scale, delta = tensors.scale(name), deltas[name]() if name in deltas else None
                value = tensor if scale is None else tensor.float() * scale
                value = value if delta is None else value.float() + delta.float()
                yield name, value.to(entries[name][0])

        said = {**inherited, "num_heads": str(shape.heads), **metadata}
        save_stream(entries, merged(), target, said, option)
    logger.info("wrote %s", target)


def _written(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype in FLOAT8 else dtype
