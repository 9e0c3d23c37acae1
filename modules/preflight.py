"""Everything that can be checked before a large model loads, and the plan of the run that comes out of it."""

import logging
import math
from dataclasses import dataclass, fields, replace

import torch

from dataset.cache import read_header
from dataset.config import DatasetConfig, load_config
from dataset.loader import CachedDataset, CachedItem
from modules.cache_checks import check_fresh, check_one_frame
from modules.checkpoints import SavingOptions, check_saving
from modules.ema import check_ema
from modules.flow_matching import check_sides, check_timesteps
from modules.generation import step_of
from modules.generation_options import GenerationPairOptions, RunOptions, SamplingOptions
from modules.hub import check_hub, resumed_from
from modules.losses import check_loss
from modules.optimizers import check_optimizer
from modules.samples import SamplePlan, plan_samples
from modules.states import State, check_fit, check_states, find_state, position
from modules.train_options import AttentionOptions, PrecisionOptions, TrainingOptions, TrainOptions
from modules.trained import Trained
from modules.validation import ValidationPlan, check_validation, plan_validation
from utils.errors import UserError
from utils.safetensors_io import read_metadata
from wan.attention import check_attention
from wan.block_swap import check_swap
from wan.compiling import CompileOptions, check_compile
from wan.configs import WanConfig
from wan.dit_file import check_dit, dit_dtype
from wan.memory import Step
from wan.model import WanShape
from wan.pair import check_pair, task_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A training run whose options, data and files are known to go together."""

    options: TrainOptions
    trained: Trained  # checked, not attached
    config: WanConfig
    seed: int
    data: CachedDataset
    total_steps: int
    epochs: int
    mixed_precision: str
    dtype: torch.dtype  # that the DiT computes in
    attn_mode: str
    compiling: CompileOptions
    samples: SamplePlan | None
    validation: ValidationPlan | None = None
    state: State | None = None  # that the run goes on from
    begun: int = 0  # batches of the next epoch that each process leaves out
    batches: int = 0  # of an epoch, on each process
    shape: WanShape | None = None  # of the DiT

    def steps(self) -> list[Step]:
        """Return what the steps of training compute, one for each size of batch, and those of samples."""
        trained = self.trained
        how = {
            # At least 1: of a DiT that is trained itself the numbers are counted with its weights.
            "trained": max(trained.numbers, 1),
            "rank": trained.rank,
            "checkpointing": self.options.precision.gradient_checkpointing,
            "scratch": trained.scratch,
        }
        sizes = {
            (dict(item.shapes)["latents"][1:], config.batch_size)
            for config, items in zip(self.data.configs, self.data.items, strict=True)
            for item in items
        }
        if self.validation:
            sizes |= {(dict(items[0].shapes)["latents"][1:], len(items)) for _, items in self.validation.batches}
        sampled = self.samples.samples if self.samples else ()
        samples = [step_of(each.request, self.config, SamplingOptions()) for each in sampled]
        return [*(Step(grid, batch, **how) for grid, batch in sizes), *samples]


def check(options: TrainOptions, trained: Trained, seed: int, device: torch.device, processes: int = 1) -> Plan:
    """Return the plan of a run on this device by so many processes, or raise UserError for what would fail later."""
    config = task_config(options.dit.task, options.pair)
    _check_numbers(options.training)
    _warn_of_unused(options.precision)
    for field in fields(options.unused):
        if getattr(options.unused, field.name) != field.default:
            logger.warning("--%s: has no effect, it is of another model than Wan", field.name)
    check_timesteps(options.timesteps)
    check_ema(options.ema, trained.beside)
    check_loss(options.loss, options.timesteps.weighting_scheme)
    attn_mode = choose_attention(options.attention)
    compiling = options.compiling.resolved()
    check_compile(compiling, device)
    datasets = load_config(options.data.dataset_config)
    shape = check_dit(options.dit.dit, config)
    check_paired(options, trained, shape, config)
    check_states(options.states)
    resume = resumed_from(options.hub, options.states.resume)
    state = find_state(resume, options.saving.output_dir, options.saving.output_name)
    if state and state.progress.seed not in (None, seed):
        if options.training.seed is not None:
            logger.warning("--seed %d: the run goes on with its own, %d", seed, state.progress.seed)
        seed = state.progress.seed
    check_saving(options.saving, options.metadata, options.dit.dit, resumed=state is not None)
    if options.swap.auto and not trained.beside:
        raise UserError("--blocks_to_swap auto: is not available in fine-tuning", "leave it out or give a number")
    if options.swap.weights_on_disk and not trained.beside:
        raise UserError("--weights_on_disk: is not available in fine-tuning, whose weights change", "leave it out")
    mixed_precision, dtype = trained.check(options, shape, dit_dtype(options.dit.dit), device, seed)
    check_swap(options.swap, shape.blocks)
    check_validation(options.validation, datasets)
    data, measured = (
        _cached([each for each in datasets if each.validation == held], options, seed, config, shape)
        for held in (False, True)
    )
    validation = plan_validation(options.validation, options.timesteps, data, measured)
    batches = math.ceil(len(data) / processes)
    total_steps, epochs = run_length(options.training, batches)
    begun = 0
    if state:
        begun = position(state.progress, data, processes)
        total_steps, epochs = rest_of_run(options.training, batches, state, begun)
        refuse_finished(options.saving, state, total_steps, options.ema.ema_decay is not None)
    optimizer = check_optimizer(options.optimizer, device, total_steps, trained.shapes)
    if state:
        check_fit(state, trained.expected_shapes(), optimizer)
    precision = options.precision
    run = RunOptions(
        fp8=precision.fp8_base, fp8_scaled=precision.fp8_scaled, quantize=precision.quantize, attn_mode=attn_mode
    )
    samples = plan_samples(
        options.samples,
        options.dit,
        (options.vae, options.t5, options.clip),
        run,
        device,
        (options.saving.output_dir, options.saving.output_name),
    )
    if samples:
        samples = replace(
            samples, models=replace(samples.models, config=config, pair=GenerationPairOptions(**vars(options.pair)))
        )
    check_hub(options.hub, options.states.save_state or options.states.save_state_on_train_end)
    return Plan(
        options=options,
        trained=trained,
        config=config,
        seed=seed,
        data=data,
        total_steps=total_steps,
        epochs=epochs,
        mixed_precision=mixed_precision,
        dtype=dtype,
        attn_mode=attn_mode,
        compiling=compiling,
        samples=samples,
        validation=validation,
        state=state,
        begun=begun,
        batches=batches,
        shape=shape,
    )


def check_paired(options: TrainOptions, trained: Trained, shape: WanShape, config: WanConfig) -> None:
    """Raise UserError where what is trained, on which timesteps, does not go with the two models of Wan2.2."""
    if not trained.beside and options.pair.dit_high_noise is not None:
        raise UserError("--dit_high_noise: fine-tuning trains one model at a time", "give it as --dit in another run")
    if not trained.beside and options.swap.block_swap_h2d_only:
        raise UserError("--block_swap_h2d_only: blocks in training have to come back", "leave it out")
    if options.pair.dit_high_noise is None:
        return
    precision = options.precision
    check_pair(
        options.pair,
        *(options.dit.dit, shape, config),
        *(precision.fp8_base, precision.fp8_scaled),
        quantize=precision.quantize,
    )
    check_sides(options.timesteps, config.boundary)


def _cached(
    datasets: list[DatasetConfig], options: TrainOptions, seed: int, config: WanConfig, shape: WanShape
) -> CachedDataset | None:
    """Return the caches of datasets, known to fit the task, or None where there are no datasets."""
    if not datasets:
        return None
    data = CachedDataset(datasets, seed, options.timesteps.num_timestep_buckets)
    for items in data.items:
        check_caches(items, config, shape)
    check_fresh(data, options.training.allow_stale)
    check_one_frame(data, options.samples.one_frame)
    return data


def run_length(training: TrainingOptions, batches: int) -> tuple[int, int]:
    """Return (optimizer steps, epochs) of a run; batches: of an epoch, on one process.

    The last step of an epoch is made of fewer batches where their number does not divide by the accumulation.
    """
    rounds = math.ceil(batches / training.gradient_accumulation_steps)
    if training.max_train_epochs:
        return training.max_train_epochs * rounds, training.max_train_epochs
    return training.max_train_steps, math.ceil(training.max_train_steps / rounds)


def rest_of_run(training: TrainingOptions, batches: int, state: State, begun: int) -> tuple[int, int]:
    """Return run_length() of a run that goes on; begun: batches of its next epoch that are behind it."""
    rounds, progress = math.ceil(batches / training.gradient_accumulation_steps), state.progress
    done = math.ceil(begun / training.gradient_accumulation_steps)
    if training.max_train_epochs:
        epochs = training.max_train_epochs
        total = progress.step + max(epochs - progress.epoch, 0) * rounds - done
    else:
        total = training.max_train_steps
        epochs = progress.epoch + math.ceil((total - progress.step + done) / rounds)
    return total, epochs


def refuse_finished(saving: SavingOptions, state: State, total_steps: int, averaged: bool = False) -> None:
    """Raise UserError where nothing is left to do, not even to write the files of a run that was killed just before.

    averaged: the average of what is trained is one of them. A file of fewer steps is that of a shorter run before.
    """
    progress, step = state.progress, str(state.progress.step)
    files = [saving.output_dir / f"{saving.output_name}{end}.safetensors" for end in ("", "_ema")[: 1 + averaged]]
    written = all(path.exists() and read_metadata(path).get("ss_steps", step) == step for path in files)
    if total_steps < progress.step or total_steps == progress.step and written:
        raise UserError(
            f"--resume {state.path}: is at the end already, after {progress.step} steps and {progress.epoch} epochs",
            "ask for more with --max_train_steps or --max_train_epochs",
        )


def _check_numbers(training: TrainingOptions) -> None:
    for name in ("max_train_steps", "max_train_epochs", "gradient_accumulation_steps", "max_nan_steps"):
        value = getattr(training, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if training.seed is not None and not 0 <= training.seed < 2**63:
        raise UserError(f"--seed {training.seed}: must be from 0 to 2^63 - 1", "leave it out to have one drawn")
    if training.max_data_loader_n_workers < 0:
        raise UserError(f"--max_data_loader_n_workers {training.max_data_loader_n_workers}: must not be negative")


def _warn_of_unused(precision: PrecisionOptions) -> None:
    for name in ("gradient_checkpointing_cpu_offload", "gradient_checkpointing_keep_attention"):
        if getattr(precision, name) and not precision.gradient_checkpointing:
            logger.warning("--%s: ignored without --gradient_checkpointing", name)


def choose_attention(options: AttentionOptions) -> str:
    """Return the attention mode asked for, one that is installed; the first of the list counts, as in musubi-tuner."""
    modes = {"sdpa": "torch", "flash_attn": "flash2", "xformers": "xformers", "flash3": "flash3"}
    if options.sage_attn and not any(getattr(options, name) for name in modes):
        raise UserError(
            "--sage_attn: sage attention cannot be trained through", "use --sdpa, --xformers or --flash_attn"
        )
    name = next((name for name in modes if getattr(options, name)), "sdpa")
    check_attention(modes[name], f"--{name}")
    return modes[name]


def check_caches(items: list[CachedItem], config: WanConfig, shape: WanShape) -> None:
    """Raise UserError when a cached example lacks what the task is trained on, or is of another model's sizes."""
    needed = {
        "latents_image": (config.images, "image latents", caching_flags(config)),
        "clip": (config.clip and config.images, "clip features", caching_flags(config)),
        "latents_control": (config.control, "control latents", ""),
    }
    for item in items:
        shapes = dict(item.shapes)
        for name, (wanted, words, flag) in needed.items():
            if wanted and name not in shapes:
                how = (
                    f"run wan_cache_latents.py with {flag}"
                    if flag
                    else "give the dataset a control_directory and cache"
                )
                count = sum(name not in dict(other.shapes) for other in items)
                first = f"{item.latents} ({count:,} of {len(items):,})"
                raise UserError(f"--task {config.name}: these caches have no {words}, e.g. {first}", f"{how} again")
        if len(shapes["latents"]) != 4 or shapes["latents"][0] != 16:
            raise UserError(
                f"{item.latents}: latents of shape {shapes['latents']}, not of the Wan2.1 VAE", "cache again"
            )
        height, width = shapes["latents"][-2:]
        if height % shape.patch[1] or width % shape.patch[2]:
            raise UserError(f"{item.latents}: {8 * width}x{8 * height} is no multiple of 16", "cache again")
        if config.images and "clip" in shapes:
            _check_clip(item, shapes, config, shape)
    for item in items[:1]:
        width = read_header(item.text).by_batch_name()["t5"][-1]
        if width != shape.text_dim:
            raise UserError(
                f"{item.text}: text features of {width} channels, the DiT takes {shape.text_dim}",
                "cache the text again with the T5 that belongs to the DiT",
            )


def caching_flags(config: WanConfig) -> str:
    """Return the options by which wan_cache_latents.py makes the caches of videos for a task that sees pictures."""
    return ("--flf2v " if "last" in config.images else "") + ("--clip PATH" if config.clip else "--i2v")


def _check_clip(item: CachedItem, shapes: dict[str, tuple[int, ...]], config: WanConfig, shape: WanShape) -> None:
    """Raise UserError where the clip features are not of the pictures that the task sees, or of another encoder.

    They tell caches of first frames from those of first and last frames too where the task itself does not see them.
    """
    clip, one_frame = shapes["clip"], "f_indices" in shapes
    if not config.clip and one_frame:
        return
    pictures = clip[0] if len(clip) == 3 else 1
    if pictures != len(config.images):
        if one_frame:
            fix = f"use datasets with {'two control pictures' if len(config.images) == 2 else 'one control picture'}"
        elif len(config.images) == 2 and shapes["latents"][1] == 1:
            fix = "use videos, cached with --flf2v, or one-frame datasets with two control pictures"
        else:
            without = "" if "last" in config.images else ", without --flf2v,"
            fix = f"run wan_cache_latents.py with {caching_flags(config)}{without} again"
        raise UserError(
            f"--task {config.name}: is trained with {' and '.join(config.images)} picture as condition, "
            f"{item.latents} has {pictures} picture{'s' * (pictures > 1)}",
            fix,
        )
    if config.clip and clip[-1] != shape.clip_dim:
        raise UserError(f"{item.latents}: clip features of {clip[-1]} channels, the DiT takes {shape.clip_dim}")
