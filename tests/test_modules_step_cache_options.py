import json
from pathlib import Path

import pytest

from modules.step_cache_options import (
    StepCacheOptions,
    cache_settings,
    check_step_cache,
    describe_step_cache,
    read_coefficients,
)
from modules.step_cache_tables import KNOWN
from utils.errors import UserError
from wan.configs import TASKS
from wan.model import WanShape


def settings(task="t2v-1.3B", steps=50, file="a.safetensors", pixels=832 * 480, blocks=None, **options):
    config = TASKS[task]
    shape = WanShape(config.dim, config.ffn_dim, config.heads, blocks or config.blocks, config.in_channels)
    return cache_settings(StepCacheOptions(**options), config, shape, Path(file), pixels, steps)


def test_without_a_method_every_step_is_computed():
    assert settings() is None and not StepCacheOptions().keeps_sums


def test_usual_settings_are_those_of_the_weights():
    found = settings(step_cache="easycache")
    assert (found.threshold, found.warmup, found.last) == (0.05, 10, True)
    found = settings(step_cache="teacache")
    assert (found.threshold, found.warmup, found.last, found.projected) == (0.08, 5, False, True)
    assert found.coefficients == KNOWN["t2v-1.3B"].ret
    found = settings("i2v-14B", 40, pixels=1280 * 720, step_cache="teacache", teacache_mode="plain")
    assert (found.threshold, found.warmup, found.last, found.projected) == (0.3, 1, True, False)
    assert found.coefficients == KNOWN["i2v-14B-720P"].plain
    found = settings("i2v-14B", 20, step_cache="magcache")
    assert (found.threshold, found.warmup, found.most) == (0.24, 4, 6)
    assert len(found.curve) == 20 and found.curve[-1] == 0.92617


def test_what_is_given_goes_before_the_usual():
    given = {"step_cache_threshold": 0.3, "step_cache_warmup": 0.5}
    for method in ("easycache", "teacache", "magcache"):
        found = settings(step_cache=method, magcache_k=2, **given)
        assert (found.threshold, found.warmup) == (0.3, 25)
    assert found.most == 2
    coefficients = "-302.3,2e2,-0.5"
    found = settings(step_cache="teacache", blocks=3, teacache_coefficients=coefficients)
    assert found.coefficients == (-302.3, 200.0, -0.5)


def test_a_measured_curve_is_used_for_any_weights(tmp_path):
    path = tmp_path / "curve.json"
    path.write_text(json.dumps({"curve": [1, 0.9, 0.8]}))
    found = settings(steps=5, blocks=3, step_cache="magcache", magcache_curve=path)
    assert found.curve == (1, 1, 0.9, 0.8, 0.8)
    options = StepCacheOptions(step_cache="magcache", magcache_curve=path)
    assert describe_step_cache(options, found) == {
        "step_cache": "magcache",
        "step_cache_threshold": 0.12,
        "step_cache_warmup_steps": 1,
        "magcache_k": 4,
        "magcache_curve": "curve.json",
    }


@pytest.mark.parametrize(
    ("task", "options", "line"),
    [
        (
            "t2v-14B",
            {"step_cache": "magcache"},
            "--step_cache magcache: its curve is not known for t2v-14B. Measure it",
        ),
        (
            "t2v-A14B",
            {"step_cache": "teacache"},
            "teacache: its polynomial is not known for t2v-A14B. Use --step_cache",
        ),
        (
            "t2v-1.3B",
            {"step_cache": "teacache", "blocks": 4},
            "its polynomial is not known for a model of other sizes than t2v-1.3B. Use --step_cache easycache",
        ),
    ],
)
def test_weights_that_nothing_is_known_of_are_named_with_what_to_use(task, options, line):
    with pytest.raises(UserError) as error:
        settings(task, **options)
    assert line in str(error.value)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"step_cache_threshold": -1.0}, "--step_cache_threshold -1.0: must be 0 or more"),
        ({"step_cache_threshold": float("nan")}, "--step_cache_threshold nan: must be 0 or more"),
        ({"step_cache_warmup": 10.0}, "--step_cache_warmup 10.0: must be from 0 to 1. It is a share of the steps"),
        ({"magcache_k": 0}, "--magcache_k 0: must be at least 1"),
        ({"compare_exact": True}, "--compare_exact: every step is computed anyway. Add --step_cache easycache."),
        ({"teacache_coefficients": "1,x"}, "--teacache_coefficients 1,x: not two or more numbers with commas"),
        ({"teacache_coefficients": "1"}, "--teacache_coefficients 1: not two or more"),
        ({"teacache_coefficients": "1,inf"}, "--teacache_coefficients 1,inf: not two or more"),
        ({"magcache_curve": Path("nowhere.json")}, "--magcache_curve nowhere.json: no such file"),
        (
            {"step_cache": "magcache", "calibrate_magcache": Path("a.json")},
            "--calibrate_magcache a.json: measures with every step computed. Leave out --step_cache magcache.",
        ),
        ({"calibrate_magcache": Path("a.txt")}, "--calibrate_magcache a.txt: is written as JSON. Use a.json."),
    ],
)
def test_a_value_that_fits_nothing_is_refused(options, line):
    with pytest.raises(UserError) as error:
        check_step_cache(StepCacheOptions(**options))
    assert line in str(error.value)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "not a curve of MagCache"),
        ("[1, 2]", "not a curve of MagCache"),
        ('{"curve": 1}', "not a curve of MagCache"),
        ('{"curve": [1, "x"]}', "not a curve of MagCache"),
        ('{"curve": []}', "not a curve of MagCache"),
        ('{"curve": [1, -0.5]}', "has numbers that are not above 0"),
        ('{"curve": [1, NaN]}', "has numbers that are not above 0"),
    ],
)
def test_a_file_that_is_no_curve_is_refused(tmp_path, content, line):
    path = tmp_path / "curve.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        check_step_cache(StepCacheOptions(step_cache="magcache", magcache_curve=path))
    assert f"--magcache_curve {path}: {line}" in str(error.value)


def test_a_calibration_is_one_process_s_and_of_one_number_of_steps(tmp_path):
    options = StepCacheOptions(calibrate_magcache=tmp_path / "a.json")
    check_step_cache(options, [4, 4])
    with pytest.raises(UserError, match="the videos have different numbers of steps. Give all the same --s."):
        check_step_cache(options, [4, 5])
    with pytest.raises(UserError, match="2 processes each hold a part of what is measured. Start one process"):
        check_step_cache(options, processes=2)


def test_what_has_no_effect_is_a_warning(caplog):
    check_step_cache(StepCacheOptions(step_cache_threshold=0.1, magcache_k=3, teacache_coefficients="1,2"))
    assert [record.message for record in caplog.records] == [
        "--step_cache_threshold: ignored without --step_cache easycache or teacache or magcache",
        "--teacache_coefficients: ignored without --step_cache teacache",
        "--magcache_k: ignored without --step_cache magcache",
    ]


def test_coefficients_are_read_in_any_notation():
    assert read_coefficients("-5.2e4, 9,.5") == (-5.2e4, 9.0, 0.5)
