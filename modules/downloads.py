"""The published weights for a task: which files they are, how large, and where they lie after --download."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.files import require_writable_folder
from utils.hub_files import download
from utils.options import option
from wan.configs import WanConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DownloadOptions:
    """downloading"""

    download: Path | None = option(
        None, "folder: tell the sizes of the published weights for --task, download them into it, and stop"
    )


@dataclass(frozen=True)
class Published:
    """A weight file on the hub."""

    option: str  # that takes it
    repo: str
    file: str


_WAN21, _WAN22 = "Comfy-Org/Wan_2.1_ComfyUI_repackaged", "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"
_OFFICIAL = "Wan-AI/Wan2.1-I2V-14B-720P"
_DITS = {
    "t2v-1.3B": [(_WAN21, "wan2.1_t2v_1.3B_bf16")],
    "t2v-14B": [(_WAN21, "wan2.1_t2v_14B_bf16")],
    "t2i-14B": [(_WAN21, "wan2.1_t2v_14B_bf16")],
    "i2v-14B": [(_WAN21, "wan2.1_i2v_480p_14B_bf16")],
    "flf2v-14B": [(_WAN21, "wan2.1_flf2v_720p_14B_fp16")],
    "t2v-A14B": [(_WAN22, "wan2.2_t2v_low_noise_14B_fp16"), (_WAN22, "wan2.2_t2v_high_noise_14B_fp16")],
    "i2v-A14B": [(_WAN22, "wan2.2_i2v_low_noise_14B_fp16"), (_WAN22, "wan2.2_i2v_high_noise_14B_fp16")],
}
_FUN = {
    "t2v-1.3B-FC": "alibaba-pai/Wan2.1-Fun-1.3B-Control",
    "t2v-14B-FC": "alibaba-pai/Wan2.1-Fun-14B-Control",
    "i2v-14B-FC": "alibaba-pai/Wan2.1-Fun-14B-Control",
}


def published(config: WanConfig) -> list[Published]:
    """Return the files that a task needs."""
    if config.name in _FUN:
        dits = [Published("--dit", _FUN[config.name], "diffusion_pytorch_model.safetensors")]
    else:
        places = zip(("--dit", "--dit_high_noise"), _DITS[config.name], strict=False)
        dits = [
            Published(name, repo, f"split_files/diffusion_models/{file}.safetensors") for name, (repo, file) in places
        ]
    clip = Published("--clip", _OFFICIAL, "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    return [
        *dits,
        Published("--vae", _WAN21, "split_files/vae/wan_2.1_vae.safetensors"),
        Published("--t5", _OFFICIAL, "models_t5_umt5-xxl-enc-bf16.pth"),
        *([clip] if config.clip and config.images else []),
        Published("--t5_tokenizer", _OFFICIAL, "google/umt5-xxl/spiece.model"),
    ]


def download_published(config: WanConfig, folder: Path) -> dict[str, Path]:
    """Download a task's files into a folder after a table of their sizes; return them by option.

    Files that are there are kept; what was cut off goes on.
    """
    require_writable_folder(folder, "--download")
    files = published(config)
    sizes = _sizes(files)
    missing = 0
    for file, size in zip(files, sizes, strict=True):
        there = folder / file.file
        complete = there.is_file() and there.stat().st_size == size
        missing += 0 if complete else size
        state = "is there" if complete else f"{size / 1e9:6.2f} GB"
        logger.info("%-16s %s  %s/%s", file.option, state, file.repo, file.file)
    free = shutil.disk_usage(folder).free
    logger.info("%.2f GB to download, %.2f GB are free in %s", missing / 1e9, free / 1e9, folder)
    if missing > free:
        raise UserError(
            f"--download {folder}: needs {missing / 1e9:.1f} GB, {free / 1e9:.1f} GB are free", "choose another folder"
        )
    paths = {file.option: download(file.repo, file.file, None, "--download", folder) for file in files}
    logger.info("the options for them: %s", " ".join(f"{name} {path}" for name, path in paths.items()))
    return paths


def _sizes(files: list[Published]) -> list[int]:
    """Return the bytes of each file, as the hub tells them."""
    from huggingface_hub import HfApi

    sizes = {}
    try:
        for repo in dict.fromkeys(file.repo for file in files):
            wanted = [file.file for file in files if file.repo == repo]
            sizes |= {(repo, info.path): info.size for info in HfApi().get_paths_info(repo, wanted)}
    except Exception as error:  # of the client's HTTP library, which is not the same in all its versions
        raise UserError(
            f"--download: {repo} cannot be reached ({str(error).splitlines()[0][:160]})",
            "check the connection, and that HF_HUB_OFFLINE is not set",
        ) from None
    for file in files:
        if (file.repo, file.file) not in sizes:
            raise UserError(f"--download: {file.repo} has no {file.file} any more", f"see huggingface.co/{file.repo}")
    return [sizes[file.repo, file.file] for file in files]
