"""Everything that can be checked before a large model loads, and the plan of the run that comes out of it."""

import importlib
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from dataset.cache import read_header
from dataset.config import DatasetOptions, load_config
from dataset.loader import CachedDataset, CachedItem
from modules.checkpoints import MetadataOptions, SavingOptions, check_saving
from modules.flow_matching import TimestepOptions, check_timesteps
from modules.generation import RunOptions
from modules.optimizers import OptimizerOptions, check_optimizer
from modules.samples import SampleOptions, SamplePlan, plan_samples
from networks.formats import deltas, read_lora
from networks.lora import LoRANetwork
from utils.devices import FLOAT8, dtype_name
from utils.errors import UserError
from utils.options import option, suggest
from wan.attention import check_attention
from wan.clip import ClipOptions
from wan.configs import TASKS, WanConfig
from wan.loading import Deltas, DitOptions, check_dit, check_fp8, dit_dtype
from wan.model import WanModel, WanShape
from wan.t5 import T5Options
from wan.vae import VaeOptions

logger = logging.getLogger(__name__)

_MIXED_PRECISION = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainingOptions:
    """the training run"""

    max_train_steps: int = option(1600, "optimizer steps to train")
    max_train_epochs: int | None = option(None, "epochs to train, instead of a number of steps")
    gradient_accumulation_steps: int = option(1, "batches that an optimizer step averages over")
    seed: int | None = option(None, "of everything random (default: drawn, and logged)")
    max_data_loader_n_workers: int = option(8, "processes that read caches, at most one a CPU core; 0: none")
    persistent_data_loader_workers: bool = option(False, "keep these processes from epoch to epoch")


@dataclass(frozen=True)
class PrecisionOptions:
    """precision and memory"""

    mixed_precision: str | None = option(
        None,
        "number format of the frozen DiT: bf16, fp16, or no for the file's own (default: accelerate's setting)",
        choices=("no", "fp16", "bf16"),
    )
    fp8_base: bool = option(False, "hold the DiT's linear weights as float8 (e4m3fn), which halves their memory")
    fp8_scaled: bool = option(False, "with --fp8_base: with a scale for every 64 weights, which is more exact")
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass: much less memory")
    blocks_to_swap: int = option(0, "not available yet: DiT blocks held in main memory")


@dataclass(frozen=True)
class AttentionOptions:
    """attention, --sdpa unless another is asked for"""

    sdpa: bool = option(False, "torch's own")
    flash_attn: bool = option(False, "flash-attn 2")
    flash3: bool = option(False, "flash-attn 3")
    xformers: bool = option(False, "xformers")
    sage_attn: bool = option(False, "refused: sage attention cannot be trained through")
    split_attn: bool = option(False, "one video of a batch after the other, for less memory")


@dataclass(frozen=True)
class NetworkOptions:
    """the LoRA"""

    network_module: str = option("networks.lora_wan", "module that makes the network")
    network_dim: int | None = option(None, "rank (default: 4)")
    network_alpha: float = option(1.0, "the LoRA counts alpha / rank times; 0 stands for the rank")
    network_dropout: float | None = option(None, "probability of dropping a rank activation")
    network_args: tuple[str, ...] = option((), "more arguments, key=value (docs/lora_files.md)", metavar="KEY=VALUE")
    network_weights: Path | None = option(None, "LoRA file to start from")
    dim_from_weights: bool = option(False, "take ranks and alphas from --network_weights")
    scale_weight_norms: float | None = option(None, "shrink updates of a layer whose norm is greater")
    base_weights: tuple[Path, ...] = option((), "LoRA files to merge into the DiT before training")
    base_weights_multiplier: tuple[float, ...] = option((), "their strengths in turn (default: 1 each)")


@dataclass(frozen=True)
class LaterOptions:
    """not available yet"""

    dit_high_noise: Path | None = option(None, "train on both models of Wan2.2")
    save_state: bool = option(False, "save the state of the run beside each LoRA file")
    save_state_on_train_end: bool = option(False, "save the state of the run at its end")
    resume: Path | None = option(None, "continue from a saved state")
    compile: bool = option(False, "compile the DiT with torch.compile")
    huggingface_repo_id: str | None = option(None, "upload LoRA files to Hugging Face")


@dataclass(frozen=True)
class TrainOptions:
    """All options of a training run, by subject."""

    dit: DitOptions
    data: DatasetOptions
    training: TrainingOptions
    precision: PrecisionOptions
    attention: AttentionOptions
    timesteps: TimestepOptions
    optimizer: OptimizerOptions
    network: NetworkOptions
    saving: SavingOptions
    metadata: MetadataOptions
    samples: SampleOptions
    vae: VaeOptions
    t5: T5Options
    clip: ClipOptions
    later: LaterOptions


@dataclass(frozen=True)
class Plan:
    """A training run whose options, data and files are known to go together."""

    options: TrainOptions
    config: WanConfig
    seed: int
    data: CachedDataset
    total_steps: int
    epochs: int
    network: LoRANetwork  # on the CPU, not attached
    base_deltas: Deltas | None  # what --base_weights adds to the DiT
    mixed_precision: str
    dtype: torch.dtype  # that the DiT computes in
    attn_mode: str
    samples: SamplePlan | None


def check(options: TrainOptions, seed: int, device: torch.device, processes: int = 1) -> Plan:
    """Return the plan of a run on this device by so many processes, or raise UserError for what would fail later."""
    config = TASKS[options.dit.task]
    _refuse_later(options)
    _check_numbers(options.training)
    check_saving(options.saving, options.metadata)
    check_timesteps(options.timesteps)
    attn_mode = choose_attention(options.attention)
    datasets = load_config(options.data.dataset_config)
    shape = check_dit(options.dit.dit, config)
    check_fp8(options.dit.dit, options.precision.fp8_base, options.precision.fp8_scaled)
    file_dtype = dit_dtype(options.dit.dit)
    mixed_precision, dtype = choose_precision(options.precision.mixed_precision, file_dtype, device)
    data = CachedDataset(datasets, seed, options.timesteps.num_timestep_buckets)
    for items in data.items:
        check_caches(items, config, shape)
    total_steps, epochs = run_length(options.training, math.ceil(len(data) / processes))
    check_optimizer(options.optimizer, device, total_steps)
    network, base_deltas = _make_network(options.network, shape, seed)
    run = RunOptions(fp8=options.precision.fp8_base, fp8_scaled=options.precision.fp8_scaled, attn_mode=attn_mode)
    samples = plan_samples(
        options.samples,
        options.dit,
        (options.vae, options.t5, options.clip),
        run,
        device,
        (options.saving.output_dir, options.saving.output_name),
    )
    return Plan(
        options=options,
        config=config,
        seed=seed,
        data=data,
        total_steps=total_steps,
        epochs=epochs,
        network=network,
        base_deltas=base_deltas,
        mixed_precision=mixed_precision,
        dtype=dtype,
        attn_mode=attn_mode,
        samples=samples,
    )


def run_length(training: TrainingOptions, batches: int) -> tuple[int, int]:
    """Return (optimizer steps, epochs) of a run; batches: of an epoch, on one process.

    The last step of an epoch is made of fewer batches where their number does not divide by the accumulation.
    """
    rounds = math.ceil(batches / training.gradient_accumulation_steps)
    if training.max_train_epochs:
        return training.max_train_epochs * rounds, training.max_train_epochs
    return training.max_train_steps, math.ceil(training.max_train_steps / rounds)


def _refuse_later(options: TrainOptions) -> None:
    given = {name: value for name, value in vars(options.later).items() if value}
    if options.precision.blocks_to_swap:
        given["blocks_to_swap"] = options.precision.blocks_to_swap
    for name in given:
        raise UserError(f"--{name}: is not available yet", "leave it out")


def _check_numbers(training: TrainingOptions) -> None:
    for name in ("max_train_steps", "max_train_epochs", "gradient_accumulation_steps"):
        value = getattr(training, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if training.max_data_loader_n_workers < 0:
        raise UserError(f"--max_data_loader_n_workers {training.max_data_loader_n_workers}: must not be negative")


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


def choose_precision(asked: str | None, file_dtype: torch.dtype, device: torch.device) -> tuple[str, torch.dtype]:
    """Return accelerate's mixed precision and the dtype that the DiT computes in.

    asked: the script's own option; None stands for what `accelerate launch` was told, which it passes on in the
    environment. "no" keeps the file's dtype on a GPU; on a CPU it means float32, which is faster there.
    """
    mixed = asked or os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    where = f"--mixed_precision {mixed}" if asked else f"--mixed_precision {mixed} of accelerate launch"
    if mixed not in ("no", *_MIXED_PRECISION):
        raise UserError(f"{where}: is not supported", "use --mixed_precision bf16")
    if mixed == "no":
        if device.type == "cpu":
            return mixed, torch.float32
        return mixed, torch.bfloat16 if file_dtype in FLOAT8 else file_dtype
    dtype = _MIXED_PRECISION[mixed]
    if file_dtype in (torch.float16, torch.bfloat16) and file_dtype != dtype:
        fit = "fp16" if file_dtype == torch.float16 else "bf16"
        raise UserError(f"{where}: the DiT's file holds {dtype_name(file_dtype)}", f"use --mixed_precision {fit} or no")
    if device.type == "cpu" and mixed == "fp16":
        raise UserError(f"{where}: training in float16 needs a GPU", "use --mixed_precision no")
    if device.type == "cpu":
        logger.warning("%s: bfloat16 is slow on most CPUs; --mixed_precision no computes in float32", where)
    return mixed, dtype


def check_caches(items: list[CachedItem], config: WanConfig, shape: WanShape) -> None:
    """Raise UserError when a cached example lacks what the task is trained on, or is of another model's sizes."""
    needed = {
        "latents_image": (config.images, "image latents", "--clip PATH" if config.clip else "--i2v"),
        "clip": (config.clip and config.images, "clip features", "--clip PATH"),
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
                raise UserError(
                    f"--task {config.name}: these caches have no {words}, e.g. {item.latents}", f"{how} again"
                )
        if len(shapes["latents"]) != 4 or shapes["latents"][0] != 16:
            raise UserError(
                f"{item.latents}: latents of shape {shapes['latents']}, not of the Wan2.1 VAE", "cache again"
            )
        height, width = shapes["latents"][-2:]
        if height % shape.patch[1] or width % shape.patch[2]:
            raise UserError(f"{item.latents}: {8 * width}x{8 * height} is no multiple of 16", "cache again")
        if config.clip and config.images:
            _check_clip(item, shapes["clip"], config, shape)
    for item in items[:1]:
        width = read_header(item.text).by_batch_name()["t5"][-1]
        if width != shape.text_dim:
            raise UserError(
                f"{item.text}: text features of {width} channels, the DiT takes {shape.text_dim}",
                "cache the text again with the T5 that belongs to the DiT",
            )


def _check_clip(item: CachedItem, clip: tuple[int, ...], config: WanConfig, shape: WanShape) -> None:
    pictures = clip[0] if len(clip) == 3 else 1
    if pictures != len(config.images):
        fix = (
            "one-frame datasets with two control pictures can be trained, cached with --one_frame"
            if len(config.images) == 2
            else "use datasets with one control picture"
        )
        raise UserError(
            f"--task {config.name}: is trained on clip features of {len(config.images)} pictures, "
            f"{item.latents} has {pictures}",
            fix,
        )
    if clip[-1] != shape.clip_dim:
        raise UserError(f"{item.latents}: clip features of {clip[-1]} channels, the DiT takes {shape.clip_dim}")


def _make_network(options: NetworkOptions, shape: WanShape, seed: int) -> tuple[LoRANetwork, Deltas | None]:
    """Return the network, not attached, and the deltas of --base_weights; both are known to fit the DiT."""
    module = network_module(options.network_module)
    arguments = network_arguments(options.network_args)
    if options.network_dim is not None and options.network_dim < 1:
        raise UserError(f"--network_dim {options.network_dim}: must be at least 1")
    with torch.device("meta"):
        model = WanModel(shape)
    torch.manual_seed(seed)
    if options.dim_from_weights:
        if options.network_weights is None:
            raise UserError("--dim_from_weights: needs the LoRA file", "add --network_weights PATH")
        weights, _ = read_lora(options.network_weights, "--network_weights")
        network = module.create_network_from_weights(weights, model, dropout=options.network_dropout, args=arguments)
    else:
        network = module.create_network(
            model, options.network_dim, options.network_alpha, options.network_dropout, args=arguments
        )
        if options.network_weights is not None:
            module.load_weights(network, read_lora(options.network_weights, "--network_weights")[0])
    return network, _base_deltas(options, model)


def _base_deltas(options: NetworkOptions, model: WanModel) -> Deltas | None:
    paths, multipliers = options.base_weights, options.base_weights_multiplier
    if len(multipliers) > len(paths):
        raise UserError(f"--base_weights_multiplier: {len(multipliers)} numbers for {len(paths)} --base_weights files")
    if not paths:
        return None
    multipliers = (*multipliers, *[1.0] * (len(paths) - len(multipliers)))
    names = {name for name, _ in model.named_parameters()}
    loras = []
    for path, multiplier in zip(paths, multipliers, strict=True):
        lora = (read_lora(path, "--base_weights")[0], multiplier, f"--base_weights {path}")
        if unknown := sorted(deltas([lora]).keys() - names):
            raise UserError(
                f"--base_weights {path}: LoRA for another model: {len(unknown)} of its layers are not in the DiT, "
                f"e.g. {unknown[0]}"
            )
        loras.append(lora)
    return deltas(loras)


def network_module(name: str) -> ModuleType:
    """Return the module that makes the network; musubi_tuner's names of our modules are understood."""
    ours = name.removeprefix("musubi_tuner.")
    try:
        module = importlib.import_module(ours)
    except ImportError as error:
        known = ("networks.lora_wan",)
        raise UserError(
            f"--network_module {name}: cannot be imported ({error})", suggest(ours, known) or f"use {known[0]}"
        ) from None
    if not hasattr(module, "create_network"):
        raise UserError(f"--network_module {name}: is no network module", "use networks.lora_wan")
    return module


def network_arguments(items: tuple[str, ...]) -> dict[str, str]:
    """Return `key=value` items as a dictionary; values may hold more equal signs."""
    arguments = {}
    for item in items:
        name, separator, value = item.partition("=")
        if not separator:
            raise UserError(
                f"--network_args {item}: not of the form key=value", "write --network_args rank_dropout=0.1"
            )
        arguments[name.strip()] = value
    return arguments
