"""The keys of the dataset file: where each may stand, and what value it takes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import voluptuous as vol

from utils.options import suggest

FRAME_EXTRACTIONS = ("head", "chunk", "slide", "uniform", "full")
BACKSLASHES = "in paths write / for \\, or put them into 'single quotes'"
LARGEST = 1_000_000  # of any number: beyond it is a slip of the finger, and lists of that length fill the memory
LONGEST_SIDE = 16_384  # pixels


def path_of(text: Any) -> Path:
    """Return a path of the dataset file or of a JSONL line; ValueError says what no system takes for a path."""
    if not isinstance(text, str) or not text:
        raise ValueError("must be a text in quotes")
    if any(character < " " for character in text):  # "C:\new" in TOML: \n is a line break
        raise ValueError(f"holds a line break or tab; {BACKSLASHES}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("is half of a character (\\ud800 to \\udfff go in pairs)")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError("begins with ~, but there is no such user; write ./~ for a name") from None


def _path(value: Any) -> Path:
    try:
        return path_of(value)
    except ValueError as error:
        raise vol.Invalid(str(error)) from None


def _ending(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise vol.Invalid("must be a text in quotes")
    if "/" in value or "\\" in value:
        raise vol.Invalid('must be the end of a file name, such as ".txt"')
    _path(value)
    return value


def _whole(minimum: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise vol.Invalid(f"must be a whole number of at least {minimum}")
        if value > LARGEST:
            raise vol.Invalid(f"must be a whole number of at most {LARGEST}")
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
    if max(pair) > LONGEST_SIDE:
        raise vol.Invalid(f"is too large: width and height are pixels, at most {LONGEST_SIDE}")
    if math.prod(pair) < 32 * 32:
        raise vol.Invalid("is too small: the area must be at least 32 x 32")
    return pair[0], pair[1]


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise vol.Invalid("must be true or false")
    return value


def _extraction(value: Any) -> str:
    if not isinstance(value, str) or value not in FRAME_EXTRACTIONS:
        near = suggest(str(value), FRAME_EXTRACTIONS)
        raise vol.Invalid(f"must be one of {', '.join(FRAME_EXTRACTIONS)}" + (f"; {near}" if near else ""))
    return value


def _fps(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.1 <= value < 10_000:
        raise vol.Invalid("must be a number of frames per second, such as 30 or 29.97")
    return float(value)


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise vol.Invalid("must be a number from 0 to 1")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise vol.Invalid("must be a text in quotes")
    return value


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST:
        raise vol.Invalid("must be a number greater than 0")
    return float(value)


SHARED = {  # what [general] may say for all
    "resolution": _resolution,
    "caption_extension": _ending,
    "caption_prefix": _text,
    "caption_dropout": _share,
    "multiple_captions": _flag,
    "batch_size": _whole(1),
    "num_repeats": _whole(1),
    "enable_bucket": _flag,
    "bucket_no_upscale": _flag,
}
_ONE_DATASET = SHARED | {
    "cache_directory": _path,
    "control_directory": _path,
    "mask_directory": _path,
    "mask_min_weight": _share,
    "is_reg": _flag,
    "prior_weight": _positive,
    "fp_latent_window_size": _whole(1),
}
IMAGE = _ONE_DATASET | {
    "image_directory": _path,
    "image_jsonl_file": _path,
    "fp_1f_clean_indices": _whole_list(0),
    "fp_1f_target_index": _whole(0),
    "fp_1f_no_post": _flag,
    "multiple_target": _flag,
    "alpha_mask": _flag,
    "no_resize_control": _flag,
    "control_resolution": _resolution,
}
VIDEO = _ONE_DATASET | {
    "video_directory": _path,
    "video_jsonl_file": _path,
    "target_frames": _whole_list(1),
    "frame_extraction": _extraction,
    "frame_stride": _whole(1),
    "frame_sample": _whole(1),
    "max_frames": _whole(1),
    "source_fps": _fps,
}
OLD_SPELLINGS = {
    "flux_kontext_no_resize_control": "no_resize_control",
    "qwen_image_edit_no_resize_control": "no_resize_control",
    "qwen_image_edit_control_resolution": "control_resolution",
}
LISTS = ("datasets", "validation")  # of what is trained on, and what the loss is only measured on
TOP = {
    vol.Optional("general"): dict,
    vol.Required("datasets"): vol.All([dict], vol.Length(min=1)),
    vol.Optional("validation"): [dict],
}
