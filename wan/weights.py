"""What reading the weights of any model has in common: which model a file holds, what is missing, filling it in."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from utils.errors import UserError

_KINDS = (
    (r"lora_(unet|te|down|up|A|B)\b|lora_unet_", "a LoRA"),
    (r"(^|\.)blocks\.\d+\.self_attn\.q\.weight$", "a Wan DiT"),
    (r"(^|\.)blocks\.\d+\.attn1\.to_q\.", "a Wan DiT in the diffusers layout"),
    (r"^(encoder|decoder)\.(downsamples|upsamples)\.\d+\.(downsamples|upsamples)\.", "the Wan2.2 VAE of the 5B model"),
    (r"^(encoder\.down_blocks|decoder\.up_blocks|encoder\.down|decoder\.up)\.", "a VAE in another layout"),
    (r"^encoder\.downsamples\.\d+\.residual\.", "the Wan2.1 VAE"),
    (r"pos_embedding\.embedding\.weight$|relative_attention_bias\.weight$", "a T5 text encoder"),
    (r"^visual\.|vision_model\.|^pre_layrnorm\.", "a CLIP image encoder"),
    (r"text_model\.", "a CLIP text encoder"),
)
_SCALED = (".scale_weight", ".weight_scale", "scaled_fp8", ".scale_input")


class Weights(Protocol):
    """Named tensors that can be looked at before they are read: utils.safetensors_io.TensorFile, or InMemory."""

    metadata: Mapping[str, str]

    def keys(self) -> Iterable[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def get(self, key: str) -> Tensor: ...

    def place(self, key: str) -> tuple[Path, int] | None: ...

    def each(self, keys: Iterable[str], mapped: bool = True) -> Iterator[tuple[str, Tensor]]: ...


class InMemory:
    """A state dict behind the interface of a weight file."""

    def __init__(self, state_dict: Mapping[str, Tensor]):
        self.metadata: Mapping[str, str] = {}
        self._tensors = state_dict

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def get(self, key: str) -> Tensor:
        return self._tensors[key]

    def place(self, key: str) -> None:
        return None

    def each(self, keys: Iterable[str], mapped: bool = True) -> Iterator[tuple[str, Tensor]]:
        return ((key, self._tensors[key]) for key in keys)


def shapes_of(weights: Weights) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by its key."""
    keys = weights.keys()
    return {key: tuple(weights.shape(key)) for key in keys}


def describe(keys: Iterable[str]) -> str:
    """Return what a file with these keys seems to be: "a Wan DiT", or some of the keys when it is nothing known."""
    keys = list(keys)
    for pattern, kind in _KINDS:
        if any(re.search(pattern, key) for key in keys):
            return kind
    return f"an unknown model (with {', '.join(sorted(keys)[:2])})" if keys else "an empty file"


def wrong_kind(where: str, weights: Weights, wanted: str, fix: str) -> UserError:
    """Return the error for a file that holds another model than the option asks for."""
    return UserError(f"{where}: this seems to be {describe(weights.keys())}, not {wanted}", fix)


def check_names(where: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError, naming them, for tensors that are missing, unexpected or of another shape than expected."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    differing = [name for name, shape in expected.items() if name in found and tuple(found[name]) != tuple(shape)]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for names, what in ((missing, "missing"), (unexpected, "unexpected"), (differing, "of the wrong shape"))
        if names
    ]
    if any(name.endswith(_SCALED) for name in unexpected):
        raise UserError(
            f"{where}: an fp8_scaled file, whose weights come with scales", "use the bf16, fp16 or fp32 file"
        )
    if problems:
        raise UserError(f"{where}: tensors do not fit; {'; '.join(problems)}", "the file may be damaged or incomplete")


def place(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> None:
    """Make a copy of a tensor, cast and moved, the frozen parameter `name` of a model that was built without memory."""
    owner, _, parameter = name.rpartition(".")
    tensor = tensor.to(device=device, dtype=dtype, copy=True)
    setattr(model.get_submodule(owner), parameter, nn.Parameter(tensor, requires_grad=False))
