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

from dataset.cache import may_be_deleted, tells_how_made
from dataset.config import DatasetConfig
from utils.errors import UserError
from utils.files import remove_leftovers, require_writable_folder
from utils.options import option

logger = logging.getLogger(__name__)
Job = TypeVar("Job")
Result = TypeVar("Result")
_NAMED = 10  # files in one line of the log


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
    skip_existing: bool = option(
        False, "keep cache files that are complete and still match, without decoding; says why of the others"
    )
    keep_cache: bool = option(False, "do not delete cache files that no media file of the dataset belongs to any more")
    dry_run: bool = option(False, "only tell what would be encoded, written and deleted; no file is made or changed")


@dataclass
class CachingResult:
    """What a caching run did, filled in as it goes."""

    written: list[Path] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)  # media file > why
    deleted: list[Path] = field(default_factory=list)
    dry_run: bool = False

    def report(self) -> None:
        """Log what was done in a line, and each media file that could not be used; UserError when nothing is there."""
        if self.dry_run:
            logger.info("dry run: nothing was written, changed or deleted")
            return
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
    would = "would be removed" if options.dry_run else "removed"
    for config in configs:
        if not options.dry_run:
            require_writable_folder(config.cache_directory, f"{config.where}: cache_directory")
        for path in remove_leftovers(config.cache_directory, options.dry_run):
            logger.info("%s, left by a run that was killed: %s", would, path)


def log_reasons(reasons: Counter) -> None:
    """Log why cache files are made again, a line for each reason."""
    for reason, count in reasons.most_common():
        logger.info("%s: %s", items(count), reason)


def note_untold(kept: Iterable[Path]) -> None:
    """Log in a line how many of the cache files kept do not say how they were made."""
    untold = [path for path in kept if not tells_how_made(path)]
    if untold:
        logger.info(
            "%s: the cache files do not tell how they were made (musubi-tuner's do not); "
            "kept, as name, shapes and number format fit, the first %s",
            items(len(untold)),
            untold[0],
        )


def items(count: int) -> str:
    return "1 item" if count == 1 else f"{count:,} items"


def delete_stale(config: DatasetConfig, candidates: Iterable[Path], options: CachingOptions) -> list[Path]:
    """Delete those of the files that say that they were made for this dataset, after listing them, and return them.

    Anything else is named and left alone.
    """
    candidates = list(candidates)
    stale = [path for path in candidates if may_be_deleted(path, config)]
    if others := [path for path in candidates if path not in set(stale)]:
        named = ", ".join(path.name for path in others[:_NAMED])
        more = f" and {len(others) - _NAMED:,} more" if len(others) > _NAMED else ""
        logger.warning(
            "%s: files that are not known to be caches of this dataset; left alone, but training takes what it can of "
            "them: %s%s",
            config.cache_directory,
            named,
            more,
        )
    does = "no longer used" if options.keep_cache else "would be deleted" if options.dry_run else "to be deleted"
    for path in stale:
        logger.info("%s, no media file of the dataset belongs to it: %s", does, path)
    if options.keep_cache or options.dry_run:
        return []
    for path in stale:
        path.unlink(missing_ok=True)  # another run may have been faster
    return stale
