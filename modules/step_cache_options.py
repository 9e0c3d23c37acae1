"""The options of predictions that are used again: checked, and completed by what is known of the weights."""

import json
import logging
import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modules.step_cache_tables import KNOWN, Known, for_steps, published_name
from modules.step_caching import CacheSettings
from utils.errors import UserError
from utils.files import require_file, require_writable_folder
from utils.options import option
from wan.configs import WanConfig
from wan.model import WanShape

logger = logging.getLogger(__name__)

EASYCACHE_THRESHOLD = 0.05  # its paper's, for Wan2.1
MAGCACHE_THRESHOLD, MAGCACHE_K = 0.12, 4  # with a curve of one's own: those of t2v-1.3B
WARMUP = 0.2  # of the steps: 10 of 50 by EasyCache's paper, and MagCache's retention ratio
TEACACHE_WARMUP = {"ret": 5, "plain": 1}  # steps


@dataclass(frozen=True)
class StepCacheOptions:
    """approximate speed-ups: predictions that are used again at later steps"""

    step_cache: str = option(
        "none",
        "how to tell which steps need no prediction of their own",
        choices=("none", "easycache", "teacache", "magcache"),
    )
    step_cache_threshold: float | None = option(
        None, "error at which the model runs again: higher is faster and less exact, 0 is exact; left out: the usual"
    )
    step_cache_warmup: float | None = option(
        None,
        "share of the steps, the first ones, that are all computed (MagCache's retention ratio); left out: 0.2, or "
        "TeaCache's 5 steps (ret) or 1 (plain)",
    )
    teacache_mode: str = option(
        "ret",
        "what TeaCache looks at: the time embedding's projection (ret), or the embedding",
        choices=("ret", "plain"),
    )
    teacache_coefficients: str | None = option(
        None, "TeaCache's polynomial for other weights, the highest power first; write it behind =", metavar="X,X,..."
    )
    magcache_k: int | None = option(None, "MagCache: most steps in a row that are not computed; left out: the usual")
    magcache_curve: Path | None = option(None, "MagCache: curve that --calibrate_magcache has measured")
    calibrate_magcache: Path | None = option(
        None, "measure MagCache's curve of these weights while generating, and write it to this .json file"
    )
    compare_exact: bool = option(
        False, "make each video once more with every step computed, and log how far the approximate one is from it"
    )

    @property
    def method(self) -> str:
        """Which of step_caching.METHODS is to be used, or none."""
        return "calibrate" if self.calibrate_magcache else self.step_cache

    def repeated(self) -> "StepCacheOptions":
        """Return the options that a result depends on."""
        return replace(self, calibrate_magcache=None, compare_exact=False)

    @property
    def keeps_sums(self) -> bool:
        """Whether what the blocks add is kept from step to step, on the device."""
        return self.method not in ("none", "easycache")


def check_step_cache(options: StepCacheOptions, steps: Collection[int] = (), processes: int = 1) -> None:
    """Raise UserError for values that fit no weights; warn of those without effect. steps: of each video."""
    method, threshold, warmup = options.step_cache, options.step_cache_threshold, options.step_cache_warmup
    needed = {
        "step_cache_threshold": ("easycache", "teacache", "magcache"),
        "step_cache_warmup": ("easycache", "teacache", "magcache"),
        "teacache_coefficients": ("teacache",),
        "magcache_k": ("magcache",),
        "magcache_curve": ("magcache",),
    }
    for name, methods in needed.items():
        if getattr(options, name) is not None and method not in methods:
            logger.warning("--%s: ignored without --step_cache %s", name, " or ".join(methods))
    if threshold is not None and not (math.isfinite(threshold) and threshold >= 0):
        raise UserError(
            f"--step_cache_threshold {threshold}: must be 0 or more", "0 computes every step; 0.1 is a usual value"
        )
    if warmup is not None and not 0 <= warmup <= 1:
        raise UserError(f"--step_cache_warmup {warmup}: must be from 0 to 1", "it is a share of the steps, usually 0.2")
    if options.magcache_k is not None and options.magcache_k < 1:
        raise UserError(f"--magcache_k {options.magcache_k}: must be at least 1", "leave it out for the usual value")
    if options.compare_exact and method == "none":
        raise UserError("--compare_exact: every step is computed anyway", "add --step_cache easycache")
    if options.teacache_coefficients is not None:
        read_coefficients(options.teacache_coefficients)
    if options.magcache_curve is not None:
        read_curve(options.magcache_curve)
    if path := options.calibrate_magcache:
        where = f"--calibrate_magcache {path}"
        if method != "none":
            raise UserError(f"{where}: measures with every step computed", f"leave out --step_cache {method}")
        if processes > 1:
            raise UserError(f"{where}: {processes} processes each hold a part of what is measured", "start one process")
        if len(set(steps)) > 1:
            raise UserError(f"{where}: the videos have different numbers of steps", "give all the same --s")
        if path.suffix.lower() != ".json":
            raise UserError(f"{where}: is written as JSON", f"use {path.with_suffix('.json').name}")
        require_writable_folder(path.parent, "--calibrate_magcache")


def cache_settings(
    options: StepCacheOptions, config: WanConfig, shape: WanShape, dit: Path, pixels: int, steps: int
) -> CacheSettings | None:
    """Return how a denoising of so many steps uses predictions again, or None for not at all.

    pixels: of a frame. Raises UserError where nothing is known of the weights, and they need it.
    """
    method, warmup = options.method, options.step_cache_warmup
    if method == "none":
        return None
    if method == "calibrate":
        return CacheSettings(method, 0.0, steps, 0)
    name = published_name(config, shape, dit.name, pixels)
    known = KNOWN.get(name, Known())
    first = int((WARMUP if warmup is None else warmup) * steps + 0.5)
    if method == "easycache":
        return CacheSettings(method, _given(options.step_cache_threshold, EASYCACHE_THRESHOLD), steps, first, last=True)
    if method == "teacache":
        mode = options.teacache_mode
        return CacheSettings(
            method,
            _given(options.step_cache_threshold, known.teacache_threshold, KNOWN["t2v-1.3B"].teacache_threshold),
            steps,
            TEACACHE_WARMUP[mode] if warmup is None else first,
            last=mode == "plain",
            coefficients=_coefficients(options, known, config, name),
            projected=mode == "ret",
        )
    return CacheSettings(
        method,
        _given(options.step_cache_threshold, known.magcache_threshold, MAGCACHE_THRESHOLD),
        steps,
        first,
        curve=for_steps(_curve(options, known, config, name), steps),
        most=_given(options.magcache_k, known.magcache_k, MAGCACHE_K),
    )


def _given(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _coefficients(options: StepCacheOptions, known: Known, config: WanConfig, name: str) -> tuple[float, ...]:
    if options.teacache_coefficients is not None:
        return read_coefficients(options.teacache_coefficients)
    found = getattr(known, options.teacache_mode)
    if not found:
        raise UserError(
            f"--step_cache teacache: its polynomial is not known for {_weights(config, name)}",
            "use --step_cache easycache, which needs none, or give --teacache_coefficients",
        )
    return found


def _curve(options: StepCacheOptions, known: Known, config: WanConfig, name: str) -> tuple[float, ...]:
    curve = read_curve(options.magcache_curve) if options.magcache_curve else known.curve
    if not curve:
        raise UserError(
            f"--step_cache magcache: its curve is not known for {_weights(config, name)}",
            "measure it by a run with --calibrate_magcache curve.json and give it as --magcache_curve, or use "
            "--step_cache easycache, which needs none",
        )
    return curve


def _weights(config: WanConfig, name: str) -> str:
    return name or f"a model of other sizes than {config.name}"


def read_coefficients(text: str) -> tuple[float, ...]:
    """Return the numbers of --teacache_coefficients."""
    try:
        numbers = tuple(float(word) for word in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) < 2 or not all(map(math.isfinite, numbers)):
        raise UserError(
            f"--teacache_coefficients {text}: not two or more numbers with commas between them",
            "write them as --teacache_coefficients=-302.3,223.9,-52.5,5.87,-0.2",
        )
    return numbers


def read_curve(path: Path) -> tuple[float, ...]:
    """Return the curve of a file that --calibrate_magcache has written."""
    where = f"--magcache_curve {path}"
    try:
        content = json.loads(require_file(path, "--magcache_curve", "a curve").read_text(encoding="utf-8"))
        curve = tuple(float(number) for number in content["curve"])
    except (ValueError, KeyError, TypeError):
        curve = ()
    if not curve:
        raise UserError(f"{where}: not a curve of MagCache", "make one by --calibrate_magcache curve.json")
    if not all(math.isfinite(number) and number > 0 for number in curve):
        raise UserError(f"{where}: has numbers that are not above 0", "measure it again")
    return curve


def describe_step_cache(options: StepCacheOptions, settings: CacheSettings | None) -> dict[str, Any]:
    """Return as metadata how a result is approximate; nothing where it is exact."""
    if settings is None:
        return {}
    described: dict[str, Any] = {"step_cache": settings.method, "step_cache_threshold": settings.threshold}
    described["step_cache_warmup_steps"] = settings.warmup
    if settings.method == "teacache":
        described |= {"teacache_mode": options.teacache_mode, "teacache_coefficients": list(settings.coefficients)}
    if settings.method == "magcache":
        described["magcache_k"] = settings.most
        if options.magcache_curve:
            described["magcache_curve"] = options.magcache_curve.name
    return described
