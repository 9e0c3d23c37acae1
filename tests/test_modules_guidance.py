import json

import numpy as np
import pytest
import torch

from modules.guidance import CFG_SKIP_MODES, cfg_steps, classifier_free, guidance_pattern, guided, predictions
from modules.solvers import Step

ARGUMENTS = ("steps", "cfg_skip_mode", "cfg_apply_ratio", "slg_mode", "slg_start", "slg_end")


class Counted:
    """A velocity that answers a constant and counts how often it is asked."""

    def __init__(self, value):
        self.value, self.calls = value, 0

    def __call__(self, x, step):
        self.calls += 1
        return torch.full_like(x, self.value)


def run(letter, scale, slg_scale=3.0):
    """Return the guided value of one step and the calls of the conditional, unconditional and skipping model."""
    models = Counted(5.0), Counted(2.0), Counted(1.0)
    value = guided(letter, *models, scale, slg_scale)(torch.zeros(1), Step(0, 1000.0, 1.0))
    return float(value), [model.calls for model in models]


def test_patterns_equal_the_recorded_ones(golden):
    rows = json.loads((golden / "guidance_patterns.json").read_text(encoding="utf-8"))["cases"]
    assert len(rows) == 111
    assert [guidance_pattern(*(row[name] for name in ARGUMENTS)) for row in rows] == [row["pattern"] for row in rows]


@pytest.mark.parametrize(
    ("mode", "ratio", "pattern"),
    [
        ("early", 0.6, "CCCCGGGGGG"),
        ("late", 0.6, "GGGGGGCCCC"),
        ("middle", 0.6, "GGGCCCCGGG"),
        ("early_late", 0.6, "CCGGGGGGCC"),
        ("alternate", 0.6, "CGCGCGGCGC"),
        ("early_late", 0.5, "CCGGGGGCCC"),
    ],
)
def test_ten_steps_with_a_part_of_the_guidance(mode, ratio, pattern):
    assert guidance_pattern(10, mode, ratio) == pattern


@pytest.mark.parametrize("mode", CFG_SKIP_MODES)
def test_no_ratio_means_guidance_at_every_step(mode):
    assert cfg_steps(7, mode, None) == [True] * 7


def test_scale_one_never_asks_for_the_unconditional_prediction():
    assert run("G", 1.0) == (5.0, [1, 0, 0])
    assert run("U", 1.0) == (5.0, [1, 0, 0])


def test_classifier_free_guidance_extrapolates_from_the_unconditional():
    assert run("G", 4.0) == (2 + 4 * (5 - 2), [1, 1, 0])
    assert run("C", 4.0) == (5.0, [1, 0, 0])


def test_skip_layer_guidance_adds_its_own_difference_or_takes_the_place_of_the_unconditional():
    assert run("S", 4.0, slg_scale=3.0) == (2 + 4 * (5 - 2) + 3 * (5 - 1), [1, 1, 1])
    assert run("S", 1.0, slg_scale=3.0) == (5 + 3 * (5 - 1), [1, 0, 1])
    assert run("U", 4.0) == (1 + 4 * (5 - 1), [1, 0, 1])


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("letter", "CGSU")
def test_what_a_step_asks_for_is_known_beforehand(letter, scale):
    _, calls = run(letter, scale)
    asked = predictions(letter, scale)
    assert asked[0] == "conditional" and len(set(asked)) == len(asked)
    assert [asked.count(name) for name in ("conditional", "unconditional", "skipped")] == calls


# ---------------------------------------------------------------------------------------------------------- CFG-Zero*
def answers(batch=2):
    """Return the three predictions [B 3 2 2 2] of a step, as tensors."""
    return torch.randn(3, batch, 3, 2, 2, 2, generator=torch.Generator().manual_seed(3)).unbind()


def zero_star(letter, scale, slg_scale, predicted):
    velocity = guided(letter, *(lambda x, step, v=v: v for v in predicted), scale, slg_scale, zero_star=True)
    return velocity(torch.ones_like(predicted[0]), Step(0, 1000.0, 1.0))


@pytest.mark.parametrize("letter", "GSU")
def test_zero_star_scales_the_unconditional_to_the_nearest_of_each_sample(letter):
    v_c, v_u, v_s = (v.double().numpy() for v in answers())
    found = zero_star(letter, 4.0, 3.0, answers()).numpy()
    for sample in range(2):
        other = (v_s if letter == "U" else v_u)[sample].ravel()
        wanted = v_c[sample].ravel()
        (nearest,) = np.linalg.lstsq(other[:, None], wanted, rcond=None)[0]
        value = nearest * other + 4.0 * (wanted - nearest * other)
        if letter == "S":
            value = value + 3.0 * (wanted - v_s[sample].ravel())
        np.testing.assert_allclose(found[sample].ravel(), value, rtol=1e-5, atol=1e-6)


def test_zero_star_is_what_diffusers_guider_makes():
    from diffusers.guiders import ClassifierFreeZeroStarGuidance

    guider = ClassifierFreeZeroStarGuidance(guidance_scale=4.0, zero_init_steps=1)
    v_c, v_u, _ = answers()
    for step, letter in ((0, "Z"), (1, "G")):
        guider.set_state(step=step, num_inference_steps=9, timestep=torch.tensor(500.0))
        torch.testing.assert_close(zero_star(letter, 4.0, 0.0, answers()), guider.forward(v_c, v_u).pred)


def test_a_zero_prediction_is_scaled_to_zero():
    v_c, v_u, v_s = answers()
    torch.testing.assert_close(zero_star("G", 4.0, 0.0, (v_c, torch.zeros_like(v_u), v_s)), 4 * v_c)


def test_zero_steps_come_first_and_ask_for_nothing():
    assert guidance_pattern(6, "late", 0.5, "original", 0.0, 0.4, zero_steps=1) == "ZSGCCC"
    assert guidance_pattern(3, zero_steps=0) == "GGG"
    models = Counted(5.0), Counted(2.0), Counted(1.0)
    assert float(guided("Z", *models, 4.0)(torch.ones(1), Step(0, 1000.0, 1.0))) == 0
    assert [model.calls for model in models] == [0, 0, 0] and predictions("Z", 4.0) == ()


def test_the_scale_may_depend_on_the_step():
    velocity = classifier_free(Counted(5.0), Counted(2.0), lambda step: 2.0 if step.timestep >= 875 else 3.0)
    x = torch.zeros(1)
    assert float(velocity(x, Step(0, 900.0, 0.9))) == 8.0 and float(velocity(x, Step(1, 800.0, 0.8))) == 11.0


def test_each_step_follows_its_own_letter():
    models = Counted(5.0), Counted(2.0), Counted(1.0)
    velocity = guided("CGSU", *models, 2.0)
    for i in range(4):
        velocity(torch.zeros(1), Step(i, 1000.0, 1.0))
    assert [model.calls for model in models] == [4, 2, 2]
