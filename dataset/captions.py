"""What is said of an example in training: its caption, one of several, or now and then nothing."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from dataset.cache import extra_text_path
from dataset.config import DatasetConfig
from dataset.items import Source, Text
from utils.identity import seed_of

EMPTY = ""  # what caption_dropout puts in place of a caption


def texts_of(config: DatasetConfig, sources: Iterable[Source]) -> list[Source | Text]:
    """Return the texts that a dataset needs encoded: media files for their first captions, then others, each once."""
    sources = list(sources)
    more = [caption for source in sources for caption in source.more_captions]
    return [*sources, *map(Text, dict.fromkeys([*more, *([EMPTY] if config.caption_dropout else [])]))]


def drawn_text(config: DatasetConfig, texts: Sequence[Path], occasion: str) -> Path:
    """Return one of an example's text caches, or that of the empty text.

    occasion: what alone decides: seed, epoch and example, and how often it has come in the epoch, but neither its place
    there nor the process that reads it.
    """
    chance = random.Random(seed_of(occasion))
    return extra_text_path(config, EMPTY) if chance.random() < config.caption_dropout else chance.choice(texts)
