"""How to generate and with which models: the options of generation, and what loads its models by them."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from modules.guidance import CFG_SKIP_MODES, SLG_MODES
from modules.lora_files import LoraOptions, lora_deltas
from modules.solvers import SOLVERS
from modules.step_cache_options import StepCacheOptions
from utils.devices import compute_dtype, parse_dtype
from utils.errors import UserError
from utils.options import option, suggest
from wan.attention import ATTENTION_MODES
from wan.block_swap import SwapOptions
from wan.clip import ClipOptions
from wan.compiling import DYNAMIC, MODES, CompileOptions
from wan.configs import WanConfig
from wan.dit_file import DitOptions, dit_dtype
from wan.loading import load_dit
from wan.memory import Step as MemoryStep
from wan.model import WanModel
from wan.pair import HIGH, DitPair, PairOptions, load_pair, task_config
from wan.quantize import FORMATS
from wan.t5 import T5Options
from wan.vae import VaeOptions, WanVAE, load_vae

logger = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class SamplingOptions:
    """how noise becomes a video"""

    sample_solver: str = option("unipc", "the solver; vanilla is Euler's method", choices=tuple(SOLVERS))
    cpu_noise: bool = option(False, "draw the noise on the CPU: the same on every device, and the same as ComfyUI's")
    cfg_skip_mode: str = option(
        "none", "which steps do without the negative prompt, in half the time", choices=CFG_SKIP_MODES
    )
    cfg_apply_ratio: float | None = option(None, "share of the steps that keep it, 0 to 1; for --cfg_skip_mode")
    cfg_zero_star: bool = option(
        False,
        "CFG-Zero*: scale the prediction of the negative prompt to be as near as can be, and begin with zero steps",
    )
    cfg_zero_init_steps: int = option(
        1, "with --cfg_zero_star: first steps that change nothing, and need no prediction"
    )
    slg_mode: str | None = option(
        None, "skip-layer guidance: added to the other (original), or in its place (uncond)", choices=SLG_MODES
    )
    slg_layers: str | None = option(None, "numbers of the DiT blocks to skip", metavar="N,N,...")
    slg_scale: float = option(3.0, "weight of --slg_mode original")
    slg_start: float = option(0.0, "share of the steps before skip-layer guidance begins")
    slg_end: float = option(0.3, "share of the steps after which it ends")


@dataclass(frozen=True)
class RunOptions:
    """how the models run"""

    device: str | None = option(None, "cuda, cuda:1, cpu; left out: CUDA where there is one, or one for each process")
    attn_mode: str = option(
        "torch", "attention kernel; all but torch and sdpa (the same) need a package", choices=ATTENTION_MODES
    )
    fp8: bool = option(False, "hold the DiT's linear weights as float8: half the memory, a little less exact")
    fp8_scaled: bool = option(False, "the same with a scale for each 64 weights, which is more exact")
    fp8_fast: bool = option(
        False,
        "with --fp8_scaled: round what comes in to float8 too and multiply that, on GPUs of compute capability 8.9 or "
        "newer: faster and less exact (docs/memory.md); not in the first and the last block",
    )
    riflex_freq_index: int | None = option(
        None,
        "for videos of more than 81 frames: number of the frequency along time, from 1, that is changed so that they "
        "do not repeat (RIFLEx); 6 is usual",
    )
    quantize: str | None = option(
        None, "hold the DiT's linear weights as bitsandbytes does, instead of as float8", choices=tuple(FORMATS)
    )


@dataclass(frozen=True)
class GenerationCompileOptions(CompileOptions):
    """torch.compile"""

    compile_args: tuple[str, str, str, str] | None = option(
        None, "deprecated: four of these options in one", metavar=("BACKEND", "MODE", "DYNAMIC", "FULLGRAPH")
    )

    def resolved(self) -> CompileOptions:
        if self.compile_args is None:
            return super().resolved()
        if not self.compile:
            logger.warning("--compile_args: ignored without --compile")
            return CompileOptions()
        backend, *words = self.compile_args
        mode, dynamic, fullgraph = words = [word.lower() for word in words]
        choices = {"MODE": MODES, "DYNAMIC": DYNAMIC, "FULLGRAPH": ("true", "false")}
        for (name, known), word in zip(choices.items(), words, strict=True):
            if word not in known:
                raise UserError(f"--compile_args: {name} is {word}", suggest(word, known) or f"use {', '.join(known)}")
        return CompileOptions(True, backend, mode, dynamic, fullgraph == "true", self.compile_cache_size_limit)


@dataclass(frozen=True)
class GenerationPairOptions(PairOptions):
    """the two models of Wan2.2"""

    lazy_loading: bool = option(False, "load each of the two when the first step asks for it, and drop the other")


def generation_config(task: str, pair: GenerationPairOptions) -> WanConfig:
    """Return what a task has, with the boundary that is asked for. Raises UserError for options that exclude others."""
    if pair.lazy_loading and pair.offload_inactive_dit:
        raise UserError("--lazy_loading: keeps one model alone, --offload_inactive_dit both", "leave one of them out")
    if pair.lazy_loading and pair.dit_high_noise is None:
        logger.warning("--lazy_loading: ignored without --dit_high_noise")
    return task_config(task, pair)


@dataclass(frozen=True)
class Models:
    """Where the models are and how they run; each is loaded when its stage comes, and freed after it."""

    config: WanConfig
    device: torch.device
    dit: DitOptions
    vae: VaeOptions
    t5: T5Options
    clip: ClipOptions
    lora: LoraOptions
    run: RunOptions
    swap: SwapOptions = SwapOptions()
    compiling: CompileOptions = CompileOptions()
    pair: GenerationPairOptions = GenerationPairOptions()
    step_cache: StepCacheOptions = StepCacheOptions()

    def groups(self) -> tuple[object, ...]:
        """Return the options of all of them, in groups."""
        models = self.dit, self.pair, self.vae, self.t5, self.clip, self.lora
        return *models, self.run, self.swap, self.compiling, self.step_cache.repeated()

    def files(self) -> dict[str, Path | None]:
        """Return the weight files by the options that name them."""
        dits = {"dit": self.dit.dit, "dit_high_noise": self.pair.dit_high_noise}
        return {**dits, "vae": self.vae.vae, "t5": self.t5.t5, "clip": self.clip.clip}

    def load_dit(self, steps: Sequence[MemoryStep] = ()) -> WanModel | DitPair:
        """Return the DiT, or both of Wan2.2; steps: what they are going to compute."""
        return load_pair(
            partial(self._load_dit, steps),
            self.dit.dit,
            self.pair,
            self.config,
            self.device,
            self.swap,
            self.pair.lazy_loading,
        )

    def _load_dit(self, steps: Sequence[MemoryStep], path: Path, option: str) -> WanModel:
        files = self.lora.high_noise_files() if option == HIGH else self.lora.files()
        model = load_dit(
            path,
            self.config,
            compute_dtype(dit_dtype(self.dit.dit), self.device),
            self.device,
            deltas=lora_deltas(files),
            attn_mode=self.run.attn_mode,
            fp8=self.run.fp8 or self.run.fp8_scaled,
            fp8_scaled=self.run.fp8_scaled,
            fp8_fast=self.run.fp8_fast,
            quantize=self.run.quantize,
            swap=self.swap,
            disable_numpy_memmap=self.dit.disable_numpy_memmap,
            compiling=self.compiling,
            steps=steps,
            residual_dtype=parse_dtype(self.dit.residual_dtype),
            option=option,
        )
        model.second_picture_as_text = self.dit.compat_musubi
        model.riflex = self.run.riflex_freq_index
        return model

    def kept(self, name: str, load: Callable[[], Loaded]) -> Loaded:
        """Return what load() does; those who keep models (modules/interactive.py) load each, known by a name, once."""
        return load()

    def load_vae(self) -> WanVAE:
        dtype = parse_dtype(self.vae.vae_dtype) if self.vae.vae_dtype else compute_dtype(torch.bfloat16, self.device)
        return load_vae(self.vae.vae, dtype, self.device, self.vae.vae_cache_cpu, self.vae.tile)
