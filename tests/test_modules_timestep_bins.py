import pytest
import torch

from modules.timestep_bins import TimestepBins, in_words


def test_errors_are_averaged_in_the_bin_of_their_timestep():
    bins = TimestepBins()
    t = torch.tensor([0.0, 0.05, 0.1, 0.3, 0.7, 0.9999, 1.0])
    bins.add(t, torch.tensor([1.0, 3, 4, 5, 6, 7, 9]))
    means = bins.means("loss/")
    expected = {"t0-100": 2, "t100-200": 4, "t300-400": 5, "t700-800": 6, "t900-1000": 8}
    assert means == {f"loss/{name}": mean for name, mean in expected.items()}
    assert bins.mean() == pytest.approx(5)
    assert in_words(means).startswith("0-100 2.000, 100-200 4.000")


def test_sums_go_through_a_state_and_add_up_over_processes():
    bins, rest = TimestepBins(), TimestepBins()
    bins.add(torch.tensor([0.2]), torch.tensor([0.1]))
    rest.add(torch.tensor([0.25]), torch.tensor([0.3]))
    assert TimestepBins([list(pair) for pair in bins.pairs()]).pairs() == bins.pairs()
    together = TimestepBins((bins.tensor() + rest.tensor()).tolist())
    assert together.means("") == {"t200-300": pytest.approx(0.2)}
