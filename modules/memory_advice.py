"""How much memory a training run takes, by estimate, and what would save some that is not in use yet."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from modules.disk import moment_bytes
from modules.preflight import Plan
from utils.devices import free_memory
from wan.auto_swap import not_enough_memory, ran_out_of_memory
from wan.block_swap import slots_for
from wan.loading import block_linears
from wan.memory import step_bytes, weight_bytes


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device at the peak of a step."""

    weights: int  # those of swapped blocks only as far as they are there; in fine-tuning with gradients and averages
    step: int
    free: int  # now, before the DiT is there

    @property
    def total(self) -> int:
        return self.weights + self.step


def estimate(plan: Plan, device: torch.device, swapped: int | None = None) -> Estimate:
    """Return what the largest step takes; swapped: blocks in main memory, in place of --blocks_to_swap."""
    precision, swap = plan.options.precision, plan.options.swap
    make = block_linears(
        plan.shape, plan.dtype, device, precision.fp8_base, precision.fp8_scaled, quantize=precision.quantize
    )(0)
    blocks = plan.shape.blocks
    swapped = (0 if swap.auto else swap.blocks_to_swap) if swapped is None else swapped
    block, rest = weight_bytes(plan.shape, plan.dtype, make)
    there = rest + (blocks - swapped + slots_for(swapped, swap.block_swap_ring_size)) * block
    if plan.options.pair.dit_high_noise and not plan.options.pair.offload_inactive_dit:
        there *= 2
    if not plan.trained.beside:
        moments = moment_bytes(plan.options.optimizer, device, plan.trained.shapes)
        gradient = 0 if plan.trained.fused else plan.dtype.itemsize
        there = round(there * (1 + (gradient + moments) / plan.dtype.itemsize))
    waiting = block if swapped else 0
    steps = [step_bytes(plan.shape, step, plan.dtype, make is not None, waiting) for step in plan.steps()]
    return Estimate(there, max(steps), free_memory(device))


def savings(plan: Plan) -> str:
    """Return the options that save memory and are not in use, the first to try first."""
    options, trained = plan.options, plan.trained
    precision, swap = options.precision, options.swap
    found = []
    if trained.beside and not swap.auto:
        found.append("--blocks_to_swap auto")
    elif not trained.beside and not swap.blocks_to_swap:
        found.append(f"--blocks_to_swap {plan.shape.blocks}")
    if not precision.gradient_checkpointing:
        found.append("--gradient_checkpointing")
    elif not precision.gradient_checkpointing_cpu_offload:
        found.append("--gradient_checkpointing_cpu_offload")
    if trained.beside and not (precision.fp8_base or precision.quantize):
        found.append("--fp8_base")
    found += [f"--{name}" for name in ("full_bf16", "fused_backward_pass") if not getattr(trained.options, name, True)]
    if not trained.beside and options.optimizer.optimizer_type.lower() == "adamw":
        found.append("--optimizer_type adamw8bit")
    if any(config.batch_size > 1 for config in plan.data.configs):
        found.append("batch_size 1 in the dataset file")
    found.append("a smaller resolution or fewer frames")
    first, *more = found
    rest = " or ".join([", ".join(more[:-1]), more[-1]] if more[1:] else more)
    return f"use {first}" + (f"; if that is not enough {rest}" if more else "")


@contextlib.contextmanager
def memory_advised(plan: Plan) -> Iterator[None]:
    """Say in a UserError what would save memory where the body runs out of it."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        fix = f"{savings(plan)}; docs/memory.md lists what saves how much"
        raise not_enough_memory(error, plan.options.swap.blocks_to_swap, fix) from None
