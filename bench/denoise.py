"""Compare the denoising of a video, 20 steps with guidance, with the same through diffusers' DiT and the plain twin.

python -m bench.denoise
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from bench.dit import Size, both, inputs, velocity_of_theirs
from bench.measure import TWO_WAY, Row, Setting, compared, main
from bench.two_way import plain_twin
from modules.conditions import Condition
from modules.generation import Texts, denoise
from modules.generation_options import SamplingOptions
from modules.guidance import classifier_free
from modules.solvers import Velocity, sample
from wan.model import WanModel

STEPS, SHIFT, SCALE = 20, 3.0, 5.0
Predictor = Callable[[Tensor, Tensor, list[Tensor]], Tensor]  # (x, timestep, text) > velocity
SIZES = {
    "S=128": Size(128, 512, 4, 6, 96, (2, 16, 16)),
    "S=512": Size(128, 512, 4, 6, 96, (8, 16, 16)),
}


@torch.no_grad()
def rows(setting: Setting) -> Iterator[Row]:
    for name, size in list(SIZES.items())[: 1 if setting.quick else None]:
        ours, theirs = both(size, setting)
        (noise, prompt), (_, negative) = inputs(size, setting, rows=20), inputs(size, setting, rows=100)
        run_ours = partial(denoised, ours, noise, prompt, negative)
        run_theirs = partial(denoised_by_others, as_velocity(theirs, setting.dtype), noise, prompt, negative)
        run_twin = partial(denoised_by_others, plain_twin(ours), noise, prompt, negative)
        others = {"": (run_theirs, 0.6), TWO_WAY: (run_twin, 0.5)}
        yield from compared(
            f"{STEPS} steps with guidance, d={size.dim}, {size.blocks} blocks, {name}", run_ours, others, setting
        )


def denoised(dit: WanModel, noise: Tensor, prompt: list[Tensor], negative: list[Tensor]) -> Tensor:
    texts = Texts(prompt[0], negative[0])
    return denoise(dit, noise[0], texts, Condition(), STEPS, SHIFT, SCALE, SamplingOptions())[None]


def as_velocity(dit: nn.Module, dtype: torch.dtype) -> Predictor:
    """Return diffusers' DiT as a function of what ours takes."""

    def velocity(x: Tensor, timestep: Tensor, text: list[Tensor]) -> Tensor:
        return velocity_of_theirs(dit, x.to(dtype), timestep, text)

    return velocity


@torch.no_grad()
def denoised_by_others(dit: Predictor, noise: Tensor, prompt: list[Tensor], negative: list[Tensor]) -> Tensor:
    """Return what the noise becomes with two predictions a step, each of which begins anew with the text."""

    def predicting(text: list[Tensor]) -> Velocity:
        return lambda x, step: dit(x, torch.tensor([step.timestep], device=x.device), text)

    velocity = classifier_free(predicting(prompt), predicting(negative), SCALE)
    return sample(SamplingOptions().sample_solver, velocity, noise, STEPS, SHIFT)


if __name__ == "__main__":
    main(__doc__, {"denoise": rows})
