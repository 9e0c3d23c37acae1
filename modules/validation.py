"""The loss of examples that are not trained on, with the same noise at the same noise levels every time."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dataset.config import DatasetConfig
from dataset.loader import CachedDataset, CachedItem, load_batch
from modules.flow_matching import TimestepOptions, bounds, noised
from modules.losses import sample_errors
from modules.prediction import Told, predict
from modules.timestep_bins import TimestepBins, in_words
from utils.errors import UserError
from utils.identity import seed_of
from utils.options import option
from wan.configs import WanConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationOptions:
    """validation, of [[validation]] datasets or a share of the others"""

    validation_split: float | None = option(
        None, "share of the media files, from 0 to 1, that is not trained on but measured; chosen by --seed and name"
    )
    validate_every_n_steps: int | None = option(None, "measure the validation loss after every N steps")
    validate_every_n_epochs: int | None = option(
        None, "measure it after every N epochs (default: 1, without --validate_every_n_steps)"
    )
    validation_timesteps: int = option(10, "noise levels at which every example is measured, evenly spread")


@dataclass(frozen=True)
class ValidationPlan:
    """What is measured, and how often."""

    options: ValidationOptions
    batches: tuple[tuple[DatasetConfig, tuple[CachedItem, ...]], ...]  # examples of one shape each
    levels: tuple[float, ...]  # t in (0, 1) of each measurement

    @property
    def examples(self) -> int:
        return sum(len(items) for _, items in self.batches)

    def due(self, step: int, epoch: int | None, last: bool) -> bool:
        """Tell whether it is time: before training, at its last step, and as asked; epoch: complete ones, or None."""
        steps, epochs = self.options.validate_every_n_steps, self.options.validate_every_n_epochs
        if step == 0 or last:
            return True
        every, count = (steps, step) if epoch is None else (epochs or (None if steps else 1), epoch)
        return bool(every) and count % every == 0


def check_validation(options: ValidationOptions, datasets: Sequence[DatasetConfig]) -> None:
    """Raise UserError for numbers that cannot be, and where there is nothing to measure."""
    split = options.validation_split
    if split is not None and not 0 < split < 1:
        raise UserError(f"--validation_split {split:g}: must be between 0 and 1", "0.1 holds out a tenth")
    for name in ("validate_every_n_steps", "validate_every_n_epochs", "validation_timesteps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if split is None and not any(config.validation for config in datasets):
        for name in ("validate_every_n_steps", "validate_every_n_epochs"):
            if getattr(options, name) is not None:
                raise UserError(
                    f"--{name}: there is nothing to validate on",
                    "add --validation_split 0.1, or [[validation]] to the dataset file",
                )


def plan_validation(
    options: ValidationOptions, timesteps: TimestepOptions, data: CachedDataset, own: CachedDataset | None
) -> ValidationPlan | None:
    """Return what is to be measured, or None for nothing; examples that are held out leave `data`.

    data: what is trained on; own: of the [[validation]] datasets.
    """
    groups = list(zip(own.configs, own.items, strict=True)) if own else []
    if options.validation_split is not None:
        names = data.choose_media(options.validation_split)
        groups += zip(data.configs, data.hold_out(names), strict=True)
        logger.info("held out for validation: %d media files, e.g. %s", len(names), min(names))
    batches = [(config, batch) for config, items in groups for batch in _batches(items, config.batch_size)]
    if not batches:
        return None
    low, high = bounds(timesteps)
    count = options.validation_timesteps
    levels = tuple(low + (high - low) * (i + 0.5) / count for i in range(count))
    plan = ValidationPlan(options, tuple(batches), levels)
    logger.info("validation: %d examples at %d noise levels", plan.examples, count)
    return plan


def _batches(items: Sequence[CachedItem], size: int) -> list[tuple[CachedItem, ...]]:
    """Return examples in batches of one shape each, in their order."""
    buckets: dict[object, list[CachedItem]] = {}
    for item in items:
        buckets.setdefault(item.shapes, []).append(item)
    return [tuple(bucket[i : i + size]) for bucket in buckets.values() for i in range(0, len(bucket), size)]


class Validator:
    """Measures the validation loss of a plan; draws no random number that training could miss."""

    def __init__(self, plan: ValidationPlan, config: WanConfig, accelerator: Accelerator, told: Told):
        self.plan, self.config, self.accelerator, self.told = plan, config, accelerator, told
        self._last_step = -1

    def due(self, step: int, epoch: int | None = None, last: bool = False) -> bool:
        """Tell whether to measure now, which is not twice at the same step."""
        return step != self._last_step and self.plan.due(step, epoch, last)

    def go_on(self, step: int) -> None:
        """Go on after a step at whose end a state was saved: what was due then is done."""
        if step and self.due(step):
            self._last_step = step

    @torch.no_grad()
    def measure(self, dit: nn.Module, trained: nn.Module, step: int) -> dict[str, float]:
        """Return the mean squared error of the velocity by name, over everything and in each bin of noise levels.

        On all processes, which share the work and all compute equally often, as weights that are spread over them need.
        """
        self._last_step = step
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        work = [(*batch, level) for batch in self.plan.batches for level in range(len(self.plan.levels))]
        bins, training = TimestepBins(), trained.training
        trained.eval()
        try:
            for start in range(0, len(work), processes):
                t, errors = self._errors(dit, *work[(start + rank) % len(work)])
                if start + rank < len(work):
                    bins.add(t, errors)
        finally:
            trained.train(training)
        if processes > 1:
            bins = TimestepBins(self.accelerator.reduce(bins.tensor().to(self.accelerator.device)).tolist())
        name, means = "loss/validation", bins.means("loss/validation/")
        logger.info("step %d: validation loss %.4f; by timestep: %s", step, bins.mean(), in_words(means))
        return {name: bins.mean(), **means}

    def _errors(
        self, dit: nn.Module, config: DatasetConfig, items: Sequence[CachedItem], level: int
    ) -> tuple[Tensor, Tensor]:
        """Return t and the error of each example [B] at a noise level."""
        device = self.accelerator.device
        batch = load_batch(items, config).to(device)
        noise = torch.stack([fixed_noise(item, level, batch.latents.shape[1:]) for item in items]).to(device)
        t = torch.full((len(items),), self.plan.levels[level], device=device)
        x_t, velocity = noised(batch.latents, noise, t)
        return t, sample_errors(predict(dit, self.config, batch, x_t, t, self.told), velocity, batch.mask)


def fixed_noise(item: CachedItem, level: int, shape: Sequence[int]) -> Tensor:
    """Return noise that only the example's name and the number of the noise level decide, whatever the seed."""
    generator = torch.Generator().manual_seed(seed_of(f"{item.latents.name} {level}"))
    return torch.randn(*shape, generator=generator)
