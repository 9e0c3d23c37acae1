"""What a run is going to do, in a table before any large model loads."""

import math
from collections import Counter

import torch

from modules.dataset_report import count, in_bytes
from modules.disk import check_room, sizes
from modules.memory_advice import estimate, savings
from modules.milestones import FILE, SAMPLE, STATE, milestones
from modules.preflight import Plan


def summary(plan: Plan, device: torch.device) -> list[str]:
    """Return the table; raises UserError where the disk has no room for a file and a state."""
    planned, size = milestones(plan), sizes(plan, device)
    kinds, step = Counter(each.kind for each in planned), plan.state.progress.step if plan.state else 0
    accumulated = plan.options.training.gradient_accumulation_steps
    rows = [("steps", _steps(plan, step, accumulated)), ("epochs", f"{plan.epochs:,} of {_batches(plan, accumulated)}")]
    for kind, name in ((FILE, "files"), (STATE, "states")):
        if kinds[kind]:
            rows.append((name, f"{kinds[kind]:,} of {in_bytes(size[kind])} each"))
    rows.append(("disk", check_room(plan, planned, size)))
    if plan.samples:
        rows.append(("samples", f"{count(kinds[SAMPLE], 'time')}, {count(len(plan.samples.samples), 'prompt')}"))
    rows.append(("GPU memory" if device.type == "cuda" else "memory", _memory(plan, device)))
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {text}" for name, text in rows]


def _steps(plan: Plan, step: int, accumulated: int) -> str:
    words = f"{plan.total_steps - step:,}"
    if step:
        words += f", from {step:,} to {plan.total_steps:,}"
    return words + (f", each of {accumulated} batches" if accumulated > 1 else "")


def _batches(plan: Plan, accumulated: int) -> str:
    steps = math.ceil(plan.batches / accumulated)
    return count(plan.batches, "batch", "batches") + (f", {count(steps, 'step')}" if accumulated > 1 else "")


def _memory(plan: Plan, device: torch.device) -> str:
    """Return the estimate of the peak and what is free, with advice where the one is more than the other."""
    swap, whole = plan.options.swap, estimate(plan, device)
    free = f"{in_bytes(whole.free)} are free"
    if swap.auto:
        least = estimate(plan, device, plan.shape.blocks)
        every, none = in_bytes(whole.total), in_bytes(least.total)
        return f"about {every} with all blocks there, {none} with all of them swapped; {free}"
    line = f"about {in_bytes(whole.total)}: weights {in_bytes(whole.weights)}, a step {in_bytes(whole.step)}; {free}"
    return line + (f". Too little by this estimate: {savings(plan)}" if whole.total > whole.free else "")
