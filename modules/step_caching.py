"""Predictions of the DiT that are used again at later steps: three ways to tell when, behind one interface.

Each way estimates how wrong it would be to go on with what was last computed. The estimates add up from step to step,
and where their sum reaches a threshold the DiT runs again. All predictions of a step (conditional, unconditional,
skipped) are computed together or used again together: guidance multiplies their difference, so one that is fresh beside
one that is not makes a larger error than both of the same step.

What is used again is either the velocity less the noisy latents (EasyCache), or what the blocks have added to the
tokens (TeaCache, MagCache), so that the embeddings of the time and the head still follow the step.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from modules.solvers import Step
from wan.block_reuse import Residual, velocities
from wan.model import WanModel, sinusoid

# velocity(dit, x, step, the arguments of each prediction by its name): what is asked of the DiT in a step
Predict = Callable[[WanModel, Tensor, Step, Mapping[str, Mapping[str, Any]]], list[Tensor]]


@dataclass(frozen=True)
class CacheSettings:
    """How predictions are used again in one denoising."""

    method: str  # of METHODS
    threshold: float
    steps: int  # of the denoising
    warmup: int  # first steps, all of which are computed
    last: bool = False  # the last step is computed too
    coefficients: tuple[float, ...] = ()  # TeaCache's polynomial, the highest power first
    projected: bool = False  # it is of the projection of the time embedding
    curve: tuple[float, ...] = ()  # MagCache's, one number a step
    most: int = 0  # MagCache: steps in a row that are not computed


class Asked:
    """What a step asks the DiT for."""

    def __init__(self, dit: WanModel, x: Tensor, step: Step):
        self.dit, self.x, self.step = dit, x, step
        self.timestep = torch.tensor([step.timestep], device=x.device)

    @cached_property
    def time(self) -> Tensor:
        """The embedding of the timestep [1 D], float32."""
        return self.dit.time_embedding(sinusoid(self.timestep, self.dit.shape.freq_dim))

    @cached_property
    def modulation(self) -> Tensor:
        """What the blocks are modulated by, before what each adds of its own: [1 6D], float32."""
        return self.dit.time_projection(self.time)


class Estimate:
    """How wrong the predictions of a model get by being used again; this one has every step computed."""

    def __init__(self, settings: CacheSettings):
        pass

    def change(self, asked: Asked) -> float:
        """Return what a step adds to the error; infinite where it has to be computed."""
        return math.inf

    def restart(self) -> None:
        """The step last asked about is computed."""

    def computed(self, x: Tensor, velocity: Tensor) -> None:
        """Hear what has been computed of the first prediction."""


class EasyCache(Estimate):
    """EasyCache (arXiv:2507.02860): how much the velocity changes, guessed from how much the latents do.

    With |.| the mean of absolute values, and i, j the last two computed steps, k = |v_i - v_j| / |x_i - x_j| is how far
    the velocity moves by a move of the latents. A step n adds k |x_n - x_(n-1)| / |v_i|. In place of a velocity stands
    x_n + (v_i - x_i).
    """

    def __init__(self, settings: CacheSettings):
        self.rate = math.inf
        self.seen: Tensor | None = None  # the latents last asked about
        self.x: Tensor | None = None
        self.velocity: Tensor | None = None

    def change(self, asked: Asked) -> float:
        before, self.seen = self.seen, asked.x
        if before is None or math.isinf(self.rate):
            return math.inf
        return self.rate * _size(asked.x - before) / _size(self.velocity)

    def computed(self, x: Tensor, velocity: Tensor) -> None:
        if self.velocity is not None and (moved := _size(x - self.x)) > 0:
            self.rate = _size(velocity - self.velocity) / moved
        self.x, self.velocity = x, velocity


class TeaCache(Estimate):
    """TeaCache (arXiv:2411.19108): a polynomial, fitted to the weights, of how much the embedding of the time changes.

    A step n adds P(|e_n - e_(n-1)| / |e_(n-1)|), e being the embedding or its projection.
    """

    def __init__(self, settings: CacheSettings):
        self.coefficients, self.projected = settings.coefficients, settings.projected
        self.seen: Tensor | None = None

    def change(self, asked: Asked) -> float:
        before, self.seen = self.seen, asked.modulation if self.projected else asked.time
        if before is None:
            return math.inf
        changed, value = _size(self.seen - before) / _size(before), 0.0
        for coefficient in self.coefficients:
            value = value * changed + coefficient
        return value


class MagCache(Estimate):
    """MagCache (arXiv:2506.09045): how much shorter the blocks' sum gets, as was measured once with the weights.

    With the curve's numbers g, a step n after the computed step i adds |1 - g_(i+1) ... g_n|. Not more than `most`
    steps in a row go without computing.
    """

    def __init__(self, settings: CacheSettings):
        self.curve, self.most = settings.curve, settings.most
        self.ratio, self.passed = 1.0, 0

    def change(self, asked: Asked) -> float:
        self.ratio *= self.curve[asked.step.index]
        self.passed += 1
        return abs(1 - self.ratio) if self.passed <= self.most else math.inf

    def restart(self) -> None:
        self.ratio, self.passed = 1.0, 0


METHODS: dict[str, type[Estimate]] = {
    "easycache": EasyCache,
    "teacache": TeaCache,
    "magcache": MagCache,
    "calibrate": Estimate,  # MagCache's curve is measured
}


class Prediction:
    """What was last computed of one of a step's predictions."""

    def __init__(self, measured: bool):
        self.step = -1
        self.place: tuple[int, ...] | None = None  # among the predictions of that step, where it matters
        self.offset: Tensor | None = None  # the velocity less the latents
        self.residual = Residual(measured)


class State:
    """What is known of one model from step to step; of a pair, each has its own."""

    def __init__(self, settings: CacheSettings):
        self.settings, self.error = settings, 0.0
        self.estimate = METHODS[settings.method](settings)
        self.predictions: dict[str, Prediction] = {}

    def reused(self, asked: Asked, seen: Sequence[Prediction], places: Sequence[tuple[int, ...]]) -> list[bool]:
        """Return which predictions of a step, the first of which every step has, are used again."""
        settings, index, first = self.settings, asked.step.index, seen[0]
        more = self.estimate.change(asked)
        due = index < settings.warmup or (settings.last and index == settings.steps - 1) or settings.threshold == 0
        if not due and first.place == places[0]:
            self.error += more
            if self.error < settings.threshold:
                known = zip(seen, places, strict=True)
                return [each.step >= first.step and each.place == place for each, place in known]
        self.error = 0.0
        self.estimate.restart()
        return [False] * len(seen)


class StepCache:
    """The predictions of one denoising, some of them used again; agree: has all processes do as the first decides."""

    def __init__(
        self,
        settings: CacheSettings,
        agree: Callable[[Callable[[], list[bool]]], list[bool]] = lambda decide: decide(),
        processes: int = 1,
    ):
        self.settings, self.agree = settings, agree
        # Processes share out the tokens of a prediction by its place in the step, and each keeps its part of the sum.
        self.parted = processes > 1 and settings.method != "easycache"
        self.states: WeakKeyDictionary[WanModel, State] = WeakKeyDictionary()
        self.asked, self.computed, self.computed_steps = 0, 0, 0
        self.curve = [1.0] * settings.steps  # how long the blocks' sum is by what it was the step before, if measured

    def __call__(self, dit: WanModel, x: Tensor, step: Step, passes: Mapping[str, Mapping[str, Any]]) -> list[Tensor]:
        """Return the velocity of each prediction: see Predict."""
        state = self.states.setdefault(dit, State(self.settings))
        measured = self.settings.method == "calibrate"
        seen = [state.predictions.setdefault(name, Prediction(measured)) for name in passes]
        places = [(len(passes), i) if self.parted else () for i in range(len(passes))]
        asked = Asked(dit, x, step)
        reused = self.agree(lambda: state.reused(asked, seen, places))
        found = self._velocities(asked, list(passes.values()), seen, reused)
        for prediction, place, again, velocity in zip(seen, places, reused, found, strict=True):
            if not again:
                prediction.step, prediction.place, prediction.offset = step.index, place, velocity - x
        if not reused[0]:
            state.estimate.computed(x, found[0])
            self.curve[step.index] = seen[0].residual.growth or 1.0
        self.asked, self.computed = self.asked + len(passes), self.computed + reused.count(False)
        self.computed_steps += not all(reused)
        return found

    def _velocities(
        self, asked: Asked, passes: list[Mapping[str, Any]], seen: list[Prediction], reused: list[bool]
    ) -> list[Tensor]:
        dit, x = asked.dit, asked.x
        if self.settings.method != "easycache":
            return velocities(dit, x, asked.timestep, passes, [each.residual for each in seen], reused)
        due = [each for each, again in zip(passes, reused, strict=True) if not again]
        computed = iter(dit.velocities(x, asked.timestep, due) if due else ())
        return [x + each.offset if again else next(computed) for each, again in zip(seen, reused, strict=True)]


def exact(dit: WanModel, x: Tensor, step: Step, passes: Mapping[str, Mapping[str, Any]]) -> list[Tensor]:
    """Return the velocity of each prediction of a step, all computed: see Predict."""
    return dit.velocities(x, torch.tensor([step.timestep], device=x.device), list(passes.values()))


def _size(x: Tensor) -> float:
    return x.abs().mean().item()
