"""The GPU's benchmark runs at small sizes on a CPU, with few packages, and one failing row does not stop the others."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.gpu import SCALES, Bench, Lab, Line, measured
from wan.fp8 import takes_row_scales

ROOT = Path(__file__).resolve().parent.parent
ABSENT = ["diffusers", "av", "cv2", "toml", "voluptuous", "bitsandbytes", "sentencepiece", "google", "ftfy", "PIL"]
WITHOUT = f"""
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_every_row_runs_with_few_packages_installed(tmp_path):
    rows = tmp_path / "rows.json"
    command = [sys.executable, "-c", WITHOUT, str(ROOT / "bench" / "gpu.py"), "--device", "cpu", "--scale", "small"]
    done = subprocess.run([*command, "--json", str(rows)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads(rows.read_text())
    assert [row["name"] for row in written] == [bench.name for bench in gpu.benches()]
    for row in written:
        if "fp8_fast" in row["name"] and takes_row_scales(torch.device("cpu")) is None:
            assert "failed: UserError: --fp8_fast: torch" in row["note"]
            continue
        assert "failed" not in row["note"] and "not begun" not in row["note"], row
        assert row["ours"] is not None or row["unit"] == "GiB", row
    forward = next(row for row in written if row["name"] == "14B 480p81 forward")
    assert "plain twin" in forward["note"] and forward["ratio"] > 0 and forward["goal"] == 0.65


def lab(seconds: float = 60) -> Lab:
    return Lab(torch.device("cpu"), SCALES["small"], time.monotonic() + seconds)


def fails(lab: Lab) -> Line:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")


def test_a_row_that_fails_says_why():
    row = measured(Bench("row", fails, lambda lab: 0), lab())
    assert row == Line("row", note="failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB")


def test_a_row_that_there_is_no_time_for_is_not_begun():
    short = lab(10)
    short.rate = 1.0
    row = measured(Bench("row", fails, lambda lab: 100), short)
    assert row.note.startswith("not begun: ") and "about 130 s" in row.note
    assert measured(Bench("row", fails, lambda lab: 0), lab(-1)).note.startswith("not begun: 0 s")


def test_one_dit_is_made_for_rows_that_share_it_and_streamed_from_where_it_is():
    here = lab()
    dit = here.model("14B")
    assert here.model("14B") is dit and here.model("14B", swapped=True) is dit and here.swapped
    other = here.model("14B", fp8=True)
    assert other is not dit and not here.swapped and other.blocks[0].ffn[0].weight.dtype == torch.float8_e4m3fn


def test_the_forward_pass_is_that_of_diffusers_where_it_is_installed():
    pytest.importorskip("diffusers")
    here = lab()
    row = gpu.forward(here, Line("row"), "1.3B", here.work("1.3B", "480p81"))
    assert row.note.startswith("against diffusers; relative distance ") and float(row.note.split()[4][:-1]) < 1e-4
