"""What the two caching scripts have in common: options, what a run did, shares of several processes, stale files."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dataset.cache import may_be_deleted
from dataset.config import DatasetConfig
from modules.quarantine import NAME as QUARANTINE
from utils.errors import UserError
from utils.files import require_writable_folder
from utils.options import option

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachingOptions:
    """caching"""

    device: str | None = option(None, "where the encoder runs: cuda, cuda:1, cpu (default: cuda where there is one)")
    batch_size: int | None = option(
        None, "examples encoded at once, for datasets that name no batch_size; of latents never more than this"
    )
    num_workers: int | None = option(
        None, "threads that read media ahead of the encoder (default: CPU cores - 1); captions need none"
    )
    decode_timeout: float = option(
        120.0, "seconds without a new frame after which a media file is given up and quarantined"
    )
    strict: bool = option(False, "end with exit code 2 where any media file is quarantined, after all else is done")
    skip_existing: bool = option(False, "keep cache files that are complete and fit, without reading their media")
    keep_cache: bool = option(False, "do not delete cache files that no media file of the dataset belongs to any more")


@dataclass
class CachingResult:
    """What a caching run did, filled in as it goes."""

    written: list[Path] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)  # media file > why
    deleted: list[Path] = field(default_factory=list)
    waited: float = 0.0  # seconds that the encoder waited for media
    worked: float = 0.0  # seconds from the first media read to the last cache file written

    def report(self, strict: bool = False) -> None:
        """Log what was done in a line, and each media file that could not be used.

        Raises UserError when nothing is there; when a media file could not be used, only where that is not to be.
        """
        if not self.written and not self.kept:
            first = next(iter(self.failed.values()), "no examples")
            raise UserError(f"nothing could be cached; files that failed: {len(self.failed)}, the first: {first}")
        for reason in self.failed.values():
            logger.warning("failed: %s", reason)
        counts = [f"{len(self.written)} cache files written", f"{len(self.kept)} kept", f"{len(self.failed)} failed"]
        logger.info("%s", ", ".join([*counts, *([f"{len(self.deleted)} deleted"] if self.deleted else [])]))
        if self.worked and self.waited > 0.1 * self.worked > 1:
            share = 100 * self.waited / self.worked
            logger.info("the encoder waited for media %.0f %% of the time; --num_workers N reads more at once", share)
        if strict and self.failed:
            raise UserError(
                f"--strict: {len(self.failed)} media files could not be used, the first: {next(iter(self.failed))}",
                f"mend them or take them out; {QUARANTINE} in the cache folder lists them",
            )

    def add(self, other: "CachingResult") -> None:
        """Take in what another process did at the same time."""
        self.written += other.written
        self.kept += other.kept
        self.failed |= other.failed
        self.waited += other.waited
        self.worked += other.worked


def evenly(costs: Sequence[float], shares: int) -> list[list[int]]:
    """Return for each share the numbers of its jobs, rising, so that all shares cost about the same.

    The costliest job first, each to the share that has least: the dearest share is at most 4/3 of what is best (Graham,
    Bounds on multiprocessing timing anomalies, 1969).
    """
    numbers: list[list[int]] = [[] for _ in range(shares)]
    loads = [0.0] * shares
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        least = min(range(shares), key=lambda share: (loads[share], len(numbers[share]), share))
        numbers[least].append(job)
        loads[least] += costs[job]
    return [sorted(share) for share in numbers]


def check_run(configs: Sequence[DatasetConfig], options: CachingOptions) -> None:
    """Raise UserError for what would fail only after the encoder has been loaded."""
    if options.num_workers is not None and options.num_workers < 0:
        raise UserError(f"--num_workers {options.num_workers}: must be 0 or more", "leave it out")
    if not options.decode_timeout > 0:
        raise UserError(f"--decode_timeout {options.decode_timeout:g}: must be more than 0 seconds", "leave it out")
    for config in configs:
        require_writable_folder(config.cache_directory, f"{config.where}: cache_directory")


def log_reasons(reasons: Counter) -> None:
    for reason, count in reasons.most_common():
        logger.info("%d cache files to make: %s", count, reason)


def delete_stale(config: DatasetConfig, candidates: Iterable[Path], keep: bool) -> list[Path]:
    """Delete the cache files for Wan among the candidates, or only name them; anything else is left alone."""
    deleted = []
    for path in candidates:
        if not may_be_deleted(path, config):
            logger.warning("%s: is not a complete cache file of this dataset; left alone", path)
        elif keep:
            logger.info("no longer used: %s", path)
        else:
            logger.info("deleted, no media file belongs to it: %s", path)
            path.unlink()
            deleted.append(path)
    return deleted
