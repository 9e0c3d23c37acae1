"""TensorBoard and Weights & Biases: where the curves and samples of a run go, beside its own log."""

import importlib.util
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import toml
from accelerate import Accelerator

from modules.settings import tracked
from utils.errors import UserError, first_line
from utils.files import require_file
from utils.options import option, suggest

logger = logging.getLogger(__name__)

TENSORBOARD, WANDB = "tensorboard", "wandb"


@dataclass(frozen=True)
class LoggingOptions:
    """logs of loss and learning rate"""

    logging_dir: Path | None = option(None, "folder for TensorBoard logs, one folder in it for each run")
    log_with: str | None = option(
        None,
        "what keeps curves and samples: TensorBoard, Weights & Biases or both (default: tensorboard with "
        "--logging_dir, else neither)",
        choices=(TENSORBOARD, WANDB, "all"),
    )
    log_prefix: str = option("", "first part of the name of a run's folder")
    log_tracker_name: str = option("network_train", "name of the logs in that folder, and of the project at wandb")
    log_tracker_config: Path | None = option(
        None, "TOML file with arguments of wandb.init under [wandb], of TensorBoard's SummaryWriter under [tensorboard]"
    )
    wandb_run_name: str | None = option(None, "name of the run at wandb (default: one that it makes up)")
    wandb_api_key: str | None = option(
        None,
        "key to log in to wandb with; better the environment variable WANDB_API_KEY, or `wandb login`",
        secret=True,
    )
    log_config: bool = option(False, "give them the options of the run as well, but for secrets and paths")


@dataclass(frozen=True)
class Tracking:
    """Which trackers a run has, known to be there."""

    names: tuple[str, ...] = ()
    folder: Path | None = None  # of TensorBoard's
    arguments: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # by tracker


def plan_tracking(options: LoggingOptions) -> Tracking:
    """Return what the options ask for, or raise UserError for what is not there."""
    names = {None: (TENSORBOARD,) if options.logging_dir else (), "all": (TENSORBOARD, WANDB)}.get(
        options.log_with, (options.log_with,)
    )
    folder = None
    if TENSORBOARD in names:
        if options.logging_dir is None:
            raise UserError(f"--log_with {options.log_with}: needs a folder", "add --logging_dir PATH")
        folder = options.logging_dir / f"{options.log_prefix}{time.strftime('%Y%m%d%H%M%S')}"
    for name in names:
        if importlib.util.find_spec(name) is None:
            asked = f"--log_with {options.log_with}" if options.log_with else "--logging_dir"
            raise UserError(f"{asked}: {name} is not installed", f"pip install {name}")
    if WANDB not in names:
        for given in ("wandb_run_name", "wandb_api_key"):
            if getattr(options, given):
                logger.warning("--%s: ignored without --log_with wandb", given)
    arguments = _tracker_config(options.log_tracker_config)
    if options.wandb_run_name:
        arguments[WANDB] = {"name": options.wandb_run_name} | arguments.get(WANDB, {})
    return Tracking(names, folder, arguments)


def _tracker_config(path: Path | None) -> dict[str, dict[str, Any]]:
    if path is None:
        return {}
    require_file(path, "--log_tracker_config", "a TOML file")
    try:
        content = toml.loads(path.read_text(encoding="utf-8"))
    except (toml.TomlDecodeError, UnicodeDecodeError, IndexError) as error:
        raise UserError(f"--log_tracker_config {path}: not valid TOML ({error})") from None
    known = (TENSORBOARD, WANDB)
    for name, table in content.items():
        if name not in known or not isinstance(table, dict):
            fix = suggest(name, known) or "write arguments of wandb.init under [wandb]"
            raise UserError(f"--log_tracker_config {path}: [{name}] is no tracker", fix)
    return content


def start_tracking(
    accelerator: Accelerator, options: LoggingOptions, tracking: Tracking, groups: Iterable[Any]
) -> None:
    """Start the trackers, on the first process; groups: of options that --log_config tells them."""
    if not tracking.names or not accelerator.is_main_process:
        return
    settings = tracked(groups) if options.log_config else None
    try:
        if WANDB in tracking.names and options.wandb_api_key:
            import wandb

            wandb.login(key=options.wandb_api_key)
        accelerator.init_trackers(options.log_tracker_name, settings, dict(tracking.arguments))
    except Exception as error:
        line = first_line(error, options.wandb_api_key, 200)
        fix = (
            "set WANDB_API_KEY or run `wandb login`; WANDB_MODE=offline needs neither"
            if WANDB in tracking.names
            else ""
        )
        raise UserError(f"--log_with {options.log_with or TENSORBOARD}: cannot be started ({line})", fix) from None


def track_epoch(accelerator: Accelerator, values: Mapping[str, float], epoch: int, step: int) -> None:
    """Give trackers what is known of an epoch: at that epoch, or for wandb, whose steps only grow, at the step."""
    for tracker in accelerator.trackers:
        if tracker.name == WANDB:
            tracker.log({**values, "epoch": epoch}, step=step)
        else:
            tracker.log(dict(values), step=epoch)


def track_samples(accelerator: Accelerator, files: Sequence[Path], prompts: Sequence[str], step: int) -> None:
    """Give wandb the samples of a step, as sample_0, sample_1 ..."""
    for tracker in accelerator.trackers:
        if tracker.name == WANDB:
            import wandb

            kinds = {".mp4": wandb.Video}
            tracker.log(
                {
                    f"sample_{number}": kinds.get(path.suffix, wandb.Image)(str(path), caption=prompt)
                    for number, (path, prompt) in enumerate(zip(files, prompts, strict=False))
                },
                step=step,
            )


def rates_of(groups: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the learning rates of an optimizer's parameter groups, by the names that trackers know.

    Optimizers that estimate the distance to the solution (D-Adaptation, Prodigy) have it in `d`: what counts is d * lr.
    """
    found = {}
    for group in groups:
        name, rate = group["name"], group["lr"]
        if rate is None:
            continue
        found[f"lr/{name}"] = float(rate)
        if "d" in group:
            found[f"lr/d*lr/{name}"] = float(group["d"]) * float(rate)
            if group.get("effective_lr") is not None:
                found[f"lr/d*eff_lr/{name}"] = float(group["d"]) * float(group["effective_lr"])
    return found
