"""The table of tasks."""

import hashlib

import pytest

from wan.configs import DEFAULT_NEGATIVE_PROMPT, TASKS, default_flow_shift


def test_the_default_negative_prompt_is_the_official_one_to_the_byte():
    digest = hashlib.sha256(DEFAULT_NEGATIVE_PROMPT.encode()).hexdigest()
    assert digest == "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"


# Steps, shift, guidance, guidance of the high-noise model, boundary, frames.
@pytest.mark.parametrize(
    "name, defaults",
    [
        ("t2v-1.3B", (50, 5.0, 5.0, None, None, 81)),
        ("t2v-14B", (50, 5.0, 5.0, None, None, 81)),
        ("t2i-14B", (50, 5.0, 5.0, None, None, 1)),
        ("i2v-14B", (40, 5.0, 5.0, None, None, 81)),
        ("flf2v-14B", (40, 5.0, 5.0, None, None, 81)),
        ("t2v-1.3B-FC", (50, 5.0, 5.0, None, None, 81)),
        ("t2v-14B-FC", (50, 5.0, 5.0, None, None, 81)),
        ("i2v-14B-FC", (40, 5.0, 5.0, None, None, 81)),
        ("t2v-A14B", (40, 12.0, 3.0, 4.0, 0.875, 81)),
        ("i2v-A14B", (40, 5.0, 3.5, 3.5, 0.9, 81)),
    ],
)
def test_a_task_has_the_defaults_that_users_of_musubi_tuner_expect(name, defaults):
    task = TASKS[name]
    found = (task.steps, task.flow_shift, task.guidance, task.guidance_high, task.boundary, task.frames)
    assert found == defaults


def test_there_are_ten_tasks():
    assert len(TASKS) == 10


@pytest.mark.parametrize("size", [(832, 480), (480, 832)])
@pytest.mark.parametrize("name", TASKS)
def test_only_image_to_video_of_wan21_has_a_shift_of_its_own_at_480p(name, size):
    special = name in ("i2v-14B", "i2v-14B-FC")
    assert default_flow_shift(TASKS[name], *size) == (3.0 if special else TASKS[name].flow_shift)
    assert default_flow_shift(TASKS[name], 832, 464) == TASKS[name].flow_shift
