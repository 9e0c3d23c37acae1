"""The cache files between the encoders and training: names, keys, shapes, dtypes, metadata.

They are those of musubi-tuner, both ways. One safetensors file per training example holds its latents,
`NAME_WWWWxHHHH_wan.safetensors` for pictures and `NAME_SSSSS-FFF_WWWWxHHHH_wan.safetensors` for FFF frames of a video
from frame SSSSS; one file per media file holds its text, `NAME_wan_te.safetensors`.
"""

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dataset.config import DatasetConfig
from dataset.items import VIDEO_SUFFIXES, DatasetItem, Source, Text
from dataset.masks import is_masked
from dataset.provenance import (
    Making,
    caption_hash,
    dataset_identity,
    media_recorded,
    recorded_in,
    source_fps,
    written,
)
from utils.devices import dtype_name
from utils.errors import UserError
from utils.files import write_whole
from utils.safetensors_io import open_tensors, to_bytes

logger = logging.getLogger(__name__)

LATENT_SUFFIX = "_wan.safetensors"
TEXT_SUFFIX = "_wan_te.safetensors"
_FORMAT = {"architecture": "wan", "format_version": "1.0.1"}
_SIZE = r"_(?P<width>\d{4,})x(?P<height>\d{4,})"
_NAMES = {
    "image": re.compile(rf"(?P<name>.+){_SIZE}{re.escape(LATENT_SUFFIX)}"),
    "video": re.compile(rf"(?P<name>.+)_(?P<first>\d{{5,}})-(?P<frames>\d{{3,}}){_SIZE}{re.escape(LATENT_SUFFIX)}"),
}
_DTYPE_ENDING = re.compile(r"_(bfloat16|u?int\d+|bool|float(8_e4m3fnuz|8_e4m3fn|8_e5m2fnuz|8_e5m2|16|32|64))$")


# ----------------------------------------------------------------------------------------------------------- names
def latent_path(config: DatasetConfig, item: DatasetItem) -> Path:
    """Return where the latents of a training example are cached."""
    return config.cache_directory / f"{item.key}_{item.named_width:04d}x{item.named_height:04d}{LATENT_SUFFIX}"


def text_path(config: DatasetConfig, name: str) -> Path:
    """Return where the text of the media file `name` is cached; all clips of a video share it."""
    return config.cache_directory / f"{name}{TEXT_SUFFIX}"


def extra_text_path(config: DatasetConfig, caption: str) -> Path:
    """Return where a text is cached that is not the first caption of a media file; files with it share that."""
    return config.cache_directory / f"text_{caption_hash(caption)}{TEXT_SUFFIX}"


def more_text_paths(config: DatasetConfig, header: "CacheHeader") -> tuple[Path, ...]:
    """Return where the further captions of a media file are cached, as the header of its text cache tells."""
    hashes = (recorded_in(header.metadata) or {}).get("more")
    hashes = hashes if isinstance(hashes, list) else []
    return tuple(config.cache_directory / f"text_{each}{TEXT_SUFFIX}" for each in hashes)


def text_file(config: DatasetConfig, of: Source | Text) -> Path:
    """Return where the first caption of a media file, or another text, is cached."""
    return text_path(config, of.name) if isinstance(of, Source) else extra_text_path(config, of.caption)


def media_name(config: DatasetConfig, latents: Path) -> str | None:
    """Return the media file's name that a latent cache file belongs to, or None for a name that is not ours."""
    match = _NAMES[config.kind].fullmatch(latents.name)
    return match["name"] if match else None


def latent_files(config: DatasetConfig) -> list[Path]:
    """Return the files in the dataset's cache folder that are named as its latent caches are, sorted."""
    return [path for path in _files(config) if media_name(config, path)]


def text_files(config: DatasetConfig) -> list[Path]:
    """Return the files in the dataset's cache folder that are named as text caches are, sorted."""
    return [path for path in _files(config) if path.name.endswith(TEXT_SUFFIX)]


def _files(config: DatasetConfig) -> list[Path]:
    # No glob: folder names with brackets would be taken for patterns. A leading dot marks a file being written.
    folder = config.cache_directory
    return sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []


def batch_name(key: str) -> str:
    """Return what a cached tensor is called in a batch: latents_image for "latents_image_21x60x104_bfloat16"."""
    name = _DTYPE_ENDING.sub("", key.removeprefix("varlen_"))
    return name.rpartition("_")[0] if name.startswith("latents_") else name


# ----------------------------------------------------------------------------------------------------------- write
def write_latents(
    config: DatasetConfig,
    item: DatasetItem,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    making: Making | None = None,
) -> Path:
    """Write the latents of one training example and return the file.

    tensors: latents [16 f h w] and, as the model needs them, latents_image [20 f h w], latents_control [16 f h w],
    stored in `dtype`; latents_mask [1 f h w], in float32; clip [257 D] or [N 257 D], in float16; f_indices [f], in
    int32. making: how they were made, for the metadata; None for a file that does not tell, as musubi-tuner's.
    """
    path = latent_path(config, item)
    _existing(path, item.source)  # raises where the file is another model's
    shape = "x".join(map(str, tensors["latents"].shape[1:]))
    suffix = dtype_name(dtype)
    stored = {}
    for name, tensor in tensors.items():
        tensor = _finite(tensor, name, path)
        if name == "f_indices":
            stored[f"{name}_int32"] = tensor.to("cpu", torch.int32)
        elif name == "latents_mask":
            stored[f"{name}_{shape}_float32"] = tensor.to("cpu", torch.float32)
        elif name == "clip":
            # The key names the latents' dtype although the features are float16: musubi-tuner's files are so.
            stored[f"clip_{suffix}"] = tensor.to("cpu", torch.float16)
        else:
            stored[f"{name}_{shape}_{suffix}"] = tensor.to("cpu", dtype)
    metadata = {**_FORMAT, "width": str(item.named_width), "height": str(item.named_height)}
    if item.source.is_video:
        metadata["frame_count"] = str(item.frames)
    if making:
        metadata |= written(making.record_latents(config, item))
    write_whole(path, to_bytes(stored, metadata))
    return path


def write_text(config: DatasetConfig, of: Source | Text, text: Tensor, making: Making | None = None) -> Path:
    """Write the text features [L D] of one media file's first caption, or of another text, and return the file.

    What other tensors an older file holds is kept, of text features of any dtype only the new ones. making: how they
    were made, for the metadata; None for a file that does not tell.
    """
    path = text_file(config, of)
    kept, metadata = _kept(path, of)
    stored = {**kept, f"varlen_t5_{dtype_name(text.dtype)}": _finite(text.cpu(), "t5", path)}
    made = written(making.record_text(config, of)) if making else {}
    write_whole(path, to_bytes(stored, {**metadata, **_FORMAT, "caption1": of.caption, **made}))
    return path


def _kept(path: Path, of: Source | Text) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and metadata of an existing text cache that the new text does not replace."""
    header = _existing(path, of)
    if header is None:
        return {}, {}
    with open_tensors(path, "text cache") as file:
        # Copies: the file itself is about to be replaced, which Windows refuses while it is mapped.
        kept = {key: file.get(key).clone() for key in header.shapes if batch_name(key) != "t5"}
    return kept, header.metadata


def _finite(tensor: Tensor, name: str, path: Path) -> Tensor:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        logger.warning("%s: %s holds values that are not finite; they are stored as 0", path, name)
        return torch.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0)
    return tensor


# ------------------------------------------------------------------------------------------------------------ read
@dataclass(frozen=True)
class CacheHeader:
    """What a cache file says of itself before its tensors are read."""

    shapes: dict[str, tuple[int, ...]]  # by key
    dtypes: dict[str, torch.dtype]
    metadata: dict[str, str]

    def by_batch_name(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes by the tensors' names in a batch."""
        return {batch_name(key): shape for key, shape in self.shapes.items()}


def read_header(path: Path) -> CacheHeader:
    """Return the header of a cache file. Raises UserError for a file that is damaged, or not for Wan."""
    with open_tensors(path, "cache file") as file:
        keys = file.keys()
        header = CacheHeader({k: file.shape(k) for k in keys}, {k: file.dtype(k) for k in keys}, file.metadata)
    _refuse_foreign(path, header)
    return header


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a cache file by their names in a batch. Raises UserError for a damaged file."""
    with open_tensors(path, "cache file") as file:
        keys = file.keys()
        return {batch_name(key): file.get(key) for key in keys}


def may_be_deleted(path: Path, config: DatasetConfig) -> bool:
    """Tell whether a file is a complete cache file that says it was made for this very dataset; no other may be."""
    try:
        recorded = recorded_in(read_header(path).metadata)
    except UserError:
        return False
    return recorded is not None and recorded.get("dataset") == dataset_identity(config)


def tells_how_made(path: Path) -> bool:
    """Tell whether a file says how it was made; musubi-tuner's do not."""
    try:
        return recorded_in(read_header(path).metadata) is not None
    except UserError:
        return False


def why_remake_latents(
    config: DatasetConfig,
    item: DatasetItem,
    names: Collection[str],
    dtype: torch.dtype,
    making: Making | None = None,
    images: Sequence[str] = ("first",),
) -> str | None:
    """Return why the latents of an item are to be cached (again), or None for a file that can be kept.

    names: the tensors it must hold, as in a batch; dtype: of the latents; making: how it would be made now, compared
    where the file tells how it was; images: the frames of a video that its latents_image show. Raises UserError for a
    file of another model, or of a picture where the item is of a video, and the other way round.
    """
    path = latent_path(config, item)
    header = _existing(path, item.source)
    if header is None:
        return "damaged" if path.is_file() else "not cached yet"
    shapes = header.by_batch_name()
    if missing := [name for name in names if name not in shapes]:
        return f"without {' and '.join(missing)}"
    stored = {batch_name(key): dtype for key, dtype in header.dtypes.items()}["latents"]
    if stored != dtype:
        return f"in {dtype_name(stored)}"
    if shapes["latents"][-2:] != (item.height // 8, item.width // 8):
        return "of another resolution"
    if "latents_mask" in shapes and "latents_mask" not in names and is_masked(config) is None:
        return "with a mask"  # that training would take
    if "f_indices" in shapes and "f_indices" not in names:
        return "of one-frame training"
    if shapes["latents"][1:-2] != (len(config.frame_indices) if "f_indices" in names else (item.frames + 3) // 4,):
        return "of another number of frames"
    if "latents_image" in names and item.source.is_video and shows_last_frame(path) != ("last" in images):
        return "without the last frame" if "last" in images else "with the last frame"
    if "f_indices" in names and read_tensors(path)["f_indices"].tolist() != config.frame_indices:
        return "of other one-frame indices"
    if recorded := recorded_in(header.metadata):
        return making.why_latents(config, item, recorded) if making else None
    # What an older version of this project wrote says so under a key of its own, where it was given.
    fps = header.metadata.get("source_fps")
    return "of another source_fps" if fps and fps != f"{source_fps(config) or 0:g}" else None


def shows_last_frame(path: Path) -> bool:
    """Tell whether the condition in a clip's latent cache shows its last frame besides the first, by the mask."""
    with open_tensors(path, "cache file") as file:
        key = next((key for key in file.keys() if batch_name(key) == "latents_image"), None)  # noqa: SIM118
        # Of four frames that share a latent frame, the last one is marked in the mask's last channel.
        return key is not None and file.shape(key)[1] > 1 and bool(file.get(key)[3, -1, 0, 0] == 1)


def why_remake_text(path: Path, of: Source | Text, making: Making | None = None) -> str | None:
    """Return why the text of a caption is to be cached (again), or None for a file that can be kept.

    making: how it would be made now, compared where the file tells how it was. Raises UserError for a file of another
    model, or of a picture where the source is a video, and the other way round.
    """
    header = _existing(path, of)
    if header is None:
        return "damaged" if path.is_file() else "not cached yet"
    if "t5" not in header.by_batch_name():
        return "without text features"
    if header.metadata.get("caption1", of.caption) != of.caption:
        return "caption changed"
    recorded = recorded_in(header.metadata)
    if of.more_captions and recorded is None:
        return "without the other captions"
    return making.why_text(of, recorded) if making and recorded else None


def _existing(path: Path, of: Source | Text) -> CacheHeader | None:
    """Return the header of a cache file, or None where there is none or a damaged one; UserError for a foreign one."""
    if not path.is_file():
        return None
    try:
        header = read_header(path)
    except ForeignCacheError:
        raise
    except UserError:
        return None
    made_of = media_recorded(recorded_in(header.metadata) or {})
    if not isinstance(of, Source) or not made_of or of.path.is_dir():
        return header
    if (Path(made_of).suffix.lower() in VIDEO_SUFFIXES) != of.is_video:
        other = path.parent / made_of
        if other.is_file():
            raise ForeignCacheError(
                f"{path}: is the cache of {other}, {of.path} would share it",
                "rename one of them, or choose another cache_directory",
            )
    return header


class ForeignCacheError(UserError):
    """A file has the name of a cache file but is another model's; it is neither used nor replaced."""


def _refuse_foreign(path: Path, header: CacheHeader) -> None:
    architecture = header.metadata.get("architecture")
    if architecture != _FORMAT["architecture"]:
        raise ForeignCacheError(
            f"{path}: is a cache file for {architecture or 'another program'}, not for wan",
            "move it away or choose another cache_directory",
        )
