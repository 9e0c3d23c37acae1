"""--show_timesteps: the distribution that training draws from, for the sizes of each dataset, without a model."""

import math
import re
import sys
from collections import Counter
from statistics import NormalDist

import numpy as np
import pytest
from PIL import Image

import wan_train
import wan_train_network
from modules.flow_matching import _SAMPLINGS, TimestepOptions
from modules.timestep_chart import DRAWS, as_picture, as_text, draw, latent_sizes, make_charts
from utils.errors import UserError

SQUARE = [("one", Counter({(64, 64): 1}))]
EDGES = np.linspace(0, 1, 41)


def normal(x: float) -> float:
    """Return where the standard normal distribution's quantile function of t is, 0 and 1 at the ends."""
    return NormalDist().cdf(math.log(x / (1 - x))) if 0 < x < 1 else float(x)


@pytest.mark.parametrize(
    ("options", "below"),
    [
        (TimestepOptions(), lambda t: t),
        (TimestepOptions("shift", discrete_flow_shift=3.0), lambda t: normal(t / (3 - 2 * t))),
        (TimestepOptions("uniform", min_timestep=500), lambda t: max(0.0, 2 * t - 1)),
        (TimestepOptions("sigmoid", num_timestep_buckets=10), normal),
    ],
)
def test_each_row_has_the_share_that_the_distribution_gives_it(options, below):
    (chart,) = make_charts(options, SQUARE, seed=1)
    expected = np.diff([below(edge) for edge in EDGES])
    assert np.abs(chart.share - expected).max() < 5 * math.sqrt(0.07 / DRAWS)


@pytest.mark.parametrize("sampling", sorted(_SAMPLINGS))
def test_every_sampling_is_shown_with_every_weighting(sampling):
    for scheme in ("none", "mode", "logit_normal", "cosmap", "sigma_sqrt", "min_snr"):
        (chart,) = make_charts(TimestepOptions(sampling, weighting_scheme=scheme), SQUARE, seed=0)
        assert chart.share.sum() == pytest.approx(1) and len(as_text(chart).splitlines()) in (42, 83)
        assert as_picture([chart]).shape == (300 if chart.weights is None else 600, 900, 3)


def test_datasets_of_equal_distributions_share_a_chart_and_others_have_their_own():
    datasets = [("small", Counter({(8, 8): 4})), ("large", Counter({(90, 160): 3, (60, 104): 1}))]
    (one,) = make_charts(TimestepOptions("shift"), datasets, seed=0)
    assert one.title.startswith("small; large\n")
    small, large = make_charts(TimestepOptions("flux_shift"), datasets, seed=0)
    means = [int(re.search(r"mean (\d+)", chart.title)[1]) for chart in (small, large)]
    assert means[0] + 50 < means[1]
    only = [draw(TimestepOptions("flux_shift"), Counter({size: 1}), 0).mean().item() for size in ((90, 160), (60, 104))]
    assert means[1] == pytest.approx(750 * only[0] + 250 * only[1], abs=3)


def test_sizes_are_those_of_the_caches(dataset):
    sizes = Counter()
    for _, found in latent_sizes(dataset):
        sizes += found
    assert sum(sizes.values()) > 5 and len(sizes) > 2
    assert latent_sizes(None) == [("no --dataset_config: latents of 128x128", Counter({(128, 128): 1}))]


@pytest.mark.parametrize("script", [wan_train_network, wan_train])
def test_a_script_shows_them_and_ends_before_anything_loads(script, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(f"{script.__name__}.make_trainer", lambda *arguments: pytest.fail("training was prepared"))
    given = ["--dataset_config", str(dataset), "--timestep_sampling", "qwen_shift", "--weighting_scheme", "cosmap"]
    monkeypatch.setattr(sys, "argv", ["s.py", "--show_timesteps", "console", *given])
    script.main()
    assert "qwen_shift: mean " in (shown := capsys.readouterr().out) and "mean loss weight" in shown
    into = ["--output_dir", str(tmp_path), "--output_name", "name"]
    monkeypatch.setattr(sys, "argv", ["s.py", "--show_timesteps", "image", *given, *into])
    script.main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "name_timesteps.png")
    pixels = np.asarray(Image.open(tmp_path / "name_timesteps.png").convert("RGB"))
    assert (pixels == (59, 130, 246)).all(-1).sum() > 20_000
    monkeypatch.setattr(sys, "argv", ["s.py", "--show_timesteps", "image", "--min_timestep", "2000"])
    with pytest.raises(UserError, match="--min_timestep 2000"):
        script.main()


def test_a_bar_is_as_high_as_its_share():
    (chart,) = make_charts(TimestepOptions("shift", discrete_flow_shift=3.0), SQUARE, seed=0)
    blue = (as_picture([chart]) == (59, 130, 246)).all(-1)
    heights = [blue[:, round(60 + (row + 0.5) * 20.5)].sum() for row in range(40)]
    assert np.abs(np.array(heights) / max(heights) - chart.share / chart.share.max()).max() < 0.02
