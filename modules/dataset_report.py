"""What caching would make of a dataset, file by file, without a model: clips, buckets, what is left out and why."""

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dataset.cache import latent_path
from dataset.captions import texts_of
from dataset.config import DatasetConfig, VideoConfig
from dataset.items import DatasetItem, Source, find_sources, uncaptioned
from dataset.media import (
    FPS,
    Clip,
    MediaError,
    VideoFacts,
    probe_video,
    read_clips,
    require_fitting_controls,
    resample,
)
from modules.latent_caching import HEADER, latent_bytes, require_last_frames, require_one_frame_keys
from modules.pages import thumbnail
from utils.options import option

logger = logging.getLogger(__name__)

THUMBNAIL = 192  # pixels of the longer side
# Pixels of all frames that the VAE encodes in a second on an H100 in bf16. Decoding is measured (docs/memory.md: 1.6 s
# for 81 frames of 832x480); encoding takes about 0.6 of its operations.
ENCODED_PER_SECOND = 81 * 832 * 480 / (0.6 * 1.6)


@dataclass(frozen=True)
class ReportOptions:
    """explaining the data instead of caching"""

    report: bool = option(False, "tell what comes out of every file and why some are left out, and stop; no weights")
    report_json: Path | None = option(None, "write the report as JSON, too")
    report_html: Path | None = option(None, "write it as one page with the first and last frame of every clip, too")

    @property
    def wanted(self) -> bool:
        return self.report or self.report_json is not None or self.report_html is not None


@dataclass(frozen=True)
class ClipReport:
    """One training example that caching would make."""

    item: DatasetItem
    cache: Path  # the file of its latents
    size: int  # bytes of that file, within a few hundred
    first: bytes = b""  # its first frame as a small JPEG, and its last; empty unless asked for
    last: bytes = b""
    controls: tuple[bytes, ...] = ()  # the first frame of each
    mask: bytes = b""


@dataclass(frozen=True)
class FileReport:
    """What comes out of one media file."""

    path: Path
    caption: str | None = None
    clips: tuple[ClipReport, ...] = ()
    width: int = 0  # pixels of the file itself, upright; 0 where it cannot be read
    height: int = 0
    facts: VideoFacts | None = None  # of a video
    source_fps: float | None = None
    frames: int = 0  # of a video, at 16 frames per second
    dropped: str = ""  # why nothing comes out: one of REASONS
    detail: str = ""  # what exactly, and what would help
    notes: tuple[str, ...] = ()

    @property
    def bucket(self) -> str:
        return f"{self.clips[0].item.width}x{self.clips[0].item.height}" if self.clips else ""

    @property
    def unused(self) -> int:
        """Frames of a video, at 16 frames per second, that are in none of its clips."""
        used = set()
        for clip in self.clips:
            used.update(range(clip.item.first_frame, clip.item.first_frame + clip.item.frames))
        return max(0, self.frames - len(used))

    def line(self) -> str:
        """Return what comes out, as "143 frames at 30 fps -> 77 at 16 fps -> 1 clip of 65, 12 frames unused"."""
        if self.facts is None:
            return self._outcome() if self.dropped else f"{self.width}x{self.height} -> 1 picture"
        steps = [count(self.facts.frames, "frame") + (f" at {self.source_fps:g} fps" if self.source_fps else "")]
        if self.source_fps:
            steps.append(f"{self.frames} at {FPS} fps")
        return " -> ".join([*steps, self._outcome()])

    def _outcome(self) -> str:
        if self.dropped:
            return f"left out, {self.dropped}" + (f": {self.detail}" if self.detail else "")
        lengths = sorted(Counter(clip.item.frames for clip in self.clips).items())
        clips = [f"{n if i else count(n, 'clip')} of {frames}" for i, (frames, n) in enumerate(lengths)]
        unused = f"{count(self.unused, 'frame')} unused" if self.unused else "every frame used"
        return f"{', '.join(clips)}, {unused}"


NO_CAPTION, TOO_SHORT, UNREADABLE = "no caption", "too short", "cannot be read"


@dataclass(frozen=True)
class DatasetReport:
    """What comes out of one dataset."""

    config: DatasetConfig
    files: tuple[FileReport, ...]

    @property
    def clips(self) -> list[ClipReport]:
        return [clip for file in self.files for clip in file.clips]

    def buckets(self) -> Counter:
        """Return the training examples, without repeats, of each (width, height, frames)."""
        return Counter((clip.item.width, clip.item.height, clip.item.frames) for clip in self.clips)

    def batches(self) -> int:
        """Return the batches of an epoch: each holds examples of one bucket."""
        repeats, size = self.config.num_repeats, self.config.batch_size
        return sum(-(-examples * repeats // size) for examples in self.buckets().values())

    def heading(self) -> str:
        """Return the dataset in a line: "data.toml: dataset 1: walks, 832x480, head of [25]"."""
        config = self.config
        source = config.directory or config.jsonl_file
        words = [f"{config.kind}s of {source}", f"resolution {config.resolution[0]}x{config.resolution[1]}"]
        if isinstance(config, VideoConfig):
            full = config.frame_extraction == "full"
            lengths = f"at most {config.max_frames}" if full else ", ".join(map(str, config.target_frames))
            words.append(f"{config.frame_extraction}: clips of {lengths} frames")
            words.append(f"source_fps {config.source_fps:g}" if config.source_fps else "every frame taken as it is")
        return f"{config.where}: {'; '.join(words)}"


@dataclass(frozen=True)
class Report:
    """What comes out of all datasets."""

    datasets: tuple[DatasetReport, ...]
    encoded: int  # pixels of all frames that the VAE would encode
    text_bytes: int  # of the text caches, about
    seconds: float  # that reading took, and would take again

    @property
    def dropped(self) -> Counter:
        return Counter(file.dropped for each in self.datasets for file in each.files if file.dropped)

    @property
    def latent_bytes(self) -> int:
        return sum(clip.size for each in self.datasets for clip in each.clips)

    def totals(self) -> list[str]:
        """Return the sums in a few lines."""
        clips = [clip for each in self.datasets for clip in each.clips]
        trained = [each for each in self.datasets if not each.config.validation]
        repeated = sum(each.config.num_repeats * len(each.clips) for each in trained)
        batches = sum(each.batches() for each in trained)
        measured = sum(len(each.clips) for each in self.datasets if each.config.validation)
        used = sum(1 for each in self.datasets for file in each.files if file.clips)
        lost = sum(self.dropped.values())
        why = ", ".join(f"{files} {reason}" for reason, files in self.dropped.most_common())
        encoding = self.encoded / ENCODED_PER_SECOND
        return [
            f"{count(len(clips), 'training example')} of {count(used, 'file')}",
            f"an epoch: {count(batches, 'batch', 'batches')} of {count(repeated, 'example')}, repeats counted",
            *([f"validation: {count(measured, 'example')}, not trained on"] if measured else []),
            f"left out: {count(lost, 'file')} ({why})" if lost else "no file is left out",
            f"caches: {in_bytes(self.latent_bytes)} of latents, about {in_bytes(self.text_bytes)} of texts",
            f"time: reading took {duration(self.seconds)} here; encoding, by estimate, {duration(encoding)} on an "
            "H100 and several times that on smaller cards",
        ]


def examine(
    configs: Sequence[DatasetConfig],
    names: Sequence[str],
    dtype: torch.dtype,
    workers: int | None = None,
    thumbnails: bool = False,
    images: Sequence[str] = ("first",),
) -> Report:
    """Read every file of the datasets as caching reads it, and return what would be cached.

    names, dtype, images: the tensors of the cache files, the number format of latents and the frames that conditions
    show, as for `cache_latents`; workers: threads that read. Raises UserError where caching would.
    """
    if "f_indices" in names:
        require_one_frame_keys(configs)
    if "last" in images:
        require_last_frames(configs)
    jobs = [(config, source) for config in configs for source in find_sources(config)]
    for config in configs:
        require_fitting_controls(config, [source for its, source in jobs if its is config])

    def read(job: tuple[DatasetConfig, Source]) -> FileReport:
        return _examine_file(*job, names, dtype, thumbnails, images)

    start = time.monotonic()
    files: dict[Path, list[FileReport]] = {config.cache_directory: [] for config in configs}
    workers = max(1, workers or (os.cpu_count() or 2) - 1)
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(jobs), unit="file", desc="report") as progress:
        for (config, _), file in zip(jobs, pool.map(read, jobs), strict=True):
            files[config.cache_directory].append(file)
            progress.update()
    seconds = time.monotonic() - start
    reports = []
    for config in configs:
        lost = [_without_caption(path, config) for path in uncaptioned(config)]
        every = [*files[config.cache_directory], *lost]
        reports.append(DatasetReport(config, tuple(sorted(every, key=lambda file: file.path) if lost else every)))
    clips = [(clip, len(clip.item.source.controls)) for each in reports for clip in each.clips]
    return Report(
        datasets=tuple(reports),
        encoded=sum(_encoded_pixels(clip.item, controls, names) for clip, controls in clips),
        text_bytes=sum(
            _text_bytes(of.caption)
            for config in configs
            for of in texts_of(config, [source for its, source in jobs if its is config])
        ),
        seconds=seconds,
    )


def _examine_file(
    config: DatasetConfig,
    source: Source,
    names: Sequence[str],
    dtype: torch.dtype,
    thumbnails: bool,
    images: Sequence[str],
) -> FileReport:
    file: dict[str, Any] = {"path": source.path, "caption": "\n".join((source.caption, *source.more_captions))}
    notes = [] if source.caption else ["the caption is empty"]
    if source.masked and source.mask is None and not config.alpha_mask:
        notes.append("no mask: all of it counts")
    try:
        if isinstance(config, VideoConfig):
            facts = probe_video(source.path)
            frames = sum(1 for _ in resample(range(facts.frames), config.source_fps))
            file |= {"facts": facts, "width": facts.width, "height": facts.height, "frames": frames}
            file["source_fps"] = config.source_fps
            notes += _rate_notes(facts, config)
        # By name: what is read again after a wrong start comes once all the same.
        clips = {
            clip.item.key: _clip_report(config, clip, names, dtype, thumbnails, len(images))
            for clip in read_clips(source, config)
        }
    except MediaError as error:
        reason = str(error).removeprefix(f"{source.path}: ")
        if reason.startswith(f"{UNREADABLE} (") and reason.endswith(")"):
            reason = reason[len(UNREADABLE) + 2 : -1]
        return FileReport(**file, dropped=UNREADABLE, detail=reason, notes=tuple(notes))
    if not clips:
        return FileReport(**file, dropped=TOO_SHORT, detail=_shortness(config, file["frames"]), notes=tuple(notes))
    first = next(iter(clips.values())).item
    if "last" in images and first.frames == 1:
        detail = "gives one frame, but --flf2v needs at least 5"
        return FileReport(**file, dropped=TOO_SHORT, detail=detail, notes=tuple(notes))
    if not isinstance(config, VideoConfig):
        file |= {"width": first.named_width, "height": first.named_height}
    else:
        notes += _missing_lengths(config, file["frames"], {clip.item.frames for clip in clips.values()})
    scale = max(first.width / file["width"], first.height / file["height"])
    if scale > 1.25:
        notes.append(f"enlarged {scale:.1f} times")
    return FileReport(**file, clips=tuple(clips.values()), notes=tuple(notes))


def _rate_notes(facts: VideoFacts, config: VideoConfig) -> list[str]:
    if facts.fps is None:
        return []
    if config.source_fps is None:
        if abs(facts.fps / FPS - 1) > 0.02:
            speed, fps = "slower" if facts.fps > FPS else "faster", f"{facts.fps:.4g}"
            return [f"the file runs at {fps} fps and is learned {speed}; source_fps = {fps} mends that"]
    elif abs(facts.fps / config.source_fps - 1) > 0.02:
        return [f"the file runs at {facts.fps:.4g} fps, but source_fps is {config.source_fps:g}"]
    return []


def _shortness(config: VideoConfig, frames: int) -> str:
    """Return by how much a video is too short for every length, and which length would take it."""
    needed = min(config.target_frames)
    if frames >= needed:
        return f"the file announces {frames} frames, but fewer can be decoded"
    lacking = f"{count(needed - frames, 'frame')} short of {needed}"
    return f"{lacking}; target_frames = [{(frames - 1) // 4 * 4 + 1}] would take it" if frames > 0 else lacking


def _missing_lengths(config: VideoConfig, frames: int, lengths: set[int]) -> list[str]:
    missing = [] if config.frame_extraction == "full" else sorted(set(config.target_frames) - lengths)
    return [f"no clip of {length}: {count(length - frames, 'frame')} short" for length in missing if length > frames]


def _without_caption(path: Path, config: DatasetConfig) -> FileReport:
    return FileReport(path, dropped=NO_CAPTION, detail=f"{path.stem}{config.caption_extension} is missing")


def _clip_report(
    config: DatasetConfig, clip: Clip, names: Sequence[str], dtype: torch.dtype, thumbnails: bool, shown: int
) -> ClipReport:
    item = clip.item
    pictures = [clip.pixels[0], clip.pixels[-1], *(control[0] for control in clip.controls)] if thumbnails else []
    first, last, *controls = (thumbnail(picture, THUMBNAIL) for picture in pictures) if thumbnails else (b"", b"")
    mask = thumbnail(clip.mask[0], THUMBNAIL) if thumbnails and clip.mask is not None else b""
    size = latent_bytes(item, len(clip.controls), names, dtype, shown)
    return ClipReport(item, latent_path(config, item), size, first, last, tuple(controls), mask)


def _text_bytes(caption: str) -> int:
    """Return about how large a caption's cache file is: 4096 numbers a token in bfloat16, some 4 letters a token."""
    letters = sum(0.25 if character.isascii() else 0.7 for character in caption)
    return min(512, math.ceil(letters) + 1) * 4096 * 2 + HEADER


def _encoded_pixels(item: DatasetItem, controls: int, names: Sequence[str]) -> int:
    """Return how many pixels, of all frames, the VAE encodes for an example: itself, its condition, its controls."""
    one_frame = "f_indices" in names  # the picture, a grey one, the controls
    videos = 2 + controls if one_frame else 1 + ("latents_image" in names) + (controls > 0)
    return item.width * item.height * item.frames * videos


def count(number: int, word: str, plural: str = "") -> str:
    return f"{number:,} {word if number == 1 else plural or word + 's'}"


def in_bytes(number: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def duration(seconds: float) -> str:
    if seconds < 1:
        return "under a second"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
