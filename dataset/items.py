"""The media files of a dataset with their captions, from a folder or a JSONL file."""

import difflib
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.config import DatasetConfig, ImageConfig
from utils.errors import UserError
from utils.files import require_file
from utils.options import suggest

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")
VIDEO_SUFFIXES = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg")


@dataclass(frozen=True)
class Source:
    """One media file of a dataset and its caption; a video may give several training examples."""

    path: Path  # an image, a video, or a folder of images that are the frames of a video
    caption: str
    is_video: bool
    controls: tuple[Path, ...] = ()  # pictures, or one video, that steer the generation

    @property
    def name(self) -> str:
        """The name that the cache files begin with: the file's, without its last suffix."""
        return self.path.name if self.path.is_dir() else self.path.stem


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
    sources = _from_jsonl(config) if config.jsonl_file else _from_directory(config)
    _refuse_equal_names(sources, config)
    return sources


def uncaptioned(config: DatasetConfig) -> list[Path]:
    """Return the media files of the dataset's folder that `find_sources` leaves out for want of a caption."""
    if config.jsonl_file:
        return []
    paths = media_in(config.directory, VIDEO_SUFFIXES if config.kind == "video" else IMAGE_SUFFIXES)
    return [path for path in paths if not path.with_name(path.stem + config.caption_extension).is_file()]


# ---------------------------------------------------------------------------------------------------------- folder
def _from_directory(config: DatasetConfig) -> list[Source]:
    key = f"{config.kind}_directory"
    is_video = config.kind == "video"
    paths = media_in(_require_folder(config.directory, config, key), VIDEO_SUFFIXES if is_video else IMAGE_SUFFIXES)
    if not paths:
        raise UserError(
            f"{config.where}: {key} {config.directory}: there are no {config.kind}s in this folder",
            f"they end in {', '.join(VIDEO_SUFFIXES if is_video else IMAGE_SUFFIXES)}; folders in it are not searched",
        )
    if config.caption_extension is None:
        raise UserError(f"{config.where}: caption_extension is missing", 'add caption_extension = ".txt", for example')
    captions = {path: path.with_name(path.stem + config.caption_extension) for path in paths}
    captioned = [path for path in paths if captions[path].is_file()]
    if not captioned:
        raise UserError(
            f"{config.where}: none of the {len(paths)} {config.kind}s in {config.directory} has a caption",
            f"write one into {captions[paths[0]].name} beside {paths[0].name}",
        )
    if len(captioned) < len(paths):
        first = next(path for path in paths if path not in set(captioned))
        count = len(paths) - len(captioned)
        logger.warning("%s: files left out because they have no caption: %d, the first %s", config.where, count, first)
    controls = _controls(config, captioned)
    return [Source(path, _read_caption(captions[path]), is_video, controls.get(path, ())) for path in captioned]


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


def _read_caption(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the caption is not UTF-8 text (byte {error.start})", "save it as UTF-8") from None


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
    found = {}
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


# ----------------------------------------------------------------------------------------------------------- JSONL
def _from_jsonl(config: DatasetConfig) -> list[Source]:
    path = require_file(config.jsonl_file, f"{config.where}: {config.kind}_jsonl_file", "the list")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})", "save it as UTF-8") from None
    records = [(f"{path} line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    sources = [_from_line(line, place, config) for place, line in records]
    if not sources:
        raise UserError(f"{config.where}: {path}: the file lists nothing")
    if any(source.controls for source in sources):
        needed = 1 if config.kind == "video" else _controls_needed(config)
        for (place, _), source in zip(records, sources, strict=True):
            if len(source.controls) < needed:
                raise UserError(f"{place}: {len(source.controls)} control paths, but {needed} are needed on every line")
    return sources


def _from_line(line: str, place: str, config: DatasetConfig) -> Source:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: is not valid JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(record, dict):
        raise UserError(f'{place}: must be an object such as {{"{config.kind}_path": ..., "caption": ...}}')
    path_key = f"{config.kind}_path"
    if config.kind == "image" and path_key not in record and "image_path_0" in record:
        path_key = "image_path_0"
    for key in record:
        if re.fullmatch(r"image_path_\d+", key) and key != path_key:
            raise UserError(f"{place}: {key}: several target pictures are not supported yet", "leave it out")
    for key in (path_key, "caption"):
        if not isinstance(record.get(key), str):
            near = difflib.get_close_matches(key, record.keys() - {key}, n=1)
            raise UserError(f"{place}: {key} is missing or not a text", f"is {near[0]} a typo?" if near else "")
    # control_path, control_path_0, control_path_00, control_path_1 ... in the order of their numbers
    matches = [match for match in (re.fullmatch(r"control_path(?:_(\d+))?", key) for key in record) if match]
    controls = [match[0] for match in sorted(matches, key=lambda match: int(match[1] or 0))]
    return Source(
        path=_located(record[path_key], config.jsonl_file),
        caption=record["caption"].strip(),
        is_video=config.kind == "video",
        controls=tuple(_located(record[key], config.jsonl_file) for key in controls)[: _controls_needed(config)],
    )


def _located(name: Any, jsonl_file: Path) -> Path:
    """Return a path of a JSONL line: relative to the working directory, else to the JSONL file's folder."""
    path = Path(str(name)).expanduser()
    beside = jsonl_file.parent / path
    return beside if not path.exists() and beside.exists() else path


def _refuse_equal_names(sources: list[Source], config: DatasetConfig) -> None:
    seen: dict[str, Source] = {}
    for source in sources:
        other = seen.setdefault(source.name, source)
        if other is not source:
            raise UserError(
                f"{config.where}: {other.path} and {source.path} would share the cache files {source.name}_*",
                "rename one of them, or put them into two datasets",
            )
