"""How to generate and with which models: the options of generation, and what loads its models by them."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from modules.guidance import CFG_SKIP_MODES, SLG_MODES
from modules.solvers import SOLVERS
from modules.step_cache_options import StepCacheOptions
from networks.formats import weight_deltas
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
from wan.quantize import FORMATS
from wan.t5 import T5Options
from wan.vae import VaeOptions, WanVAE, load_vae

logger = logging.getLogger(__name__)


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
class LoraOptions:
    """LoRA"""

    lora_weight: tuple[Path, ...] = option((), "LoRA files of any key format, merged into the DiT while it loads")
    lora_multiplier: tuple[float, ...] = option((), "strength of each LoRA in turn; those left out have 1.0")

    def files(self) -> list[tuple[Path, float]]:
        """Return the LoRA files with their multipliers."""
        missing = len(self.lora_weight) - len(self.lora_multiplier)
        if missing < 0:
            raise UserError(
                f"--lora_multiplier: {len(self.lora_multiplier)} numbers for {len(self.lora_weight)} LoRA files",
                fix="give one number for each --lora_weight",
            )
        for multiplier in self.lora_multiplier:
            if not math.isfinite(multiplier):
                raise UserError(f"--lora_multiplier {multiplier}: not a usable number", fix="1.0 is full strength")
        return list(zip(self.lora_weight, (*self.lora_multiplier, *[1.0] * missing), strict=True))


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
    step_cache: StepCacheOptions = StepCacheOptions()

    def groups(self) -> tuple[object, ...]:
        """Return the options of all of them, in groups."""
        return (
            self.dit,
            self.vae,
            self.t5,
            self.clip,
            self.lora,
            self.run,
            self.swap,
            self.compiling,
            self.step_cache.repeated(),
        )

    def files(self) -> dict[str, Path | None]:
        """Return the weight files by the options that name them."""
        return {"dit": self.dit.dit, "vae": self.vae.vae, "t5": self.t5.t5, "clip": self.clip.clip}

    def load_dit(self, steps: Sequence[MemoryStep] = ()) -> WanModel:
        """Return the DiT; steps: what it is going to compute."""
        dtype = compute_dtype(dit_dtype(self.dit.dit), self.device)
        loras = self.lora.files()
        model = load_dit(
            self.dit.dit,
            self.config,
            dtype,
            self.device,
            deltas=weight_deltas(loras) if loras else None,
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
        )
        model.second_picture_as_text = self.dit.compat_musubi
        model.riflex = self.run.riflex_freq_index
        return model

    def load_vae(self) -> WanVAE:
        dtype = parse_dtype(self.vae.vae_dtype) if self.vae.vae_dtype else compute_dtype(torch.bfloat16, self.device)
        return load_vae(self.vae.vae, dtype, self.device, self.vae.vae_cache_cpu, self.vae.tile)
