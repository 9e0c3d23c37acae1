"""Predictions that are used again: when, and what comes out, against other implementations."""

import numpy as np
import pytest
import torch

from modules.conditions import Condition
from modules.generation import Texts, denoise
from modules.generation_options import SamplingOptions
from modules.solvers import Step, sigma_schedule
from modules.step_caching import CacheSettings, StepCache, exact
from tests import tiny
from tests.diffusers_dit import diffusers_dit, padded
from wan.block_swap import stream_blocks
from wan.compiling import CompileOptions, compile_blocks
from wan.loading import build_dit
from wan.streaming import CpuDevice

STEPS = 8
CURVE = (1.0, 0.9, 0.97, 0.98, 0.99, 0.97, 0.96, 0.9)
WAYS = {
    "easycache": {"warmup": 2, "last": True},
    "teacache": {"warmup": 1, "coefficients": (0.0, 0.04), "projected": True},
    "magcache": {"warmup": 2, "curve": CURVE, "most": 3},
}


@pytest.fixture(scope="module")
def dit():
    return build_dit(tiny.state_dict("dit_t2v"), heads=3)


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(1)
    width = tiny.state_dict("dit_t2v")["text_embedding.0.weight"].shape[1]
    return Texts(*(torch.randn(n, width, generator=generator) for n in (7, 5)))


def settings(method, threshold, steps=STEPS):
    return CacheSettings(method, threshold, steps, **WAYS[method])


def denoised(dit, texts, predict, steps=STEPS, scale=4.0, **sampling):
    noise = torch.randn(16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    return denoise(dit, noise, texts, Condition(), steps, 3.0, scale, SamplingOptions(**sampling), predict=predict)


SLG = {"slg_mode": "original", "slg_layers": "1", "slg_start": 0.2, "slg_end": 0.7}
PATTERNS = [{}, SLG, SLG | {"slg_mode": "uncond"}, {"cfg_skip_mode": "alternate", "cfg_apply_ratio": 0.5}]


# ------------------------------------------------------------------------------------------------- in every pattern
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", WAYS)
def test_a_threshold_of_0_is_the_exact_result_bit_by_bit(dit, texts, method, pattern):
    cache = StepCache(settings(method, 0.0))
    assert torch.equal(denoised(dit, texts, cache, **pattern), denoised(dit, texts, exact, **pattern))
    assert cache.computed == cache.asked and "embed" not in vars(dit)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", WAYS)
def test_a_threshold_leaves_out_predictions_in_every_pattern(dit, texts, method, pattern):
    cache = StepCache(settings(method, {"easycache": 1.0}.get(method, 0.1)))
    found, wanted = denoised(dit, texts, cache, **pattern), denoised(dit, texts, exact, **pattern)
    assert 0 < cache.computed < cache.asked and cache.computed_steps < STEPS
    # How near it stays is another question (test_modules_approximation.py): random weights forget all in one step.
    assert torch.isfinite(found).all() and not torch.allclose(found, wanted, atol=1e-2)


@pytest.mark.parametrize("method", ["teacache", "magcache"])
def test_blocks_that_are_swapped_or_compiled_give_the_same_bits(texts, method):
    latents = []
    for kind in ("plain", "swapped", *["compiled"] * (method == "magcache")):
        dit = build_dit(tiny.state_dict("dit_t2v"), heads=3)
        ring = stream_blocks(dit, [0, 1], 1, CpuDevice()) if kind == "swapped" else None
        if kind == "compiled":
            compile_blocks(dit, CompileOptions(compile=True, compile_backend="aot_eager"))
        cache = StepCache(settings(method, 0.15))
        latents.append(denoised(dit, texts, cache))
        if ring:
            assert ring.loads == 2 * cache.computed_steps, "a step without predictions copies no block"
    assert all(torch.equal(latents[0], other) for other in latents[1:])


def test_a_sum_that_other_processes_hold_is_not_added(dit, texts):
    """Between steps of one prediction and of two, processes share out the tokens differently."""
    pattern = {"cfg_skip_mode": "late", "cfg_apply_ratio": 0.5}
    seen = {}
    for processes in (1, 2):
        cache = StepCache(settings("teacache", 10.0), processes=processes)
        denoised(dit, texts, cache, **pattern)
        seen[processes] = (cache.asked, cache.computed)
    assert seen == {1: (12, 2), 2: (12, 3)}


class Falling:
    """A model whose velocity is a known function of latents and time; it counts what it is asked."""

    def __init__(self, factor):
        self.factor, self.calls = factor, []

    def velocities(self, x, timestep, passes):
        self.calls.append(float(timestep))
        return [each["by"] * (self.factor * x + torch.sin(x * timestep / 300)) for each in passes]


def walk(models, method, threshold, steps=STEPS, names=("conditional", "unconditional"), **more):
    """Return the trajectory and the velocities of Euler steps, models[i] being asked at step i."""
    cache = StepCache(CacheSettings(method, threshold, steps, **{**WAYS[method], **more}))
    timesteps, sigmas = sigma_schedule("vanilla", steps, 3.0)
    x, found = torch.randn(1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(4)), []
    for i, timestep in enumerate(timesteps.tolist()):
        passes = {name: {"by": 1.0 + 0.5 * number} for number, name in enumerate(names)}
        velocities = cache(models[i], x, Step(i, timestep, float(sigmas[i])), passes)
        found.append((x, *velocities))
        x = x + (sigmas[i + 1] - sigmas[i]) * velocities[0]
    return found, cache


def test_each_of_two_models_starts_anew():
    """Of a pair, one makes the noisy steps and the other the rest: what the first predicted says nothing of it."""
    noisy, other = Falling(0.5), Falling(-0.5)
    found, _ = walk([noisy] * 4 + [other] * 4, "easycache", 1e9, last=False, names=("conditional",))
    assert len(noisy.calls) == 2, "both of the warm-up"
    # Two predictions are needed before the change of a third can be guessed.
    assert len(other.calls) == 2
    x, velocity = found[4]
    torch.testing.assert_close(velocity, -0.5 * x + torch.sin(x * other.calls[0] / 300))


# ------------------------------------------------------------------------------------- against other implementations
@pytest.mark.parametrize("threshold", [0.15, 0.3, 0.8])
def test_easycache_follows_the_formula_of_its_paper(threshold):
    steps, warmup = 16, 3
    model = Falling(0.3)
    found, cache = walk([model] * steps, "easycache", threshold, steps, warmup=warmup)

    def true(x, timestep):
        return 0.3 * x + np.sin(x * timestep / 300)

    timesteps, sigmas = sigma_schedule("vanilla", steps, 3.0)
    x, before, computed, error = found[0][0].double().numpy(), None, [], 0.0
    for i in range(steps):
        estimate = np.inf
        if len(computed) >= 2:
            (x_j, v_j), (x_i, v_i) = computed[-2:]
            k = np.abs(v_i - v_j).mean() / np.abs(x_i - x_j).mean()
            estimate = k * np.abs(x - before).mean() / np.abs(v_i).mean()
        if i < warmup or i == steps - 1 or error + estimate >= threshold:
            error, v = 0.0, true(x, float(timesteps[i]))
            computed.append((x, v))
        else:
            error += estimate
            v = x + (computed[-1][1] - computed[-1][0])
        np.testing.assert_allclose(found[i][1].numpy(), v, rtol=2e-3, atol=2e-4)
        # The other prediction, half as large again, is of the same step as the first.
        other = 1.5 * computed[-1][1] + x - computed[-1][0]
        np.testing.assert_allclose(found[i][2].numpy(), other, rtol=2e-3, atol=3e-4)
        before, x = x, x + float(sigmas[i + 1] - sigmas[i]) * v
    assert len(model.calls) == len(computed) == cache.computed_steps and warmup < len(computed) < steps
    assert cache.computed == 2 * len(computed)


def their_steps(distances, coefficients, threshold, warmup, last):
    """Return for each step whether TeaCache computes it: the sum of the polynomial, restarted where it is reached."""
    computed, total = [], 0.0
    for i, distance in enumerate(distances):
        if i < warmup or (last and i == len(distances) - 1):
            due = True
        else:
            total += np.polyval(coefficients, distance)
            due = total >= threshold
        total = 0.0 if due else total
        computed.append(due)
    return computed


@pytest.mark.parametrize(("mode", "threshold"), [("ret", 0.6), ("ret", 1.1), ("plain", 0.6), ("plain", 1.1)])
def test_teacache_computes_the_steps_that_diffusers_time_embedding_asks_for(dit, texts, mode, threshold):
    steps, coefficients = 20, (0.2, 0.3, -0.1)
    theirs = diffusers_dit(tiny.state_dict("dit_t2v"), dit.shape).condition_embedder
    timesteps, _ = sigma_schedule("unipc", steps, 3.0)
    embedded = [theirs.time_embedder(theirs.timesteps_proj(t[None].float())) for t in timesteps]
    if mode == "ret":
        embedded = [theirs.time_proj(theirs.act_fn(e)) for e in embedded]
    pairs = zip(embedded, embedded[1:], strict=False)
    distances = [0.0, *(float((b - a).abs().mean() / a.abs().mean()) for a, b in pairs)]
    warmup, last = (5, False) if mode == "ret" else (1, True)
    wanted = their_steps(distances, coefficients, threshold, warmup, last)
    assert 5 < sum(wanted) < steps
    cache = StepCache(
        CacheSettings("teacache", threshold, steps, warmup, last, coefficients=coefficients, projected=mode == "ret")
    )
    computed = []

    def watched(*asked):
        before = cache.computed
        found = cache(*asked)
        computed.append(cache.computed > before)
        return found

    denoised(dit, texts, watched, steps, scale=1.0)
    assert computed == wanted


@pytest.mark.parametrize(("threshold", "most", "warmup"), [(0.06, 2, 0.2), (0.12, 4, 0.2), (0.5, 3, 0.4)])
def test_magcache_makes_the_velocities_that_diffusers_hook_makes(dit, texts, threshold, most, warmup):
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    steps = 12
    curve = (1.0, *(float(1 - 0.01 * i % 0.07 - 0.003) for i in range(1, steps)))
    theirs = diffusers_dit(tiny.state_dict("dit_t2v"), dit.shape)
    config = {"threshold": threshold, "max_skip_steps": most, "retention_ratio": warmup, "num_inference_steps": steps}
    apply_mag_cache(theirs, MagCacheConfig(**config, mag_ratios=list(curve)))
    ours = StepCache(CacheSettings("magcache", threshold, steps, int(warmup * steps + 0.5), curve=curve, most=most))
    timesteps, sigmas = sigma_schedule("vanilla", steps, 3.0)
    context, text = dit.context([texts.prompt]), padded([texts.prompt])
    x = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for i, timestep in enumerate(timesteps.tolist()):
            (velocity,) = ours(dit, x, Step(i, timestep, float(sigmas[i])), {"conditional": {"text": context}})
            wanted = theirs(x, torch.tensor([timestep]), text, return_dict=False)[0]
            torch.testing.assert_close(velocity, wanted, rtol=1e-3, atol=1e-4)
            x = x + (sigmas[i + 1] - sigmas[i]) * wanted
    assert int(warmup * steps) < ours.computed < steps


def test_a_calibration_measures_what_diffusers_hook_measures(dit, texts, capsys):
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    theirs = diffusers_dit(tiny.state_dict("dit_t2v"), dit.shape)
    apply_mag_cache(theirs, MagCacheConfig(num_inference_steps=5, calibrate=True))
    ours = StepCache(CacheSettings("calibrate", 0.0, 5, 0))
    timesteps, sigmas = sigma_schedule("vanilla", 5, 3.0)
    context, text = dit.context([texts.prompt]), padded([texts.prompt])
    x = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for i, timestep in enumerate(timesteps.tolist()):
            (velocity,) = ours(dit, x, Step(i, timestep, float(sigmas[i])), {"conditional": {"text": context}})
            theirs(x, torch.tensor([timestep]), text)
            x = x + (sigmas[i + 1] - sigmas[i]) * velocity
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("[1.0"))
    wanted = [float(word) for word in printed.strip("[]").split(",")]
    assert wanted[0] == 1.0 and ours.curve == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("method", WAYS)
def test_a_prediction_that_is_older_than_the_first_one_is_computed(dit, texts, method):
    """The unconditional one is asked for at the steps 1, 3, 5 and 7, the conditional one at all."""
    cache, asked = (
        StepCache(CacheSettings(method, 1e9, 8, **{**WAYS[method], "warmup": 3, "most": 9, "last": False})),
        [],
    )

    def watched(dit, x, step, passes):
        before = cache.computed
        found = cache(dit, x, step, passes)
        asked.append(cache.computed - before)
        return found

    denoised(dit, texts, watched, cfg_skip_mode="alternate", cfg_apply_ratio=0.5)
    # Both at step 1; the conditional one last at 2, so that the unconditional one of step 1 is too old at 3.
    assert asked == [1, 2, 1, 1, 0, 0, 0, 0]
