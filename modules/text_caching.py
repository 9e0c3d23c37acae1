"""Captions > text encoder > text cache files; captions that occur several times are encoded once."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from dataset.cache import text_files, text_path, why_remake_text, write_text
from dataset.config import DatasetConfig
from dataset.items import Source, find_sources
from dataset.provenance import Making
from modules.caching import CachingOptions, CachingResult, check_run, delete_stale, log_reasons, note_untold
from modules.dry_run import log_plan
from utils.devices import compute_dtype
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
    models: Mapping[str, str] | None = None,
) -> CachingResult:
    """Write the text cache files of all datasets; captions that occur several times are encoded once.

    load_encoder: called when there is something to encode. dtype: of the cached features.
    models: the identity of the encoder's weights by option, which the files tell, and by which old ones are judged.
    """
    result, reasons = CachingResult(dry_run=options.dry_run), Counter()
    making = Making(models=models or {})
    expected: dict[Path, set[Path]] = {}
    users: dict[str, list[tuple[DatasetConfig, Source]]] = {}
    for config in configs:
        sources = find_sources(config)
        expected[config.cache_directory] = {text_path(config, source.name) for source in sources}
        for source in sources:
            path = text_path(config, source.name)
            reason = why_remake_text(path, source, making)
            if reason := reason if options.skip_existing else "asked for":
                users.setdefault(source.caption, []).append((config, source))
                reasons[reason] += 1
            else:
                result.kept.append(path)
    check_run(configs, options)
    if options.skip_existing or options.dry_run:
        log_reasons(reasons)
        note_untold(result.kept)
    if options.dry_run:
        sources = [user for each in users.values() for user in each]
        log_plan(configs, {text_path(config, source.name): _bytes(source.caption) for config, source in sources})
        users.clear()
    # Captions of about one length together: the encoder pads a batch to its longest.
    captions = sorted(users, key=len)
    size = options.batch_size or max(config.batch_size for config in configs)
    encoder = load_encoder() if captions else None
    with tqdm(total=len(captions), unit="caption", desc="captions") as progress:
        for start in range(0, len(captions), size):
            batch = captions[start : start + size]
            for caption, text in zip(batch, encoder.encode(batch), strict=True):
                result.written += [write_text(*user, text.to(dtype), making) for user in users[caption]]
            progress.update(len(batch))
    for config in configs:
        stale = [path for path in text_files(config) if path not in expected[config.cache_directory]]
        result.deleted += delete_stale(config, stale, options)
    return result


def _bytes(caption: str) -> int:
    """Return about how large the text cache of a caption becomes: for 4 letters a token of 4096 numbers."""
    return min(512, len(caption) // 4 + 2) * 4096 * 2 + 500
