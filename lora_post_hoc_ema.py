"""Average the LoRA files that a training saved on its way.

python lora_post_hoc_ema.py lora-000001.safetensors lora.safetensors --beta 0.5 --output_file ema.safetensors
python lora_post_hoc_ema.py lora-0000*.safetensors lora.safetensors --sigma_rel 0.15 --output_file ema.safetensors

Files are put in the order of their last change. The log tells how much each of them counts.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from networks.post_hoc_ema import AverageOptions, average, shares, weights
from utils.errors import UserError, run_script
from utils.files import require_file, require_safetensors_output
from utils.options import option, parse_options
from utils.safetensors_io import save_file_atomically

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileOptions:
    """files"""

    path: tuple[Path, ...] = option((), "LoRA files of one training, two or more", positional=True, required=True)
    output_file: Path | None = option(None, "LoRA file to write", required=True)
    no_sort: bool = option(False, "take the files in the order given, oldest first, not by the time of their change")


def main() -> None:
    files, options = parse_options(__doc__, FileOptions, AverageOptions)
    paths = [require_file(path, "path", "a LoRA file") for path in files.path]
    if len(paths) < 2:
        raise UserError(f"{paths[0]}: one file has no average", "name two or more")
    check_output(files.output_file, paths)
    if not files.no_sort:
        paths.sort(key=lambda path: path.stat().st_mtime_ns)
    kept = shares(options, len(paths))
    tensors, metadata = average(paths, kept)
    for path, weight in zip(paths, weights(kept), strict=True):
        logger.info("%5.1f %%  %s", 100 * weight, path)
    save_file_atomically(tensors, files.output_file, metadata)
    logger.info("saved %s", files.output_file)


def check_output(output: Path, paths: list[Path]) -> None:
    """Raise UserError for an output that cannot be written, or is one of the inputs."""
    require_safetensors_output(output, "--output_file")
    if output.exists():
        if any(output.samefile(path) for path in paths):
            raise UserError(f"--output_file {output}: is one of the files to average", "choose another name")
        logger.warning("--output_file %s: is replaced", output)


if __name__ == "__main__":
    run_script(main)
