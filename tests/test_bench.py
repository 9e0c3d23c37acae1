"""The benchmarks compare like with like: both sides compute the same, and the rows say what was measured."""

import json
import time

import pytest
import torch

from bench import caching, denoise, dit, measure, precision, swapping, training, vae
from bench.dit import Size
from bench.measure import Row, Setting
from dataset.config import load_config
from dataset.items import find_sources
from dataset.media import plan_items
from tests.test_wan_fp8 import needs_float8_product
from tests.tiny import state_dict
from wan.vae import build_vae

SMALL = Size(64, 96, 2, 2, 32, (1, 4, 4))


@pytest.mark.parametrize("table", [dit, denoise])
def test_all_sides_come_to_the_same_result(table, monkeypatch):
    monkeypatch.setattr(table, "SIZES", {"small": (SMALL, 0.5, 0.4) if table is dit else SMALL})
    rows = list(table.rows(Setting(pairs=1)))
    assert [row.name.endswith(", two-way") for row in rows] == [False, True]
    assert all(row.distance < 2e-5 and row.ours > 0 < row.theirs and row.unit == "s" for row in rows)


def test_both_vaes_come_to_the_same_latents_and_frames(monkeypatch):
    monkeypatch.setattr(vae, "SIZES", {"small": (8, 5, 16, 16, 0.9, None)})
    encoded, decoded = vae.rows(Setting(pairs=1))
    assert max(encoded.distance, decoded.distance) < 1e-5 and (encoded.goal, decoded.goal) == (0.9, None)


def test_a_training_step_has_the_same_gradients_on_all_sides(monkeypatch):
    monkeypatch.setattr(training, "SIZE", SMALL)
    kept, kept_two_way, *steps = training.rows(Setting(pairs=1))
    assert kept.unit == kept_two_way.unit == "MB" and max(kept.ratio, kept_two_way.ratio) < 0.5
    assert len(steps) == 4 and max(step.distance for step in steps) < 1e-5


def test_swapped_bytes_are_those_of_the_blocks_once_twice_and_four_times(monkeypatch):
    monkeypatch.setattr(swapping, "SIZE", SMALL)
    theirs, two_way = swapping.rows(Setting())
    blocks = state_dict("dit_t2v", dim=64, ffn=96, blocks=2, text=32)
    size = sum(tensor.nbytes for name, tensor in blocks.items() if name.startswith("blocks.")) / 1e6
    assert (theirs.theirs, two_way.theirs) == pytest.approx((2 * size, 4 * size))
    assert theirs.ours == two_way.ours <= 1.01 * size  # the ring rounds sizes up
    assert max(theirs.distance, two_way.distance) < 2e-5


def test_bytes_kept_for_the_backward_pass_are_those_of_activations():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
    x = torch.randn(100, 8)
    assert training.kept_bytes(lambda: layer(x), torch.nn.ModuleList(layer)) == 2 * x.nbytes  # into each of the two


def test_caching_writes_what_the_plain_loop_writes(tmp_path):
    caching.write_videos(tmp_path / "v", 2, 30, 160, 96)
    keys = f'video_directory = "{tmp_path / "v"}"\ncaption_extension = ".txt"\nresolution = [64, 64]\n'
    keys += 'frame_extraction = "uniform"\ntarget_frames = [5]\nframe_sample = 3\n'
    model = build_vae(state_dict("vae"))
    for side in ("ours", "theirs"):
        (tmp_path / "d.toml").write_text(f'[[datasets]]\ncache_directory = "{tmp_path / side}"\n{keys}')
        configs = load_config(tmp_path / "d.toml")
        items = [item for source in find_sources(configs[0]) for item in plan_items(source, configs[0])]
        start = time.perf_counter()
        ours = side == "ours"
        idle = caching.cache_ours(configs, model) if ours else caching.cache_plainly(configs[0], items, model)
        assert 0 < idle < time.perf_counter() - start
    assert len(items) == 6 and caching.apart(tmp_path / "ours", tmp_path / "theirs") == 0


def test_rows_are_shown_and_written_as_json(tmp_path, capsys):
    rows = [Row("one", 1.0, 4.0, 0.25, 0.5, "s", 1e-6), Row("two", 3.0, 2.0, 1.5, None, "MB")]
    tables = {"a": lambda setting: iter(rows[:1]), "b": lambda setting: iter(rows[1:])}
    measure.main("doc", tables, ["--only", "a", "b", "--json", str(tmp_path / "rows.json")])
    assert "| one | 1 s | 4 s | 0.25 | <= 0.50 | 1.0e-06 |" in capsys.readouterr().out
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in written] == ["one", "two"] and written[1]["goal"] is None


@needs_float8_product
def test_ways_of_holding_weights_are_told_apart_by_their_error():
    errors = {name: from_exact for name, from_exact, _ in precision.rows(torch.device("cpu"))}
    bf16 = errors["bf16"]
    assert 0 < bf16 < 0.01 and all(bf16 < error for name, error in errors.items() if name.startswith("`"))
    assert errors["`--quantize int8`"] < errors["`--fp8_scaled`"] < errors["`--quantize nf4`"] < 0.3
    assert errors["text embedding, bf16"] < errors["text embedding, `--fp8_t5`"] < 0.03
