"""The options of a run as it tells of them: no secrets, and of paths at most the last part."""

import dataclasses
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from modules.train_options import TrainOptions
from utils.options import secrets_in, without_secrets

logger = logging.getLogger(__name__)

_PLACES = ("resume", "config_file")  # texts that are paths; that a run goes on does not make it another


def each_option(groups: Iterable[Any]) -> Iterator[tuple[dataclasses.Field, Any]]:
    """Yield every option of some groups with its value, but for the secret ones."""
    for group in groups:
        for field in dataclasses.fields(group):
            if field.metadata and not field.metadata.get("secret") and field.name not in _PLACES:
                yield field, getattr(group, field.name)


def groups_of(options: TrainOptions, *others: Any) -> list[Any]:
    """Return the groups of options that a run has."""
    return [*(getattr(options, field.name) for field in dataclasses.fields(options)), *others]


def told(groups: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """Return by name the value of every option, and whether it is not the default; of paths the last part alone."""
    return {
        field.name: {"value": _last_part(value), "changed": value != field.default}
        for field, value in each_option(groups)
    }


def tracked(groups: Iterable[Any]) -> dict[str, bool | int | float | str]:
    """Return by name what --log_config gives to the trackers: all options but secrets and paths."""
    found = {}
    for field, value in each_option(groups):
        if _paths(value) or "Path" in str(field.type):
            continue
        found[field.name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found


def _paths(value: Any) -> bool:
    return isinstance(value, Path) or (isinstance(value, tuple) and any(isinstance(part, Path) for part in value))


def _last_part(value: Any) -> Any:
    if isinstance(value, Path):
        return value.name
    return [_last_part(part) for part in value] if isinstance(value, tuple) else value


def hide_secrets(groups: Iterable[Any]) -> None:
    """Take secret options out of this process's words, where libraries and the command to resume would find them."""
    groups = list(groups)
    names = secrets_in(*map(type, groups))
    for name in sorted(names):
        if any(word.partition("=")[0] == f"--{name}" for word in sys.argv):
            better = {"wandb_api_key": "WANDB_API_KEY", "huggingface_token": "HF_TOKEN"}.get(name, "")
            logger.warning(
                "--%s: all users of this machine can read command lines; the environment variable %s is better",
                *(name, better),
            )
    sys.argv[:] = without_secrets(sys.argv, names)
