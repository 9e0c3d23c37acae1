"""Media and captions > encoders > cache files: skips what is done, names what failed, deletes what is stale."""

import itertools
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from dataset.cache import (
    latent_files,
    latent_path,
    may_be_deleted,
    media_name,
    text_files,
    text_path,
    why_remake_latents,
    why_remake_text,
    write_latents,
    write_text,
)
from dataset.config import DatasetConfig, ImageConfig
from dataset.items import DatasetItem, Source, find_sources
from dataset.media import Clip, MediaError, plan_items, read_clips
from utils.devices import compute_dtype
from utils.errors import UserError
from utils.files import require_writable_folder
from utils.options import option
from wan.clip import ClipOptions, ImageEncoder, load_clip
from wan.conditioning import first_frame_condition
from wan.t5 import T5Options, TextEncoder, load_t5
from wan.vae import VaeOptions, WanVAE, load_vae

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


@dataclass(frozen=True)
class LatentEncoders:
    """What turns pixels into the tensors of a latent cache file."""

    vae: WanVAE
    clip: ImageEncoder | None


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


# --------------------------------------------------------------------------------------------------------- latents
# The tensors of a latent cache file, by what is to be trained. Wan2.2's image-to-video models know no CLIP.
T2V = ("latents",)
I2V_WITHOUT_CLIP = ("latents", "latents_image")
I2V = ("latents", "latents_image", "clip")
ONE_FRAME_WITHOUT_CLIP = ("latents", "latents_image", "f_indices")
ONE_FRAME = ("latents", "latents_image", "f_indices", "clip")


def load_latent_encoders(
    vae: VaeOptions, clip: ClipOptions, dtype: torch.dtype, device: torch.device
) -> LatentEncoders:
    """Return the VAE, and CLIP where its weights are given, ready to encode on a device.

    dtype: of the VAE on a GPU; a CPU computes in float32, where it is faster than in 16 bits.
    """
    computing = torch.float32 if device.type == "cpu" else dtype
    loaded_vae = load_vae(vae.vae, computing, device, vae.vae_cache_cpu, vae.tile)
    return LatentEncoders(
        vae=loaded_vae,
        clip=load_clip(clip.clip, compute_dtype(torch.float16, device), device) if clip.clip else None,
    )


def cache_latents(
    configs: Sequence[DatasetConfig],
    load_encoders: Callable[[], LatentEncoders],
    dtype: torch.dtype,
    options: CachingOptions,
    names: Sequence[str] = T2V,
) -> CachingResult:
    """Write the latent cache files of all datasets.

    load_encoders: called once, when the first example has been read. dtype: of the cached latents. names: the tensors
    wanted: T2V, I2V, ONE_FRAME or one without clip; latents_control comes along where a dataset has control files.
    """
    if "f_indices" in names:
        _require_one_frame_keys(configs)
    sources = [(config, source) for config in configs for source in find_sources(config)]
    _check_run(configs, options)
    result, reasons = CachingResult(), Counter()
    writer = _LatentWriter(load_encoders, dtype, names, options.batch_size)
    expected: dict[Path, set[Path]] = {config.cache_directory: set() for config in configs}
    failed: dict[Path, set[str]] = {config.cache_directory: set() for config in configs}

    present = {config.cache_directory: _by_media(config) for config in configs}

    def read(job: tuple[DatasetConfig, Source]) -> _Read:
        config, source = job
        cached = present[config.cache_directory].get(source.name, set())
        return _read(config, source, names, dtype, cached if options.skip_existing else None)

    with tqdm(total=len(sources), unit="file", desc="latents") as progress:
        for found in ahead(read, sources, options.num_workers):
            folder = found.config.cache_directory
            if found.error:
                logger.warning("left out: %s", found.error)
                result.failed[found.source.path] = found.error
                failed[folder].add(found.source.name)
            expected[folder].update(found.expected)
            result.kept += found.kept
            reasons.update(found.reasons)
            for clip in found.clips:
                writer.add(found.config, clip)
            progress.update()
        writer.finish()
    result.written += writer.written
    if options.skip_existing:
        _log_reasons(reasons)
    for config in configs:
        folder = config.cache_directory
        stale = [path for path in latent_files(config) if path not in expected[folder]]
        # What could not be read this time may be readable again: its caches stay.
        stale = [path for path in stale if media_name(config, path) not in failed[folder]]
        result.deleted += _delete_stale(config, stale, options.keep_cache)
    return result


def _require_one_frame_keys(configs: Sequence[DatasetConfig]) -> None:
    for config in configs:
        if getattr(config, "fp_1f_clean_indices", None) is None:
            raise UserError(
                f"{config.where}: --one_frame needs image datasets with fp_1f_clean_indices and fp_1f_target_index"
            )


@dataclass(frozen=True)
class _Read:
    """What reading one media file gave."""

    config: DatasetConfig
    source: Source
    expected: list[Path] = field(default_factory=list)  # the cache files of all examples of the file
    kept: list[Path] = field(default_factory=list)  # those among them that are there and fit
    clips: list[Clip] = field(default_factory=list)  # those to be encoded
    reasons: list[str] = field(default_factory=list)  # why, one for each clip
    error: str | None = None


def _by_media(config: DatasetConfig) -> dict[str, set[Path]]:
    """Return the latent cache files that are there, by the name of the media file they belong to."""
    present: dict[str, set[Path]] = {}
    for path in latent_files(config):
        present.setdefault(media_name(config, path), set()).add(path)
    return present


def _read(
    config: DatasetConfig, source: Source, names: Sequence[str], dtype: torch.dtype, present: set[Path] | None
) -> _Read:
    """Return the examples of a media file and the pixels of those that are to be encoded.

    present: the file's latent caches, to be kept where they fit; None to encode everything again.
    """
    one_frame = "f_indices" in names
    names = [*names, "latents_control"] if source.controls and not one_frame else names

    def why(item: DatasetItem) -> str | None:
        return why_remake_latents(config, item, names, dtype) if present is not None else "asked for"

    try:
        if present:
            items = plan_items(source, config)
            paths = [latent_path(config, item) for item in items]
            # A plan may miss examples at the end of an odd video. Caches that it does not know are no reason to
            # delete them, but one to decode the file.
            if present <= set(paths) and not any(map(why, items)):
                return _Read(config, source, expected=paths, kept=paths)
        clips = read_clips(source, config)
    except MediaError as error:
        return _Read(config, source, error=str(error))
    if not clips:
        reason = f"{source.path}: is shorter than the {min(config.target_frames)} frames that target_frames asks for"
        return _Read(config, source, error=reason)
    if one_frame and len(source.controls) < len(config.fp_1f_clean_indices):
        return _Read(config, source, error=f"{source.path}: has no control picture, which --one_frame needs")
    paths = [latent_path(config, clip.item) for clip in clips]
    reasons = [why(clip.item) for clip in clips]
    return _Read(
        config,
        source,
        expected=paths,
        kept=[path for path, reason in zip(paths, reasons, strict=True) if not reason],
        clips=[clip for clip, reason in zip(clips, reasons, strict=True) if reason],
        reasons=[reason for reason in reasons if reason],
    )


class _LatentWriter:
    """Encodes examples in batches of one shape and writes their cache files; loads the encoders for the first."""

    def __init__(
        self, load: Callable[[], LatentEncoders], dtype: torch.dtype, names: Sequence[str], batch_limit: int | None
    ):
        self.load, self.dtype, self.names, self.batch_limit = load, dtype, names, batch_limit
        self.encoders: LatentEncoders | None = None
        self.waiting: dict[tuple, tuple[DatasetConfig, list[Clip]]] = {}
        self.written: list[Path] = []

    def add(self, config: DatasetConfig, clip: Clip) -> None:
        """Take one example; it is encoded once there are enough of its shape."""
        key = config.cache_directory, clip.pixels.shape, len(clip.controls)
        batch = self.waiting.setdefault(key, (config, []))[1]
        batch.append(clip)
        if len(batch) >= min(config.batch_size, self.batch_limit or config.batch_size):
            self._write(*self.waiting.pop(key))

    def finish(self) -> None:
        """Encode what still waits for more of its shape."""
        while self.waiting:
            self._write(*self.waiting.popitem()[1])

    def _write(self, config: DatasetConfig, clips: list[Clip]) -> None:
        self.encoders = self.encoders or self.load()
        if "f_indices" in self.names:
            encoded = [encode_one_frame(self.encoders, clip, config) for clip in clips]
        else:
            encoded = encode_clips(self.encoders, clips, self.names)
        for clip, tensors in zip(clips, encoded, strict=True):
            self.written.append(write_latents(config, clip.item, tensors, self.dtype))


@torch.no_grad()
def encode_clips(encoders: LatentEncoders, clips: Sequence[Clip], names: Sequence[str]) -> list[dict[str, Tensor]]:
    """Return for each clip the tensors of its cache file; the clips must have one shape.

    names: of latents [16 f h w], latents_image [20 f h w] and clip [257 D], the features of the first frame.
    latents_control [16 f h w] is added where the clips have controls.
    """
    pixels = torch.stack([as_pixels(clip.pixels) for clip in clips])
    tensors = {"latents": encoders.vae.encode(pixels)}
    if "latents_image" in names:
        frames = pixels.shape[2]
        tensors["latents_image"] = torch.stack(
            [first_frame_condition(encoders.vae, video[:, 0], frames) for video in pixels]
        )
    if "clip" in names:
        tensors["clip"] = encoders.clip.encode(pixels[:, :, 0])
    if clips[0].controls:
        tensors["latents_control"] = encoders.vae.encode(torch.stack([as_pixels(clip.controls[0]) for clip in clips]))
    return [{name: tensor[i] for name, tensor in tensors.items()} for i in range(len(clips))]


@torch.no_grad()
def encode_one_frame(encoders: LatentEncoders, clip: Clip, config: ImageConfig) -> dict[str, Tensor]:
    """Return the tensors of a one-frame cache file: a picture and its N control pictures as frames of one latent video.

    latents [16 N+1 h w] and latents_image [20 N+1 h w] hold the frames in the order of f_indices [N+1], each encoded
    alone; latents_image shows the controls (mask 1) and is grey in the picture's place (mask 0). clip [N 257 D] are the
    features of the controls.
    """
    picture = as_pixels(clip.pixels)
    controls = [as_pixels(control) for control in clip.controls]
    picture_latent, grey, *control_latents = encoders.vae.encode(
        torch.stack([picture, torch.zeros_like(picture), *controls])
    )
    indices = config.frame_indices
    place = indices.index(config.fp_1f_target_index)
    frames = [*control_latents[:place], picture_latent, *control_latents[place:]]
    shown = [*control_latents[:place], grey, *control_latents[place:]]
    mask = torch.ones(4, len(indices), *picture_latent.shape[2:])
    mask[:, place] = 0
    tensors = {
        "latents": torch.cat(frames, dim=1),
        "latents_image": torch.cat([mask, torch.cat(shown, dim=1)]),
        "f_indices": torch.tensor(indices),
    }
    if encoders.clip is not None:
        tensors["clip"] = encoders.clip.encode(torch.stack([control[:, 0] for control in controls]))
    return tensors


def as_pixels(frames: np.ndarray) -> Tensor:
    """Return uint8 frames [F H W 3] or one picture [H W 3] as pixels [3 F H W] or [3 H W] in [-1, 1], float32.

    In float32 whatever the VAE computes in: in bfloat16 the division would quantise the picture.
    """
    return rearrange(torch.from_numpy(frames), "... c -> c ...") / 127.5 - 1


# ------------------------------------------------------------------------------------------------------------ text
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
) -> CachingResult:
    """Write the text cache files of all datasets; captions that occur several times are encoded once.

    load_encoder: called when there is something to encode. dtype: of the cached features.
    """
    result, reasons = CachingResult(), Counter()
    expected: dict[Path, set[Path]] = {}
    users: dict[str, list[tuple[DatasetConfig, Source]]] = {}
    for config in configs:
        sources = find_sources(config)
        expected[config.cache_directory] = {text_path(config, source.name) for source in sources}
        for source in sources:
            path = text_path(config, source.name)
            reason = why_remake_text(path, source) if options.skip_existing else "asked for"
            if reason:
                users.setdefault(source.caption, []).append((config, source))
                reasons[reason] += 1
            else:
                result.kept.append(path)
    _check_run(configs, options)
    if options.skip_existing:
        _log_reasons(reasons)
    # Captions of about one length together: the encoder pads a batch to its longest.
    captions = sorted(users, key=len)
    size = options.batch_size or max(config.batch_size for config in configs)
    encoder = load_encoder() if captions else None
    with tqdm(total=len(captions), unit="caption", desc="captions") as progress:
        for start in range(0, len(captions), size):
            batch = captions[start : start + size]
            for caption, text in zip(batch, encoder.encode(batch), strict=True):
                result.written += [write_text(*user, text.to(dtype)) for user in users[caption]]
            progress.update(len(batch))
    for config in configs:
        stale = [path for path in text_files(config) if path not in expected[config.cache_directory]]
        result.deleted += _delete_stale(config, stale, options.keep_cache)
    return result


# ---------------------------------------------------------------------------------------------------------- common
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


def _check_run(configs: Sequence[DatasetConfig], options: CachingOptions) -> None:
    """Raise UserError for what would fail only after the encoder has been loaded."""
    if options.num_workers is not None and options.num_workers < 0:
        raise UserError(f"--num_workers {options.num_workers}: must be 0 or more", "leave it out")
    for config in configs:
        require_writable_folder(config.cache_directory, f"{config.where}: cache_directory")


def _log_reasons(reasons: Counter) -> None:
    for reason, count in reasons.most_common():
        logger.info("%d cache files to make: %s", count, reason)


def _delete_stale(config: DatasetConfig, candidates: Iterable[Path], keep: bool) -> list[Path]:
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
