"""Captions > text encoder > text cache files; captions that occur several times are encoded once."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from dataset.cache import text_file, text_files, why_remake_text, write_text
from dataset.captions import texts_of
from dataset.config import DatasetConfig
from dataset.items import Source, Text, find_sources, uncaptioned
from dataset.provenance import Making
from modules.caching import CachingOptions, CachingResult, check_run, delete_stale, evenly, log_reasons, note_untold
from modules.dry_run import log_plan
from modules.quarantine import NO_CAPTION, write_quarantine
from utils.devices import compute_dtype
from utils.processes import Processes
from wan.t5 import T5Options, TextEncoder, load_t5


def load_text_encoder(t5: T5Options, device: torch.device) -> TextEncoder:
    """Return the text encoder with its tokenizer, ready to encode on a device."""
    return load_t5(
        t5.t5,
        compute_dtype(torch.bfloat16, device),
        device,
        tokenizer=t5.t5_tokenizer,
        fp8=t5.fp8_t5,
        blocks_to_swap=t5.t5_blocks_to_swap,
    )


def cache_texts(
    configs: Sequence[DatasetConfig],
    load_encoder: Callable[[], TextEncoder],
    options: CachingOptions,
    dtype: torch.dtype = torch.bfloat16,
    processes: Processes | None = None,
    models: Mapping[str, str] | None = None,
) -> CachingResult:
    """Write the text cache files of all datasets; return what all processes did, each with a share of the work.

    Captions that occur several times, in whatever datasets, are encoded once. load_encoder: called when there is
    something to encode. dtype: of the cached features. models: the identity of the encoder's weights by option, which
    the files tell, and by which old ones are judged.
    """
    processes = processes or Processes()
    making = Making(models=models or {})
    plan = processes.first(lambda: _plan(configs, options, making))
    result = CachingResult(kept=list(plan.kept) if processes.is_first else [], dry_run=options.dry_run)
    encoder = load_encoder() if plan.users else None
    batches = _batches(plan.users, encoder, options.batch_size or max(config.batch_size for config in configs))
    shares = evenly([len(batch) * batch[-1][1] for batch in batches], processes.count)
    batches = [batches[number] for number in shares[processes.rank]]
    total = sum(map(len, batches))
    with tqdm(total=total, unit="caption", desc="captions", disable=not processes.is_first) as progress:
        for batch in batches:
            captions = [caption for caption, _ in batch]
            for caption, text in zip(captions, encoder.encode(captions), strict=True):
                result.written += [write_text(*user, text.to(dtype), making) for user in plan.users[caption]]
            progress.update(len(batch))
    result, *others = processes.exchange(result)
    for other in others:
        result.add(other)
    if processes.is_first:
        for config in configs:
            stale = [path for path in text_files(config) if path not in plan.expected[config.cache_directory]]
            result.deleted += delete_stale(config, stale, options)
            without = {path: f"{path}: {NO_CAPTION}" for path in uncaptioned(config)}
            result.failed |= without
            if not options.dry_run:
                write_quarantine(config.cache_directory, without, captions_only=True)
    return result


@dataclass(frozen=True)
class _Plan:
    """What there is to do."""

    users: dict[str, list[tuple[DatasetConfig, Source | Text]]]  # by caption: what its text is to be cached for
    kept: list[Path]  # caches that are there and fit
    expected: dict[Path, set[Path]]  # by cache folder: all caches that belong to a caption


def _plan(configs: Sequence[DatasetConfig], options: CachingOptions, making: Making) -> _Plan:
    """Return what there is to do, in a dry run after telling it: nothing."""
    plan, reasons = _Plan({}, [], {}), Counter()
    for config in configs:
        paths = {text_file(config, of): of for of in texts_of(config, find_sources(config))}
        plan.expected[config.cache_directory] = set(paths)
        for path, of in paths.items():
            reason = why_remake_text(path, of, making)
            if reason := reason if options.skip_existing else "asked for":
                plan.users.setdefault(of.caption, []).append((config, of))
                reasons[reason] += 1
            else:
                plan.kept.append(path)
    check_run(configs, options)
    if options.skip_existing or options.dry_run:
        log_reasons(reasons)
        note_untold(plan.kept)
    if options.dry_run:
        users = [(caption, user) for caption, users in plan.users.items() for user in users]
        log_plan(configs, {text_file(*user): _bytes(caption) for caption, user in users})
        plan.users.clear()
    return plan


def _batches(captions: Iterable[str], encoder: TextEncoder | None, size: int) -> list[list[tuple[str, int]]]:
    """Return batches of (caption, number of tokens), sorted by tokens: the encoder pads a batch to its longest."""
    captions = list(captions)
    lengths = encoder.lengths(captions) if captions else []
    rising = sorted(zip(captions, lengths, strict=True), key=lambda pair: pair[1])
    return [rising[start : start + size] for start in range(0, len(rising), size)]


def _bytes(caption: str) -> int:
    """Return about how large the text cache of a caption becomes: for 4 letters a token of 4096 numbers."""
    return min(512, len(caption) // 4 + 2) * 4096 * 2 + 500
