"""Prefix, several captions and dropout: what is encoded, what training draws, what is told where a text is missing."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dataset.cache import read_header, read_tensors, why_remake_text, write_latents
from dataset.captions import texts_of
from dataset.config import load_config
from dataset.items import DatasetItem, Text, captions_now, find_sources
from dataset.loader import CachedDataset, make_loader
from dataset.provenance import KEY, Making, caption_hash
from modules.cache_checks import check_fresh
from modules.caching import CachingOptions
from modules.text_caching import cache_texts
from tests.media import write_pictures, write_toml
from utils.errors import UserError

SKIP = CachingOptions(device="cpu", skip_existing=True)


class Encoder:
    """Says of a text its number in the order in which texts came, and counts what it was asked."""

    def __init__(self):
        self.asked: list[str] = []

    def lengths(self, captions: list[str]) -> list[int]:
        return [len(caption) + 1 for caption in captions]

    def encode(self, captions: list[str]) -> list[torch.Tensor]:
        self.asked += captions
        return [torch.full((2, 4), float(self.asked.index(caption))) for caption in captions]


class Data:
    """Two pictures, whose captions are lines, with cached latents; made anew for other keys of the dataset file."""

    def __init__(self, folder: Path):
        self.folder, self.encoder = folder, Encoder()
        self.images = write_pictures(folder / "images", {"a": (64, 64), "b": (64, 64)})
        (self.images / "a.txt").write_text("a star\n\n a red star \na star that spins\n")
        (self.images / "b.txt").write_text("a moon")

    def configs(self, **keys: object):
        table = {"image_directory": self.images, "cache_directory": self.folder / "cache", **keys}
        general = {"resolution": 64, "caption_extension": ".txt"}
        return load_config(write_toml(self.folder / "data.toml", general, table))

    def cache(self, options: CachingOptions = SKIP, **keys: object) -> list[str]:
        """Cache, and return the texts that were encoded, sorted."""
        before, configs = len(self.encoder.asked), self.configs(**keys)
        for source in find_sources(configs[0]):
            write_latents(configs[0], DatasetItem(source, 64, 64, 64, 64), LATENTS, torch.float32)
        cache_texts(configs, lambda: self.encoder, options, torch.float32, models={"t5": "t"})
        return sorted(self.encoder.asked[before:])

    def drawn(self, epoch: int, workers: int = 0, seed: int = 1, **keys: object) -> list[tuple[float, str]]:
        """Return (which latents, which text) of each example of an epoch, in its order."""
        data = CachedDataset(self.configs(**keys), seed)
        data.set_epoch(epoch)
        batches = list(make_loader(data, workers))
        return [
            (batch.latents[i, 0, 0, 0, 0].item(), self.encoder.asked[int(text[0, 0])])
            for batch in batches
            for i, text in enumerate(batch.text)
        ]


LATENTS = {"latents": torch.zeros(16, 1, 8, 8)}
SEVERAL = {"multiple_captions": True}


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path)


def test_a_plain_dataset_is_cached_as_ever(data: Data):
    assert data.cache() == ["a moon", "a star\n\n a red star \na star that spins"]
    assert sorted(path.name for path in (data.folder / "cache").glob("*_te*")) == [
        "a_wan_te.safetensors",
        "b_wan_te.safetensors",
    ]
    record = json.loads(read_header(data.folder / "cache" / "a_wan_te.safetensors").metadata[KEY])
    assert "more" not in record


def test_each_text_is_encoded_once_and_again_only_when_it_changes(data: Data):
    (data.images / "b.txt").write_text("a moon\na red star")
    keys = SEVERAL | {"caption_dropout": 0.5}
    assert data.cache(**keys) == ["", "a moon", "a red star", "a star", "a star that spins"]
    assert data.cache(**keys) == []
    cache = data.folder / "cache"
    assert read_header(cache / "a_wan_te.safetensors").metadata["caption1"] == "a star"
    shared = cache / f"text_{caption_hash('a red star')}_wan_te.safetensors"
    assert read_header(shared).metadata["caption1"] == "a red star"
    assert data.cache(**keys, caption_prefix="zorb, ") == [
        *("zorb, a moon", "zorb, a red star", "zorb, a star", "zorb, a star that spins")
    ]
    # What no caption needs any more went, and the empty text has no prefix.
    assert not shared.exists() and len(list(cache.glob("text_*"))) == 3
    (data.images / "a.txt").write_text("a star")
    assert data.cache(**keys, caption_prefix="zorb, ") == ["zorb, a star"]
    assert data.cache() == ["a moon\na red star", "a star"] and not list(cache.glob("text_*"))


def test_training_draws_by_seed_epoch_and_example_alone(data: Data):
    keys = SEVERAL | {"caption_dropout": 0.25, "num_repeats": 40, "caption_prefix": "zorb, "}
    data.cache(**keys)
    first = data.drawn(0, **keys)
    assert first == data.drawn(0, **keys) == data.drawn(0, workers=2, **keys)
    assert Counter(first) != Counter(data.drawn(1, **keys)) and Counter(first) != Counter(data.drawn(0, seed=2, **keys))
    # Batches of another size come in another order, and give each example the same texts.
    larger = data.drawn(0, **keys, batch_size=8)
    assert larger != first and Counter(larger) == Counter(first)
    counts = Counter(text for epoch in range(10) for _, text in data.drawn(epoch, **keys))
    total = counts.total()
    assert total == 800 and abs(counts[""] / total - 0.25) < 0.05
    for text in ("a star", "a red star", "a star that spins"):
        assert abs(counts[f"zorb, {text}"] / total - 0.75 / 6) < 0.04
    assert abs(counts["zorb, a moon"] / total - 0.75 / 2) < 0.06


def test_the_order_of_batches_and_their_noise_are_those_of_a_dataset_without_choice(data: Data):
    keys = {"num_repeats": 5, "batch_size": 2}
    data.cache(**SEVERAL, caption_dropout=0.5)

    def order(**more: object):
        plan = CachedDataset(data.configs(**keys, **more), 1, num_timestep_buckets=3)._plan(2)
        return [([item.latents for item in items], levels) for _, items, levels in plan]

    assert order(**SEVERAL, caption_dropout=0.5) == order(**SEVERAL)


def test_a_text_that_is_missing_is_said_with_the_command_that_makes_it(data: Data):
    data.cache(**SEVERAL)
    with pytest.raises(UserError) as error:
        CachedDataset(data.configs(**SEVERAL, caption_dropout=0.1), 0)
    assert "the empty text that caption_dropout needs is not cached: " in str(error.value)
    assert str(error.value).endswith("Run wan_cache_text_encoder_outputs.py with --skip_existing.")
    (data.folder / "cache" / f"text_{caption_hash('a red star')}_wan_te.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="another caption of an example is not cached"):
        CachedDataset(data.configs(**SEVERAL), 0)
    assert data.cache(**SEVERAL) == ["a red star"]
    CachedDataset(data.configs(**SEVERAL), 0)


def test_training_refuses_captions_that_changed_in_any_way(data: Data):
    def fresh(**keys: object) -> bool:
        try:
            check_fresh(CachedDataset(data.configs(**keys), 0), allow_stale=False)
        except UserError as error:
            assert "whose caption is another one" in str(error)
            return False
        return True

    data.cache(**SEVERAL)
    assert fresh(**SEVERAL) and not fresh() and not fresh(**SEVERAL, caption_prefix="x ")
    (data.images / "a.txt").write_text("a star\na star that spins\na red star")
    assert not fresh(**SEVERAL)


def test_a_cache_of_another_program_knows_of_one_caption(data: Data):
    """Of what musubi-tuner cached the first caption is taken, and the others are encoded."""
    (config,) = data.configs(**SEVERAL)
    data.cache(**SEVERAL)
    path = data.folder / "cache" / "a_wan_te.safetensors"
    tensors, metadata = read_tensors(path), read_header(path).metadata
    save_file({"varlen_t5_float32": tensors["t5"]}, path, {k: v for k, v in metadata.items() if k != KEY})
    source = find_sources(config)[0]
    assert why_remake_text(path, source, Making()) == "without the other captions"
    assert why_remake_text(path, replace(source, more_captions=()), Making()) is None


def test_a_jsonl_line_may_list_captions(data: Data):
    lines = [
        {"image_path": str(data.images / "a.png"), "caption": "for others", "captions": ["one", " two "]},
        {"image_path": str(data.images / "b.png"), "caption": "three"},
    ]
    listed = data.folder / "l.jsonl"
    listed.write_text("\n".join(map(json.dumps, lines)))
    table = {"image_jsonl_file": listed, "cache_directory": data.folder / "c", "caption_prefix": "x "}
    (config,) = load_config(write_toml(data.folder / "j.toml", {"resolution": 64}, table))
    sources = find_sources(config)
    assert [(source.caption, source.more_captions) for source in sources] == [("x one", ("x two",)), ("x three", ())]
    assert captions_now(config, []) == {"a": ("x one", "x two"), "b": ("x three",)}
    assert texts_of(replace(config, caption_dropout=0.1), sources)[2:] == [Text("x two"), Text("")]
    for wrong in ([], ["a", 3], "a"):
        listed.write_text(json.dumps({"image_path": "a.png", "captions": wrong}))
        with pytest.raises(UserError, match="captions must be a list of texts"):
            find_sources(config)
