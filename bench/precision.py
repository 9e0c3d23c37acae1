"""Measure how far each way of holding weights takes the velocity of the tiny world's model from exact arithmetic.

python -m bench.precision
python -m bench.precision --device cuda
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.measure import distance
from modules.generation import draw_noise
from modules.solvers import Step, sample
from wan.configs import TASKS
from wan.loading import load_dit
from wan.model import WanModel
from wan.t5 import load_t5

WEIGHTS = Path(__file__).resolve().parent.parent / "examples" / "tiny_world" / "weights"
PROMPTS = (
    "a red star spins on a black background",
    "a blue ring moves left on a white background",
    "a green square grows on a gray background",
)
STEPS, SHIFT, LOOKED_AT = 20, 3.0, (1, 7, 13, 19)  # the latents of these steps
WAYS = {  # of holding the DiT's linear weights
    "bf16": {},
    "`--fp8`": {"fp8": True},
    "`--fp8_scaled`": {"fp8": True, "fp8_scaled": True},
    "`--fp8_scaled --fp8_fast`": {"fp8": True, "fp8_scaled": True, "fp8_fast": True},
    "`--quantize int8`": {"quantize": "int8"},
    "`--quantize nf4`": {"quantize": "nf4"},
}
Example = tuple[Tensor, Tensor, Tensor]  # latents [1 16 f h w], timestep [1], text [n D]


def dit(dtype: torch.dtype, device: torch.device, **way) -> WanModel:
    return load_dit(WEIGHTS / "dit_t2v.safetensors", TASKS["t2v-1.3B"], dtype, device, **way)


def texts(device: torch.device, dtype: torch.dtype, fp8: bool = False) -> list[Tensor]:
    t5 = load_t5(WEIGHTS / "t5.safetensors", dtype, device, WEIGHTS / "spiece.model", fp8)
    return [t5.encode([prompt])[0] for prompt in PROMPTS]


def examples(exact: WanModel, embeddings: Sequence[Tensor]) -> list[Example]:
    """Return what the model sees at some steps on the way from noise to the video of each prompt."""
    seen: list[Example] = []
    for seed, text in enumerate(embeddings):

        def velocity(x: Tensor, step: Step, text: Tensor = text) -> Tensor:
            timestep = torch.tensor([step.timestep], device=x.device)
            if step.index in LOOKED_AT:
                seen.append((x, timestep, text))
            return exact(x, timestep, [text])

        sample("unipc", velocity, draw_noise(17, 64, 64, seed, exact.device)[None], STEPS, SHIFT)
    return seen


def velocities(model: WanModel, given: Sequence[Example]) -> Tensor:
    return torch.cat([model(x, timestep, [text.to(model.dtype)]) for x, timestep, text in given])


@torch.no_grad()
def rows(device: torch.device) -> list[tuple[str, float, float]]:
    """Return (way, distance from float32, distance from bf16), of the velocity, for fp8_t5 of the text embedding."""
    embeddings = texts(device, torch.float32)
    given = examples(dit(torch.float32, device), embeddings)
    exact = velocities(dit(torch.float32, device), given)
    found = {name: velocities(dit(torch.bfloat16, device, **way), given) for name, way in WAYS.items()}
    table = [(name, distance(out, exact), distance(out, found["bf16"])) for name, out in found.items()]
    exact, rounded, coarse = (
        torch.cat(texts(device, dtype, fp8)).float()
        for dtype, fp8 in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True))
    )
    table.append(("text embedding, bf16", distance(rounded, exact), 0.0))
    table.append(("text embedding, `--fp8_t5`", distance(coarse, exact), distance(coarse, rounded)))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    table = rows(parser.parse_args().device)
    print("| weights | from float32 | from bf16 |\n| --- | --- | --- |")
    for name, from_exact, from_bf16 in table:
        print(f"| {name} | {100 * from_exact:.2f} % | {100 * from_bf16:.2f} % |")


if __name__ == "__main__":
    main()
