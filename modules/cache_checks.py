"""Whether the caches are those of the dataset as it is now, as far as that can be told without its media."""

import logging
from pathlib import Path

from dataset.cache import extra_text_path, media_name
from dataset.items import captions_now
from dataset.loader import CachedDataset
from utils.errors import UserError

logger = logging.getLogger(__name__)


def check_fresh(data: CachedDataset, allow_stale: bool) -> None:
    """Raise UserError for latents without a text cache and for captions that changed, or only warn of them."""
    refused = (
        (data.without_text, "without a text cache", "leave them out"),
        (changed_captions(data), "whose caption is another one than when its text was cached", "train on the old one"),
    )
    for paths, what, otherwise in refused:
        if not paths:
            continue
        found = f"latent caches {what}: {len(paths):,}, the first is {paths[0]}"
        if not allow_stale:
            command = "run wan_cache_text_encoder_outputs.py with --skip_existing"
            raise UserError(found, f"{command}, or {otherwise} with --allow_stale")
        logger.warning("--allow_stale: %s", found)


def is_one_frame(data: CachedDataset) -> bool:
    """Return whether some of the caches are of one-frame training."""
    return any("f_indices" in item.names for items in data.items for item in items)


def check_one_frame(data: CachedDataset, asked: bool) -> None:
    """Raise UserError where one-frame training is asked for and no cache is of it."""
    if asked and not is_one_frame(data):
        raise UserError("--one_frame: the caches are not of one-frame training", "run wan_cache_latents.py --one_frame")


def changed_captions(data: CachedDataset) -> list[Path]:
    """Return the latent caches whose caption is no longer the one that their text was cached for."""
    changed = []
    for config, items in zip(data.configs, data.items, strict=True):
        names = {item: media_name(config, item.latents) for item in items if item.caption is not None}
        now = captions_now(config, set(names.values()))
        for item, name in names.items():
            if name not in now:
                continue
            first, *more = now[name]
            others = tuple(extra_text_path(config, each) for each in more)
            if (first, others) != (item.caption.strip(), item.more_texts):
                changed.append(item.latents)
    return changed
