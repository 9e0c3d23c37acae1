"""The media files of a dataset with their captions, from a folder or a JSONL file."""

import difflib
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from dataset.config import DatasetConfig, ImageConfig
from dataset.config_keys import path_of
from utils.errors import UserError
from utils.files import require_file
from utils.options import suggest

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")
VIDEO_SUFFIXES = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg", ".gif")


@dataclass(frozen=True)
class Source:
    """One media file of a dataset and its caption; a video may give several training examples."""

    path: Path  # an image, a video, or a folder of images that are the frames of a video
    caption: str  # with the dataset's prefix
    is_video: bool
    controls: tuple[Path, ...] = ()  # pictures, or one video, that steer the generation
    more_captions: tuple[str, ...] = ()  # of which training may draw one instead
    masked: bool = False  # a mask is cached beside its latents
    mask: Path | None = None  # a picture, or a video or folder of pictures; None: its alpha channel, or all counts

    @property
    def name(self) -> str:
        """The name that the cache files begin with: the file's, without its last suffix."""
        return self.path.name if self.path.is_dir() else self.path.stem


@dataclass(frozen=True)
class Text:
    """What may be said in place of a media file's caption; media files may share it."""

    caption: str
    more_captions: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class DatasetItem:
    """One training example before encoding: some frames of one file, and its caption."""

    source: Source
    width: int  # pixels after resizing and cropping, a multiple of 16; so is height
    height: int
    named_width: int  # pixels, as the cache file's name tells them: a picture's own size, a video's resized one
    named_height: int
    first_frame: int = 0  # counted after resampling, at 16 frames per second where the file's rate is given
    frames: int = 1  # 4 n + 1; a picture is 1

    @property
    def key(self) -> str:
        """The name of the example in its dataset, as the latent cache file's name begins."""
        window = f"_{self.first_frame:05d}-{self.frames:03d}" if self.source.is_video else ""
        return self.source.name + window


def find_sources(config: DatasetConfig) -> list[Source]:
    """Return the dataset's media files that have captions, in the order of their paths or of the JSONL lines.

    Raises UserError when there are none, or when two of them would share cache files.
    """
    if config.jsonl_file:
        sources = _from_jsonl(config)
    else:
        captioned, left = _captioned(config)
        if left:
            counted = f"{len(left)}, the first {left[0]}"
            logger.warning("%s: files left out because they have no caption: %s", config.where, counted)
        controls = _controls(config, list(captioned))
        is_video = config.kind == "video"
        sources = []
        for path, caption in captioned.items():
            first, *more = _read_captions(caption, config)
            sources.append(Source(path, first, is_video, controls.get(path, ()), tuple(more)))
        sources = _with_masks(sources, config)
    _refuse_equal_names(sources, config)
    return sources


def uncaptioned(config: DatasetConfig) -> list[Path]:
    """Return the media files of the dataset's folder that `find_sources` leaves out for want of a caption."""
    return [] if config.jsonl_file else _captioned(config)[1]


# ---------------------------------------------------------------------------------------------------------- folder
def _captioned(config: DatasetConfig) -> tuple[dict[Path, Path], list[Path]]:
    """Return the media files of the dataset's folder with their captions' files, and those that have none."""
    key, kinds = f"{config.kind}_directory", f"{config.kind}s"
    suffixes = VIDEO_SUFFIXES if config.kind == "video" else IMAGE_SUFFIXES
    paths = media_in(_require_folder(config.directory, config, key), suffixes)
    # A GIF beside a video of the same name is its preview.
    stems = {path.stem for path in paths if path.suffix.lower() != ".gif"}
    paths = [path for path in paths if path.suffix.lower() != ".gif" or path.stem not in stems]
    if not paths:
        raise UserError(
            f"{config.where}: {key} {config.directory}: there are no {kinds} in this folder",
            f"they end in {', '.join(suffixes)}; folders in it are not searched",
        )
    extension = config.caption_extension
    if extension is None:
        raise UserError(f"{config.where}: caption_extension is missing", 'add caption_extension = ".txt", for example')
    captions = {path: path.with_name(path.stem + extension) for path in paths}
    captioned = {path: caption for path, caption in captions.items() if caption.is_file()}
    if not captioned:
        dotted = next((path for path in paths if path.with_name(f"{path.stem}.{extension}").is_file()), None)
        raise UserError(
            f"{config.where}: none of the {len(paths)} {kinds} in {config.directory} has a caption",
            f'use caption_extension = ".{extension}", with a dot'
            if dotted
            else f"write one into {captions[paths[0]].name} beside {paths[0].name}",
        )
    return captioned, [path for path in paths if path not in captioned]


def media_in(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """Return the files of a folder (not of folders in it) with one of the suffixes, sorted by name.

    Hidden ones are left out: macOS puts a `._a.mp4` of its own beside `a.mp4` on disks of other systems.
    """
    paths = (path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.name[0] != ".")
    return sorted(path for path in paths if path.is_file())


def _require_folder(folder: Path, config: DatasetConfig, key: str) -> Path:
    if folder.is_file():
        raise UserError(f"{config.where}: {key} {folder}: is a file, not a folder")
    if not folder.is_dir():
        parent = folder.absolute().parent
        siblings = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
        near = suggest(folder.name, siblings)
        raise UserError(f"{config.where}: {key} {folder}: no such folder", near or "check the path")
    return folder


def _read_captions(path: Path, config: DatasetConfig) -> tuple[str, ...]:
    """Return the captions in a file: one, or with multiple_captions one a line."""
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the caption is not UTF-8 text (byte {error.start})", "save it as UTF-8") from None
    lines = [line for line in text.split("\n") if line.strip()] if config.multiple_captions else []
    return _prefixed(config, lines or [text])


def _prefixed(config: DatasetConfig, captions: Iterable[str]) -> tuple[str, ...]:
    """Return captions as the model is told them."""
    return tuple(f"{config.caption_prefix}{caption.strip()}".strip() for caption in captions)


def _controls(config: DatasetConfig, paths: list[Path]) -> dict[Path, tuple[Path, ...]]:
    """Return the control files of each media file, or {} where the dataset has no control_directory."""
    if config.control_directory is None:
        return {}
    folder = _require_folder(config.control_directory, config, "control_directory")
    find = _control_images if isinstance(config, ImageConfig) else _control_videos
    return find(config, folder, paths)


def _control_images(config: DatasetConfig, folder: Path, paths: list[Path]) -> dict[Path, tuple[Path, ...]]:
    """Return NAME.*, NAME_0.*, NAME_1.* ... of a folder for the picture NAME.*, as many as the dataset uses.

    Longer names choose first, so that `a_b_0.png` goes to `a_b` where that exists, and else to `a`.
    """
    left = media_in(folder, IMAGE_SUFFIXES)
    needed = _controls_needed(config)
    found, more = {}, []
    for path in sorted(paths, key=lambda path: (-len(path.stem), path)):
        numbered = []
        for candidate in left:
            match = re.fullmatch(re.escape(path.stem) + r"(?:_(.*))?", candidate.stem)
            if match is None:
                continue
            if match[1] is not None and not match[1].isdecimal():
                raise UserError(f"{candidate}: the control picture's name must end in a number, as {path.stem}_0")
            numbered.append((-1 if match[1] is None else int(match[1]), candidate))
        left = [candidate for candidate in left if candidate not in {control for _, control in numbered}]
        if len(numbered) < needed:
            count = len(numbered)
            raise UserError(f"{config.where}: {path.name} has {count} control pictures in {folder}, but needs {needed}")
        found[path] = tuple(control for _, control in sorted(numbered)[:needed])
        more += [path] * (len(numbered) > needed)
    if more:
        counted = f"{len(more)}, the first {min(more)}"
        logger.warning("%s: pictures with more control pictures than are used: %s", config.where, counted)
    return found


def _control_videos(config: DatasetConfig, folder: Path, paths: list[Path]) -> dict[Path, tuple[Path, ...]]:
    """Return for the video NAME.mp4 the file of that name in the folder, else the folder NAME, else NAME.webm ..."""
    found = {}
    for path in paths:
        others = media_in(folder, VIDEO_SUFFIXES)
        candidates = [folder / path.name, folder / path.stem, *(other for other in others if other.stem == path.stem)]
        control = next((candidate for candidate in candidates if candidate.exists()), None)
        if control is None:
            raise UserError(f"{config.where}: {path.name} has no control video in {folder}")
        found[path] = (control,)
    return found


def _controls_needed(config: DatasetConfig) -> int:
    return len(getattr(config, "fp_1f_clean_indices", None) or (0,))


def _with_masks(sources: list[Source], config: DatasetConfig) -> list[Source]:
    """Return the media files with the masks NAME.* of the dataset's mask_directory; those without one count wholly."""
    found: dict[str, Path] = {}
    if config.mask_directory is not None:
        folder = _require_folder(config.mask_directory, config, "mask_directory")
        suffixes = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES) if config.kind == "video" else IMAGE_SUFFIXES
        found = {path.stem: path for path in media_in(folder, suffixes)}
        if config.kind == "video":
            found |= {path.name: path for path in folder.iterdir() if path.is_dir()}
    sources = [replace(source, mask=found.get(source.name)) for source in sources]
    return _marked(sources, config, f"in {config.mask_directory}")


def _marked(sources: list[Source], config: DatasetConfig, where: str) -> list[Source]:
    """Return the media files of a dataset that has masks marked as such; one without its own is named in a warning."""
    alpha = config.alpha_mask
    without = [source.path for source in sources if source.mask is None]
    if len(without) == len(sources) and not alpha:
        if config.mask_directory is None or config.jsonl_file:
            return sources
        raise UserError(
            f"{config.where}: none of the {len(sources)} {config.kind}s has a mask {where}",
            f"call that of {without[0].name} {without[0].stem}.png, for example",
        )
    if without and not alpha:
        counted = f"{len(without)}, the first {without[0]}"
        logger.warning("%s: files without a mask %s, of which all counts: %s", config.where, where, counted)
    return [replace(source, masked=True) for source in sources]


def captions_now(config: DatasetConfig, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the captions of media files by their names, as far as the caption files or the JSONL file are there.

    The media need not be. Raises UserError for what cannot be read as captions.
    """
    if config.jsonl_file:
        if not config.jsonl_file.is_file():
            return {}
        sources = {_name_once(source.path) or source.name: source for source in _from_jsonl(config)}
        return {name: (source.caption, *source.more_captions) for name, source in sources.items()}
    if config.caption_extension is None:
        return {}
    paths = {name: config.directory / f"{name}{config.caption_extension}" for name in names}
    return {name: _read_captions(path, config) for name, path in paths.items() if path.is_file()}


def _name_once(path: Path) -> str | None:
    """Return the name of what was a folder of frames and is gone, or None: its last dot began no suffix."""
    gone = not path.exists() and path.suffix.lower() not in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
    return path.name if gone else None


# ----------------------------------------------------------------------------------------------------------- JSONL
def _from_jsonl(config: DatasetConfig) -> list[Source]:
    path = require_file(config.jsonl_file, f"{config.where}: {config.kind}_jsonl_file", "the list")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})", "save it as UTF-8") from None
    places = {f"{path} line {number}": line for number, line in enumerate(lines, 1) if line.strip()}
    records = {place: _record(line, place, config) for place, line in places.items()}
    if not records:
        raise UserError(f"{config.where}: {path}: the file lists nothing")
    sources = {place: _from_record(record, place, config) for place, record in records.items()}
    _check_counts(sources, config)
    _warn_of_typos(records, config)
    needed = _controls_needed(config)
    cut = [replace(source, controls=source.controls[:needed]) for source in sources.values()]
    return _marked(cut, config, f"in {path}")


def _record(line: str, place: str, config: DatasetConfig) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: is not valid JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError):  # a number of thousands of digits; brackets in brackets in brackets
        raise UserError(f"{place}: is not valid JSON", "numbers are too long, or brackets too deep") from None
    if not isinstance(record, dict):
        raise UserError(f'{place}: must be an object such as {{"{config.kind}_path": ..., "caption": ...}}')
    return record


def _from_record(record: dict[str, Any], place: str, config: DatasetConfig) -> Source:
    path_key = f"{config.kind}_path"
    if config.kind == "image" and path_key not in record and "image_path_0" in record:
        path_key = "image_path_0"
    for key in record:
        if re.fullmatch(r"image_path_\d+", key) and key != path_key:
            raise UserError(
                f"{place}: {key}: Wan makes one picture at a time, not several together",
                "give each picture a line of its own, or as control_path what it is to be made from",
            )
    for key in (path_key, *(["caption"] if "captions" not in record else [])):
        if not isinstance(record.get(key), str):
            near = difflib.get_close_matches(key, record.keys() - {key}, n=1)
            raise UserError(f"{place}: {key} is missing or not a text", f"is {near[0]} a typo?" if near else "")
    captions = record.get("captions", [record.get("caption")])
    if not (isinstance(captions, list) and captions and all(isinstance(caption, str) for caption in captions)):
        raise UserError(f"{place}: captions must be a list of texts", 'such as ["a cat", "a cat on a carpet"]')
    first, *more = _prefixed(config, captions)
    # control_path, control_path_0, control_path_00, control_path_1 ... in the order of their numbers
    matches = [match for match in (re.fullmatch(_CONTROL_KEY, key) for key in record) if match]
    controls = [match[0] for match in sorted(matches, key=lambda match: int(match[1] or 0))]
    return Source(
        path=_located(record, path_key, place, config),
        caption=first,
        is_video=config.kind == "video",
        controls=tuple(_located(record, key, place, config) for key in controls),
        more_captions=tuple(more),
        mask=_located(record, "mask_path", place, config) if "mask_path" in record else None,
    )


def _located(record: dict[str, Any], key: str, place: str, config: DatasetConfig) -> Path:
    """Return a path of a JSONL line: relative to the working directory, else to the JSONL file's folder."""
    try:
        path = path_of(record[key])
    except ValueError as error:
        raise UserError(f"{place}: {key} {error}") from None
    beside = config.jsonl_file.parent / path
    return beside if not path.exists() and beside.exists() else path


_CONTROL_KEY = r"control_path(?:_(\d+))?"


def _warn_of_typos(records: dict[str, dict[str, Any]], config: DatasetConfig) -> None:
    """Name keys that are not read and look like one that is, each once; other keys are the user's own affair."""
    known = [f"{config.kind}_path", "caption", "captions", "control_path", "mask_path"]
    numbered = r"image_path_\d+|" + _CONTROL_KEY
    strange: dict[str, str] = {}
    for place, record in records.items():
        for key in record:
            if key not in known and not re.fullmatch(numbered, key):
                strange.setdefault(key, place)
    for key, place in strange.items():
        if near := difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.8):
            logger.warning("%s: %s is not read. Did you mean '%s'?", place, key, near[0])


def _check_counts(sources: dict[str, Source], config: DatasetConfig) -> None:
    """Raise UserError for a line with too few control paths; warn once of those that have more than are used."""
    needed = 1 if config.kind == "video" else _controls_needed(config)
    one_frame = getattr(config, "fp_1f_clean_indices", None) is not None
    if not one_frame and not any(source.controls for source in sources.values()):
        return
    for place, source in sources.items():
        if len(source.controls) < needed:
            why = " (one for each of fp_1f_clean_indices)" if one_frame else ""
            raise UserError(
                f"{place}: {len(source.controls)} control paths, but {needed} are needed on every line{why}",
                "add control_path" + (", or control_path_0 and control_path_1" if needed > 1 else ""),
            )
    if more := [place for place, source in sources.items() if len(source.controls) > needed]:
        counted = f"{len(more)}, the first {more[0]}"
        logger.warning("%s: lines with more control paths than are used: %s", config.where, counted)


def _refuse_equal_names(sources: list[Source], config: DatasetConfig) -> None:
    seen: dict[str, Source] = {}
    ignores_case = _ignores_case(config.cache_directory)
    for source in sources:
        other = seen.setdefault(source.name.casefold() if ignores_case else source.name, source)
        if other is not source:
            raise UserError(
                f"{config.where}: {other.path} and {source.path} would share the cache files {source.name}_*",
                "rename one of them, or put them into two datasets",
            )


def _ignores_case(folder: Path) -> bool:
    """Tell whether `A` and `a` would be one file in a folder, by another spelling of its path, or of one above it."""
    for place in (folder.absolute(), *folder.absolute().parents):
        other = place.with_name(place.name.swapcase())
        if place.is_dir() and other.name != place.name:
            return other.is_dir() and other.samefile(place)
    return False
