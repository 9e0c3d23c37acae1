"""The dataset file (TOML or JSON), checked, as frozen dataclasses."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import toml
import voluptuous as vol

from utils.errors import UserError
from utils.files import require_file
from utils.options import option, suggest

logger = logging.getLogger(__name__)

FRAME_EXTRACTIONS = ("head", "chunk", "slide", "uniform", "full")


@dataclass(frozen=True)
class DatasetOptions:
    """the dataset"""

    dataset_config: Path | None = option(None, "dataset file, TOML or JSON (docs/dataset_config.md)")


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """What pictures and videos have in common; the fields are the keys of the dataset file."""

    kind: ClassVar[str]

    where: str  # "data.toml: dataset 1", for messages
    cache_directory: Path
    resolution: tuple[int, int] = (960, 544)  # width, height: the bucket without enable_bucket, else the area aimed at
    caption_extension: str | None = None
    batch_size: int = 1
    num_repeats: int = 1
    enable_bucket: bool = False
    bucket_no_upscale: bool = False
    control_directory: Path | None = None

    @property
    def directory(self) -> Path | None:
        """The folder with the media, unless a JSONL file lists them."""
        return getattr(self, f"{self.kind}_directory")

    @property
    def jsonl_file(self) -> Path | None:
        """The file that lists media and captions; a directory given beside it wins, as in musubi-tuner."""
        return None if self.directory else getattr(self, f"{self.kind}_jsonl_file")


@dataclass(frozen=True, kw_only=True)
class ImageConfig(DatasetConfig):
    kind: ClassVar[str] = "image"

    image_directory: Path | None = None
    image_jsonl_file: Path | None = None
    fp_1f_clean_indices: tuple[int, ...] | None = None  # one-frame: the latent frames of the control pictures
    fp_1f_target_index: int | None = None  # one-frame: the latent frame of the picture itself

    @property
    def frame_indices(self) -> list[int]:
        """One-frame: the latent frames of control pictures and picture, in the order in which they are cached."""
        return sorted([*self.fp_1f_clean_indices, self.fp_1f_target_index])


@dataclass(frozen=True, kw_only=True)
class VideoConfig(DatasetConfig):
    kind: ClassVar[str] = "video"

    video_directory: Path | None = None
    video_jsonl_file: Path | None = None
    target_frames: tuple[int, ...] = (1,)  # lengths of the clips, each 4 n + 1
    frame_extraction: str = "head"
    frame_stride: int = 1  # slide: frames between the starts of two clips
    frame_sample: int = 1  # uniform: clips per video
    max_frames: int = 129  # full
    source_fps: float | None = None  # frames per second of the files, to resample to 16; None takes every frame


def load_config(path: Path | str | None, batch_size: int | None = None) -> list[DatasetConfig]:
    """Return the datasets of a TOML or JSON file; the media themselves are not looked at.

    batch_size: for datasets that give none. Raises UserError with file, key and value for whatever is wrong.
    """
    path = require_file(path, "--dataset_config", "the dataset file")
    text, content = _read(path)
    report = _Report(path, text)
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a table with the key datasets", "see docs/dataset_config.md")
    report.check(_TOP, content, "")
    shared = report.check_keys(content.get("general", {}), "[general]", _SHARED, elsewhere=_IMAGE | _VIDEO)
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: must be at least 1")
    fallback = {} if batch_size is None else {"batch_size": batch_size}
    entries = enumerate(content["datasets"], 1)
    configs = [_dataset(report, entry, number, {**fallback, **shared}) for number, entry in entries]
    _refuse_shared_caches(configs)
    return configs


def clip_lengths(target_frames: Sequence[int]) -> tuple[int, ...]:
    """Return the lengths rounded down to 4 n + 1, which is what the VAE encodes, sorted and each once."""
    return tuple(sorted({(frames - 1) // 4 * 4 + 1 for frames in target_frames}))


def dataset_metadata(config: DatasetConfig) -> dict[str, Any]:
    """Return what a trained file's metadata says of a dataset (one entry of ss_datasets): JSON types, no full paths."""
    entry: dict[str, Any] = {
        "resolution": list(config.resolution),
        "caption_extension": config.caption_extension,
        "batch_size_per_device": config.batch_size,
        "num_repeats": config.num_repeats,
        "enable_bucket": config.enable_bucket,
        "bucket_no_upscale": config.bucket_no_upscale,
        "has_control": config.control_directory is not None,
    }
    for name in (f"{config.kind}_directory", f"{config.kind}_jsonl_file", "control_directory"):
        if (value := getattr(config, name)) is not None:
            entry[name] = Path(value).name
    if isinstance(config, VideoConfig):
        names = ("frame_extraction", "frame_stride", "frame_sample", "target_frames", "max_frames", "source_fps")
        entry.update({name: getattr(config, name) for name in names}, target_frames=list(config.target_frames))
    return entry


# ------------------------------------------------------------------------------------------------- one value each
def _whole(minimum: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise vol.Invalid(f"must be a whole number of at least {minimum}")
        return value

    return check


def _whole_list(minimum: int) -> Callable[[Any], tuple[int, ...]]:
    def check(value: Any) -> tuple[int, ...]:
        if not isinstance(value, list) or not value:
            raise vol.Invalid(f"must be a list of whole numbers, such as [{minimum}, {minimum + 24}]")
        return tuple(_whole(minimum)(number) for number in value)

    return check


def _resolution(value: Any) -> tuple[int, int]:
    pair = value if isinstance(value, list) else [value, value]
    if len(pair) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 16 for side in pair):
        raise vol.Invalid("must be one whole number or [width, height], in pixels, each at least 16")
    if pair[0] * pair[1] < 32 * 32:
        raise vol.Invalid("is too small: the area must be at least 32 x 32")
    return pair[0], pair[1]


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise vol.Invalid("must be true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise vol.Invalid("must be a text in quotes")
    return value


def _path(value: Any) -> Path:
    if any(character < " " for character in _text(value)):  # "C:\new" in TOML: \n is a line break
        raise vol.Invalid(f"holds a line break or tab; {_BACKSLASHES}")
    return Path(value).expanduser()


def _extraction(value: Any) -> str:
    if value not in FRAME_EXTRACTIONS:
        near = suggest(str(value), FRAME_EXTRACTIONS)
        raise vol.Invalid(f"must be one of {', '.join(FRAME_EXTRACTIONS)}" + (f"; {near}" if near else ""))
    return value


def _fps(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 10_000:
        raise vol.Invalid("must be a number of frames per second, such as 30 or 29.97")
    return float(value)


_BACKSLASHES = "in paths write / for \\, or put them into 'single quotes'"
_SHARED = {
    "resolution": _resolution,
    "caption_extension": _text,
    "batch_size": _whole(1),
    "num_repeats": _whole(1),
    "enable_bucket": _flag,
    "bucket_no_upscale": _flag,
}
_ONE_DATASET = _SHARED | {"cache_directory": _path, "control_directory": _path, "fp_latent_window_size": _whole(1)}
_IMAGE = _ONE_DATASET | {
    "image_directory": _path,
    "image_jsonl_file": _path,
    "fp_1f_clean_indices": _whole_list(0),
    "fp_1f_target_index": _whole(0),
    "fp_1f_no_post": _flag,
    "multiple_target": _flag,
    "no_resize_control": _flag,
    "control_resolution": _resolution,
}
_VIDEO = _ONE_DATASET | {
    "video_directory": _path,
    "video_jsonl_file": _path,
    "target_frames": _whole_list(1),
    "frame_extraction": _extraction,
    "frame_stride": _whole(1),
    "frame_sample": _whole(1),
    "max_frames": _whole(1),
    "source_fps": _fps,
}
_UNSUPPORTED = ("multiple_target", "no_resize_control", "control_resolution")
_OLD_SPELLINGS = {
    "flux_kontext_no_resize_control": "no_resize_control",
    "qwen_image_edit_no_resize_control": "no_resize_control",
    "qwen_image_edit_control_resolution": "control_resolution",
}
_TOP = {vol.Optional("general"): dict, vol.Required("datasets"): vol.All([dict], vol.Length(min=1))}


# ---------------------------------------------------------------------------------------------- the whole file
def _read(path: Path) -> tuple[str, Any]:
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".json"):
        raise UserError(f"--dataset_config {path}: must be a .toml or .json file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        return text, toml.loads(text) if suffix == ".toml" else json.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})", "save it as UTF-8") from None
    except (ValueError, IndexError) as error:  # toml.TomlDecodeError and json.JSONDecodeError are ValueErrors
        line = "".join(text.splitlines()[getattr(error, "lineno", 0) - 1 :][:1])
        fix = _BACKSLASHES if "\\" in line else "texts and paths stand in quotes; see docs/dataset_config.md"
        raise UserError(f"{path}: is not valid {suffix[1:].upper()} ({error})", fix) from None


def _dataset(report: "_Report", entry: Mapping[str, Any], number: int, fallback: Mapping[str, Any]) -> DatasetConfig:
    table = f"[[datasets]] {number}"
    entry = _translated(entry, f"{report.path}: {table}")
    # An entry with a picture source is a picture dataset even where a video key has strayed into it.
    is_video = not (entry.keys() & {"image_directory", "image_jsonl_file"}) and bool(
        entry.keys() & (_VIDEO.keys() - _IMAGE.keys())
    )
    cls, schema, other = (VideoConfig, _VIDEO, _IMAGE) if is_video else (ImageConfig, _IMAGE, _VIDEO)
    values = {**fallback, **report.check_keys(entry, table, schema, elsewhere=other)}
    for name in _UNSUPPORTED:
        if values.get(name):
            raise UserError(f"{report.place(table, name)} is not supported yet", "leave it out")
    source = values.get(f"{cls.kind}_directory"), values.get(f"{cls.kind}_jsonl_file")
    if source == (None, None):
        keys = "image_directory, image_jsonl_file, video_directory or video_jsonl_file"
        raise UserError(f"{report.path}: {table}: names no media", f"give {keys}")
    if "cache_directory" not in values and source[0] is None:
        raise UserError(f"{report.path}: {table}: cache_directory is missing; a JSONL dataset needs one")
    values.setdefault("cache_directory", source[0])
    if is_video:
        wanted = values.get("target_frames", VideoConfig.target_frames)
        values["target_frames"] = clip_lengths(wanted)
        if values["target_frames"] != wanted:
            place, read = report.place(table, "target_frames"), list(values["target_frames"])
            logger.warning("%s = %s was read as %s", place, list(wanted), read)
    elif not values.get("enable_bucket", False):
        _refuse_odd_resolution(report, table, values.get("resolution", DatasetConfig.resolution))
    _check_one_frame(f"{report.path}: {table}", values)
    known = {field.name for field in fields(cls)}
    return cls(where=f"{report.path}: dataset {number}", **{key: values[key] for key in values if key in known})


def _translated(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the entry with old key names replaced; a new name that is there as well wins."""
    translated = {}
    for key, value in entry.items():
        new = _OLD_SPELLINGS.get(key, key)
        if new != key:
            logger.warning("%s: %s is now called %s", where, key, new)
            if new in entry:
                continue
        translated[new] = value
    return translated


def _refuse_odd_resolution(report: "_Report", table: str, resolution: tuple[int, int]) -> None:
    if any(side % 16 for side in resolution):
        rounded = [max(16, side // 16 * 16) for side in resolution]
        raise UserError(
            f"{report.place(table, 'resolution')} = {list(resolution)}: width and height must be multiples of 16 "
            "where pictures are resized to exactly this size",
            f"use {rounded} or enable_bucket = true",
        )


def _check_one_frame(where: str, values: Mapping[str, Any]) -> None:
    clean, target = values.get("fp_1f_clean_indices"), values.get("fp_1f_target_index")
    if clean is None and target is None:
        return
    if clean is None or target is None:
        raise UserError(f"{where}: fp_1f_clean_indices and fp_1f_target_index must be given together")
    if len({*clean, target}) != len(clean) + 1:
        raise UserError(f"{where}: fp_1f_clean_indices {list(clean)} and fp_1f_target_index {target} must all differ")
    if len(clean) > 2:
        raise UserError(f"{where}: fp_1f_clean_indices {list(clean)}: one or two control pictures are possible")


def _refuse_shared_caches(configs: list[DatasetConfig]) -> None:
    seen: dict[Path, DatasetConfig] = {}
    for config in configs:
        folder = config.cache_directory.resolve()
        if folder in seen:
            raise UserError(
                f"{config.where}: cache_directory {config.cache_directory} is also that of {seen[folder].where}",
                "give each dataset a cache_directory of its own",
            )
        seen[folder] = config


class _Report:
    """Turns the findings of voluptuous into one line with file, table, line, key, value and the nearest valid key."""

    def __init__(self, path: Path, text: str):
        self.path, self.text = path, text

    def check(self, schema: Any, content: Any, table: str) -> Any:
        """Return the content as the schema converts it, or raise UserError with everything that is wrong."""
        try:
            return vol.Schema(schema)(content)
        except vol.MultipleInvalid as error:
            found = [self._finding(finding, content, table, schema) for finding in error.errors]
            raise UserError(
                "; ".join(problem for problem, _ in found), next((fix for _, fix in found if fix), "")
            ) from None

    def check_keys(
        self, content: Mapping[str, Any], table: str, schema: Mapping[str, Any], elsewhere: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the checked values of one table; a key that is known elsewhere is told apart from a typo."""
        for key in content:
            if key in elsewhere and key not in schema:
                home = "image datasets" if key in _IMAGE else "video datasets"
                if table == "[general]":
                    home = "a [[datasets]] entry, not in [general]"
                raise UserError(f"{self.place(table, key)}: belongs in {home}")
        return self.check({vol.Optional(key): check for key, check in schema.items()}, content, table)

    def place(self, table: str, key: str) -> str:
        """Return "data.toml: [[datasets]] 1, line 7: key"."""
        line = self._line(table, key)
        inside = ", ".join(part for part in (table, f"line {line}" if line else "") if part)
        return f"{self.path}: {inside}: {key}" if inside else f"{self.path}: {key}"

    def _finding(self, error: vol.Invalid, content: Any, table: str, schema: Mapping) -> tuple[str, str]:
        key = str(error.path[0]) if error.path else ""
        place = self.place(table, key)
        if "extra keys" in error.msg:
            known = [str(name) for name in schema]
            # A typo in the key of the source may have made a video dataset one of pictures.
            nearest = suggest(key, [*known, *_VIDEO] if table else known)
            return f"{place}: unknown key", nearest or f"the keys are {', '.join(known)}"
        if "required key" in error.msg or error.msg.startswith("length"):
            return f"{self.path}: has no [[datasets]] entry", "see docs/dataset_config.md"
        if error.msg.startswith("expected"):
            return f"{place}: must be {'[[datasets]] tables' if key == 'datasets' else 'a table'}", ""
        return f"{place} = {json.dumps(content.get(key), default=str, ensure_ascii=False)}: {error.msg}", ""

    def _line(self, table: str, key: str) -> int | None:
        """Return the line of a key in a TOML file, or None where it cannot be told."""
        if self.path.suffix.lower() != ".toml":
            return None
        current, entries = "", 0
        for number, line in enumerate(self.text.splitlines(), 1):
            line = line.strip()
            if line.replace(" ", "").startswith("[[datasets]]"):
                entries += 1
                current = f"[[datasets]] {entries}"
            elif line.startswith("[") and "=" not in line:
                current = line.split("]")[0] + "]"
            if line.split("=")[0].strip().strip("\"'") == key and current == table:
                return number
        return None
