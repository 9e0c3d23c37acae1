"""Training batches from cache files alone: neither media nor captions are needed."""

import hashlib
import logging
import random
import signal
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dataset.cache import (
    CacheHeader,
    extra_text_path,
    latent_files,
    media_name,
    more_text_paths,
    read_header,
    read_tensors,
    text_path,
)
from dataset.captions import EMPTY, drawn_text
from dataset.config import DatasetConfig, dataset_metadata
from dataset.masks import is_masked, weights_of
from utils.errors import UserError
from utils.identity import seed_of

logger = logging.getLogger(__name__)

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class CachedItem:
    """One training example: its cache files, which are complete, and what is in them."""

    latents: Path
    text: Path
    shapes: Shapes  # (name in a batch, shape) of the tensors beside the latents' file, sorted: the bucket
    caption: str | None = None  # that the text was cached for, where its file tells
    more_texts: tuple[Path, ...] = ()  # of which one may be drawn instead of the text

    @property
    def names(self) -> frozenset[str]:
        """The tensors there are: latents, and maybe latents_image, latents_control, latents_mask, clip, f_indices."""
        return frozenset(name for name, _ in self.shapes)


@dataclass(frozen=True)
class Batch:
    """What one training step is given: examples of one shape, on the CPU until `to`."""

    latents: Tensor  # [B 16 F H W]
    text: list[Tensor]  # B times [L D], L <= 512
    latents_image: Tensor | None = None  # [B 20 F H W]: 4 mask channels, then the image's latents
    clip: Tensor | None = None  # [B 257 D]; [B 2 257 D] for two images
    latents_control: Tensor | None = None  # [B 16 F H W]
    frame_indices: Tensor | None = None  # [B F]: where in time the latent frames are (one-frame training)
    timesteps: list[float] | None = None  # B numbers in [0, 1) to use in place of uniform random ones
    mask: Tensor | None = None  # [B 1 F H W] in [0, 1]: how much each place counts in the loss; None: all the same
    weight: float = 1.0  # that its loss is multiplied by

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return the batch with all tensors on a device."""

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=non_blocking)
            return [moved(part) for part in value] if isinstance(value, list) else value

        return replace(self, **{part.name: moved(getattr(self, part.name)) for part in fields(self)})

    def __len__(self) -> int:
        return len(self.latents)


@dataclass(frozen=True)
class DatasetSummary:
    """What there is to train on, for the log and for the metadata of trained files."""

    items: int  # training examples, with repeats
    batches: int  # per epoch
    buckets: tuple[tuple[str, int], ...]  # ("832x480, 81 frames", examples without repeats), most frequent first
    names: frozenset[str]  # the tensors that every example has: latents, latents_image, clip ...
    metadata: list[dict[str, Any]] = field(default_factory=list)  # ss_datasets

    def lines(self) -> list[str]:
        """Return the summary as lines for the log."""
        shown = [f"  {bucket}: {count}" for bucket, count in self.buckets]
        return [f"{self.items} training items in {self.batches} batches per epoch", *shown]


def find_cached(config: DatasetConfig) -> tuple[list[CachedItem], list[Path]]:
    """Return the training examples in a dataset's cache folder, and the latent caches that have no text cache.

    Both are sorted by file name. Damaged and foreign files are left out with a warning. Raises UserError where a text
    is missing that may be drawn in place of an example's own, or a mask that the dataset file asks for.
    """
    items, without_text = [], []
    texts: dict[Path, CacheHeader | None] = {}

    def header_of(text: Path) -> CacheHeader | None:
        if text not in texts:
            texts[text] = _header(text, "t5") if text.is_file() else None
        return texts[text]

    for path in latent_files(config):
        text = text_path(config, media_name(config, path))
        if (of_text := header_of(text)) is None:
            without_text.append(path)
        elif header := _header(path, "latents"):
            shapes = tuple(sorted(header.by_batch_name().items()))
            if is_masked(config) is False:
                shapes = tuple(pair for pair in shapes if pair[0] != "latents_mask")
            more = more_text_paths(config, of_text)
            items.append(CachedItem(path, text, shapes, of_text.metadata.get("caption1"), more))
    without = [item for item in items if "latents_mask" not in item.names] if is_masked(config) else []
    if without:
        counted = f"{len(without):,} of {len(items):,} caches, e.g. {without[0].latents}"
        key = "mask_directory" if config.mask_directory else "alpha_mask"
        raise UserError(
            f"{config.where}: {key}: no mask is in {counted}", "run wan_cache_latents.py with --skip_existing again"
        )
    needed = {text: "another caption of an example" for item in items for text in item.more_texts}
    if items and config.caption_dropout:
        needed[extra_text_path(config, EMPTY)] = "the empty text that caption_dropout needs"
    for text, what in needed.items():
        if header_of(text) is None:
            raise UserError(
                f"{config.where}: {what} is not cached: {text} is missing or damaged",
                "run wan_cache_text_encoder_outputs.py with --skip_existing",
            )
    return items, without_text


def _header(path: Path, needed: str) -> CacheHeader | None:
    """Return the header of a cache file, or None after a warning for one that cannot be used."""
    try:
        header = read_header(path)
    except UserError as error:
        logger.warning("left out: %s", error)
        return None
    if needed not in header.by_batch_name():
        logger.warning("left out: %s holds no %s", path, needed)
        return None
    return header


class CachedDataset(Dataset):
    """The batches of an epoch, by number. Items of one batch come from one dataset and have one shape.

    The order depends on the seed and the epoch alone. Batch `i` of epoch `e` is element `e * len(self) + i`, so that
    worker processes need not be told of a new epoch.
    """

    def __init__(self, configs: Sequence[DatasetConfig], seed: int, num_timestep_buckets: int | None = None):
        self.configs, self.seed, self.num_timestep_buckets = list(configs), seed, num_timestep_buckets
        found = [find_cached(config) for config in self.configs]
        self.items = [items for items, _ in found]
        self.without_text = [path for _, latents in found for path in latents]  # latents that are left out
        self.epoch = 0
        self.begun = 0  # batches of the epoch that are left out, having been trained on before a run went on
        self._planned: tuple[int, list[_PlannedBatch]] | None = None
        for config, items in zip(self.configs, self.items, strict=True):
            if not items:
                logger.warning("%s: no training items in %s", config.where, config.cache_directory)
        if not any(self.items):
            folders = ", ".join(str(config.cache_directory) for config in self.configs)
            aim = "validate" if self.configs[0].validation else "train"
            raise UserError(
                f"there is nothing to {aim} on in {folders}",
                "run wan_cache_latents.py and wan_cache_text_encoder_outputs.py with this dataset file first",
            )
        self._length = len(self._plan(0))

    def __len__(self) -> int:
        return self._length

    def choose_media(self, share: float) -> set[str]:
        """Return the names of this share of the media files, at least one, as the seed and the names decide.

        Not of what the model is only to keep. A name stands for all examples that are cut from files of this name.
        """
        pairs = zip(self.configs, self.items, strict=True)
        names = {media_name(config, item.latents) for config, items in pairs if not config.is_reg for item in items}
        if len(names) < 2:
            raise UserError(f"--validation_split {share:g}: there are not two media files to choose from")
        count = min(max(1, round(share * len(names))), len(names) - 1)
        return set(sorted(names, key=lambda name: seed_of(f"{self.seed} {name}"))[:count])

    def hold_out(self, names: Collection[str]) -> list[list[CachedItem]]:
        """Take the examples of media files of these names out of every epoch, and return them for each dataset."""
        held = []
        for number, (config, items) in enumerate(zip(self.configs, self.items, strict=True)):
            out = [not config.is_reg and media_name(config, item.latents) in names for item in items]
            held.append(list(compress(items, out)))
            self.items[number] = [item for item, gone in zip(items, out, strict=True) if not gone]
        self._length, self._planned = len(self._plan(0)), None
        return held

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that a sampler goes through next; 0 is the first."""
        self.epoch = epoch

    def digest(self) -> str:
        """Return a hash of what is in an epoch's batches and in which order."""
        content = [
            [config.batch_size, config.num_repeats, [(item.latents.name, item.shapes) for item in items]]
            for config, items in zip(self.configs, self.items, strict=True)
        ]
        return hashlib.sha256(repr([self.seed, content]).encode()).hexdigest()

    def __getitem__(self, index: int) -> "Batch | UserError":
        """Return a batch, or what is wrong with its files: raised in a worker process, it would come as a traceback."""
        epoch, number = divmod(index, len(self))
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, self._plan(epoch)
        config, items, timesteps = self._planned[1][number]
        try:
            return load_batch(items, config, timesteps)
        except UserError as error:
            return error

    def summary(self) -> DatasetSummary:
        """Return what there is to train on."""
        every = [item for items in self.items for item in items]
        repeats = zip(self.configs, self.items, strict=True)
        return DatasetSummary(
            items=sum(config.num_repeats * len(items) for config, items in repeats),
            batches=len(self),
            buckets=tuple(Counter(map(_bucket_words, every)).most_common()),
            names=frozenset.intersection(*(item.names for item in every)),
            metadata=[dataset_metadata(config) for config in self.configs],
        )

    def _plan(self, epoch: int) -> list["_PlannedBatch"]:
        """Return all batches of an epoch in their order."""
        generator = random.Random(f"{self.seed} {epoch}")
        plan = []
        for config, items in zip(self.configs, self.items, strict=True):
            batches = self._with_drawn_texts(_batches(items, config, generator), config, epoch)
            timesteps = self._timesteps(batches, config.batch_size, generator)
            plan += [(config, *planned) for planned in zip(batches, timesteps, strict=True)]
        generator.shuffle(plan)
        return plan

    def _with_drawn_texts(
        self, batches: list[list[CachedItem]], config: DatasetConfig, epoch: int
    ) -> list[list[CachedItem]]:
        """Return an epoch's batches, each example with the text that is drawn for it where there is a choice."""
        if not config.caption_dropout and not any(item.more_texts for batch in batches for item in batch):
            return batches
        times: Counter = Counter()

        def drawn(item: CachedItem) -> CachedItem:
            times[item.latents] += 1
            occasion = f"{self.seed} {epoch} {item.latents.name} {times[item.latents]}"
            return replace(item, text=drawn_text(config, (item.text, *item.more_texts), occasion))

        return [list(map(drawn, batch)) for batch in batches]

    def _timesteps(
        self, batches: list[list[CachedItem]], batch_size: int, generator: random.Random
    ) -> list[list[float] | None]:
        """Return for each batch numbers in [0, 1) that fill equal intervals equally over the epoch, if asked for."""
        count = self.num_timestep_buckets or 1
        if count < 2:
            return [None] * len(batches)
        total = len(batches) * batch_size
        pool = [(i + generator.random()) / count for i in range(count) for _ in range(-(-total // count))]
        generator.shuffle(pool)
        return [pool[i * batch_size :][: len(batch)] for i, batch in enumerate(batches)]


_PlannedBatch = tuple[DatasetConfig, list[CachedItem], list[float] | None]


def _batches(items: list[CachedItem], config: DatasetConfig, generator: random.Random) -> list[list[CachedItem]]:
    """Return the items in shuffled batches of one shape each; the last one of a shape may be smaller."""
    buckets: dict[Shapes, list[CachedItem]] = {}
    for item in items:
        buckets.setdefault(item.shapes, []).extend([item] * config.num_repeats)
    batches = []
    for bucket in buckets.values():
        generator.shuffle(bucket)
        batches += [bucket[i : i + config.batch_size] for i in range(0, len(bucket), config.batch_size)]
    generator.shuffle(batches)
    return batches


def load_batch(items: Sequence[CachedItem], config: DatasetConfig, timesteps: list[float] | None = None) -> Batch:
    """Return the cached tensors of a dataset's items, which are of one shape, as a batch."""
    cached = [read_tensors(item.latents) for item in items]
    stacked = {name: torch.stack([tensors[name] for tensors in cached]) for name in items[0].names}
    clip = stacked.get("clip")
    if clip is not None and clip.dim() == 4 and clip.shape[1] == 1:
        clip = clip[:, 0]  # one-frame caches count their images even when there is one
    return Batch(
        latents=stacked["latents"],
        text=[read_tensors(item.text)["t5"] for item in items],
        latents_image=stacked.get("latents_image"),
        clip=clip,
        latents_control=stacked.get("latents_control"),
        frame_indices=stacked.get("f_indices"),
        timesteps=timesteps,
        mask=weights_of(stacked["latents_mask"], config) if "latents_mask" in stacked else None,
        weight=config.prior_weight,
    )


class _EpochSampler(Sampler[int]):
    """The numbers of one epoch's batches, as many for each process: the first ones again where they do not divide."""

    def __init__(self, dataset: CachedDataset, processes: int):
        self.dataset, self.processes = dataset, processes

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.processes) * self.processes

    def __iter__(self) -> Iterator[int]:
        start, count = self.dataset.epoch * len(self.dataset), len(self.dataset)
        return (start + number % count for number in range(self.dataset.begun, len(self)))

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)


def _only(batches: list[Batch]) -> Batch:
    return batches[0]


def _leave_interrupts_to_the_main_process(worker: int) -> None:
    """Ignore Ctrl-C, which a terminal sends to every process: torch reports a worker that dies with a traceback.

    SIGTERM is how torch ends a worker, whatever the main process does about it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def batches_of(loader: Iterable[Batch | UserError]) -> Iterator[Batch]:
    """Yield the batches of a loader, or raise UserError for a cache file that was damaged or deleted meanwhile."""
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def make_loader(
    dataset: CachedDataset, workers: int = 0, persistent_workers: bool = False, processes: int = 1
) -> DataLoader:
    """Return a loader of the batches of the epoch chosen by `dataset.set_epoch`, to be read through `batches_of`.

    What a loader yields does not depend on the number of workers. Each element counts as a batch of one, which
    accelerate can deal out to several processes; its prepared loader has a `set_epoch` that reaches the dataset.
    """
    return DataLoader(
        dataset,
        batch_size=1,
        sampler=_EpochSampler(dataset, processes),
        collate_fn=_only,
        num_workers=workers,
        worker_init_fn=_leave_interrupts_to_the_main_process,
        persistent_workers=persistent_workers and workers > 0,
        # Own generator: starting an epoch draws a seed for the workers, which must not shift the noise of training.
        generator=torch.Generator().manual_seed(dataset.seed),
    )


def _bucket_words(item: CachedItem) -> str:
    frames, height, width = dict(item.shapes)["latents"][1:]
    seconds = "1 frame" if frames == 1 else f"{4 * frames - 3} frames"
    return f"{8 * width}x{8 * height}, {seconds}"
