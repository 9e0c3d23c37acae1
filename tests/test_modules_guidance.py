import json

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
