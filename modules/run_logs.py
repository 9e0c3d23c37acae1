"""Where the curves of a run go."""

import time
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.options import option


@dataclass(frozen=True)
class LoggingOptions:
    """logs of loss and learning rate"""

    logging_dir: Path | None = option(None, "folder for TensorBoard logs, one folder in it for each run")
    log_with: str | None = option(None, "what the logs are for (default: tensorboard)", choices=("tensorboard",))
    log_prefix: str = option("", "first part of the name of a run's folder")
    log_tracker_name: str = option("network_train", "name of the logs in that folder")


def log_folder(options: LoggingOptions) -> Path | None:
    """Return the folder for this run's TensorBoard logs, or None where none are asked for."""
    if options.logging_dir is None:
        if options.log_with is not None:
            raise UserError(f"--log_with {options.log_with}: needs a folder", "add --logging_dir PATH")
        return None
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise UserError("--logging_dir: tensorboard is not installed", "pip install tensorboard") from None
    return options.logging_dir / f"{options.log_prefix}{time.strftime('%Y%m%d%H%M%S')}"
