"""Sigma schedules and the three solvers of the flow's equation dx/dsigma = velocity(x, sigma).

Along the straight path x_sigma = (1 - sigma) x_0 + sigma e the velocity is e - x_0, so every prediction of the model
also names the clean latents it aims at: m = x - sigma v. UniPC and DPM-Solver++ extrapolate m over the half log
signal-to-noise ratio lambda = ln((1 - sigma) / sigma); Euler follows v itself. Everything here computes in float32, and
steps are counted, never looked up by their timestep, because timesteps may repeat.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError

TRAINING_TIMESTEPS = 1000
FIRST_UNIPC_SIGMA = float(np.float32(1 - 1 / TRAINING_TIMESTEPS))


class Step(NamedTuple):
    """Where a run stands when the model is asked for a velocity."""

    index: int
    timestep: float  # what the model is told, 1000 at most
    sigma: float  # how noisy x is, 1 at most


class Memory(NamedTuple):
    """What a multistep solver keeps of the steps before."""

    data: tuple[Tensor, ...] = ()  # the last two predictions of the clean latents, newest last
    x: Tensor | None = None  # the (corrected) sample that the last step started from
    order: int = 1  # of the last prediction


Velocity = Callable[[Tensor, Step], Tensor]
StepFunction = Callable[[Tensor, Tensor, int, tuple[float, ...], Memory], tuple[Tensor, Memory]]


def sigma_schedule(solver: str, steps: int, shift: float, listed: Sequence[float] = ()) -> tuple[Tensor, Tensor]:
    """Return the `steps` timesteps told to the model and the `steps` + 1 float32 sigmas, which fall to 0.

    The timesteps of unipc and dpm++ are int64, truncated in float64 as the official schedulers do; Euler's are float32.
    listed: Euler's timesteps before the shift, for others than evenly spaced ones.
    """
    if steps < 1:
        raise UserError(
            f"--infer_steps {steps}: at least one step is needed", fix="leave it out for the task's default"
        )
    if not (shift > 0 and math.isfinite(shift)):
        raise UserError(f"--flow_shift {shift}: the shift must be above 0", fix="leave it out for the task's default")
    if listed and solver != "vanilla":
        raise UserError(f"--timesteps: not with --sample_solver {solver}", fix="add --sample_solver vanilla")
    if solver == "vanilla":
        grid = torch.tensor([*listed, 0]) / TRAINING_TIMESTEPS if listed else torch.linspace(1, 0, steps + 1)
        sigmas = shift * grid / (1 + (shift - 1) * grid)
        timesteps = sigmas[:-1] * TRAINING_TIMESTEPS
    else:
        first = FIRST_UNIPC_SIGMA if solver == "unipc" else 1.0
        grid = np.linspace(first, 0, steps + 1)
        exact = shift * grid / (1 + (shift - 1) * grid)
        sigmas = torch.from_numpy(exact.astype(np.float32))
        timesteps = torch.from_numpy((exact[:-1] * TRAINING_TIMESTEPS).astype(np.int64))
    if not bool((sigmas.diff() < 0).all()):
        raise UserError(
            f"--flow_shift {shift} with --infer_steps {steps}: some steps would not remove any noise",
            fix="use a lower shift or fewer steps",
        )
    return timesteps, sigmas


def log_snr(sigma: float) -> float:
    """Return lambda = ln((1 - sigma) / sigma): minus infinity for pure noise, infinity for a clean sample."""
    if sigma <= 0:
        return math.inf
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf


def _first_order(x: Tensor, data: Tensor, sigma: float, next_sigma: float) -> tuple[Tensor, float]:
    """Return x carried to `next_sigma` along constant `data`, and the factor that weighs corrections to `data`."""
    phi = math.expm1(log_snr(sigma) - log_snr(next_sigma))
    factor = (1 - next_sigma) * phi
    return (next_sigma / sigma) * x - factor * data, factor


def euler_step(velocity: Tensor, x: Tensor, i: int, sigmas: tuple[float, ...], memory: Memory) -> tuple[Tensor, Memory]:
    """Return x at sigmas[i + 1] by Euler's method, which remembers nothing."""
    return x + (sigmas[i + 1] - sigmas[i]) * velocity, memory


def dpmpp_step(velocity: Tensor, x: Tensor, i: int, sigmas: tuple[float, ...], memory: Memory) -> tuple[Tensor, Memory]:
    """Return x at sigmas[i + 1] by DPM-Solver++ 2M (midpoint; arXiv:2211.01095), first order at both ends."""
    data = x - sigmas[i] * velocity
    x_next, factor = _first_order(x, data, sigmas[i], sigmas[i + 1])
    if memory.data and i < len(sigmas) - 2:
        lambdas = [log_snr(sigma) for sigma in sigmas[i - 1 : i + 2]]
        ratio = (lambdas[1] - lambdas[0]) / (lambdas[2] - lambdas[1])  # infinite after a first sigma of 1
        x_next = x_next - 0.5 * factor / ratio * (data - memory.data[-1])
    return x_next, Memory(data=(data,))


def _unipc_correct(data: Tensor, i: int, sigmas: tuple[float, ...], memory: Memory) -> Tensor:
    """Return the sample at sigmas[i] recomputed from the one before with the new prediction `data`."""
    x, factor = _first_order(memory.x, memory.data[-1], sigmas[i - 1], sigmas[i])
    if memory.order == 1:
        return x - 0.5 * factor * (data - memory.data[-1])
    before, last, now = (log_snr(sigma) for sigma in sigmas[i - 2 : i + 1])
    h = now - last
    ratio = (before - last) / h
    phi = math.expm1(-h)
    b1 = (phi / -h - 1) / phi
    b2 = 2 * ((phi / -h - 1) / -h - 0.5) / phi
    weight_before = (b1 - b2) / (1 - ratio)
    change_before = (memory.data[-2] - memory.data[-1]) / ratio
    return x - factor * (weight_before * change_before + (b1 - weight_before) * (data - memory.data[-1]))


def unipc_step(velocity: Tensor, x: Tensor, i: int, sigmas: tuple[float, ...], memory: Memory) -> tuple[Tensor, Memory]:
    """Return x at sigmas[i + 1] by UniPC (arXiv:2302.04867) of order 2, "bh2", on data predictions.

    The sample is first corrected with the new prediction, which is not computed again from the corrected sample.
    """
    data = x - sigmas[i] * velocity
    if memory.data:
        x = _unipc_correct(data, i, sigmas, memory)
    order = min(2, len(sigmas) - 1 - i, len(memory.data) + 1)
    x_next, factor = _first_order(x, data, sigmas[i], sigmas[i + 1])
    if order == 2:
        lambdas = [log_snr(sigma) for sigma in sigmas[i - 1 : i + 2]]
        ratio = (lambdas[0] - lambdas[1]) / (lambdas[2] - lambdas[1])
        x_next = x_next - 0.5 * factor / ratio * (memory.data[-1] - data)
    return x_next, Memory(data=(*memory.data[-1:], data), x=x, order=order)


SOLVERS: dict[str, StepFunction] = {"unipc": unipc_step, "dpm++": dpmpp_step, "vanilla": euler_step}


class Stepper:
    """A run taken one step at a time: `timesteps` to ask the model at, and `step` with its answer.

    first: number of the step to begin with, of whatever is as noisy there. listed: see sigma_schedule().
    """

    def __init__(self, solver: str, steps: int, shift: float, first: int = 0, listed: Sequence[float] = ()):
        self.timesteps, self.sigmas = sigma_schedule(solver, steps, shift, listed)
        self._advance = SOLVERS[solver]
        self._sigmas = tuple(self.sigmas.tolist())
        self._memory = Memory()
        self._done = first

    def next(self) -> Step:
        """Return the step that `step` will take."""
        return Step(self._done, float(self.timesteps[self._done]), self._sigmas[self._done])

    def step(self, velocity: Tensor, x: Tensor) -> Tensor:
        """Return x, float32, at the next sigma, from the model's velocity for x at this one."""
        x, self._memory = self._advance(velocity.float(), x.float(), self._done, self._sigmas, self._memory)
        self._done += 1
        return x


def sample(
    solver: str,
    velocity: Velocity,
    x: Tensor,
    steps: int,
    shift: float,
    on_step: Callable[[Step, Tensor, Tensor], None] = lambda step, x, clean: None,
    first: int = 0,
    listed: Sequence[float] = (),
) -> Tensor:
    """Return the clean latents at the end of the flow from the noise `x`, in float32.

    first: number of the step to begin with, where x is as noisy as there, and all steps before are left out.
    velocity(x, step) is asked once a step, in order; on_step(step, x, clean) hears of each new x, and of the
    clean latents that the step's velocity leads to. listed: see sigma_schedule().
    """
    stepper = Stepper(solver, steps, shift, first, listed)
    for _ in range(first, steps):
        step = stepper.next()
        answer = velocity(x, step)
        clean = x - step.sigma * answer
        x = stepper.step(answer, x)
        on_step(step, x, clean)
    return x
