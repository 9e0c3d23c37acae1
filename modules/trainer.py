"""The training loop: batches > noised latents > DiT > loss > what is trained > files."""

import contextlib
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from torch import Tensor, nn
from tqdm import tqdm

from dataset.loader import Batch, batches_of, make_loader
from modules.checkpoints import Checkpoints, model_metadata, new_session, training_metadata
from modules.flow_matching import flow_loss, loss_weights, noised, sample_timesteps
from modules.optimizers import make_optimizer, make_schedule
from modules.preflight import Plan, check
from modules.samples import Sampler
from modules.train_options import TrainOptions
from modules.trained import Trained
from utils.devices import default_device, dtype_name, parse_dtype
from utils.errors import UserError
from utils.options import option
from wan.auto_swap import AutoSwap, auto_recommended
from wan.checkpointing import offloading, save_memory
from wan.configs import WanConfig
from wan.loading import load_dit
from wan.model import WanModel

logger = logging.getLogger(__name__)

_BUNDLE = 1 << 26  # gradients to average over processes in one go


@dataclass(frozen=True)
class LoggingOptions:
    """logs of loss and learning rate"""

    logging_dir: Path | None = option(None, "folder for TensorBoard logs, one folder in it for each run")
    log_with: str | None = option(None, "what the logs are for (default: tensorboard)", choices=("tensorboard",))
    log_prefix: str = option("", "first part of the name of a run's folder")
    log_tracker_name: str = option("network_train", "name of the logs in that folder")


def make_trainer(options: TrainOptions, trained: Trained, logs: LoggingOptions) -> "Trainer":
    """Check everything, load the DiT and return the run, on this process or on one of several that were launched."""
    for engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{engine}"):
            raise UserError(f"accelerate launch: {engine} is not available", "use --multi_gpu for several GPUs")
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or default_device().type == "cpu"
    # The other processes wait for samples and files of the first one, which may take longer than the usual minutes.
    state = PartialState(cpu=on_cpu, timeout=timedelta(hours=6))
    if not state.is_main_process:
        logging.disable(logging.WARNING)
    folder = log_folder(logs)
    plan = check(options, trained, _agreed_seed(options.training.seed), state.device, state.num_processes)
    accelerator = Accelerator(
        cpu=on_cpu,
        gradient_accumulation_steps=options.training.gradient_accumulation_steps,
        # No autocast, the DiT does without; gradients of float16 are scaled, or the small ones would be lost.
        mixed_precision="fp16" if plan.dtype == torch.float16 else "no",
        log_with="tensorboard" if folder else None,
        project_dir=folder,
    )
    if folder:
        accelerator.init_trackers(logs.log_tracker_name)
    for line in plan.data.summary().lines():
        logger.info("%s", line)
    # Before the DiT: the encoders of prompts and pictures are not in memory beside it.
    sampler = Sampler(plan.samples) if plan.samples and accelerator.is_main_process else None
    accelerator.wait_for_everyone()
    with _advice(options, trained):
        dit = load_dit(
            options.dit.dit,
            plan.config,
            plan.dtype,
            accelerator.device,
            deltas=trained.deltas,
            attn_mode=plan.attn_mode,
            split_attn=options.attention.split_attn,
            fp8=options.precision.fp8_base,
            fp8_scaled=options.precision.fp8_scaled,
            quantize=options.precision.quantize,
            disable_numpy_memmap=options.dit.disable_numpy_memmap,
            swap=options.swap,
            hold=trained.hold,
            compiling=plan.compiling,
            steps=plan.steps(),
            residual_dtype=parse_dtype(options.dit.residual_dtype),
        )
    return Trainer(plan, dit, accelerator, sampler)


class Trainer:
    """A run in progress: what is trained, by what, and how far it is."""

    def __init__(self, plan: Plan, dit: WanModel, accelerator: Accelerator, sampler: Sampler | None = None):
        options, training = plan.options, plan.options.training
        self.plan, self.accelerator, self.dit, self.sampler = plan, accelerator, dit, sampler
        precision = options.precision
        offloads = precision.gradient_checkpointing and precision.gradient_checkpointing_cpu_offload
        save_memory(
            dit,
            precision.gradient_checkpointing,
            offloading(accelerator.device) if offloads else None,
            precision.gradient_checkpointing_keep_attention,
        )
        self.trained = plan.trained
        self.module = self.trained.attach(dit, accelerator.device)
        self.parameters = list(self.module.parameters())
        workers = min(training.max_data_loader_n_workers, os.cpu_count() or 1)
        loader = make_loader(plan.data, workers, training.persistent_data_loader_workers)
        # The fused kernels leave out a step whose gradients overflow without a word; accelerate would not know.
        fused = accelerator.scaler is None
        optimizer, self.optimizer_name = make_optimizer(
            options.optimizer, self.trained.parameter_groups(options.optimizer.learning_rate), fused
        )
        self.loader, self.optimizer = accelerator.prepare(loader, optimizer)
        self.schedule = make_schedule(options.optimizer, self.optimizer, plan.total_steps)
        if self.trained.fused:
            for parameter in self.parameters:
                parameter.register_post_accumulate_grad_hook(lambda parameter: self.update([parameter]))
        for parameter in self.trained.stowed:
            parameter.register_post_accumulate_grad_hook(self.stow)
        # Each process draws its own noise and dropout. On the CPU, so that a seed means the same on every device.
        process_seed = plan.seed + accelerator.process_index
        self.generator = torch.Generator().manual_seed(process_seed)
        torch.manual_seed(process_seed)
        self.checkpoints = Checkpoints(
            options.saving,
            self.metadata(),
            options.metadata.no_metadata,
            self.trained.file_dtype(),
            self.trained.hashed,
        )
        self.step = 0
        self.losses: deque[float] = deque(maxlen=len(self.loader))

    def run(self) -> None:
        """Train to the end and save the result."""
        self.log_start()
        self.sample(epoch=0)
        total, silent = self.plan.total_steps, not self.accelerator.is_main_process
        # Closed also by an error, whose line would else stand at the end of the bar.
        with tqdm(total=total, desc="steps", disable=silent) as progress:
            for epoch in range(self.plan.epochs):
                self.epoch(epoch, progress)
        if self.accelerator.is_main_process:
            self.checkpoints.save_final(self.trained.tensors(), self.step, self.plan.epochs)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def epoch(self, epoch: int, progress: tqdm) -> None:
        """Train on all batches, or on those until the last step."""
        logger.info("epoch %d/%d", epoch + 1, self.plan.epochs)
        self.loader.set_epoch(epoch)
        losses = []
        for batch in batches_of(self.loader):
            with self.accelerator.accumulate(self.module):
                loss = self.gradients(batch)
                norms = self.optimizer_step() if self.accelerator.sync_gradients else {}
            losses.append(loss.item())
            self.losses.append(losses[-1])
            if self.accelerator.sync_gradients:
                self.step += 1
                progress.update()
                self.after_step(epoch)
            average = sum(self.losses) / len(self.losses)
            progress.set_postfix(avr_loss=average, **norms)
            self.log({"loss/current": losses[-1], "loss/average": average, **self.rates(), **norms}, self.step)
            if self.step >= self.plan.total_steps:
                break
        self.log({"loss/epoch": sum(losses) / len(losses)}, epoch + 1)
        self.after_epoch(epoch + 1)

    def gradients(self, batch: Batch) -> Tensor:
        """Add a batch's gradients to those that are there, and return its loss."""

        def compute() -> Tensor:
            loss = self.loss(batch)
            self.accelerator.backward(loss)
            return loss.detach()

        auto: AutoSwap | None = getattr(self.dit, "auto_swap", None)
        with _advice(self.plan.options, self.trained):
            return auto.retry(compute, self.way_back()) if auto else compute()

    def way_back(self) -> Callable[[], None]:
        """Return what undoes the computation of gradients that begins now, random numbers included."""
        generators = [self.generator, torch.default_generator]
        if self.accelerator.device.type == "cuda":
            generators.append(torch.cuda.default_generators[self.accelerator.device.index or 0])
        states = [generator.get_state() for generator in generators]
        gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in self.parameters]

        def undo() -> None:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()

        return undo

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss of a batch, each sample at a noise level of its own."""
        options, device = self.plan.options.timesteps, self.accelerator.device
        batch = batch.to(device)
        height, width = batch.latents.shape[-2:]
        t = sample_timesteps(options, len(batch), height, width, self.generator, batch.timesteps).to(device)
        noise = torch.randn(batch.latents.shape, generator=self.generator).to(device)
        x_t, velocity = noised(batch.latents, noise, t)
        prediction = predict(self.dit, self.plan.config, batch, x_t, t)
        return flow_loss(prediction, velocity, loss_weights(options.weighting_scheme, t))

    def optimizer_step(self) -> dict[str, float]:
        """End an optimizer step, which a fused backward pass has done already; return what to log of the result."""
        if not self.trained.fused:
            if self.trained.stowed:
                self.trained.settle()
            self.update(self.parameters)
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        return self.trained.limit()

    def update(self, parameters: Sequence[nn.Parameter]) -> None:
        """Apply the gradients that all processes have for these parameters, and drop them."""
        if self.accelerator.num_processes > 1:
            average_gradients([p for p in parameters if p not in self.trained.stowed], self.accelerator)
        if self.plan.options.optimizer.max_grad_norm:
            self.accelerator.clip_grad_norm_(parameters, self.plan.options.optimizer.max_grad_norm)
        self.trained.step(self.optimizer, parameters)
        for parameter in parameters:
            parameter.grad = None

    def stow(self, parameter: nn.Parameter) -> None:
        """Let a gradient leave the device, averaged over all processes with the last batch of a step."""
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            average_gradients([parameter], self.accelerator)
        self.trained.stow(parameter)

    def after_step(self, epoch: int) -> None:
        every = self.plan.options.saving.save_every_n_steps
        if every and self.step % every == 0 and self.accelerator.is_main_process:
            self.checkpoints.save_step(self.trained.tensors(), self.step, epoch)
        self.sample()

    def after_epoch(self, epoch: int) -> None:
        every = self.plan.options.saving.save_every_n_epochs
        if every and epoch % every == 0 and epoch < self.plan.epochs and self.accelerator.is_main_process:
            self.checkpoints.save_epoch(self.trained.tensors(), self.step, epoch)
        self.sample(epoch)

    def sample(self, epoch: int | None = None) -> None:
        """Make samples if they are due; epoch: how many are complete, at the start and the end of one."""
        if self.sampler and self.sampler.due(self.step, epoch):
            self.sampler.make(self.dit, self.module, self.step, epoch)

    def rates(self) -> dict[str, float]:
        return {f"lr/{group['name']}": group["lr"] for group in self.optimizer.param_groups}

    def log(self, values: dict[str, float], step: int) -> None:
        if self.accelerator.trackers:
            self.accelerator.log(values, step=step)

    def log_start(self) -> None:
        """Log the settings that people look for before they leave a run alone."""
        accelerator = self.accelerator
        count, dtype = sum(parameter.numel() for parameter in self.parameters), self.parameters[0].dtype
        logger.info(
            "device %s, DiT in %s; trained: %s of %s numbers in %s",
            accelerator.device,
            self.dit.dtype,
            self.trained.noun,
            f"{count:,}",
            dtype_name(dtype),
        )
        logger.info("optimizer %s, seed %d", self.optimizer_name, self.plan.seed)
        logger.info(
            "%d steps in %d epochs of %d batches on %d process(es), %d batches to a step",
            self.plan.total_steps,
            self.plan.epochs,
            len(self.loader),
            accelerator.num_processes,
            accelerator.gradient_accumulation_steps,
        )

    def metadata(self) -> dict[str, str]:
        """Return the metadata of the files, but for what changes from file to file."""
        options, summary = self.plan.options, self.plan.data.summary()
        timesteps, optimizer = options.timesteps, options.optimizer
        values = {
            **new_session(),
            "output_name": options.saving.output_name,
            "learning_rate": optimizer.learning_rate,
            "num_train_items": summary.items,
            "num_batches_per_epoch": len(self.loader),
            "num_epochs": self.plan.epochs,
            "gradient_checkpointing": options.precision.gradient_checkpointing,
            "gradient_checkpointing_cpu_offload": options.precision.gradient_checkpointing
            and options.precision.gradient_checkpointing_cpu_offload,
            "gradient_accumulation_steps": options.training.gradient_accumulation_steps,
            "max_train_steps": self.plan.total_steps,
            "lr_warmup_steps": optimizer.lr_warmup_steps,
            "lr_scheduler": optimizer.lr_scheduler,
            "base_model_version": "wan",
            **self.trained.training_metadata(),
            "mixed_precision": self.plan.mixed_precision,
            "seed": self.plan.seed,
            "training_comment": options.metadata.training_comment,
            "optimizer": self.optimizer_name,
            "max_grad_norm": optimizer.max_grad_norm,
            "fp8_base": options.precision.fp8_base,
            "full_fp16": False,
            "weighting_scheme": timesteps.weighting_scheme,
            "logit_mean": timesteps.logit_mean,
            "logit_std": timesteps.logit_std,
            "mode_scale": timesteps.mode_scale,
            "guidance_scale": 1.0,
            "timestep_sampling": timesteps.timestep_sampling,
            "sigmoid_scale": timesteps.sigmoid_scale,
            "discrete_flow_shift": timesteps.discrete_flow_shift,
            "datasets": summary.metadata,
            "sd_model_name": Path(options.dit.dit).name,
            **({"vae_name": Path(options.vae.vae).name} if options.vae.vae else {}),
        }
        family = "wan2.2" if self.plan.config.boundary else "wan2.1"
        bounds = (timesteps.min_timestep, timesteps.max_timestep)
        model = model_metadata(options.metadata, options.saving.output_name, family, self.trained.architecture, bounds)
        return {**self.trained.file_metadata(), **training_metadata(values), **model}


def predict(dit: nn.Module, config: WanConfig, batch: Batch, x_t: Tensor, t: Tensor) -> Tensor:
    """Return the velocity [B 16 F H W] predicted at x_t [B 16 F H W] and t [B] under a batch's conditions."""
    features = batch.clip if config.clip and config.images else None
    if features is not None:
        # Pictures of one video one after the other.
        features = features.reshape(-1, *features.shape[-2:])
    indices = None if batch.frame_indices is None else batch.frame_indices.tolist()
    y = condition_latents(config, batch)
    return dit(x_t, 1000 * t, batch.text, y=y, image_features=features, frame_indices=indices)


def condition_latents(config: WanConfig, batch: Batch) -> Tensor | None:
    """Return the channels that the DiT sees beside the noisy latents, [B 20 F H W] or [B 32 F H W], if any.

    A Fun-Control model sees the control video and, without the mask, the latents of the first frame or nothing.
    """
    if not config.control:
        return batch.latents_image if config.images else None
    picture = torch.zeros_like(batch.latents_control)
    if config.images:
        picture[:, :, 0] = batch.latents_image[:, 4:, 0]
    return torch.cat([batch.latents_control, picture], dim=1)


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace each gradient by its mean over all processes; a branch that was dropped counts as a gradient of 0.

    Small ones travel together, up to some hundred MiB, which take as much memory again while they do.
    """
    bundle: list[nn.Parameter] = []
    for number, parameter in enumerate(parameters, 1):
        bundle.append(parameter)
        if number == len(parameters) or sum(p.numel() for p in bundle) > _BUNDLE:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bundle]
            flat = accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), reduction="mean")
            for p, mean in zip(bundle, flat.split([grad.numel() for grad in grads]), strict=True):
                p.grad = mean.view_as(p)
            bundle = []


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


def _advice(options: TrainOptions, trained: Trained) -> contextlib.AbstractContextManager:
    """Return what recommends block swap where the body runs out of memory, and blocks can be swapped at will."""
    return auto_recommended(options.swap) if trained.beside else contextlib.nullcontext()


def _agreed_seed(seed: int | None) -> int:
    """Return the given seed, or one that is drawn and the same for all processes."""
    if seed is not None:
        return seed
    drawn = [secrets.randbelow(2**32)]
    broadcast_object_list(drawn)
    return drawn[0]
