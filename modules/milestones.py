"""What a run does besides its steps, and when: the files, states, samples and validations that its options plan."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from modules.preflight import Plan

FILE, STATE, SAMPLE, VALIDATION = "file", "state", "sample", "validation"


@dataclass(frozen=True)
class Milestone:
    """One of them; all that a run still has before it are sorted by step."""

    step: int
    kind: str
    series: str  # "step", "epoch" or "end": what its name counts
    number: int  # that it counts


def milestones(plan: Plan) -> list[Milestone]:
    """Return all files, states, samples and validations of a run, from where it begins or goes on."""
    saving, states, samples = plan.options.saving, plan.options.states, plan.options.samples
    begin, ends = plan.state.progress.step if plan.state else 0, epoch_ends(plan)
    found = []

    def add(kind: str, series: str, every: int | None, numbers: Sequence[tuple[int, int]]) -> None:
        found.extend(Milestone(step, kind, series, number) for step, number in numbers if every and not number % every)

    steps = [(step, step) for step in range(begin + 1, plan.total_steps + 1)]
    epochs = [(step, epoch) for step, epoch in ends if epoch < plan.epochs]
    for series, every, numbers in (
        ("step", saving.save_every_n_steps, steps),
        ("epoch", saving.save_every_n_epochs, epochs),
    ):
        add(FILE, series, every, numbers)
        if states.save_state:
            add(STATE, series, every, numbers)
    if plan.samples:
        add(SAMPLE, "step", samples.sample_every_n_steps, steps)
        at_steps = {each.step for each in found if each.kind == SAMPLE}
        add(SAMPLE, "epoch", samples.sample_every_n_epochs, [pair for pair in ends if pair[0] not in at_steps])
    if plan.validation:
        due, last = plan.validation.due, plan.total_steps
        measured = [step for step, _ in steps if due(step, None, step == last)]
        measured += [step for step, epoch in ends if due(step, epoch, step == last)] + [0] * (begin == 0)
        found += [Milestone(step, VALIDATION, "step", step) for step in set(measured)]
    if states.save_state or states.save_state_on_train_end:
        found.append(Milestone(plan.total_steps, STATE, "end", 0))
    found.append(Milestone(plan.total_steps, FILE, "end", 0))
    if plan.samples and samples.sample_at_first and not begin:
        found.append(Milestone(0, SAMPLE, "step", 0))
    return sorted(found, key=lambda each: each.step)


def epoch_ends(plan: Plan) -> list[tuple[int, int]]:
    """Return (step, epoch) of the end of each epoch that the run still has before it."""
    accumulated, progress = plan.options.training.gradient_accumulation_steps, plan.state and plan.state.progress
    rounds = math.ceil(plan.batches / accumulated)
    step, first = (progress.step, progress.epoch) if progress else (0, 0)
    step -= math.ceil(plan.begun / accumulated)
    return [
        (min(step + rounds * number, plan.total_steps), first + number) for number in range(1, plan.epochs - first + 1)
    ]


class Ahead:
    """How many milestones of each kind are left after a step."""

    def __init__(self, planned: Sequence[Milestone]):
        kinds = {each.kind for each in planned}
        self._steps = {kind: sorted(each.step for each in planned if each.kind == kind) for kind in kinds}

    def after(self, step: int) -> dict[str, int]:
        return {kind: len(steps) - bisect.bisect_right(steps, step) for kind, steps in self._steps.items()}
