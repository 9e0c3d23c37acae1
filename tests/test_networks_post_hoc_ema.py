"""Averages of saved files: recorded numbers, formulas written otherwise, and files that do not belong together."""

import math

import pytest
import torch
from safetensors.torch import save_file

from networks.post_hoc_ema import AverageOptions, average, gamma, shares, weights
from utils.errors import UserError


def of(values: list[float], **options: object) -> float:
    return sum(w * v for w, v in zip(weights(shares(AverageOptions(**options), len(values))), values, strict=True))


def test_averages_of_constants_are_the_recorded_ones():
    assert of([1, 2, 4], beta=0.5) == pytest.approx(2.75)
    assert of([1, 2, 4], beta=0.5, beta2=0.9) == pytest.approx(1.75)
    assert of([1, 2, 4], sigma_rel=0.2, compat_musubi=True) == pytest.approx(3.7180, abs=1e-4)
    assert of([1, 3], beta=0.25) == pytest.approx(2.5)


@pytest.mark.parametrize(
    "width, exponent", [(0.1, 6.9372), (0.15, 3.5579), (0.2, 1.8262), (0.25, 0.7198), (0.28, 0.1693)]
)
def test_gammas_are_the_recorded_ones_and_give_back_their_width(width: float, exponent: float):
    found = gamma(width)
    assert found == pytest.approx(exponent, abs=1e-4)
    # The width is the deviation of a density t^gamma over [0, 1]: by its moments.
    mean, square = ((found + 1) / (found + 1 + n) for n in (1, 2))
    assert math.sqrt(square - mean**2) == pytest.approx(width)


def test_the_oldest_file_counts_and_widths_grow_with_the_past_they_hold():
    for options in ({"sigma_rel": 0.1}, {"sigma_rel": 0.28}, {"beta": 0.95}):
        counted = weights(shares(AverageOptions(**options), 4))
        assert min(counted) > 0 and sum(counted) == pytest.approx(1)
    # File t of n counts t^(gamma+1) - (t-1)^(gamma+1), of n^(gamma+1): the power function over its part of the run.
    power = gamma(0.2) + 1
    expected = [(t**power - (t - 1) ** power) / 4**power for t in range(1, 5)]
    assert weights(shares(AverageOptions(sigma_rel=0.2), 4)) == pytest.approx(expected)
    assert weights(shares(AverageOptions(sigma_rel=0.2, compat_musubi=True), 4))[0] == 0


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"sigma_rel": 0.2887}, "--sigma_rel 0.2887: must be greater than 0 and less than 0.2887"),
        ({"sigma_rel": 0.5}, "--sigma_rel 0.5: must be greater than 0 and less than 0.2887. 0.05 to 0.25 are usual."),
        ({"sigma_rel": 0.0}, "--sigma_rel 0: must be greater than 0"),
        ({"beta": 1.0}, "--beta 1: must be from 0 to below 1."),
        ({"beta2": -0.1}, "--beta2 -0.1: must be from 0 to below 1."),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict, line: str):
    with pytest.raises(UserError) as error:
        shares(AverageOptions(**options), 3)
    assert str(error.value).startswith(line)


def test_tensors_of_any_kind_keep_their_format_and_alphas_must_agree(tmp_path):
    def write(name: str, value: float, **more: torch.Tensor):
        tensors = {
            "a.hada_w1_a": torch.full((2, 3), value, dtype=torch.bfloat16),
            "a.lokr_w1": torch.full((2,), value, dtype=torch.float16),
            "a.alpha": torch.tensor(4.0),
            "count": torch.tensor([int(value)]),
        }
        save_file(tensors | more, tmp_path / name, {"ss_steps": name})
        return tmp_path / name

    first, second = write("1", 1), write("2", 3)
    tensors, metadata = average([first, second], [0.25])
    assert metadata == {"ss_steps": "2"}  # no hashes where there were none
    for key, dtype in (("a.hada_w1_a", torch.bfloat16), ("a.lokr_w1", torch.float16)):
        assert tensors[key].dtype == dtype and (tensors[key] == 2.5).all()
    assert tensors["a.alpha"] == 4 and tensors["count"].tolist() == [1]
    for wrong, line in (
        ({"a.alpha": torch.tensor(8.0)}, "3: a.alpha is 8, but 4 in "),
        ({"b": torch.ones(1)}, "3: has other tensors than .*: 1 are in one alone, e.g. b. Average files of one run."),
        ({"count": torch.ones(2, dtype=torch.int64)}, r"3: count is \[2\], but \[1\] in "),
    ):
        with pytest.raises(UserError, match=line):
            average([first, write("3", 1, **wrong)], [0.5])
