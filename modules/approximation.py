"""Denoising that is approximate on request, and how far that is from the exact result; MagCache's calibration."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from modules.prompts import Request
from modules.solvers import Step
from modules.step_cache_options import StepCacheOptions, cache_settings, describe_step_cache
from modules.step_caching import CacheSettings, Predict, StepCache, exact
from utils.files import atomic_path
from utils.processes import Processes
from wan.configs import WanConfig
from wan.dit_file import DitOptions, check_dit
from wan.memory import Step as MemoryStep
from wan.model import WanModel, WanShape
from wan.vae import WanVAE

logger = logging.getLogger(__name__)


@dataclass
class Approximation:
    """What a run that may be approximate finds out on its way, one video after the other."""

    options: StepCacheOptions
    config: WanConfig
    dit: DitOptions
    processes: Processes = field(default_factory=Processes)
    elapsed: float = 0.0  # seconds of the video denoised last
    exact: list[Tensor] = field(default_factory=list)  # latents [16 f h w] of the videos so far, with --compare_exact
    curves: list[list[float]] = field(default_factory=list)  # of the videos so far, in a calibration

    @property
    def runs(self) -> int:
        """How many times each video is denoised."""
        return 2 if self.options.compare_exact else 1

    def step(self, step: MemoryStep) -> MemoryStep:
        """Return what the largest step of a video computes and keeps, for what it is without an approximation."""
        return replace(step, kept=step.passes) if self.options.keeps_sums else step

    def settings(self, request: Request, shape: WanShape) -> CacheSettings | None:
        """Return how a video's predictions are used again; raises UserError where the weights are not known enough."""
        pixels = request.width * request.height
        return cache_settings(self.options, self.config, shape, self.dit.dit, pixels, request.steps)

    def describe(self, request: Request) -> dict[str, Any]:
        """Return as metadata how a video is approximate; nothing where it is exact."""
        if self.options.step_cache == "none":
            return {}
        return describe_step_cache(self.options, self.settings(request, check_dit(self.dit.dit, self.config)))

    def denoise(self, request: Request, run: Callable[[Predict], Tensor]) -> Tensor:
        """Return the latents that run() returns, which is given how the DiT is asked for its predictions."""
        if self.options.method == "none":
            return run(exact)
        settings = self.settings(request, check_dit(self.dit.dit, self.config))
        cache = StepCache(settings, self.processes.first, self.processes.count)
        timed = Timed(cache, self.options.compare_exact)
        latent = timed.run(run)
        self.elapsed = timed.elapsed
        if settings.method == "calibrate":
            self.curves.append(cache.curve)
        else:
            logger.info(
                "--step_cache %s: %d of %d steps computed, %d of %d predictions",
                *(settings.method, cache.computed_steps, request.steps, cache.computed, cache.asked),
            )
        return latent

    def compare(
        self,
        request: Request,
        latent: Tensor,
        run: Callable[[Predict], Tensor],
        kept: Callable[[Tensor], Tensor] = lambda latent: latent,
    ) -> None:
        """Log how far what is kept of the latents denoised last is from the exact ones, with --compare_exact."""
        if not self.options.compare_exact:
            return
        plain = Timed(exact, True)
        wanted = kept(plain.run(run).cpu())
        self.exact.append(wanted)
        logger.info(
            "--compare_exact: seed %d: latents PSNR %.2f dB; %.2f of the exact time (%.1f s of %.1f s, without the "
            "first step)",
            request.seed,
            psnr([latent], [wanted]),
            self.elapsed / plain.elapsed if plain.elapsed else 1.0,  # no step: a --strength of 0
            self.elapsed,
            plain.elapsed,
        )

    def compare_frames(self, requests: Sequence[Request], latents: Sequence[Tensor], vae: WanVAE) -> None:
        """Log how far decoded frames are from those of the exact latents, with --compare_exact."""
        for request, latent, wanted in zip(requests, latents, self.exact, strict=False):
            approximate = [as_levels(pixels).cpu() for pixels in vae.decode_chunks(latent[None])]
            found = psnr(approximate, (as_levels(pixels).cpu() for pixels in vae.decode_chunks(wanted[None])), 255)
            logger.info("--compare_exact: seed %d: frames PSNR %.2f dB", request.seed, found)

    def write_curve(self, requests: Sequence[Request], solver: str) -> None:
        """Write the file of --calibrate_magcache, if there is one."""
        path = self.options.calibrate_magcache
        if not (path and self.curves and self.processes.is_first):
            return
        if path.exists():
            logger.warning("%s exists and is replaced", path)
        content = {
            "curve": [sum(column) / len(column) for column in zip(*self.curves, strict=True)],
            "task": self.config.name,
            "dit": self.dit.dit.name,
            "sample_solver": solver,
            "flow_shift": requests[0].flow_shift,
            "videos": len(self.curves),
        }
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        logger.info("wrote %s", path)


class Timed:
    """Predictions whose time is taken from the second step on: the first one compiles, warms up and is never reused."""

    def __init__(self, predict: Predict, timed: bool):
        self.predict, self.timed = predict, timed
        self.elapsed = 0.0
        self._started: list[float] = []

    def __call__(self, dit: WanModel, x: Tensor, step: Step, passes: Mapping[str, Mapping[str, Any]]) -> list[Tensor]:
        if self.timed and len(self._started) < 2:
            self._started.append(_now(x.device))
        return self.predict(dit, x, step, passes)

    def run(self, run: Callable[[Predict], Tensor]) -> Tensor:
        """Return what run() returns when it is given these predictions, and take the time."""
        result = run(self)
        if self._started:
            self.elapsed = _now(result.device) - self._started[-1]
        return result


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def as_levels(pixels: Tensor) -> Tensor:
    """Return pixels in [-1, 1] as bytes, rounded."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def psnr(found: Iterable[Tensor], wanted: Iterable[Tensor], peak: float | None = None) -> float:
    """Return the peak signal-to-noise ratio in dB of parts of a video to those of another; infinite for equal ones.

    10 log10(peak^2 / mean squared error); peak: left out, the range of what is wanted.
    """
    error, count, low, high = 0.0, 0, math.inf, -math.inf
    for mine, theirs in zip(found, wanted, strict=True):
        mine, theirs = mine.double(), theirs.double()
        error += (mine - theirs).square().sum().item()
        count += theirs.numel()
        low, high = min(low, theirs.min().item()), max(high, theirs.max().item())
    peak = high - low if peak is None else peak
    return 10 * math.log10(peak**2 * count / error) if error else math.inf
