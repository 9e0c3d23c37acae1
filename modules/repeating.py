"""A file that was made here, made again: its metadata as the options that it was made with."""

import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from modules.generation_options import Models, SamplingOptions
from modules.outputs import OutputOptions, load_latent, names_a_file
from modules.prompts import PromptOptions
from modules.video_files import read_comment
from utils.errors import UserError
from utils.files import require_file
from utils.identity import file_hash, weights_identity

logger = logging.getLogger(__name__)

_NOT_REPEATED = {"from_file", "from_metadata"}
_KIND = ("output_type", "video_format", "crf", "ten_bit")


def read_metadata(path: Path) -> dict[str, Any]:
    """Return what a video, a picture or a latent says of how it was made, or raise UserError."""
    where = f"--from_metadata {path}"
    require_file(path, "--from_metadata", "a video, picture or latent that was made by this script")
    latent = path.suffix.lower() == ".safetensors"
    metadata = load_latent(path, "--from_metadata")[1] if latent else read_comment(path)
    if not metadata or "prompt" not in metadata:
        raise UserError(f"{where}: does not say how it was made", "files made with --no_metadata, or edited, do not")
    return metadata


def stored_options(given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return where options come from and those that --from_metadata brings, if it is among the given ones."""
    path = given.get("from_metadata")
    if path is None:
        return "", {}
    metadata = read_metadata(path)
    asked = {field.name for group in (PromptOptions, SamplingOptions) for field in fields(group)} - _NOT_REPEATED
    values = {name: value for name, value in metadata.items() if name in asked}
    values.update(metadata.get("options", {}))
    if "seeds" in metadata:
        values["seed"] = metadata["seeds"]
    if "height" in metadata and "width" in metadata:
        values["video_size"] = [metadata["height"], metadata["width"]]
    if _is_another_kind(given, values):
        for name in _KIND:
            values.pop(name, None)
    if "save_path" not in given:
        values["save_path"] = str(path.absolute().parent)
    outputs = {field.name for field in fields(OutputOptions)}
    logger.info("%s: %s", path, ", ".join(f"{name} {value}" for name, value in values.items() if name not in outputs))
    return f"--from_metadata {path}", values


def _is_another_kind(given: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Return whether the typed options ask for another kind of file than the one that brings the values."""
    if "output_type" in given or "video_format" in given:
        return True
    path = given.get("save_path")
    same = OutputOptions(path, values.get("output_type", "video"), video_format=values.get("video_format"))
    return path is not None and names_a_file(path) and path.suffix.lower() != same.suffix()


def warn_of_changes(path: Path, models: Models) -> None:
    """Warn where weights are not those that made the file, which then cannot come out the same."""
    metadata = read_metadata(path)
    for name, identity in metadata.get("weights", {}).items():
        file = models.files().get(name)
        if file is not None and weights_identity(file, f"--{name}") != identity:
            logger.warning("--%s %s: is not the file that %s was made with", name, file, path)
    entries = [*metadata.get("lora", []), *metadata.get("lora_high_noise", [])]
    hashes = {entry.get("file"): entry.get("sha256") for entry in entries}
    for file in (*models.lora.files(), *models.lora.high_noise_files()):
        if file.path.name in hashes and file_hash(file.path) != hashes[file.path.name]:
            logger.warning("%s: is not the file that %s was made with", file.name, path)
