"""Which DiT a weight file holds, from its header: names, sizes, kind, number format, and whether a task can run it."""

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from utils.devices import FLOAT8 as FLOAT8_KINDS
from utils.devices import dtype_name
from utils.errors import UserError
from utils.options import option
from utils.safetensors_io import open_tensors
from wan.configs import TASKS, WanConfig
from wan.fp8 import FLOAT8
from wan.model import WanModel, WanShape
from wan.weights import InMemory, Weights, check_names, wrong_kind

logger = logging.getLogger(__name__)

PREFIX = "model.diffusion_model."  # put before every name by some repackaged files


# Of ComfyUI's fp8_scaled files: scales of weights and of inputs, which we do not round, and marks.
_BESIDE_FLOAT8 = re.compile(r"(^|\.)(scale_weight|weight_scale|scale_input|input_scale|scaled_fp8|comfy_quant)$")


HEAD_DIM = 128  # of all published models


# Tensors whose shapes are the model's sizes, and how many dimensions they have.
SIZED = {
    "patch_embedding.weight": 5,
    "blocks.0.ffn.0.weight": 2,
    "head.head.weight": 2,
    "text_embedding.0.weight": 2,
    "time_embedding.0.weight": 2,
}


@dataclass(frozen=True)
class DitOptions:
    """the DiT"""

    task: str = option("t2v-14B", "which model the weights are, and its defaults", choices=TASKS)
    dit: Path | None = option(
        None, "the DiT's weights (.safetensors; of several parts, any one), or hf://owner/repo/file", remote=True
    )
    residual_dtype: str = option(
        "float32",
        "number format of what flows from block to block: bf16 takes half the memory there, and has twice the rounding "
        "error of a bf16 DiT without it",
        choices=("float32", "bf16"),
    )
    compat_musubi: bool = option(
        False,
        "do what LoRAs of musubi-tuner were trained with, where it differs from Wan: docs/differences.md lists it",
    )
    disable_numpy_memmap: bool = option(
        False, "read the DiT with plain file reads, which are faster on some network drives, not mapped into memory"
    )


def check_dit(path: Path | str | None, config: WanConfig, option: str = "--dit") -> WanShape:
    """Return the sizes of a file's DiT, from its header alone, or raise UserError if the task cannot run it.

    Sizes other than the task's are used all the same, and logged here, so that loading need not say it again.
    """
    with open_tensors(path, option, "the DiT's weights") as file:
        shape = checked_shape(DitTensors(file, f"{option} {path}"), config)
    _log_other_sizes(f"{option} {path}", shape, config)
    return shape


def check_fp8(
    path: Path | str | None,
    fp8: bool,
    fp8_scaled: bool,
    fp8_fast: bool = False,
    quantize: str | None = None,
    option: str = "--dit",
) -> None:
    """Raise UserError if the options of how weights are held do not go with each other or with the file's dtype."""
    with open_tensors(path, option, "the DiT's weights") as file:
        check_formats(DitTensors(file, f"{option} {path}"), fp8, fp8_scaled, fp8_fast, quantize)


def dit_dtype(path: Path | str | None, option: str = "--dit") -> torch.dtype:
    """Return the dtype of the linear weights in a DiT's file, wherever among its parts they are."""
    with open_tensors(path, option, "the DiT's weights") as file:
        return DitTensors(file, f"{option} {path}").linear_dtype()


class DitTensors:
    """The tensors of a DiT by their official names, which have no prefix; `where` begins every complaint.

    In ComfyUI's fp8_scaled format float8 weights have scales beside them, which are not tensors of their own here.
    """

    def __init__(self, source: Weights, where: str = "weights"):
        self.where = where
        self.metadata = source.metadata
        self._source = source
        keys = {key.removeprefix(PREFIX): key for key in list(source.keys())}
        self._keys = {name: key for name, key in keys.items() if not _BESIDE_FLOAT8.search(name)}
        self._scales = {
            name: keys[beside]
            for name in self._keys
            for beside in (name.removesuffix("weight") + scale for scale in ("scale_weight", "weight_scale"))
            if name.endswith(".weight") and beside in keys
        }

    def keys(self) -> Iterable[str]:
        return self._keys.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._keys[name])

    def get(self, name: str) -> Tensor:
        """Return one tensor, maybe a view of the file."""
        return self._source.get(self._keys[name])

    def place(self, name: str) -> tuple[Path, int] | None:
        """Return in which file one tensor's bytes are, and from where on; None where they are in no file as such."""
        return self._source.place(self._keys[name])

    def each(self, mapped: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors with their names; each may be gone once the next one is asked for."""
        names = {key: name for name, key in self._keys.items()}
        return ((names[key], tensor) for key, tensor in self._source.each(names, mapped))

    @property
    def has_scales(self) -> bool:
        """Return whether float8 weights of the file are to be multiplied by scales in it."""
        return bool(self._scales)

    def scale(self, name: str) -> Tensor | None:
        """Return what a float8 weight is to be multiplied by, [] or [O 1], float32; None for 1."""
        if name not in self._scales:
            return None
        scale, shape = self._source.get(self._scales[name]).float(), self.shape(name)
        if scale.numel() not in (1, shape[0]):
            raise UserError(
                f"{self.where}: {self._scales[name]} holds {scale.numel()} numbers, neither one nor one for each of "
                f"{shape[0]} outputs",
                "use the bf16 or fp16 file",
            )
        return scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, *[1] * (len(shape) - 1))

    def linear_dtype(self) -> torch.dtype:
        """Return the dtype of the blocks' linear weights."""
        name = "blocks.0.cross_attn.k.weight"
        if name not in self:
            raise wrong_kind(self.where, self, "a Wan DiT", "give the DiT's weights")
        return self.get(name).dtype


def dit_shape(source: Weights | Mapping[str, Tensor], heads: int | None = None, where: str = "weights") -> WanShape:
    """Return the sizes that the shapes of the weights imply; heads: from the metadata, else one for 128 channels."""
    tensors = DitTensors(InMemory(source) if isinstance(source, Mapping) else source, where)
    if lacking := [name for name, ndim in SIZED.items() if name not in tensors or len(tensors.shape(name)) != ndim]:
        raise wrong_kind(where, tensors, "a Wan DiT", f"give the DiT's weights; there is no {lacking[0]} here")
    dim, in_channels, *patch = tensors.shape("patch_embedding.weight")
    heads = heads or _heads(tensors.metadata, dim, where)
    if dim % (2 * heads):
        raise UserError(f"{where}: {heads} heads do not divide {dim} channels into pairs")
    image = "img_emb.proj.1.weight" in tensors
    return WanShape(
        dim=dim,
        ffn_dim=tensors.shape("blocks.0.ffn.0.weight")[0],
        heads=heads,
        blocks=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        in_channels=in_channels,
        out_channels=tensors.shape("head.head.weight")[0] // math.prod(patch),
        text_dim=tensors.shape("text_embedding.0.weight")[1],
        freq_dim=tensors.shape("time_embedding.0.weight")[1],
        patch=tuple(patch),
        clip_dim=tensors.shape("img_emb.proj.1.weight")[1] if image else None,
        image_tokens=tensors.shape("img_emb.emb_pos")[1] if "img_emb.emb_pos" in tensors else None,
    )


def _heads(metadata: Mapping[str, str], dim: int, where: str) -> int:
    """Return the number of heads, the one size that no weight shows."""
    given = metadata.get("num_heads")
    if given is None:
        return max(dim // HEAD_DIM, 1)
    if not given.isdecimal() or int(given) == 0:
        raise UserError(f"{where}: the metadata say num_heads = '{given}'", "it must be a positive number")
    return int(given)


# (input channels, looks at CLIP features, of pairs of pictures) of what the tasks can run.
KINDS = {
    (16, False, False): "t2v",
    (36, True, False): "i2v",
    (36, True, True): "flf2v",
    (48, True, False): "fun-control",
    (36, False, False): "i2v without clip",
}


KIND_NAMES = {
    "t2v": "a text-to-video model (16 input channels)",
    "i2v": "an image-to-video model (36 input channels, image branch)",
    "flf2v": "a first-and-last-frame model (36 input channels, image branch for two pictures)",
    "fun-control": "a Fun-Control model (48 input channels, image branch)",
    "i2v without clip": "an image-to-video model of Wan2.2 (36 input channels, no image branch)",
}


def dit_kind(shape: WanShape) -> str | None:
    """Return which kind of DiT has such a shape, "t2v", "i2v", ...; None for one that no task can run."""
    if shape.out_channels != 16:
        return None
    return KINDS.get((shape.in_channels, shape.clip_dim is not None, shape.image_tokens is not None))


def task_kind(config: WanConfig) -> str:
    """Return the kind of DiT that a task runs."""
    return KINDS[config.in_channels, config.clip, config.clip and len(config.images) == 2]


def checked_shape(tensors: DitTensors, config: WanConfig) -> WanShape:
    """Return the shape of a DiT that is whole and of the task's kind."""
    _refuse_others(tensors)
    shape = dit_shape(tensors, where=tensors.where)
    check_dit_names(tensors, shape)
    kind = dit_kind(shape)
    if kind is None and shape.out_channels == 48:
        raise UserError(
            f"{tensors.where}: is ti2v-5B of Wan2.2, which is not supported",
            "use a model of one of the tasks that --help lists",
        )
    if kind is None:
        branch = "with" if shape.clip_dim else "without"
        raise UserError(
            f"{tensors.where}: no task has a model of {shape.in_channels} input channels and "
            f"{shape.out_channels} output channels {branch} an image branch",
            "use one of the models that docs/wan.md lists",
        )
    if kind != task_kind(config):
        tasks = _tasks_of(kind, _sizes(shape)) or _tasks_of(kind)
        raise UserError(
            f"{tensors.where}: is {KIND_NAMES[kind]}, but --task is {config.name}",
            f"use --task {' or '.join(tasks)}, or the weights for {config.name}",
        )
    return shape


def _sizes(model: WanShape | WanConfig) -> tuple[int, int, int, int]:
    return model.dim, model.ffn_dim, model.heads, model.blocks


def _tasks_of(kind: str, sizes: tuple[int, int, int, int] | None = None) -> list[str]:
    """Return the tasks that run a kind of DiT, all or those whose published sizes are the given ones."""
    return [
        name for name, task in TASKS.items() if task_kind(task) == kind and (sizes is None or _sizes(task) == sizes)
    ]


def _log_other_sizes(where: str, shape: WanShape, config: WanConfig) -> None:
    """Say so when a file's sizes are not those of the task; they come from the file and are used all the same."""
    if _sizes(shape) == _sizes(config):
        return
    if tasks := _tasks_of(task_kind(config), _sizes(shape)):
        logger.warning("%s: has the size of %s, --task is %s", where, " and ".join(tasks), config.name)
        return
    logger.info(
        "%s: a model of unpublished size: %d channels, %d in the MLP, %d heads, %d blocks", where, *_sizes(shape)
    )


# Files that are nearly what --dit takes: (a name that gives it away, what it is, what to do instead).
OTHERS = (
    (
        r"\.(lora_(down|up|A|B)|hada_w1_a|lokr_w1)\b",
        "is a LoRA, not a DiT",
        "give it to --lora_weight, or in training to --network_weights",
    ),
    (
        r"^(condition_embedder|blocks\.0\.attn1)\.",
        "is a DiT in the layout of diffusers",
        "use the file of the official repository, or the one repackaged for ComfyUI",
    ),
    (r"^ref_conv\.", "is Fun-Control V1.1, which is not supported", "use the first version of Fun-Control"),
    (
        r"^vace_(blocks|patch_embedding)\.",
        "is a VACE model, which is not supported",
        "use a model of one of the tasks that --help lists",
    ),
    (
        r"^control_adapter\.",
        "is a Fun camera model, which is not supported",
        "use a model of one of the tasks that --help lists",
    ),
)


def _refuse_others(tensors: DitTensors) -> None:
    """Raise UserError for a file that is known to be something else than a DiT in the official layout."""
    for sign, what, fix in OTHERS:
        if any(re.search(sign, name) for name in tensors):
            raise UserError(f"{tensors.where}: {what}", fix)


def check_dit_names(tensors: DitTensors, shape: WanShape) -> None:
    """Raise UserError unless the tensors are exactly those of a DiT of this shape."""
    expected = _expected_shapes(shape)
    found = {name: tensors.shape(name) for name in tensors}
    if found.keys() > expected.keys():
        more = listed(found.keys() - expected.keys())
        raise UserError(
            f"{tensors.where}: a variant of Wan that is not supported, it has {more} besides the known ones"
        )
    check_names(tensors.where, expected, found)


@lru_cache(maxsize=1)  # what is checked first is loaded next
def _expected_shapes(shape: WanShape) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in empty_dit(shape).state_dict().items()}


def listed(names: Iterable[str]) -> str:
    """Return "3 tensors (a, b, ...)", naming at most three."""
    names = sorted(names)
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(names[:3])}{more})"


def check_formats(
    tensors: DitTensors, fp8: bool, fp8_scaled: bool, fp8_fast: bool = False, quantize: str | None = None
) -> None:
    dtype = tensors.linear_dtype()
    if quantize and (fp8 or fp8_scaled or fp8_fast):
        raise UserError(
            f"--quantize {quantize}: holds the same weights as the fp8 options, in another way",
            "leave one of them out",
        )
    if fp8_fast and not fp8:
        raise UserError("--fp8_fast: computes with the weights of --fp8_scaled", "add --fp8_scaled")
    if fp8_scaled and not fp8:
        raise UserError("--fp8_scaled: is a way of doing --fp8", "add --fp8, in training --fp8_base")
    if dtype not in FLOAT8_KINDS:
        return
    if dtype != FLOAT8:
        raise UserError(
            f"{tensors.where}: holds {dtype_name(dtype)} weights, of the float8 formats only e4m3fn is supported",
            "use the bf16, fp16 or fp8_e4m3fn file",
        )
    if fp8_scaled and not tensors.has_scales:
        raise UserError(
            f"{tensors.where}: holds float8 weights, which --fp8_scaled cannot make more exact",
            "use the bf16 or fp16 file, or leave --fp8_scaled out",
        )
    if not fp8 and not quantize:
        raise UserError(
            f"{tensors.where}: holds float8 weights",
            "add --fp8, in training --fp8_base, or use the bf16 or fp16 file",
        )


def empty_dit(shape: WanShape) -> WanModel:
    """Return a model whose parameters have names and shapes but no data."""
    with torch.device("meta"):
        return WanModel(shape)
