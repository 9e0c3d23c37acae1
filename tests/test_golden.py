"""The recorded behaviour of the original code holds, through the same functions that the scripts call."""

import importlib.util
import sys

import pytest

NETWORKS = ["dit", "vae", "t5", "clip", "lora", "lora_files", "lora_names", "fp8"]
SAMPLING = ["samplers", "guidance", "sample", "timesteps", "conditioning"]
DATA = ["buckets", "resize", "frames", "tokenize", "cache", "parsing"]


@pytest.fixture(scope="module")
def check_golden(golden):
    spec = importlib.util.spec_from_file_location("check_golden", golden / "check_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def judge(check_golden, golden):
    from tests import golden_adapter

    before = sys.path[:]
    yield check_golden.Judge(str(golden), golden_adapter, verbose=False)
    sys.path[:] = before


@pytest.mark.parametrize("group", NETWORKS + SAMPLING + DATA)
def test_the_recorded_group_holds(check_golden, judge, group):
    judge.group, before = group, len(judge.rows)
    missing = check_golden.GROUPS[group](judge)
    rows = judge.rows[before:]
    assert not missing and rows, f"not supplied: {missing}"
    failed = [f"{row['case']}: {row['value']} (limit {row['limit']})" for row in rows if not row["ok"]]
    assert not failed, "\n".join(failed)
