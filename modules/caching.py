"""What the two caching scripts have in common: options, what a run did, shares of several processes, stale files."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dataset.cache import may_be_deleted, tells_how_made
from dataset.config import DatasetConfig
from modules.quarantine import NAME as QUARANTINE
from utils.errors import UserError
from utils.files import remove_leftovers, require_writable_folder
from utils.options import option

logger = logging.getLogger(__name__)
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
    decode_timeout: float = option(
        120.0, "seconds without a new frame after which a media file is given up and quarantined"
    )
    strict: bool = option(False, "end with exit code 2 where any media file is quarantined, after all else is done")
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
    waited: float = 0.0  # seconds that the encoder waited for media
    worked: float = 0.0  # seconds from the first media read to the last cache file written

    def report(self, strict: bool = False) -> None:
        """Log what was done in a line, and each media file that could not be used.

        Raises UserError when nothing is there; when a media file could not be used, only where that is not to be.
        """
        if self.dry_run:
            for reason in self.failed.values():
                logger.warning("failed: %s", reason)
            logger.info("dry run: nothing was written, changed or deleted")
            return
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
