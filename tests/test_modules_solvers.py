import json
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from modules.solvers import FIRST_UNIPC_SIGMA, SOLVERS, Stepper, sample, sigma_schedule
from utils.errors import UserError

TIMESTEPS = {  # five steps
    ("unipc", 3.0): [999, 922, 817, 666, 428],
    ("dpm++", 3.0): [1000, 923, 818, 666, 428],
    ("unipc", 5.0): [999, 952, 882, 768, 555],
    ("dpm++", 5.0): [1000, 952, 882, 769, 555],
    ("unipc", 12.0): [999, 979, 947, 888, 749],
}
TOY = {  # samples after each of five steps
    ("unipc", 3.0): [1.0769768, 1.1852180, 1.3506371, 1.6423647, 2.2689570],
    ("unipc", 5.0): [1.0476577, 1.1190134, 1.2380778, 1.4784691, 2.1830488],
    ("dpm++", 3.0): [1.0769231, 1.1841816, 1.3480722, 1.6379338, 2.2665798],
    ("vanilla", 3.0): [1.0769230, 1.1841815, 1.3454509, 1.6219989, 2.2579994],
    ("dpm++", 5.0): [1.0476190, 1.1185656, 1.2369277, 1.4762701, 2.1822907],
    ("vanilla", 5.0): [1.0476190, 1.1185657, 1.2358290, 1.4686077, 2.1799126],
}
TOY_ENDS = {  # the last sample of a few steps with shift 5
    "unipc": {1: 2.0000500, 2: 2.0495927, 3: 2.0971920},
    "dpm++": {1: 2.0, 2: 2.0495050, 3: 2.0968732},
    "vanilla": {1: 2.0, 2: 2.0495050, 3: 2.0968733},
}


def toy_velocity(x, step):
    """The exact velocity of data that are normal with mean 2 and variance 0.25."""
    a = 1 - step.sigma
    pull = (x - 2 * a) / (0.25 * a * a + step.sigma**2)
    return step.sigma * pull - (2 + 0.25 * a * pull)


@pytest.mark.parametrize(("solver", "shift"), TIMESTEPS)
def test_the_timesteps_are_truncated_as_in_the_official_tables(solver, shift):
    timesteps, sigmas = sigma_schedule(solver, 5, shift)
    assert timesteps.tolist() == TIMESTEPS[solver, shift] and timesteps.dtype == torch.int64
    assert sigmas.dtype == torch.float32 and len(sigmas) == 6 and sigmas[-1] == 0


@pytest.mark.parametrize(
    ("steps", "shift", "start", "end"),
    [
        (20, 5, [999, 989, 978, 965], [468, 356, 208]),
        (50, 5, [999, 995, 991, 987], [241, 172, 92]),
        (40, 3, [999, 991, 982, 973], [195, 136, 71]),
    ],
)
def test_long_schedules_end_as_in_the_official_tables(steps, shift, start, end):
    timesteps = sigma_schedule("unipc", steps, shift)[0].tolist()
    assert timesteps[:4] == start and timesteps[-3:] == end


def test_euler_is_told_fractions_of_timesteps():
    timesteps, _ = sigma_schedule("vanilla", 5, 3.0)
    torch.testing.assert_close(
        timesteps, torch.tensor([1000, 923.077, 818.1818, 666.6667, 428.5715]), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize(("solver", "shift"), TOY)
def test_every_step_of_the_toy_problem_has_its_known_value(solver, shift):
    seen = []
    sample(solver, toy_velocity, torch.ones(1), 5, shift, on_step=lambda step, x, clean: seen.append(float(x)))
    assert seen == pytest.approx(TOY[solver, shift], abs=2e-6)


@pytest.mark.parametrize("solver", TOY_ENDS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_end_where_they_should(solver, steps):
    assert float(sample(solver, toy_velocity, torch.ones(1), steps, 5.0)) == pytest.approx(
        TOY_ENDS[solver][steps], abs=2e-6
    )


def recorded_cases(golden):
    return json.loads((golden / "samplers.json").read_text(encoding="utf-8"))["cases"]


def test_trajectories_equal_those_recorded_of_the_official_schedulers(golden, recipe):
    cases = recipe.cases("samplers")
    assert set(cases) == set(recorded_cases(golden)) and len(cases) >= 18
    for label, case in cases.items():
        stepper = Stepper(case["solver"], case["steps"], case["shift"])
        x, mean, recorded = case["inputs"]["noise"], case["inputs"]["mean"], case["outputs"]
        assert torch.equal(stepper.timesteps.float(), recorded["timesteps"].float()), label
        torch.testing.assert_close(stepper.sigmas, recorded["sigmas"], rtol=0, atol=1e-6)
        for i, timestep in enumerate(stepper.timesteps):
            sigma = float(timestep) / 1000
            variance = max((1 - sigma) ** 2 * 0.25 + sigma * sigma, 1e-12)
            velocity = (sigma - (1 - sigma) * 0.25) / variance * (x - (1 - sigma) * mean) - mean
            x = stepper.step(velocity, x)
            if f"x_{i}" in recorded:
                error = (x - recorded[f"x_{i}"]).norm() / recorded[f"x_{i}"].norm()
                assert error <= 2e-5, f"{label}, step {i}: {error:.1e}"


def curved_velocity(x, sigma):
    return torch.sin(3 * x) + sigma * x - 0.5


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
def test_unipc_equals_diffusers_on_the_same_sigmas(steps):
    theirs = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=4.0, final_sigmas_type="zero"
    )
    grid = torch.linspace(FIRST_UNIPC_SIGMA, 0, steps + 1, dtype=torch.float64)[:-1]
    theirs.set_timesteps(steps, sigmas=grid.numpy())
    x = want = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    for sigma, timestep in zip(theirs.sigmas, theirs.timesteps, strict=False):
        want = theirs.step(curved_velocity(want, float(sigma)), timestep, want, return_dict=False)[0]
    got = sample("unipc", lambda x, step: curved_velocity(x, step.sigma), x, steps, 4.0)
    torch.testing.assert_close(got, want, rtol=0, atol=5e-6)


def test_euler_equals_diffusers_on_the_same_sigmas():
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=torch.linspace(1, 0, 8)[:-1].tolist())
    x = want = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    for sigma, timestep in zip(theirs.sigmas, theirs.timesteps, strict=False):
        want = theirs.step(curved_velocity(want, float(sigma)), timestep, want, return_dict=False)[0]
    got = sample("vanilla", lambda x, step: curved_velocity(x, step.sigma), x, 7, 3.0)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0, 12.0])
def test_the_exact_velocity_of_one_picture_recovers_it(solver, steps, shift):
    """As with models that are distilled to few steps, whose velocity leads straight to a picture."""
    picture, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3))
    seen = []
    got = sample(
        solver, lambda x, step: (x - picture) / step.sigma, noise, steps, shift, lambda step, x, clean: seen.append(x)
    )
    torch.testing.assert_close(got, picture, rtol=0, atol=1e-3 if solver == "unipc" else 2e-5)
    assert len(seen) == steps


# ------------------------------------------------------------------------------------------------- listed timesteps
def test_evenly_spaced_timesteps_may_as_well_be_listed():
    for shift in (1.0, 5.0):
        listed, plain = (sigma_schedule("vanilla", 4, shift, given) for given in ((1000, 750, 500, 250), ()))
        assert torch.equal(listed[0], plain[0]) and torch.equal(listed[1], plain[1])
    # Those of models that are distilled to four steps, shifted by 5.
    torch.testing.assert_close(listed[0], torch.tensor([1000, 937.5, 833.3333, 625]), rtol=0, atol=1e-3)


def test_euler_goes_through_the_listed_timesteps_as_diffusers_does():
    timesteps = (1000, 757, 522)
    theirs = FlowMatchEulerDiscreteScheduler(shift=1.0)
    theirs.set_timesteps(sigmas=[t / 1000 for t in timesteps])
    x = want = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    for sigma, timestep in zip(theirs.sigmas, theirs.timesteps, strict=False):
        want = theirs.step(curved_velocity(want, float(sigma)), timestep, want, return_dict=False)[0]
    asked = []
    got = sample(
        "vanilla",
        lambda x, step: asked.append(step.timestep) or curved_velocity(x, step.sigma),
        x,
        3,
        1.0,
        listed=timesteps,
    )
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    assert asked == pytest.approx(timesteps)


def test_listed_timesteps_are_euler_s():
    with pytest.raises(UserError, match="--timesteps: not with --sample_solver unipc. Add --sample_solver vanilla."):
        sigma_schedule("unipc", 2, 5.0, (1000, 500))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("steps", "shift"), [(100, 16.0), (200, 16.0)])
def test_repeated_timesteps_do_not_repeat_steps(solver, steps, shift):
    timesteps, _ = sigma_schedule(solver, steps, shift)
    if solver != "vanilla":
        assert len(set(timesteps.tolist())) < steps, "the case should have repeated timesteps"
    indices = []
    x = sample(solver, toy_velocity, torch.ones(1), steps, shift, lambda step, x, clean: indices.append(step.index))
    assert indices == list(range(steps))
    # The exact flow carries x = 1 at sigma 1, one deviation above the noise's mean, to 2 + 0.5.
    assert float(x) == pytest.approx(2.5, abs=0.1)


def test_the_state_stays_float32_whatever_the_model_answers_in():
    x = sample("unipc", lambda x, step: x.bfloat16(), torch.ones(2, dtype=torch.bfloat16), 3, 5.0)
    assert x.dtype == torch.float32


@pytest.mark.parametrize(
    ("steps", "shift", "line"),
    [
        (0, 5.0, "--infer_steps 0: at least one step is needed"),
        (4, 0.0, "--flow_shift 0.0: the shift must be above 0"),
        (4, math.nan, "the shift must be above 0"),
        (400, 1e7, "some steps would not remove any noise. Use a lower shift or fewer steps."),
    ],
)
def test_an_impossible_schedule_is_refused(steps, shift, line):
    with pytest.raises(UserError) as error:
        sigma_schedule("unipc", steps, shift)
    assert line in str(error.value)
