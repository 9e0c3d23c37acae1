"""Media > encoders > latent cache files: skips what is done, names what failed, deletes what is stale."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from dataset.cache import latent_files, latent_path, media_name, why_remake_latents, write_latents
from dataset.config import DatasetConfig, ImageConfig
from dataset.items import DatasetItem, Source, find_sources
from dataset.media import Clip, MediaError, plan_items, read_clips, require_fitting_controls
from modules.caching import CachingOptions, CachingResult, ahead, check_run, delete_stale, log_reasons
from utils.devices import compute_dtype
from utils.errors import UserError
from wan.clip import ClipOptions, ImageEncoder, load_clip
from wan.conditioning import first_frame_condition
from wan.vae import VaeOptions, WanVAE, load_vae

logger = logging.getLogger(__name__)

# The tensors of a latent cache file, by what is to be trained. Wan2.2's image-to-video models know no CLIP.
T2V = ("latents",)
I2V_WITHOUT_CLIP = ("latents", "latents_image")
I2V = ("latents", "latents_image", "clip")
ONE_FRAME_WITHOUT_CLIP = ("latents", "latents_image", "f_indices")
ONE_FRAME = ("latents", "latents_image", "f_indices", "clip")


@dataclass(frozen=True)
class LatentEncoders:
    """What turns pixels into the tensors of a latent cache file."""

    vae: WanVAE
    clip: ImageEncoder | None


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
        require_one_frame_keys(configs)
    sources = [(config, source) for config in configs for source in find_sources(config)]
    check_run(configs, options)
    for config in configs:
        require_fitting_controls(config, [source for its, source in sources if its is config])
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
        log_reasons(reasons)
    for config in configs:
        folder = config.cache_directory
        stale = [path for path in latent_files(config) if path not in expected[folder]]
        # What could not be read this time may be readable again: its caches stay.
        stale = [path for path in stale if media_name(config, path) not in failed[folder]]
        result.deleted += delete_stale(config, stale, options.keep_cache)
    return result


def require_one_frame_keys(configs: Sequence[DatasetConfig]) -> None:
    """Raise UserError for a dataset that does not say where in time its pictures are."""
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
