"""Compare the denoising of a video, 20 steps with guidance, with the same steps through diffusers' DiT.

python -m bench.denoise
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from bench.dit import Size, both, inputs
from bench.measure import Row, Setting, distance, main, timed_pairs
from modules.generation import Condition, SamplingOptions, Texts, denoise
from modules.guidance import classifier_free
from modules.solvers import Step, Velocity, sample
from tests.diffusers_dit import padded
from wan.model import WanModel

STEPS, SHIFT, SCALE = 20, 3.0, 5.0
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
        run_theirs = partial(denoised_by_theirs, theirs, noise, prompt, negative, setting.dtype)
        mine, other, ratio = timed_pairs(run_ours, run_theirs, setting.pairs)
        label = f"{STEPS} steps with guidance, d={size.dim}, {size.blocks} blocks, {name}"
        yield Row(label, mine, other, ratio, 0.6, "s", distance(run_ours(), run_theirs()))


def denoised(dit: WanModel, noise: Tensor, prompt: list[Tensor], negative: list[Tensor]) -> Tensor:
    texts = Texts(prompt[0], negative[0])
    return denoise(dit, noise[0], texts, Condition(), STEPS, SHIFT, SCALE, SamplingOptions())[None]


@torch.no_grad()
def denoised_by_theirs(
    dit: nn.Module, noise: Tensor, prompt: list[Tensor], negative: list[Tensor], dtype: torch.dtype
) -> Tensor:
    def predicting(text: list[Tensor]) -> Velocity:
        rows = padded(text)

        def velocity(x: Tensor, step: Step) -> Tensor:
            timestep = torch.tensor([step.timestep], device=x.device)
            return dit(x.to(dtype), timestep, rows, return_dict=False)[0].float()

        return velocity

    velocity = classifier_free(predicting(prompt), predicting(negative), SCALE)
    return sample(SamplingOptions().sample_solver, velocity, noise, STEPS, SHIFT)


if __name__ == "__main__":
    main(__doc__, {"denoise": rows})
