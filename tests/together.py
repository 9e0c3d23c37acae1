"""Videos that one process, or several together, make of tiny models.

    python -m torch.distributed.run --standalone --nproc_per_node 4 -m tests.together FOLDER

FOLDER holds the models of tests/tiny.py and start.png; latents go there as <case>_<processes>.safetensors.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from modules.conditions import Condition, encode_conditions, encode_pictures
from modules.generation import denoise_all, encode_prompts
from modules.generation_options import LoraOptions, Models, RunOptions, SamplingOptions
from modules.outputs import Files, Result
from modules.prompts import Request
from modules.step_cache_options import StepCacheOptions
from utils.errors import run_script
from utils.processes import Processes, joined
from wan.block_swap import SwapOptions
from wan.clip import ClipOptions
from wan.compiling import CompileOptions
from wan.configs import TASKS
from wan.dit_file import DitOptions
from wan.t5 import T5Options
from wan.vae import VaeOptions


@dataclass(frozen=True)
class Case:
    """A run of two videos that differ in what they ask for."""

    task: str = "t2v-1.3B"
    dit: str = "dit_t2v"
    sampling: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    swap: dict[str, Any] = field(default_factory=dict)
    compiling: dict[str, Any] = field(default_factory=dict)
    step_cache: dict[str, Any] = field(default_factory=dict)


# Every second step is computed, whatever the tokens are.
REUSED = {"step_cache": "teacache", "teacache_coefficients": "0,0.06", "step_cache_threshold": 0.1}
SLG = {"slg_mode": "original", "slg_layers": "1", "slg_end": 0.5}
CASES = {
    "guided": Case(),
    "odd tokens": Case(asked={"width": 112, "height": 80, "frames": 9}, sampling={"sample_solver": "dpm++"}),
    "skipped layers": Case(sampling=SLG, run={"fp8_scaled": True}),
    "unguided": Case(asked={"guidance_scale": 1.0}),
    "fewer tokens than processes": Case(asked={"width": 16, "height": 16, "frames": 1}),
    "some unguided steps": Case(sampling={"cfg_skip_mode": "late", "cfg_apply_ratio": 0.5}),
    "used again": Case(sampling=SLG, asked={"steps": 4}, step_cache=REUSED | {"step_cache_warmup": 0.25}),
    "used again, alone at first": Case(
        sampling={"cfg_skip_mode": "early", "cfg_apply_ratio": 0.5},
        asked={"steps": 4},
        step_cache={"step_cache": "easycache", "step_cache_threshold": 5.0, "step_cache_warmup": 0.25},
    ),
    "swapped": Case("i2v-14B", "dit_i2v", swap={"blocks_to_swap": 2, "block_swap_ring_size": 1}),
}
COMPILED = {"compiled": Case(compiling={"compile": True, "compile_backend": "aot_eager"})}


def make(case: Case, folder: Path, processes: Processes) -> list[Tensor]:
    """Return the latents [16 f h w] of a case's two videos."""
    config = TASKS[case.task]
    models = Models(
        config,
        torch.device("cpu"),
        DitOptions(case.task, folder / f"{case.dit}.safetensors"),
        VaeOptions(folder / "vae.safetensors"),
        T5Options(folder / "t5.safetensors", folder / "spiece.model"),
        ClipOptions(folder / "clip.safetensors"),
        LoraOptions(),
        RunOptions(device="cpu", **case.run),
        SwapOptions(**case.swap),
        CompileOptions(**case.compiling),
        step_cache=StepCacheOptions(**case.step_cache),
    )
    settings = {"width": 96, "height": 64, "frames": 5, "steps": 2, "flow_shift": 5.0, "guidance_scale": 5.0, "seed": 7}
    settings |= {"image": folder / "start.png" if config.images else None} | case.asked
    settings["guidance_scale_high_noise"] = settings["guidance_scale"]
    requests = [
        Request(prompt="a red circle", negative_prompt="dark", **settings),
        Request(prompt="a blue star", negative_prompt="dark", **settings | {"guidance_scale": 1.0, "seed": 8}),
    ]
    sampling = SamplingOptions(**case.sampling)
    texts = processes.first(lambda: encode_prompts(requests, models, sampling))
    conditions = [Condition()] * len(requests)
    if config.images:
        features = processes.first(lambda: encode_pictures(requests, models))
        conditions = processes.first(lambda: encode_conditions(requests, features, models.load_vae(), config))
    results = [Result(Files(), settings["frames"])] * len(requests)
    return denoise_all(requests, texts, conditions, models, sampling, results, processes)


def make_all(folder: Path, names: Iterable[str] = CASES) -> None:
    """Make the cases and write the latents."""
    with joined() as processes:
        for name in names:
            latents = make((CASES | COMPILED)[name], folder, processes)
            if processes.is_first:
                tensors = {str(i): latent for i, latent in enumerate(latents)}
                save_file(tensors, folder / f"{name}_{processes.count}.safetensors")


if __name__ == "__main__":
    run_script(lambda: make_all(Path(sys.argv[1])))
