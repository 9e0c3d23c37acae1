"""What the two caching scripts have in common: options, what a run did, work done ahead, stale cache files."""

import itertools
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from dataset.cache import may_be_deleted
from dataset.config import DatasetConfig
from utils.errors import UserError
from utils.files import require_writable_folder
from utils.options import option

logger = logging.getLogger(__name__)
Job = TypeVar("Job")
Result = TypeVar("Result")


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
    skip_existing: bool = option(False, "keep cache files that are complete and fit, without reading their media")
    keep_cache: bool = option(False, "do not delete cache files that no media file of the dataset belongs to any more")


@dataclass
class CachingResult:
    """What a caching run did, filled in as it goes."""

    written: list[Path] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)  # media file > why
    deleted: list[Path] = field(default_factory=list)

    def report(self) -> None:
        """Log what was done in a line, and each media file that could not be used; UserError when nothing is there."""
        if not self.written and not self.kept:
            first = next(iter(self.failed.values()), "no examples")
            raise UserError(f"nothing could be cached; files that failed: {len(self.failed)}, the first: {first}")
        for reason in self.failed.values():
            logger.warning("failed: %s", reason)
        counts = [f"{len(self.written)} cache files written", f"{len(self.kept)} kept", f"{len(self.failed)} failed"]
        logger.info("%s", ", ".join([*counts, *([f"{len(self.deleted)} deleted"] if self.deleted else [])]))


def ahead(work: Callable[[Job], Result], jobs: Iterable[Job], workers: int | None = None) -> Iterator[Result]:
    """Yield work(job) for all jobs in order; up to `workers` of them are done in threads ahead of the consumer."""
    workers = workers or max(1, (os.cpu_count() or 2) - 1)
    jobs = iter(jobs)
    with ThreadPoolExecutor(workers, thread_name_prefix="ahead") as pool:
        pending = deque(pool.submit(work, job) for job in itertools.islice(jobs, workers))
        try:
            while pending:
                done = pending.popleft().result()
                pending.extend(pool.submit(work, job) for job in itertools.islice(jobs, 1))
                yield done
        finally:
            for future in pending:
                future.cancel()


def check_run(configs: Sequence[DatasetConfig], options: CachingOptions) -> None:
    """Raise UserError for what would fail only after the encoder has been loaded."""
    if options.num_workers is not None and options.num_workers < 0:
        raise UserError(f"--num_workers {options.num_workers}: must be 0 or more", "leave it out")
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
