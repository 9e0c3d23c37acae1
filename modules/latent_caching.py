"""Media > encoders > latent cache files: skips what is done, names what failed, deletes what is stale."""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dataset.cache import latent_files, latent_path, media_name, why_remake_latents, write_latents
from dataset.config import DatasetConfig, VideoConfig
from dataset.decoding import MediaError
from dataset.items import DatasetItem, Source, find_sources, uncaptioned
from dataset.media import Clip, plan_items, read_clips, require_fitting_controls
from dataset.provenance import Making
from modules.caching import CachingOptions, CachingResult, check_run, delete_stale, evenly, log_reasons, note_untold
from modules.dry_run import log_plan
from modules.latent_encoding import T2V, LatentEncoders, encode_clips, encode_one_frame
from modules.quarantine import NO_CAPTION, write_quarantine
from modules.read_ahead import Ahead
from utils.errors import UserError
from utils.processes import Processes

logger = logging.getLogger(__name__)
_Job = tuple[DatasetConfig, Source]

HEADER = 600  # bytes of a cache file beside its tensors, about


def cache_latents(
    configs: Sequence[DatasetConfig],
    load_encoders: Callable[[], LatentEncoders],
    dtype: torch.dtype,
    options: CachingOptions,
    names: Sequence[str] = T2V,
    processes: Processes | None = None,
    models: Mapping[str, str] | None = None,
    images: Sequence[str] = ("first",),
) -> CachingResult:
    """Write the latent cache files of all datasets; return what all processes did, each with a share of the work.

    load_encoders: called once, when the first example has been read. dtype: of the cached latents. names: the tensors
    wanted: T2V, I2V, ONE_FRAME or one without clip; latents_control comes along where a dataset has control files.
    models: identities of the encoders' weights by option, which the files tell, and by which old ones are judged.
    images: the frames of a video that I2V shows, as in WanConfig.
    """
    processes = processes or Processes()
    if "f_indices" in names:
        require_one_frame_keys(configs)
    if "last" in images:
        require_last_frames(configs)
    sources = processes.first(lambda: [(config, source) for config in configs for source in find_sources(config)])
    processes.first(lambda: check_run(configs, options))
    processes.first(lambda: _check_controls(configs, sources))
    present = processes.first(lambda: {config.cache_directory: _by_media(config) for config in configs})
    making = Making(kind_of(names, images), models or {})

    def examine(job: tuple[DatasetConfig, Source]) -> _Examples:
        config, source = job
        cached = present[config.cache_directory].get(source.name, set())
        return _Examples(config, source, names, dtype, cached if options.skip_existing else None, making, images)

    if processes.count > 1:
        sources = _share(sources, examine, options, processes)
    found = _write_all(sources, examine, load_encoders, dtype, options, names, images, making, processes.is_first)
    found, *others = processes.exchange(found)
    for other in others:
        found.add(other)
    if processes.is_first:
        if options.skip_existing or options.dry_run:
            log_reasons(found.reasons)
            note_untold(found.result.kept)
        log_plan(configs, found.planned)
        for config in configs:
            _finish(config, found, options)
    return found.result


def _share(
    sources: Sequence[_Job], examine: Callable[[_Job], "_Examples"], options: CachingOptions, processes: Processes
) -> list[_Job]:
    """Return the media files of this process: all processes have about the same number of pixels to encode."""

    def cost(job: _Job, step: Callable[[], None]) -> Generator[None, None, int]:
        yield from ()  # nothing but what is returned
        with contextlib.suppress(MediaError):  # reading the file says so
            return examine(job).pixels(step)
        return 0

    mine = sources[processes.rank :: processes.count]
    costs = [cost for _, cost in Ahead(cost, mine, lambda job: 0, options.num_workers, options.decode_timeout)]
    every = [0] * len(sources)
    for rank, those in enumerate(processes.exchange(costs)):
        every[rank :: processes.count] = those
    return [sources[number] for number in evenly(every, processes.count)[processes.rank]]


def _write_all(
    sources: Sequence[_Job],
    examine: Callable[[_Job], "_Examples"],
    load_encoders: Callable[[], LatentEncoders],
    dtype: torch.dtype,
    options: CachingOptions,
    names: Sequence[str],
    images: Sequence[str],
    making: Making,
    show_progress: bool,
) -> "_Found":
    """Read and encode media files and write their caches."""

    def read(job: _Job, step: Callable[[], None]) -> Generator[Clip, None, _Read]:
        return (_plan if options.dry_run else _read)(examine(job), step)

    def late(job: _Job) -> _Read:
        config, source = job
        return _Read(config, source, error=f"{source.path}: gave no frame for {options.decode_timeout:g} seconds")

    found, start = _Found(CachingResult(dry_run=options.dry_run)), time.perf_counter()
    writer = _LatentWriter(load_encoders, dtype, names, images, options.batch_size, making)
    batch = max((writer.batch_size(config) for config, _ in sources), default=1)
    reading = Ahead(read, sources, late, options.num_workers, options.decode_timeout, batch)
    progress = tqdm(total=len(sources), unit="file", desc="latents", disable=not show_progress)
    with progress, contextlib.closing(iter(reading)) as results:
        for (config, _), result in results:
            if isinstance(result, Clip):
                writer.add(config, result)
            else:
                found.take(result)
                progress.update()
        writer.finish()
    found.result.written += writer.written
    found.result.waited, found.result.worked = reading.waited, time.perf_counter() - start
    return found


def _finish(config: DatasetConfig, found: "_Found", options: CachingOptions) -> None:
    """Delete the stale caches of a dataset and list its media files that could not be used."""
    folder = config.cache_directory
    failed = found.failed.get(folder, {})
    stale = [path for path in latent_files(config) if path not in found.expected.get(folder, ())]
    # What could not be read this time may be readable again: its caches stay.
    names = {source.name for source in failed}
    stale = [path for path in stale if media_name(config, path) not in names]
    found.result.deleted += delete_stale(config, stale, options)
    without = {path: f"{path}: {NO_CAPTION}" for path in uncaptioned(config)}
    found.result.failed |= without
    if not options.dry_run:
        write_quarantine(folder, without | {source.path: reason for source, reason in failed.items()})


def kind_of(names: Sequence[str], images: Sequence[str] = ("first",)) -> str:
    """Return what is trained on caches with these tensors that show these frames: t2v, i2v, flf2v or one_frame."""
    if "f_indices" in names:
        return "one_frame"
    return "t2v" if "latents_image" not in names else "flf2v" if "last" in images else "i2v"


def _check_controls(configs: Sequence[DatasetConfig], sources: Sequence[_Job]) -> None:
    for config in configs:
        require_fitting_controls(config, [source for its, source in sources if its is config])


def require_one_frame_keys(configs: Sequence[DatasetConfig]) -> None:
    """Raise UserError for a dataset that does not say where in time its pictures are."""
    for config in configs:
        if getattr(config, "fp_1f_clean_indices", None) is None:
            raise UserError(
                f"{config.where}: --one_frame needs image datasets with fp_1f_clean_indices and fp_1f_target_index"
            )


def require_last_frames(configs: Sequence[DatasetConfig]) -> None:
    """Raise UserError for a dataset whose clips have no last frame besides the first one."""
    for config in configs:
        if not isinstance(config, VideoConfig):
            raise UserError(
                f"{config.where}: --flf2v needs video datasets, a picture has no last frame",
                "use videos, or one-frame datasets with two control pictures and --one_frame",
            )
        full = config.frame_extraction == "full"
        key, lengths = ("max_frames", [config.max_frames]) if full else ("target_frames", list(config.target_frames))
        if min(lengths) < 5:
            raise UserError(
                f"{config.where}: {key} = {lengths[0] if full else lengths}: --flf2v needs a last frame besides the "
                "first one",
                "give 5 or more",
            )


class _Examples:
    """The examples of a media file, and why each is to be encoded.

    present: the file's latent caches, to be kept where they fit; None to encode everything again.
    """

    def __init__(
        self,
        config: DatasetConfig,
        source: Source,
        names: Sequence[str],
        dtype: torch.dtype,
        present: set[Path] | None,
        making: Making,
        images: Sequence[str],
    ):
        self.config, self.source, self.dtype, self.present, self.making = config, source, dtype, present, making
        self.images = images
        self.one_frame = "f_indices" in names
        controls = ["latents_control"] if source.controls and not self.one_frame else []
        self.names = [*names, *controls, *(["latents_mask"] if source.masked else [])]
        self.reasons: dict[DatasetItem, str | None] = {}

    def why(self, item: DatasetItem) -> str | None:
        """Return why an example is to be encoded, or None; once said it holds, whatever is written meanwhile."""
        if item not in self.reasons:
            judged = self.config, item, self.names, self.dtype, self.making, self.images
            self.reasons[item] = "asked for" if self.present is None else why_remake_latents(*judged)
        return self.reasons[item]

    def wanted(self, item: DatasetItem) -> bool:
        """Return whether an example is to be decoded; a clip of one frame has no last one besides the first."""
        return not ("last" in self.images and item.frames == 1) and self.why(item) is not None

    def pixels(self, step: Callable[[], None]) -> int:
        """Return about how many pixels are to be encoded; raises MediaError."""
        items = plan_items(self.source, self.config, step)
        return sum(item.frames * item.width * item.height for item in items if self.why(item))

    def all_kept(self, step: Callable[[], None]) -> list[DatasetItem] | None:
        """Return all examples where each can be kept, as far as can be told without decoding, or None."""
        if not self.present:
            return None
        items = plan_items(self.source, self.config, step)
        # A plan may miss examples at the end of an odd video. Caches that it does not know are no reason to delete
        # them, but one to decode the file.
        known = self.present <= {latent_path(self.config, item) for item in items}
        return items if known and not any(map(self.why, items)) else None

    def look(self, step: Callable[[], None]) -> None:
        """Look at the media before they are decoded, so that what is changed meanwhile is told by the next run."""
        for path in filter(None, (self.source.path, *self.source.controls, self.source.mask)):
            with contextlib.suppress(OSError):  # of which reading the file tells more
                self.making.media.look(path, step)

    def bytes(self, item: DatasetItem) -> int:
        return latent_bytes(item, len(self.source.controls), self.names, self.dtype, len(self.images))


def latent_bytes(item: DatasetItem, controls: int, names: Sequence[str], dtype: torch.dtype, shown: int) -> int:
    """Return the size of a latent cache file in bytes: of its tensors, and about that of its header."""
    one_frame = "f_indices" in names
    frames = controls + 1 if one_frame else (item.frames - 1) // 4 + 1
    channels = 16 + (20 if "latents_image" in names else 0) + (16 if controls and not one_frame else 0)
    latents = channels * frames * (item.height // 8) * (item.width // 8) * dtype.itemsize
    features = 257 * 1280 * 2 * (controls if one_frame else shown) if "clip" in names else 0
    mask = 4 * frames * (item.height // 8) * (item.width // 8) * item.source.masked
    return latents + mask + features + (4 * frames if one_frame else 0) + HEADER


@dataclass(frozen=True)
class _Read:
    """What reading one media file gave, beside its clips."""

    config: DatasetConfig
    source: Source
    expected: list[Path] = field(default_factory=list)  # the cache files of all examples of the file
    kept: list[Path] = field(default_factory=list)  # those among them that are there and fit
    reasons: list[str] = field(default_factory=list)  # why, one for each of the others
    planned: dict[Path, int] = field(default_factory=dict)  # in a dry run: the others, and how large they become
    error: str | None = None


@dataclass
class _Found:
    """What reading and encoding gave, filled in file by file; by cache folder."""

    result: CachingResult = field(default_factory=CachingResult)
    reasons: Counter = field(default_factory=Counter)  # why caches were made
    planned: dict[Path, int] = field(default_factory=dict)  # in a dry run: what would be written, bytes by file
    expected: dict[Path, set[Path]] = field(default_factory=dict)  # all caches that belong to a media file
    failed: dict[Path, dict[Source, str]] = field(default_factory=dict)  # media files that cannot be used, and why

    def take(self, read: _Read) -> None:
        """Take in what one media file gave."""
        folder = read.config.cache_directory
        if read.error:
            logger.warning("quarantined: %s", read.error)
            self.result.failed[read.source.path] = read.error
            self.failed.setdefault(folder, {})[read.source] = read.error
        self.expected.setdefault(folder, set()).update(read.expected)
        self.result.kept += read.kept
        self.reasons.update(read.reasons)
        self.planned |= read.planned

    def add(self, other: "_Found") -> None:
        """Take in what another process found."""
        self.result.add(other.result)
        self.reasons.update(other.reasons)
        self.planned |= other.planned
        for folder, paths in other.expected.items():
            self.expected.setdefault(folder, set()).update(paths)
        for folder, sources in other.failed.items():
            self.failed.setdefault(folder, {}).update(sources)


def _by_media(config: DatasetConfig) -> dict[str, set[Path]]:
    """Return the latent cache files that are there, by the name of the media file they belong to."""
    present: dict[str, set[Path]] = {}
    for path in latent_files(config):
        present.setdefault(media_name(config, path), set()).add(path)
    return present


def _read(examples: _Examples, step: Callable[[], None]) -> Generator[Clip, None, _Read]:
    """Yield the examples of a media file that are to be encoded; return what there is to say of the file."""
    config, source = examples.config, examples.source
    if examples.one_frame and len(source.controls) < len(config.fp_1f_clean_indices):
        return _Read(config, source, error=f"{source.path}: has no control picture, which --one_frame needs")
    try:
        items = examples.all_kept(step)
        if items is None:
            examples.look(step)
            items = yield from read_clips(source, config, examples.wanted, step)
    except MediaError as error:
        return _Read(config, source, error=str(error))
    return _said(examples, items)


def _plan(examples: _Examples, step: Callable[[], None]) -> Generator[Clip, None, _Read]:
    """Return what there is to say of a media file before it is decoded."""
    yield from ()  # nothing but what is returned
    try:
        said = _said(examples, items := plan_items(examples.source, examples.config, step))
    except MediaError as error:
        return _Read(examples.config, examples.source, error=str(error))
    planned = {latent_path(examples.config, item): examples.bytes(item) for item in items if examples.why(item)}
    return replace(said, planned=planned)


def _said(examples: _Examples, items: Sequence[DatasetItem]) -> _Read:
    """Return what there is to say of a media file with these examples."""
    config, source = examples.config, examples.source
    if not items:
        reason = f"{source.path}: is shorter than the {min(config.target_frames)} frames that target_frames asks for"
        return _Read(config, source, error=reason)
    if "last" in examples.images and items[0].frames == 1:
        return _Read(config, source, error=f"{source.path}: gives one frame, but --flf2v needs at least 5")
    paths = {item: latent_path(config, item) for item in items}
    return _Read(
        config,
        source,
        expected=list(paths.values()),
        kept=[path for item, path in paths.items() if not examples.why(item)],
        reasons=[reason for reason in map(examples.why, items) if reason],
    )


class _LatentWriter:
    """Encodes examples in batches of one shape; a thread writes their cache files meanwhile. Loads the encoders."""

    def __init__(
        self,
        load: Callable[[], LatentEncoders],
        dtype: torch.dtype,
        names: Sequence[str],
        images: Sequence[str],
        batch_limit: int | None,
        making: Making,
    ):
        self.load, self.dtype, self.names, self.images = load, dtype, names, images
        self.batch_limit, self.making = batch_limit, making
        self.encoders: LatentEncoders | None = None
        self.waiting: dict[tuple, tuple[DatasetConfig, list[Clip]]] = {}
        self.written: list[Path] = []
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self.writing: Future | None = None

    def batch_size(self, config: DatasetConfig) -> int:
        """Return how many examples of a dataset are encoded at once."""
        return min(config.batch_size, self.batch_limit or config.batch_size)

    def add(self, config: DatasetConfig, clip: Clip) -> None:
        """Take one example; it is encoded once there are enough of its shape."""
        key = config.cache_directory, clip.pixels.shape, len(clip.controls)
        batch = self.waiting.setdefault(key, (config, []))[1]
        batch.append(clip)
        if len(batch) >= self.batch_size(config):
            self._encode(*self.waiting.pop(key))

    def finish(self) -> None:
        """Encode what still waits for more of its shape, and wait until all is written."""
        while self.waiting:
            self._encode(*self.waiting.popitem()[1])
        if self.writing:
            self.writing.result()
        self.thread.shutdown()

    def _encode(self, config: DatasetConfig, clips: list[Clip]) -> None:
        self.encoders = self.encoders or self.load()
        if "f_indices" in self.names:
            encoded = [encode_one_frame(self.encoders, clip, config) for clip in clips]
        else:
            encoded = encode_clips(self.encoders, clips, self.names, self.images)
        if self.writing:
            self.writing.result()  # raises what writing the batch before did
        self.writing = self.thread.submit(self._write, config, [clip.item for clip in clips], encoded)

    def _write(self, config: DatasetConfig, items: list[DatasetItem], encoded: list[dict[str, Tensor]]) -> None:
        for item, tensors in zip(items, encoded, strict=True):
            self.written.append(write_latents(config, item, tensors, self.dtype, self.making))
