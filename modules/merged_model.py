"""--save_merged_model: the DiT with its LoRA files merged, as a file of its own."""

import json
from pathlib import Path

from modules.generation_options import Models
from modules.generation_plan import describe_loras, software
from modules.lora_files import check_loras, lora_deltas
from utils.errors import UserError
from wan.dit_file import check_dit
from wan.merging import check_merged, merge_dit

OPTION = "--save_merged_model"


def save_merged_model(models: Models, path: Path) -> None:
    """Write --dit with the --lora_weight files merged to `path`. Needs no other model and no device.

    Raises UserError where nothing would be merged, or into which model is not clear.
    """
    files = models.lora.files()
    if models.pair.dit_high_noise is not None:
        raise UserError(
            f"{OPTION} {path}: merges one model, --dit_high_noise is another",
            "leave that out, and merge it in a second run as --dit",
        )
    if not files:
        raise UserError(f"{OPTION} {path}: there is no LoRA to merge", "add --lora_weight PATH")
    shape = check_dit(models.dit.dit, models.config)
    check_loras(files, shape, models.config)
    check_merged(path, models.dit.dit, OPTION)
    said = {
        "dit": models.dit.dit.name,
        "task": models.config.name,
        "lora": json.dumps(describe_loras(files), ensure_ascii=False),
        "software": software(),
    }
    merge_dit(models.dit.dit, models.config, lora_deltas(files), path, said, OPTION)
