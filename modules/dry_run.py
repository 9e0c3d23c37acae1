"""What a caching run would write: how much, how long it may take, and whether there is room."""

import itertools
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from dataset.config import DatasetConfig
from modules.caching import items

logger = logging.getLogger(__name__)

_PAUSE = 300  # seconds between two files that do not come from one run


def log_plan(configs: Sequence[DatasetConfig], made: Mapping[Path, int]) -> None:
    """Log what a run would write, how long that may take, and the room for it; made: bytes by cache file."""
    for folder in [config.cache_directory for config in configs]:
        sizes = [size for path, size in made.items() if path.parent == folder]
        if not sizes:
            continue
        pace = seconds_per_byte(folder)
        words = [f"{items(len(sizes))}, about {sum(sizes) / 1e6:,.1f} MB"]
        if pace is not None:
            words.append(f"about {pace * sum(sizes) / 60:,.1f} minutes at the pace of the newest files there")
        place = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
        words.append(f"{shutil.disk_usage(place).free / 1e6:,.0f} MB are free")
        logger.info("would be written into %s: %s", folder, "; ".join(words))


def seconds_per_byte(folder: Path) -> float | None:
    """Return how fast the newest cache files of a folder came one after the other; None for fewer than five."""
    files = folder.iterdir() if folder.is_dir() else ()
    states = sorted(
        ((state.st_mtime, state.st_size) for state in (path.stat() for path in files if path.suffix == ".safetensors")),
        reverse=True,
    )
    run = list(itertools.takewhile(lambda pair: pair[0][0] - pair[1][0] < _PAUSE, itertools.pairwise(states)))
    if len(run) < 4:
        return None
    return (run[0][0][0] - run[-1][1][0]) / sum(newer[1] for newer, _ in run)
