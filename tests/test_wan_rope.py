"""Rotary position factors."""

import math

import pytest
import torch

from tests import tiny
from wan.loading import build_dit
from wan.rope import rope_factors, rotate, temporal_pairs


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


@pytest.mark.parametrize(("head_dim", "k"), [(128, 6), (128, 1), (24, 4)])
def test_riflex_changes_one_frequency_along_time(head_dim, k):
    frames, height, width = 41, 2, 3
    plain, changed = (rope_factors(head_dim, frames, height, width, riflex=number) for number in (None, k))
    others = [pair for pair in range(head_dim // 2) if pair != k - 1]
    assert torch.equal(plain[..., others], changed[..., others])
    # Over the whole video it turns nine tenths of a circle, each token by the place of its frame.
    frame = torch.arange(frames, dtype=torch.float64).repeat_interleave(height * width)
    wanted = torch.stack([(0.9 * 2 * math.pi / frames * frame).cos(), (0.9 * 2 * math.pi / frames * frame).sin()], -1)
    torch.testing.assert_close(torch.view_as_real(changed[:, 0, k - 1]).double(), wanted, rtol=0, atol=1e-6)


def test_frequencies_along_time_are_what_rows_and_columns_leave():
    assert [temporal_pairs(head_dim) for head_dim in (128, 32, 24)] == [22, 6, 4]


def test_a_model_with_riflex_makes_another_video_and_without_it_the_same_as_ever():
    dit = build_dit(tiny.state_dict("dit_t2v"), heads=3)
    x, timestep = torch.randn(1, 16, 6, 4, 4), torch.tensor([500.0])
    text = [torch.randn(3, dit.shape.text_dim)]
    with torch.no_grad():
        before = dit(x, timestep, text)
        dit.riflex = 3
        other = dit(x, timestep, text)
        placed = dit(x, timestep, text, frame_indices=[range(6)])
        dit.riflex = None
        assert torch.equal(dit(x, timestep, text), before) and torch.equal(placed, before)
    assert not torch.allclose(other, before, atol=1e-3)
