"""Convert the key names of a LoRA file for other programs, or back.

python convert_lora.py --input lora.safetensors --output lora_other.safetensors --target other
python convert_lora.py --input lora.safetensors --output lora_diffusers.safetensors --target diffusers
python convert_lora.py --input lora_other.safetensors --output lora.safetensors --target default
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from networks.formats import detect_format, read_lora, to_default, to_diffusers, to_other, with_hashes
from utils.errors import run_script
from utils.files import require_safetensors_output
from utils.options import option, parse_options
from utils.safetensors_io import save_file_atomically

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConversionOptions:
    """conversion"""

    input: Path | None = option(None, "LoRA file to read, in any known format", required=True)
    output: Path | None = option(None, "LoRA file to write", required=True)
    target: str | None = option(
        None,
        "other: dotted keys with lora_A and lora_B, for ComfyUI and diffusers' pipelines; diffusers: with layer names "
        "of its DiT, for load_lora_adapter; default: the keys that training writes",
        choices=("other", "diffusers", "default"),
        required=True,
    )
    diffusers_prefix: str | None = option(
        None, "first part of the keys (default: diffusion_model with --target other, transformer with diffusers)"
    )


def main() -> None:
    (options,) = parse_options(__doc__, ConversionOptions)
    require_safetensors_output(options.output, "--output")
    state_dict, metadata = read_lora(options.input, "--input")
    name = f"--input {options.input}"
    if options.target == "default":
        converted = to_default(state_dict, name)
    else:
        convert = {"other": to_other, "diffusers": to_diffusers}[options.target]
        given = {} if options.diffusers_prefix is None else {"prefix": options.diffusers_prefix}
        converted = convert(state_dict, name=name, **given)
    save_file_atomically(converted, options.output, with_hashes(converted, metadata))
    source = detect_format(list(state_dict))
    logger.info("%s: %d tensors, %s > %s", options.output, len(converted), source, options.target)


if __name__ == "__main__":
    run_script(main)
