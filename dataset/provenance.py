"""How a cache file was made: one JSON value in its metadata, and what has changed since then."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.config import DatasetConfig
from dataset.decoding import no_step
from dataset.items import DatasetItem, Source, Text
from utils.identity import content_hash, size_and_time
from utils.version import VERSION

KEY = "wan_tuner"  # of the metadata; musubi-tuner carries it along without reading it
MODELS = {"vae": "VAE", "clip": "CLIP", "t5": "T5"}

# {"dataset": kind and folder or list of the media, "version": of this project, "models": {option: identity}}, for
# latents also {"kind": what is trained on them, "media": a file, "controls": [files], "window": [first frame, frames],
# "bucket": [width, height], "source_fps": number or null} and with masks {"mask": a file, "alpha" or "none"}, for texts
# {"media": {"path"}, "caption": hash, "more": [hashes of further captions]}. A file is {"path", "size" in bytes,
# "mtime_ns", "sha256"}. All paths are relative to the cache folder.
Record = Mapping[str, Any]


class MediaStates:
    """What the media files of a run are like, each looked at once: size, time, and a hash where that is asked for."""

    def __init__(self) -> None:
        self._found: dict[Path, dict[str, Any]] = {}

    def look(self, path: Path, step: Callable[[], None] = no_step) -> dict[str, Any]:
        """Return a file's size, mtime_ns and sha256; of when it was looked at first. Raises OSError.

        Whoever decodes the file looks before: what is changed meanwhile then has another time than the one returned.
        step: called now and then while the file is read.
        """
        if path not in self._found:
            size, time = size_and_time(path)
            self._found[path] = {"size": size, "mtime_ns": time, "sha256": content_hash(path, step)}
        return self._found[path]

    def is_same(self, path: Path, recorded: Record, folder: Path) -> bool:
        """Tell whether a file has the recorded content; read it only where its path or time differs."""
        try:
            size, time = size_and_time(path)
            if size != recorded.get("size"):
                return False
            if time == recorded.get("mtime_ns") and relative(path, folder) == recorded.get("path"):
                return True
            return self.look(path)["sha256"] == recorded.get("sha256")
        except OSError:
            return False


@dataclass(frozen=True)
class Making:
    """How the cache files of a run are made, and of those that are there which were made otherwise."""

    kind: str = "t2v"  # what is to be trained on the latents: t2v, i2v, flf2v, one_frame
    models: Mapping[str, str] = field(default_factory=dict)  # identities of the weights by option: vae, clip, t5
    media: MediaStates = field(default_factory=MediaStates)

    def record_latents(self, config: DatasetConfig, item: DatasetItem) -> Record:
        """Return what the cache file of a training example says of how it was made. Raises OSError for its media."""
        masked = {"mask": self._mask(config, item.source)} if item.source.masked else {}
        return {
            **self._record(config),
            **masked,
            "kind": self.kind,
            "media": self._file(config, item.source.path),
            "controls": [self._file(config, path) for path in item.source.controls],
            "window": [item.first_frame, item.frames],
            "bucket": [item.width, item.height],
            "source_fps": source_fps(config),
        }

    def _mask(self, config: DatasetConfig, source: Source) -> Record | str:
        """Return what mask an example has: a file, the alpha channel of its picture, or none, so that all counts."""
        if source.mask is not None:
            return self._file(config, source.mask)
        return "alpha" if config.alpha_mask else "none"

    def record_text(self, config: DatasetConfig, of: Source | Text) -> Record:
        """Return what the text cache of a media file, or of another text, says of how it was made."""
        record = {**self._record(config), "caption": caption_hash(of.caption)}
        if isinstance(of, Source):
            record["media"] = {"path": relative(of.path, config.cache_directory)}
        return {**record, "more": list(map(caption_hash, of.more_captions))} if of.more_captions else record

    def why_latents(self, config: DatasetConfig, item: DatasetItem, recorded: Record) -> str | None:
        """Return why latents are not those that would be made now, or None; their shapes are not looked at."""
        if self.kind != "t2v" and recorded.get("kind") != self.kind:
            return f"made for {recorded.get('kind')}"
        if reason := self._why_models(recorded):
            return reason
        if recorded.get("source_fps") != source_fps(config):
            return "of another source_fps"
        if not self._is_same(config, item.source.path, recorded.get("media")):
            return "the video file changed" if item.source.is_video else "the picture changed"
        controls = recorded.get("controls")
        if not isinstance(controls, list) or len(controls) != len(item.source.controls):
            return "other control files"
        if not all(self._is_same(config, *pair) for pair in zip(item.source.controls, controls, strict=True)):
            return "the control file changed"
        if item.source.masked:
            now, mask = item.source.mask, recorded.get("mask")
            if not (self._is_same(config, now, mask) if now else self._mask(config, item.source) == mask):
                return "the mask changed"
        return None

    def why_text(self, of: Source | Text, recorded: Record) -> str | None:
        """Return why a text cache is not the one that would be made now, or None."""
        if recorded.get("caption") != caption_hash(of.caption):
            return "caption changed"
        if recorded.get("more", []) != list(map(caption_hash, of.more_captions)):
            return "captions changed"
        return self._why_models(recorded)

    def _why_models(self, recorded: Record) -> str | None:
        made_with = recorded.get("models")
        made_with = made_with if isinstance(made_with, dict) else {}
        other = [MODELS[name] for name, identity in self.models.items() if made_with.get(name) != identity]
        return f"made with another {' and '.join(other)}" if other else None

    def _is_same(self, config: DatasetConfig, path: Path, recorded: Any) -> bool:
        return isinstance(recorded, dict) and self.media.is_same(path, recorded, config.cache_directory)

    def _record(self, config: DatasetConfig) -> dict[str, Any]:
        return {"version": VERSION, "dataset": dataset_identity(config), "models": dict(self.models)}

    def _file(self, config: DatasetConfig, path: Path) -> dict[str, Any]:
        return {"path": relative(path, config.cache_directory), **self.media.look(path)}


def written(record: Record) -> dict[str, str]:
    """Return a record as metadata of a file."""
    return {KEY: json.dumps(record, sort_keys=True)}


def recorded_in(metadata: Mapping[str, str]) -> Record | None:
    """Return what a file's metadata say of how it was made, or None: musubi-tuner's files do not."""
    with contextlib.suppress(ValueError):
        record = json.loads(metadata.get(KEY, ""))
        return record if isinstance(record, dict) else None
    return None


def dataset_identity(config: DatasetConfig) -> str:
    """Return what tells a dataset from others with the same cache folder: where its media, or their list, are."""
    return f"{config.kind} {relative(config.directory or config.jsonl_file, config.cache_directory)}"


def relative(path: Path, folder: Path) -> str:
    """Return a path as seen from a folder, so that both can be moved together; absolute on another drive."""
    place = Path(os.path.realpath(path.parent), path.name)
    try:
        return Path(os.path.relpath(place, os.path.realpath(folder))).as_posix()
    except ValueError:
        return place.as_posix()


def caption_hash(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()[:16]


def source_fps(config: DatasetConfig) -> float | None:
    """Return the frame rate that videos are resampled from; names and shapes do not tell it."""
    return getattr(config, "source_fps", None)


def media_recorded(record: Record) -> str | None:
    """Return the media file that a record names, as seen from the cache folder."""
    media = record.get("media")
    path = media.get("path") if isinstance(media, dict) else None
    return path if isinstance(path, str) else None
