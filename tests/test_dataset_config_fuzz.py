"""Whatever a dataset file says, it gives datasets or one line; never a traceback."""

import json
import math
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataset.config import load_config
from dataset.config_keys import IMAGE, OLD_SPELLINGS, VIDEO
from dataset.items import find_sources
from utils.errors import UserError, explain

KEYS = sorted(IMAGE.keys() | VIDEO.keys() | OLD_SPELLINGS.keys())
RIGHT = {  # values that are right, so that datasets come out as well
    "resolution": [64, [960, 544]],
    "image_directory": ["i"],
    "video_directory": ["v", "nowhere/ä [1]"],
    "cache_directory": ["c", "d"],
    "target_frames": [[1, 25]],
    "frame_extraction": ["head", "uniform"],
    "enable_bucket": [True],
    "source_fps": [30, 29.97, 8],
}
texts = st.text(max_size=12) | st.sampled_from(["", "~", "~x/y", "/", "a\x00b", "\ud800", "C:\\new", "x" * 260])
numbers = st.integers() | st.sampled_from([0, -1, 10**9, 10**30, 10**400]) | st.floats()
scalars = texts | numbers | st.booleans() | st.none() | st.dates()
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=2), max_leaves=6)


@st.composite
def key_and_value(draw: st.DrawFn) -> tuple[str, Any]:
    key = draw(st.sampled_from(KEYS))
    if key in RIGHT and draw(st.integers(0, 3)):
        return key, draw(st.sampled_from(RIGHT[key]))
    slip = draw(st.integers(0, 7))
    if slip < 2:
        place = draw(st.integers(0, len(key) - 1))
        key = key[:place] + draw(st.sampled_from(["", "_", "x", "é", "."])) + key[place + slip :]
    return draw(texts) if slip == 2 else key, draw(values)


tables = st.lists(key_and_value(), max_size=4).map(dict)
good = st.sampled_from([{"image_directory": "i", "resolution": 64}, {"video_directory": "v", "target_frames": [9]}])
entries = st.tuples(good, tables).map(lambda both: both[0] | both[1]) | tables
contents = st.fixed_dictionaries(
    {"datasets": st.lists(entries, min_size=1, max_size=3) | values}, optional={"general": tables | values}
)


def toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, date):
        return value.isoformat()
    return json.dumps(value, ensure_ascii=False)


def toml_text(content: dict[str, Any]) -> str:
    lines = []
    for name, value in content.items():
        inside = value if isinstance(value, list) and all(isinstance(v, dict) for v in value) else [value]
        for table in inside:
            if isinstance(table, dict):
                lines.append(f"[[{name}]]" if name == "datasets" else f"[{name}]")
                lines += [f"{key or json.dumps(key)} = {toml_value(inner)}" for key, inner in table.items()]
            else:
                lines.append(f"{name} = {toml_value(value)}")
    return "\n".join(lines)


def slipped(text: str, place: int, typed: str) -> str:
    """Return the text with one slip of the finger: some characters in place of one."""
    place %= len(text) + 1
    return text[:place] + typed + text[place + 1 :]


def outcome(path: Path, text: str) -> str:
    """Return "datasets" or "error" after reading the file and looking for its media as a script does."""
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        for config in load_config(path):
            find_sources(config)
    except Exception as error:
        code = explain(error)
        if code is None:
            raise
        assert code == 2 and isinstance(error, UserError | OSError)
        assert "\n" not in str(error) and len(str(error)) < 4000
        return "error" if "no such folder" not in str(error) else "datasets"
    return "datasets"


slips = st.tuples(st.integers(0, 400), st.text(max_size=3) | st.sampled_from(list("[]{}\"'=,\n")))


@pytest.mark.parametrize(("suffix", "count"), [(".toml", 130), (".json", 60)])
def test_a_random_dataset_file_gives_datasets_or_one_line(tmp_path: Path, suffix: str, count: int, capsys):
    """Each file is read as it is and with three slips of the finger: 520 TOML files, 240 of JSON."""
    seen = []

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(contents, st.tuples(slips, slips, slips))
    def check(content: dict[str, Any], typed: tuple[tuple[int, str], ...]) -> None:
        text = toml_text(content) if suffix == ".toml" else json.dumps(content, default=str)
        for variant in (text, *(slipped(text, *slip) for slip in typed)):
            seen.append(outcome(tmp_path / f"d{suffix}", variant))

    check()
    assert len(seen) >= 4 * count and set(seen) == {"datasets", "error"}


@pytest.mark.parametrize("suffix", [".toml", ".json"])
@pytest.mark.parametrize("opening", ['{"a":', "["])
def test_nesting_that_no_one_means_is_one_line_too(tmp_path: Path, suffix: str, opening: str, capsys):
    prefix = "datasets = " if suffix == ".toml" else ""
    assert outcome(tmp_path / f"d{suffix}", prefix + opening * 5_000) == "error"
