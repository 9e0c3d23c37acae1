"""Classifier-free and skip-layer guidance: velocity functions made from velocity functions.

One letter a step says which predictions that step asks the model for:
C the conditional one; G also the unconditional; S both and one with blocks skipped; U conditional and skipped; Z none,
the velocity being zero.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from modules.solvers import Step, Velocity

CFG_SKIP_MODES = ("early", "late", "middle", "early_late", "alternate", "none")
SLG_MODES = ("original", "uncond")
Scale = float | Callable[[Step], float]


def cfg_steps(steps: int, mode: str = "none", ratio: float | None = None) -> list[bool]:
    """Return for each step whether classifier-free guidance is applied there.

    mode names where it is left out and `ratio` the share of steps that keep it; `none` or no ratio keep all.
    """
    if mode == "none" or ratio is None:
        return [True] * steps
    if mode == "alternate":
        applied, due = [], 0.0
        for _ in range(steps):
            # A plain float64 sum: its rounding decides some steps, and files made before must come out again.
            due += ratio
            applied.append(due >= 1.0)
            due -= 1.0 if due >= 1.0 else 0.0
        return applied
    kept = int(steps * ratio)
    if mode == "middle":
        return [not kept // 2 <= i < kept // 2 + steps - kept for i in range(steps)]
    first = {"early": steps - kept, "late": 0, "early_late": (steps - kept) // 2}[mode]
    return [first <= i < first + kept for i in range(steps)]


def guidance_pattern(
    steps: int,
    cfg_skip_mode: str = "none",
    cfg_apply_ratio: float | None = None,
    slg_mode: str | None = None,
    slg_start: float = 0.0,
    slg_end: float = 0.3,
    zero_steps: int = 0,
) -> str:
    """Return the letter of each step; layers are skipped from `slg_start` to `slg_end`, where there is guidance.

    zero_steps: how many of the first ones are Z.
    """
    skipping = {None: "G", "original": "S", "uncond": "U"}[slg_mode]
    start, end = int(slg_start * steps), int(slg_end * steps)
    applied = cfg_steps(steps, cfg_skip_mode, cfg_apply_ratio)
    letters = "".join((skipping if start <= i < end else "G") if on else "C" for i, on in enumerate(applied))
    return "Z" * zero_steps + letters[zero_steps:]


def predictions(letter: str, weight: float) -> tuple[str, ...]:
    """Return what a step of this letter asks for at this scale: "conditional" first, "unconditional", "skipped"."""
    if letter == "Z":
        return ()
    compared = {"C": (), "G": ("unconditional",), "S": ("unconditional",), "U": ("skipped",)}[letter]
    return ("conditional", *(compared if weight != 1 else ()), *(("skipped",) if letter == "S" else ()))


def scale_at(scale: Scale, step: Step) -> float:
    return scale(step) if callable(scale) else scale


def zero_star_scale(wanted: Tensor, unwanted: Tensor) -> Tensor:
    """Return the number s [B 1 1 1 1] by which s v_u is nearest to v_c: <v_c, v_u> / |v_u|^2 (arXiv:2503.18886)."""
    v_c, v_u = wanted.double().flatten(1), unwanted.double().flatten(1)
    scale = (v_c * v_u).sum(1) / v_u.square().sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    return scale.to(unwanted.dtype).view(-1, *[1] * (unwanted.ndim - 1))


def classifier_free(conditional: Velocity, unconditional: Velocity, scale: Scale, zero_star: bool = False) -> Velocity:
    """Return v_u + scale (v_c - v_u) (arXiv:2207.12598); at scale 1 that is v_c, and v_u is never computed.

    zero_star: with s v_u in place of v_u, s being that of zero_star_scale().
    """

    def velocity(x: Tensor, step: Step) -> Tensor:
        weight = scale_at(scale, step)
        wanted = conditional(x, step)
        if weight == 1:
            return wanted
        unwanted = unconditional(x, step)
        if zero_star:
            unwanted = zero_star_scale(wanted, unwanted) * unwanted
        return unwanted + weight * (wanted - unwanted)

    return velocity


def skip_layer(
    conditional: Velocity,
    unconditional: Velocity,
    skipped: Velocity,
    scale: Scale,
    slg_scale: float,
    zero_star: bool = False,
) -> Velocity:
    """Return the classifier-free velocity plus slg_scale (v_c - v_s), v_s being predicted with some blocks skipped."""

    def velocity(x: Tensor, step: Step) -> Tensor:
        wanted = conditional(x, step)
        guided = classifier_free(lambda x, step: wanted, unconditional, scale, zero_star)(x, step)
        return guided + slg_scale * (wanted - skipped(x, step))

    return velocity


def guided(
    pattern: str,
    conditional: Velocity,
    unconditional: Velocity,
    skipped: Velocity,
    scale: Scale,
    slg_scale: float = 3.0,
    zero_star: bool = False,
) -> Velocity:
    """Return the velocity that follows `pattern`, one letter a step."""
    by_letter = {
        "Z": lambda x, step: torch.zeros_like(x),
        "C": conditional,
        "G": classifier_free(conditional, unconditional, scale, zero_star),
        "S": skip_layer(conditional, unconditional, skipped, scale, slg_scale, zero_star),
        "U": classifier_free(conditional, skipped, scale, zero_star),
    }
    return lambda x, step: by_letter[pattern[step.index]](x, step)
