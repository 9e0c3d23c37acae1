"""The benchmarks compare like with like: both sides compute the same, and the rows say what was measured."""

import json

import pytest
import torch

from bench import denoise, dit, measure, training, vae
from bench.dit import Size
from bench.measure import Row, Setting

SMALL = Size(64, 96, 2, 2, 32, (1, 4, 4))


@pytest.mark.parametrize("table", [dit, denoise])
def test_both_sides_come_to_the_same_result(table, monkeypatch):
    monkeypatch.setattr(table, "SIZES", {"small": (SMALL, 0.5) if table is dit else SMALL})
    (row,) = table.rows(Setting(pairs=1))
    assert row.distance < 2e-5 and row.ours > 0 < row.theirs and row.unit == "s"


def test_both_vaes_come_to_the_same_latents_and_frames(monkeypatch):
    monkeypatch.setattr(vae, "SIZES", {"small": (8, 5, 16, 16, 0.9, None)})
    encoded, decoded = vae.rows(Setting(pairs=1))
    assert max(encoded.distance, decoded.distance) < 1e-5 and (encoded.goal, decoded.goal) == (0.9, None)


def test_a_training_step_has_the_same_gradients_on_both_sides(monkeypatch):
    monkeypatch.setattr(training, "SIZE", SMALL)
    kept, step = training.rows(Setting(pairs=1))
    assert kept.unit == "MB" and step.distance < 1e-5


def test_bytes_kept_for_the_backward_pass_are_those_of_activations():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
    x = torch.randn(100, 8)
    assert training.kept_bytes(lambda: layer(x), torch.nn.ModuleList(layer)) == 2 * x.nbytes  # into each of the two


def test_rows_are_shown_and_written_as_json(tmp_path, capsys):
    rows = [Row("one", 1.0, 4.0, 0.25, 0.5, "s", 1e-6), Row("two", 3.0, 2.0, 1.5, None, "MB")]
    tables = {"a": lambda setting: iter(rows[:1]), "b": lambda setting: iter(rows[1:])}
    measure.main("doc", tables, ["--only", "a", "b", "--json", str(tmp_path / "rows.json")])
    assert "| one | 1 s | 4 s | 0.25 | <= 0.50 | 1.0e-06 |" in capsys.readouterr().out
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in written] == ["one", "two"] and written[1]["goal"] is None
