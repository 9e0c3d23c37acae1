"""Rotary position factors."""

import pytest
import torch

from wan.rope import rope_factors, rotate


@pytest.mark.parametrize("head_dim", [24, 32, 40, 128])
def test_tokens_are_rotated_as_the_official_code_does(golden, recipe, head_dim):
    case = recipe.cases("dit_parts", golden)[f"rope_{head_dim}"]
    out = rotate(case["inputs"]["x"], rope_factors(head_dim, *case["inputs"]["grid"]))
    assert (out - case["outputs"]["out"]).abs().max() <= 1e-5


def test_hand_picked_frames_have_the_factors_they_have_in_a_long_video():
    picked = rope_factors(32, [0, 9, 4], 2, 3).view(3, 2, 3, 1, 16)
    assert torch.equal(picked, rope_factors(32, 10, 2, 3).view(10, 2, 3, 1, 16)[[0, 9, 4]])


def test_a_product_of_two_rotated_tokens_depends_on_how_far_apart_they_are():
    q, k = torch.randn(2, 1, 1, 1, 128)
    factors = rope_factors(128, 20, 4, 4).view(20, 4, 4, 1, 1, 64)

    def product(a: tuple[int, int, int], b: tuple[int, int, int]) -> torch.Tensor:
        return (rotate(q, factors[a]) * rotate(k, factors[b])).sum()

    torch.testing.assert_close(product((17, 0, 2), (12, 1, 0)), product((5, 2, 3), (0, 3, 1)), rtol=1e-4, atol=1e-4)


def test_rotation_of_half_precision_tokens_is_computed_in_float32():
    x, factors = torch.randn(2, 12, 3, 32), rope_factors(32, 3, 2, 2)
    half = x.bfloat16()
    assert torch.equal(rotate(half, factors), rotate(half.float(), factors).bfloat16())


def test_late_frames_are_as_exact_as_early_ones():
    position, pairs = 1000, 22
    exact = torch.polar(
        torch.ones(pairs, dtype=torch.float64),
        position * 10000.0 ** (-2 * torch.arange(pairs, dtype=torch.float64) / 44),
    )
    found = rope_factors(128, [position], 1, 1)[0, 0, :pairs]
    assert (found - exact).abs().max() < 1e-7
