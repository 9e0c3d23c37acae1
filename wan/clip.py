"""The CLIP image encoder (ViT-H/14): transformers' class with the official file's weights, pictures to features."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from utils.errors import UserError
from utils.options import option
from utils.safetensors_io import open_tensors
from wan.weights import InMemory, Weights, check_names, describe, place, shapes_of, wrong_kind

if TYPE_CHECKING:  # importing transformers takes seconds, which --help should not
    from transformers import CLIPVisionConfig, CLIPVisionModel

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_DIM = 80  # of the published model
FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
_PATCHES, _POSITIONS, _CLASS = (f"embeddings.{part}_embedding" for part in ("patch", "position", "class"))
NAMES = {  # in the official file after "visual.", and in transformers
    "cls_embedding": _CLASS,
    "pos_embedding": f"{_POSITIONS}.weight",
    "patch_embedding.weight": f"{_PATCHES}.weight",
    "pre_norm.weight": "pre_layrnorm.weight",
    "pre_norm.bias": "pre_layrnorm.bias",
}
LAYER_NAMES = {  # of visual.transformer.N and of encoder.layers.N
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_OFFICIAL_LAYER = re.compile(r"visual\.transformer\.(\d+)\.(.+)\.(weight|bias)")
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
_AXES = {_CLASS: 1, f"{_POSITIONS}.weight": 2}
_ALL = slice(None)
# The text encoder, what follows the layer that the features are taken from, and a buffer of old files.
_UNUSED = (
    *("textual.", "text_model.", "text_projection.", "log_scale", "logit_scale", "visual.head", "visual.post_norm."),
    *("vision_model.post_layernorm.", "post_layernorm.", "visual_projection."),
    *("vision_model.embeddings.position_ids", "embeddings.position_ids"),
)


@dataclass(frozen=True)
class ClipOptions:
    """the image encoder"""

    clip: Path | None = option(
        None,
        f"weights of the CLIP image encoder, for image to video: {FILE} or a .safetensors file; hf:// too",
        remote=True,
    )


class ImageEncoder:
    """Pictures to the features that the DiT of image-to-video models reads."""

    def __init__(self, model: "CLIPVisionModel"):
        self.model = model

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return the features [B 257 D] of whole pictures, after the last layer but one, in the encoder's dtype.

        pixels [B 3 H W] in [-1, 1], float32, of any size and aspect ratio, on any device.
        """
        weight = next(self.model.parameters())
        seen = clip_input(pixels.to(weight.device, torch.float32), self.model.config.image_size)
        return self.model(pixel_values=seen.to(weight.dtype)).last_hidden_state


def clip_input(pixels: Tensor, size: int) -> Tensor:
    """Return pictures [B 3 H W] in [-1, 1], squeezed to size x size pixels, in the scale that the model was trained on.

    No antialiasing and no clamp: the DiT was trained on features of pictures resized like this.
    """
    resized = F.interpolate(pixels, (size, size), mode="bicubic", align_corners=False)
    mean, std = (rearrange(torch.tensor(values, device=pixels.device), "c -> c 1 1") for values in (MEAN, STD))
    return (resized * 0.5 + 0.5 - mean) / std


def load_clip(
    path: Path | str | None,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    option: str = "--clip",
) -> ImageEncoder:
    """Return the frozen image encoder of a .pth or .safetensors file; a text encoder in it is ignored.

    Raises UserError for a file that is something else.
    """
    with open_tensors(path, option, "the weights of the CLIP image encoder") as weights:
        return ImageEncoder(_build(weights, f"{option} {path}", dtype, device))


def build_clip(
    state_dict: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, heads: int | None = None
) -> "CLIPVisionModel":
    """Return the frozen image encoder of tensors in memory; heads: one for each 80 channels unless given."""
    return _build(InMemory(state_dict), "CLIP weights", dtype, "cpu", heads)


def empty_clip(config: "CLIPVisionConfig") -> "CLIPVisionModel":
    """Return the image encoder without memory for its weights, and without the norm that only its unused output has."""
    from transformers import CLIPVisionModel

    with torch.device("meta"):
        model = CLIPVisionModel(config)
    tower = getattr(model, "vision_model", model)  # transformers 4 keeps all layers one level deeper
    tower.post_layernorm = nn.Identity()
    return model.eval()


def clip_config(
    shapes: Mapping[str, tuple[int, ...]], heads: int | None = None, where: str = "CLIP weights"
) -> "CLIPVisionConfig":
    """Return transformers' configuration for tensors of these shapes, with one layer less than they have.

    shapes: by transformers' names without prefix. The features are those before the last layer.
    """
    from transformers import CLIPVisionConfig

    patches, positions, mlp = f"{_PATCHES}.weight", f"{_POSITIONS}.weight", "encoder.layers.0.mlp.fc1.weight"
    missing = [name for name, axes in ((patches, 4), (positions, 2), (mlp, 2)) if len(shapes.get(name, ())) != axes]
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} missing", "the file may be damaged or incomplete")
    width, _, patch, _ = shapes[patches]
    heads = heads or width // HEAD_DIM
    if heads == 0 or width % heads:
        raise UserError(f"{where}: another CLIP model, {width} channels wide instead of 1280", f"use {FILE}")
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shapes[mlp][0],
        num_hidden_layers=_last_layer(shapes),
        num_attention_heads=heads,
        image_size=patch * math.isqrt(shapes[positions][0] - 1),
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )


def _last_layer(names: Iterable[str]) -> int:
    return max(int(match[1]) for name in names if (match := _LAYER.match(name)))


class ImageTower:
    """The image encoder's tensors in a file, by transformers' names without prefix."""

    def __init__(self, weights: Weights):
        self._weights = weights
        self._parts: dict[str, tuple[str, slice]] = {}  # name > key in the file and rows of that tensor
        for key, shape in shapes_of(weights).items():
            for name, rows in _names(key, shape):
                self._parts[name] = key, rows

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._shape(name) for name in self._parts}

    def get(self, name: str) -> Tensor:
        key, rows = self._parts[name]
        return self._weights.get(key)[rows].reshape(self._shape(name))

    def _shape(self, name: str) -> tuple[int, ...]:
        key, rows = self._parts[name]
        shape = self._weights.shape(key)
        # The official file gives the embeddings axes of length 1 in front.
        shape = shape[-_AXES.get(name, len(shape)) :]
        return shape if rows == _ALL else (rows.stop - rows.start, *shape[1:])


def _names(key: str, shape: tuple[int, ...]) -> Iterator[tuple[str, slice]]:
    """Yield transformers' names for the parts of a file's tensor; none if it is not needed, the key if unknown."""
    if key.startswith(_UNUSED):
        return
    key = key.removeprefix("vision_model.")
    official = key.removeprefix("visual.")
    match = _OFFICIAL_LAYER.fullmatch(key)
    if match and match[2] == "attn.to_qkv":
        width = shape[0] // 3
        for i, part in enumerate("qkv"):
            yield f"encoder.layers.{match[1]}.self_attn.{part}_proj.{match[3]}", slice(i * width, (i + 1) * width)
    elif match and match[2] in LAYER_NAMES:
        yield f"encoder.layers.{match[1]}.{LAYER_NAMES[match[2]]}.{match[3]}", _ALL
    else:
        yield NAMES[official] if key != official and official in NAMES else key, _ALL


def _build(
    weights: Weights, where: str, dtype: torch.dtype, device: torch.device | str, heads: int | None = None
) -> "CLIPVisionModel":
    if describe(weights.keys()) != "a CLIP image encoder":
        raise wrong_kind(where, weights, "the CLIP image encoder", f"use {FILE}")
    tower = ImageTower(weights)
    shapes = tower.shapes()
    if heads is None and weights.metadata.get("num_heads", "").isdecimal():
        heads = int(weights.metadata["num_heads"])
    config = clip_config(shapes, heads, where)
    model = empty_clip(config)
    prefix = "vision_model." if hasattr(model, "vision_model") else ""
    expected = {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    last = f"encoder.layers.{config.num_hidden_layers}."
    check_names(where, expected, {name: shape for name, shape in shapes.items() if not name.startswith(last)})
    for name in expected:
        place(model, prefix + name, tower.get(name), dtype, device)
    embeddings = getattr(model, "vision_model", model).embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions, device=device)[None]  # no file holds them
    return model
