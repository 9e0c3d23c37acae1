"""The training loop: batches > noised latents > DiT > loss > what is trained > files."""

import logging
import math
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from dataset.loader import Batch, batches_of, make_loader
from modules.ema import Average
from modules.flow_matching import noised, one_sided, sample_timesteps
from modules.gradients import average_gradients
from modules.losses import flow_loss, loss_weights, sample_errors
from modules.memory_advice import memory_advised, savings
from modules.milestones import SAMPLE, VALIDATION
from modules.optimizers import make_optimizer, make_schedule
from modules.prediction import as_told, predict
from modules.preflight import Plan, check
from modules.progress_bar import RunBar
from modules.recorder import Recorder, device_words
from modules.run_logs import (
    LoggingOptions,
    plan_tracking,
    rates_of,
    start_tracking,
    track_epoch,
    track_samples,
)
from modules.run_metadata import run_metadata
from modules.run_summary import summary
from modules.samples import Sampler
from modules.saving import Saver
from modules.settings import groups_of, hide_secrets
from modules.several import join, load_shared, make_accelerator, only_here, sharding
from modules.states import Progress, State
from modules.stopping import Stop, command_to_resume
from modules.timestep_bins import TimestepBins
from modules.train_options import TrainOptions
from modules.trained import Trained
from modules.validation import Validator
from utils.devices import dtype_name, parse_dtype
from utils.errors import Stopped, UserError
from utils.processes import answered
from wan.auto_swap import AutoSwap
from wan.checkpointing import offloading, save_memory
from wan.loading import load_dit
from wan.model import WanModel
from wan.pair import DitPair, each_model, load_pair
from wan.shards import Shards

logger = logging.getLogger(__name__)


@answered(certainly=False)
def make_trainer(options: TrainOptions, trained: Trained, logs: LoggingOptions) -> "Trainer":
    """Check everything, load the DiT and return the run, on this process or on one of several that were launched."""
    state = join(options.processes)
    shared = sharding(options, trained, state.num_processes, state.device)
    groups = groups_of(options, trained.options, logs)
    hide_secrets(groups)
    tracking = plan_tracking(logs)
    plan = check(options, trained, _agreed_seed(options.training.seed), state.device, state.num_processes)
    lines = summary(plan, state.device)
    accelerator = make_accelerator(options.training.gradient_accumulation_steps, plan.dtype, state, tracking)
    start_tracking(accelerator, logs, tracking, groups)
    for line in (*plan.data.summary().lines(), *lines):
        logger.info("%s", line)
    # Before the DiT: the encoders of prompts and pictures are not in memory beside it.
    sampler = Sampler(plan.samples) if plan.samples and accelerator.is_main_process else None
    accelerator.wait_for_everyone()

    def load(path: Path, option: str, device: torch.device | str = accelerator.device) -> WanModel:
        return load_dit(
            path,
            plan.config,
            plan.dtype,
            device,
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
            option=option,
        )

    with memory_advised(plan):
        if shared:
            shards = load_shared(partial(load, options.dit.dit, "--dit"), shared, accelerator)
            return Trainer(plan, shards.dit, accelerator, sampler, shards)
        dit = load_pair(load, options.dit.dit, options.pair, plan.config, accelerator.device, options.swap)
    return Trainer(plan, dit, accelerator, sampler)


class Trainer:
    """A run in progress: what is trained, by what, and how far it is."""

    def __init__(
        self,
        plan: Plan,
        dit: WanModel | DitPair,
        accelerator: Accelerator,
        sampler: Sampler | None = None,
        shards: Shards | None = None,  # where the DiT is shared out
    ):
        options, training = plan.options, plan.options.training
        self.plan, self.accelerator, self.dit, self.sampler, self.shards = plan, accelerator, dit, sampler, shards
        precision = options.precision
        offloads = precision.gradient_checkpointing and precision.gradient_checkpointing_cpu_offload
        offload = offloading(accelerator.device) if offloads else None
        how = precision.gradient_checkpointing, offload, precision.gradient_checkpointing_keep_attention
        for model in each_model(dit):
            if auto := getattr(model, "auto_swap", None):
                auto.fix = savings(plan)
            save_memory(model, *how)
            model.second_picture_as_text = options.dit.compat_musubi
        self.told = as_told(options.dit.compat_musubi, options.timesteps.timestep_sampling)
        self.trained = plan.trained
        self.module = self.trained.attach(dit, accelerator.device)
        self.parameters = list(self.module.parameters())
        workers = min(training.max_data_loader_n_workers, os.cpu_count() or 1)
        loader = make_loader(plan.data, workers, training.persistent_data_loader_workers, accelerator.num_processes)
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
        self.step = 0
        self.epochs = 0  # complete ones
        self.batches = 0  # of the unfinished epoch, on this process
        self.losses: deque[float] = deque(maxlen=len(self.loader))
        self.epoch_losses: list[float] = []  # of the unfinished epoch
        self.bins = TimestepBins()  # its errors by how noisy the examples were
        self.errors: tuple[Tensor, Tensor] | None = None  # t of the last batch's examples [B], and their errors [B]
        validation = plan.validation
        self.validator = Validator(validation, plan.config, accelerator, self.told) if validation else None
        self.bad_batches = 0  # of this step, those whose loss was no finite number
        self.bad_steps = 0  # the last ones, in a row
        self.norms: list[Tensor] = []  # of the gradients of this step, of which a fused backward pass has many
        self.record = Recorder(plan, accelerator.is_main_process, accelerator.device)
        decay = options.ema.ema_decay
        self.ema = Average(self.parameters, decay) if decay else None
        self.saver = Saver(
            plan,
            accelerator,
            self.optimizer,
            self.schedule,
            self.ema,
            self.generators(),
            run_metadata(plan, self.optimizer_name, len(self.loader)),
            self.record,
        )
        if self.saver.averaging:
            self.optimizer.optimizer.train()
        self.stop = Stop()
        if plan.state:
            self.restore(plan.state)

    @answered(certainly=False)
    def run(self) -> None:
        """Train to the end and save the result."""
        try:
            with memory_advised(self.plan):
                self.train()
        except BaseException as error:
            self.record.fail(self.step, error)
            raise

    def train(self) -> None:
        """Train to the end and save the result, whatever memory that takes."""
        self.log_start()
        with self.stop, self.record.running(self.step) as progress:
            if not self.plan.state:
                self.validate(epoch=0)
                self.sample(epoch=0)
            for epoch in range(self.epochs, self.plan.epochs):
                if self.step < self.plan.total_steps:
                    self.epoch(epoch, progress)
        # The file before the state: a run that has the state of its end has all that it was to have.
        self.saver.save_file("end", 0, self.step, self.plan.epochs)
        if self.plan.options.states.save_state or self.plan.options.states.save_state_on_train_end:
            self.save_state("end")
        self.record.end("end", self.step)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def epoch(self, epoch: int, progress: RunBar) -> None:
        """Train on all batches, or on those until the last step."""
        logger.info("epoch %d/%d", epoch + 1, self.plan.epochs)
        self.loader.set_epoch(epoch)
        self.plan.data.begun = self.batches * self.accelerator.num_processes
        losses, examples = [], 0  # of this step
        for batch in batches_of(self.loader):
            with self.accelerator.accumulate(self.module):
                loss = self.gradients(batch)
                norms = self.optimizer_step() if self.accelerator.sync_gradients else {}
            self.batches += 1
            losses.append(loss.item())
            if math.isfinite(losses[-1]):  # or the means would be of no use for a whole epoch
                self.epoch_losses.append(losses[-1])
                self.bins.add(*self.errors)
                self.losses.append(losses[-1])
            average = sum(self.losses) / len(self.losses) if self.losses else math.nan
            last = losses[-1]
            examples += len(batch) * self.accelerator.num_processes
            progress.set_postfix(avr_loss=average, **norms)
            if self.accelerator.sync_gradients:
                self.step += 1
                self.record.step(
                    *(self.step, epoch + 1, losses, examples, self.norms),
                    average=average,
                    **self.rates(),
                    **norms,
                )
                losses, examples, self.norms = [], 0, []
                self.after_step(epoch)
            self.log({"loss/current": last, "loss/average": average, **self.rates(), **norms}, self.step)
            if self.accelerator.sync_gradients:
                self.leave_if_told(epoch)
            if self.step >= self.plan.total_steps:
                break
        if self.epoch_losses:
            mean, means = sum(self.epoch_losses) / len(self.epoch_losses), self.bins.means("loss/epoch/")
            track_epoch(self.accelerator, {"loss/epoch": mean, **means}, epoch + 1, self.step)
            self.record.epoch(self.step, epoch + 1, mean, self.bins.means(""))
        if self.batches == len(self.loader):
            self.epochs, self.batches, self.epoch_losses, self.bins = epoch + 1, 0, [], TimestepBins()
        self.after_epoch(epoch + 1)

    def gradients(self, batch: Batch) -> Tensor:
        """Add a batch's gradients to those that are there, and return its loss.

        Where that is no finite number on any process, all of them leave the batch out.
        """

        def compute() -> Tensor:
            loss = self.loss(batch)
            if self.agreed(not math.isfinite(loss.item())):
                self.bad_batches += 1
            else:
                self.accelerator.backward(loss)
            return loss.detach()

        auto: AutoSwap | None = getattr(self.dit, "auto_swap", None)
        return auto.retry(compute, self.way_back()) if auto else compute()

    def way_back(self) -> Callable[[], None]:
        """Return what undoes the computation of gradients that begins now, random numbers included."""
        generators = list(self.saver.generators.values())
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
        options, kind, device = self.plan.options.timesteps, self.plan.options.loss, self.accelerator.device
        batch = batch.to(device)
        height, width = batch.latents.shape[-2:]
        how = height, width, self.generator
        t = sample_timesteps(options, len(batch), *how, batch.timesteps)
        if self.plan.options.pair.dit_high_noise:
            t = one_sided(t, self.plan.config.boundary, lambda count: sample_timesteps(options, count, *how))
        t = t.to(device)
        noise = torch.randn(batch.latents.shape, generator=self.generator).to(device)
        x_t, velocity = noised(batch.latents, noise, t)
        prediction = predict(self.dit, self.plan.config, batch, x_t, t, self.told)
        self.errors = t, sample_errors(prediction, velocity, batch.mask)
        weights = loss_weights(options.weighting_scheme, t, kind.min_snr_gamma)
        return batch.weight * flow_loss(prediction, velocity, weights, batch.mask, kind)

    def optimizer_step(self) -> dict[str, float]:
        """End an optimizer step, which a fused backward pass has done already; return what to log of the result."""
        if self.bad_batches:
            return self.left_out()
        self.bad_steps = 0
        if not self.trained.fused:
            if self.trained.stowed:
                self.trained.settle()
            self.update(self.parameters)
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        norms = self.trained.limit()
        if self.ema and not self.accelerator.optimizer_step_was_skipped:
            self.ema.update()
        return norms

    def left_out(self) -> dict[str, float]:
        """Forget the gradients of a step; return what to log of it. Ends the run after too many in a row."""
        if self.trained.stowed:
            self.trained.settle()
        for parameter in self.parameters:
            parameter.grad = None
        self.bad_batches = 0
        self.bad_steps += 1
        limit = self.plan.options.training.max_nan_steps
        text = "step %d is left out: its loss is no finite number (%d in a row)"
        self.record.warn(self.step + 1, text, self.step + 1, self.bad_steps)
        if self.bad_steps >= limit:
            saved = self.save_state("step", self.step, early=True)
            raise UserError(
                f"the loss was no finite number in {limit} steps in a row, from step {self.step - limit + 2} on"
                + (f"; the state is {self.saver.states.path('step', self.step)}" if saved else ""),
                "lower --learning_rate, use --mixed_precision bf16 for fp16, or look for damaged caches; an earlier "
                "state may still be sound",
            )
        return {"steps_left_out": self.bad_steps}

    def agreed(self, here: bool) -> bool:
        """Return whether something is so on any process."""
        if self.accelerator.num_processes == 1:
            return here
        flag = torch.tensor(float(here), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)

    def leave_if_told(self, epoch: int) -> None:
        """End the run with its state and files saved where a signal has asked for that."""
        if self.step >= self.plan.total_steps or not self.agreed(bool(self.stop.number)):
            return
        every = self.plan.options.saving.save_every_n_steps
        due = every and self.step % every == 0  # and so has been saved
        state = self.saver.states.path("step", self.step)
        there = due and self.plan.options.states.save_state and state.is_dir()
        saved = there or self.save_state("step", self.step, early=True)
        if not due:
            self.saver.save_file("step", self.step, self.step, epoch)
        self.record.end("stop", self.step, state=state.name if saved else None)
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            raise SystemExit(128 + self.stop.number)
        how = f"go on with: {command_to_resume(state)}" if saved else "its state could not be saved"
        raise Stopped(f"stopped after step {self.step}; {how}", 128 + self.stop.number)

    def save_state(self, series: str, number: int = 0, early: bool = False) -> bool:
        """Save the state of the run, on all processes, and return whether that was done; see Saver.save_state()."""
        return self.agreed(self.saver.save_state(series, number, self.progress(), early))

    def progress(self) -> Progress:
        return Progress(
            step=self.step,
            epoch=self.epochs,
            batches=self.batches,
            losses=tuple(self.losses),
            epoch_losses=tuple(self.epoch_losses),
            epoch_bins=self.bins.pairs(),
            seed=self.plan.seed,
            processes=self.accelerator.num_processes,
            epoch_batches=len(self.plan.data),
            data=self.plan.data.digest(),
            optimizer=self.optimizer_name.partition("(")[0],
        )

    def restore(self, state: State) -> None:
        """Go on where a state was saved."""
        self.saver.restore(state)
        progress = state.progress
        self.step, self.epochs, self.batches = progress.step, progress.epoch, self.plan.begun
        self.losses.extend(progress.losses)
        self.epoch_losses, self.bins = list(progress.epoch_losses), TimestepBins(progress.epoch_bins)
        for each in (self.validator, self.sampler):
            if each:
                each.go_on(self.step)
        logger.info("goes on from %s: step %d, epoch %d", state.path, self.step, self.epochs + 1)

    def generators(self) -> dict[str, torch.Generator]:
        """Return by name all that random numbers are drawn from on this process."""
        found = {"training": self.generator, "torch": torch.default_generator, **self.trained.generators()}
        if self.accelerator.device.type == "cuda":
            found["cuda"] = torch.cuda.default_generators[self.accelerator.device.index or 0]
        return found

    def update(self, parameters: Sequence[nn.Parameter]) -> None:
        """Apply the gradients that all processes have for these parameters, and drop them."""
        if self.accelerator.num_processes > 1:
            average_gradients([p for p in parameters if p not in self.trained.stowed], self.accelerator)
        if self.plan.options.optimizer.max_grad_norm:
            norm = self.accelerator.clip_grad_norm_(parameters, self.plan.options.optimizer.max_grad_norm)
            self.norms.append(norm.detach())
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
        due = every and self.step % every == 0
        if due:
            self.saver.save_file("step", self.step, self.step, epoch)
        self.validate()
        self.sample()
        if due and self.plan.options.states.save_state:
            self.save_state("step", self.step)

    def after_epoch(self, epoch: int) -> None:
        self.validate(epoch)
        every = self.plan.options.saving.save_every_n_epochs
        due = every and epoch % every == 0 and epoch < self.plan.epochs
        if due:
            self.saver.save_file("epoch", epoch, self.step, epoch)
        # Before the state, with which a run that goes on has all of the epoch behind it.
        self.sample(epoch)
        if due and self.plan.options.states.save_state:
            self.save_state("epoch", epoch)

    def validate(self, epoch: int | None = None) -> None:
        """Measure the validation loss if that is due; epoch: as for sample()."""
        if self.validator and self.validator.due(self.step, epoch, self.step >= self.plan.total_steps):
            with self.saver.shown(), self.record.aside(VALIDATION):
                values = self.validator.measure(self.dit, self.module, self.step)
            self.log(values, self.step)
            self.record.validation(self.step, values)

    def sample(self, epoch: int | None = None) -> None:
        """Make samples if they are due; epoch: how many are complete, at the start and the end of one."""
        with only_here(self.shards if self.plan.samples else None, self.accelerator):
            if self.sampler and self.sampler.due(self.step, epoch):
                with self.saver.shown(), self.record.aside(SAMPLE):
                    began = time.monotonic()
                    files = self.sampler.attempt(self.dit, self.module, self.step, epoch)
                    if files:
                        prompts = [request.prompt for request in self.sampler.requests]
                        self.record.samples(self.step, epoch, files, prompts, began)
                        track_samples(self.accelerator, files, prompts, self.step)

    def rates(self) -> dict[str, float]:
        return rates_of(self.optimizer.param_groups)

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
        self.record.start(
            device=device_words(accelerator.device, accelerator.num_processes),
            trained=f"{self.trained.noun}, {count:,} numbers in {dtype_name(dtype)}",
            optimizer=self.optimizer_name,
            seed=self.plan.seed,
        )
        logger.info(
            "%d steps in %d epochs of %d batches on %d process(es), %d batches to a step",
            self.plan.total_steps,
            self.plan.epochs,
            len(self.loader),
            accelerator.num_processes,
            accelerator.gradient_accumulation_steps,
        )


def _agreed_seed(seed: int | None) -> int:
    """Return the given seed, or one that is drawn and the same for all processes."""
    if seed is not None:
        return seed
    drawn = [secrets.randbelow(2**32)]
    broadcast_object_list(drawn)
    return drawn[0]
