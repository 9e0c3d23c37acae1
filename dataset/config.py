"""The dataset file (TOML or JSON), checked, as frozen dataclasses."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from dataset.config_file import ConfigFile
from dataset.config_keys import IMAGE, LISTS, OLD_SPELLINGS, SHARED, TOP, VIDEO
from utils.errors import UserError
from utils.files import require_file
from utils.options import option

logger = logging.getLogger(__name__)

# Keys that change nothing where the loss is only measured.
OF_TRAINING = ("num_repeats", "caption_dropout", "is_reg", "prior_weight")


@dataclass(frozen=True)
class DatasetOptions:
    """the dataset"""

    dataset_config: Path | None = option(None, "dataset file, TOML or JSON (docs/dataset_config.md)")


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """What pictures and videos have in common; the fields are the keys of the dataset file."""

    kind: ClassVar[str]

    where: str  # "data.toml: dataset 1", for messages
    validation: bool = False  # not trained on: its loss is only measured
    cache_directory: Path
    resolution: tuple[int, int] = (960, 544)  # width, height: the bucket without enable_bucket, else the area aimed at
    caption_extension: str | None = None
    caption_prefix: str = ""  # that every caption begins with
    caption_dropout: float = 0.0  # probability of no text in place of a caption
    multiple_captions: bool = False  # each line of a caption file is one; training draws one each time
    batch_size: int = 1
    num_repeats: int = 1
    enable_bucket: bool = False
    bucket_no_upscale: bool = False
    control_directory: Path | None = None
    mask_directory: Path | None = None  # white counts in the loss, black does not
    alpha_mask: bool = False  # of pictures: what their alpha channel hides does not count in the loss
    mask_min_weight: float = 0.0  # that black has all the same
    is_reg: bool = False  # of what the model is to keep as it is, beside what it is to learn
    prior_weight: float = 1.0  # that the loss of its batches is multiplied by

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
    no_resize_control: bool = False  # control pictures are cut to multiples of 16, but not scaled
    control_resolution: tuple[int, int] | None = None  # width, height: the area of control pictures

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
    """Return the datasets of a TOML or JSON file, those for validation last; the media are not looked at.

    batch_size: for datasets that give none. Raises UserError with file, key and value for whatever is wrong.
    """
    file = ConfigFile(require_file(path, "--dataset_config", "the dataset file"))
    file.check(TOP, file.content, "")
    shared = file.check_keys(file.content.get("general", {}), "[general]", SHARED, elsewhere=IMAGE | VIDEO)
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: must be at least 1")
    fallback = {} if batch_size is None else {"batch_size": batch_size}
    configs = [
        _dataset(file, entry, name, number, {**fallback, **shared})
        for name in LISTS
        for number, entry in enumerate(file.content.get(name, []), 1)
    ]
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
    more = (
        "caption_prefix",
        "caption_dropout",
        "multiple_captions",
        "mask_min_weight",
        "is_reg",
        "prior_weight",
        "alpha_mask",
    )
    entry.update({name: value for name in more if (value := getattr(config, name)) != getattr(DatasetConfig, name)})
    for name in (f"{config.kind}_directory", f"{config.kind}_jsonl_file", "control_directory", "mask_directory"):
        if (value := getattr(config, name)) is not None:
            entry[name] = Path(value).name
    if isinstance(config, VideoConfig):
        names = ("frame_extraction", "frame_stride", "frame_sample", "target_frames", "max_frames", "source_fps")
        entry.update({name: getattr(config, name) for name in names}, target_frames=list(config.target_frames))
    return entry


# ------------------------------------------------------------------------------------------------ one dataset
def _dataset(
    file: ConfigFile, entry: Mapping[str, Any], name: str, number: int, fallback: Mapping[str, Any]
) -> DatasetConfig:
    """Return a dataset; name: of the list that its entry stands in."""
    table = f"[[{name}]] {number}"
    where = f"{file.path}: {table}"
    entry = _translated(file, entry, table)
    # An entry with a picture source is a picture dataset even where a video key has strayed into it.
    is_video = not (entry.keys() & {"image_directory", "image_jsonl_file"}) and bool(
        entry.keys() & (VIDEO.keys() - IMAGE.keys())
    )
    cls, schema, other = (VideoConfig, VIDEO, IMAGE) if is_video else (ImageConfig, IMAGE, VIDEO)
    values = {**fallback, **file.check_keys(entry, table, schema, elsewhere=other)}
    folder, listed = values.get(f"{cls.kind}_directory"), values.get(f"{cls.kind}_jsonl_file")
    if folder is None and listed is None:
        keys = "image_directory, image_jsonl_file, video_directory or video_jsonl_file"
        raise UserError(f"{where}: names no media", f"give {keys}")
    if "cache_directory" not in values and folder is None:
        raise UserError(f"{where}: cache_directory is missing; a JSONL dataset needs one")
    values.setdefault("cache_directory", folder)
    if is_video:
        wanted = values.get("target_frames", VideoConfig.target_frames)
        values["target_frames"] = clip_lengths(wanted)
        if values["target_frames"] != wanted:
            place, read = file.place(table, "target_frames"), list(values["target_frames"])
            logger.warning("%s = %s was read as %s", place, list(wanted), read)
    elif not values.get("enable_bucket", False):
        _refuse_odd_resolution(file, table, values.get("resolution", DatasetConfig.resolution))
    if not is_video:
        _check_one_frame(file, table, values)
    idle = _without_effect(entry, values, is_video)
    if validation := name == "validation":
        idle |= {key: "each example is measured once" for key in OF_TRAINING if key in entry}
        values = {key: value for key, value in values.items() if key not in OF_TRAINING}
    if idle:
        lines = [f"{file.place(table, key).removeprefix(f'{where}, ')} ({why})" for key, why in idle.items()]
        logger.warning("%s: without effect: %s", where, "; ".join(lines))
    known = {field.name for field in fields(cls)}
    where = f"{file.path}: {'validation' if validation else 'dataset'} {number}"
    return cls(where=where, validation=validation, **{key: values[key] for key in values if key in known})


def _translated(file: ConfigFile, entry: Mapping[str, Any], table: str) -> dict[str, Any]:
    """Return the entry with old key names replaced; a new name that is there as well wins."""
    translated = {}
    for key, value in entry.items():
        new = OLD_SPELLINGS.get(key, key)
        if new != key:
            logger.warning("%s is now called %s", file.place(table, key), new)
            if new in entry:
                continue
        translated[new] = value
    return translated


def _refuse_odd_resolution(file: ConfigFile, table: str, resolution: tuple[int, int]) -> None:
    if any(side % 16 for side in resolution):
        rounded = [max(16, side // 16 * 16) for side in resolution]
        raise UserError(
            f"{file.place(table, 'resolution')} = {list(resolution)}: width and height must be multiples of 16 "
            "where pictures are resized to exactly this size",
            f"use {rounded} or enable_bucket = true",
        )


def _check_one_frame(file: ConfigFile, table: str, values: Mapping[str, Any]) -> None:
    names = "fp_1f_clean_indices", "fp_1f_target_index"
    clean, target = map(values.get, names)
    if clean is None and target is None:
        return
    place = file.place(table, names[clean is None])
    if clean is None or target is None:
        raise UserError(
            f"{place} stands alone: fp_1f_clean_indices and fp_1f_target_index must be given together",
            f"add {names[target is None]} = {1 if target is None else [0]}, for example",
        )
    given = f"{place} = {list(clean)}"
    if len(clean) > 2:
        raise UserError(f"{given}: one or two control pictures are possible")
    if len({*clean, target}) != len(clean) + 1:
        raise UserError(f"{given} and fp_1f_target_index = {target} must all differ", "each is a place in time")
    if values.get("image_directory") and not values.get("control_directory"):
        raise UserError(f"{given}: there are no control pictures", "give their folder as control_directory")


def _without_effect(entry: Mapping[str, Any], values: Mapping[str, Any], is_video: bool) -> dict[str, str]:
    """Return which keys of a dataset's own entry change nothing for Wan, and why."""
    idle = {}
    extraction = values.get("frame_extraction", "head")
    for key, needed in (("frame_stride", "slide"), ("frame_sample", "uniform"), ("max_frames", "full")):
        if extraction != needed:
            idle[key] = f'it belongs to frame_extraction = "{needed}"'
    if extraction == "full":
        idle["target_frames"] = 'not used by frame_extraction = "full"'
    if is_video:
        idle["bucket_no_upscale"] = "videos are always scaled to a bucket"
    elif not values.get("enable_bucket"):
        idle["bucket_no_upscale"] = "it needs enable_bucket = true"
    if "image_directory" in values or "video_directory" in values:
        idle["image_jsonl_file"] = idle["video_jsonl_file"] = "the directory beside it wins"
        if "control_directory" not in values:
            idle["no_resize_control"] = idle["control_resolution"] = "there is no control_directory"
    else:
        idle["caption_extension"] = "captions stand in the JSONL file"
        idle["multiple_captions"] = "a JSONL line lists them as captions"
        idle["control_directory"] = "in a JSONL file each line names its control_path"
        idle["mask_directory"] = "in a JSONL file each line names its mask_path"
    idle["multiple_target"] = "Wan makes one picture; each of the pictures is an example"
    idle["fp_latent_window_size"] = idle["fp_1f_no_post"] = "FramePack's, not Wan's"
    return {key: why for key, why in idle.items() if entry.get(key) not in (None, False)}


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
