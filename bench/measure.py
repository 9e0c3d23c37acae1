"""Measurements of ours beside others', as rows of a table."""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from utils.devices import parse_dtype
from utils.files import atomic_path


@dataclass(frozen=True)
class Setting:
    """How to measure."""

    pairs: int = 7  # of a row of seconds; the median counts
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    quick: bool = False  # small sizes only


@dataclass(frozen=True)
class Row:
    """One thing measured on both sides; a ratio below 1 is in our favour."""

    name: str
    ours: float
    theirs: float
    ratio: float
    goal: float | None  # that the ratio is not to exceed, where there is one
    unit: str
    distance: float | None = None  # of our result from theirs, relative to its norm


Table = Callable[[Setting], Iterator[Row]]
Run = Callable[[], Tensor]
TWO_WAY = ", two-way"  # ends the name of a row whose other side is not diffusers but the twin in bench/two_way.py


@torch.no_grad()
def distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the norm of the difference, relative to that of theirs."""
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


def compared(name: str, ours: Run, others: Mapping[str, tuple[Run, float | None]], setting: Setting) -> Iterator[Row]:
    """Yield a row of seconds for each of the others, (what it runs, goal) by what the row's name ends in."""
    runs = [ours, *(run for run, _ in others.values())]
    result, *results = [run() for run in runs]
    columns = timed_in_turn(runs, setting.pairs)
    for (ending, (_, goal)), theirs, column in zip(others.items(), results, columns[1:], strict=True):
        ratio = median(a / b for a, b in zip(columns[0], column, strict=True))
        yield Row(f"{name}{ending}", median(columns[0]), median(column), ratio, goal, "s", distance(result, theirs))


def timed_pairs(ours: Run, theirs: Run, pairs: int) -> tuple[float, float, float]:
    """Return the median seconds of each, and the median ratio of a pair; each is called once before."""
    ours(), theirs()
    mine, others = timed_in_turn([ours, theirs], pairs)
    return median(mine), median(others), median(a / b for a, b in zip(mine, others, strict=True))


def timed_in_turn(runs: Sequence[Run], rounds: int) -> list[list[float]]:
    """Return the seconds of each call of each run.

    In turn in one process, so that whatever else the machine does slows all of them.
    """
    return [list(column) for column in zip(*([seconds(run) for run in runs] for _ in range(rounds)), strict=True)]


def seconds(run: Run) -> float:
    """Return how long a call takes until its result is there."""
    start = time.perf_counter()
    run().flatten()[0].item()  # waits for a GPU
    return time.perf_counter() - start


def show(rows: Iterable[Row]) -> list[Row]:
    """Print the rows as a Markdown table, each as soon as it is there, and return them."""
    print("| | ours | theirs | ratio | goal | relative distance |\n|---|---|---|---|---|---|")
    shown = []
    for row in rows:
        numbers = " | ".join(f"{number:.4g} {row.unit}" for number in (row.ours, row.theirs))
        goal = "" if row.goal is None else f"<= {row.goal:.2f}"
        apart = "" if row.distance is None else f"{row.distance:.1e}"
        print(f"| {row.name} | {numbers} | {row.ratio:.2f} | {goal} | {apart} |", flush=True)
        shown.append(row)
    return shown


def main(doc: str, tables: dict[str, Table], argv: list[str] | None = None) -> None:
    """Measure and print the tables; options: --quick, --pairs, --device, --dtype, --json and, for several, --only."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if len(tables) > 1:
        parser.add_argument("--all", action="store_true", help="every table (the default)")
        parser.add_argument("--only", nargs="+", choices=tables, default=list(tables), help="these tables")
    parser.add_argument("--pairs", type=int, default=7, help="measurements of each side, at least 5 (default: 7)")
    parser.add_argument("--quick", action="store_true", help="small sizes only, five pairs")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--dtype", default="fp32", type=parse_dtype)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file too")
    given = parser.parse_args(argv)
    setting = Setting(5 if given.quick else max(given.pairs, 5), given.device, given.dtype, given.quick)
    where = f"{given.device}, {given.dtype}, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}, {setting.pairs} pairs\n")
    names = given.only if len(tables) > 1 else list(tables)
    rows = show(row for name in names for row in tables[name](setting))
    if given.json:
        with atomic_path(given.json) as temporary:
            temporary.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
