from dataclasses import replace

import numpy as np
import pytest
import torch

from modules.step_cache_tables import KNOWN, for_steps, published_name
from wan.configs import TASKS
from wan.model import WanShape

# (the polynomial of the projection, of the embedding) at 0.05, by numpy from the authors' coefficients
AT_5_PERCENT = {
    "t2v-1.3B": (0.14189837547499995, 0.07738134974999997),
    "t2v-14B": (0.21894898125000029, -4.091814416078373),
    "i2v-14B-480P": (0.13956041950000078, -0.01356101768750001),
    "i2v-14B-720P": (0.17431320115000004, -0.027979919209124987),
}
# (steps, sum, product, last) of the authors' curves
CURVES = {
    "t2v-1.3B": (50, 48.98687, 0.34758465893999874, 0.81838),
    "i2v-14B-480P": (40, 38.99195, 0.3566631092093878, 0.92617),
}


def test_polynomials_have_their_authors_values():
    for name, wanted in AT_5_PERCENT.items():
        found = (np.polyval(KNOWN[name].ret, 0.05), np.polyval(KNOWN[name].plain, 0.05))
        assert found == pytest.approx(wanted, rel=1e-9), name


def test_curves_have_their_authors_values():
    assert {name for name, known in KNOWN.items() if known.curve} == CURVES.keys()
    for name, (steps, total, product, last) in CURVES.items():
        curve = KNOWN[name].curve
        assert (len(curve), curve[0], curve[-1]) == (steps, 1.0, last)
        assert (sum(curve), np.prod(curve)) == pytest.approx((total, product), rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 4, 20, 30, 49, 50, 75, 100])
def test_a_curve_for_other_steps_is_the_one_that_diffusers_makes(steps):
    from diffusers.hooks.mag_cache import nearest_interp

    curve = KNOWN["t2v-1.3B"].curve
    assert for_steps(curve, steps) == pytest.approx(nearest_interp(torch.tensor(curve), steps).tolist(), abs=1e-6)


def shape_of(config):
    return WanShape(config.dim, config.ffn_dim, config.heads, config.blocks, config.in_channels)


@pytest.mark.parametrize(
    ("task", "file", "size", "name"),
    [
        ("t2v-1.3B", "anything.safetensors", (832, 480), "t2v-1.3B"),
        ("t2i-14B", "wan2.1_t2v_14B_bf16.safetensors", (1024, 1024), "t2v-14B"),
        ("i2v-14B", "wan2.1_i2v_480p_14B_bf16.safetensors", (1280, 720), "i2v-14B-480P"),
        ("i2v-14B", "Wan2_1-I2V-14B-720P_fp8.safetensors", (832, 480), "i2v-14B-720P"),
        ("i2v-14B", "mine.safetensors", (832, 480), "i2v-14B-480P"),
        ("i2v-14B", "mine.safetensors", (1280, 720), "i2v-14B-720P"),
        ("t2v-14B-FC", "fun.safetensors", (832, 480), "t2v-14B-FC"),
    ],
)
def test_weights_are_told_apart_by_task_name_and_size(task, file, size, name):
    config = TASKS[task]
    assert published_name(config, shape_of(config), file, size[0] * size[1]) == name


def test_a_model_of_other_sizes_is_none_of_the_published_ones():
    config = TASKS["t2v-1.3B"]
    assert published_name(config, replace(shape_of(config), blocks=12), "wan2.1_t2v_1.3B.safetensors", 399360) == ""
