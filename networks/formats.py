"""Key names of LoRA files, here and elsewhere, and the weight deltas that they stand for.

default    lora_unet_blocks_0_self_attn_q.lora_down.weight, .lora_up.weight, .alpha: what training writes
other      diffusion_model.blocks.0.self_attn.q.lora_A.weight, .lora_B.weight: alpha folded in
diffusers  transformer.blocks.0.attn1.to_q.lora_A.weight, ...: other layer names, alpha folded in
"""

import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from networks.lora import PREFIX, lora_name
from utils.devices import FLOAT8
from utils.errors import UserError
from utils.safetensors_io import open_tensors

logger = logging.getLogger(__name__)

Layers = dict[str, dict[str, Tensor]]  # {dotted path in the DiT: {part: tensor}}, parts as in the default format

_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
# Words of layer names that have an underscore of their own; with them `lora_unet_...` names can be read back.
_COMPOUND_WORDS = re.compile(
    r"(?<=_)(self_attn|cross_attn|norm_k_img|norm_k|norm_q|k_img|v_img"
    r"|patch_embedding|text_embedding|time_embedding|time_projection|img_emb)(?=_|$)"
)
_PARTS = re.compile(
    r"\.(lora_down\.weight|lora_up\.weight|lora_[AB](?:\.\w+)?\.weight|lora_[AB]|alpha|dora_scale|diff|diff_b"
    r"|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?)$"
)
_OTHER_PARTS = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
_BLOCK = re.compile(r"(blocks\.\d+\.)?(.*)")
_ATTENTION_IN_DIFFUSERS = {
    **{part: f"to_{part}" for part in "qkv"},
    "o": "to_out.0",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "norm_k_img": "norm_added_k",
}
# Layers by what follows "blocks.0.", and those outside of blocks.
_IN_DIFFUSERS = {
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _ATTENTION_IN_DIFFUSERS.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in _ATTENTION_IN_DIFFUSERS.items()},
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "head.head": "proj_out",
}
_FROM_DIFFUSERS = {theirs: ours for ours, theirs in _IN_DIFFUSERS.items()}


def layer_path(name: str) -> str:
    """Return the dotted path of a LoRA name: lora_unet_blocks_0_cross_attn_k_img > blocks.0.cross_attn.k_img."""
    guarded = _COMPOUND_WORDS.sub(lambda word: word[0].replace("_", "\0"), "_" + name.removeprefix(PREFIX))
    return guarded[1:].replace("_", ".").replace("\0", "_")


def detect_format(keys: Sequence[str]) -> str | None:
    """Return "default", "diffusers" or "other", whichever most LoRA keys have; None when there is none."""
    counts = dict.fromkeys(("default", "other", "diffusers"), 0)
    for key in keys:
        if part := _PARTS.search(key):
            stem = _unprefixed(key[: part.start()])
            foreign = "other" if _renamed(stem, _FROM_DIFFUSERS) == stem else "diffusers"
            counts["default" if key.startswith(PREFIX) else foreign] += 1
    return max(counts, key=counts.__getitem__) if any(counts.values()) else None


def read_lora(path: Path | str | None, option: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors, metadata) of a LoRA file, held in memory: the file may be replaced afterwards.

    Raises UserError for a file that is no LoRA, before its tensors are read, and for one with values that are not
    finite.
    """
    with open_tensors(path, option, "a LoRA file") as file:
        keys, name = file.keys(), f"{option} {path}"
        if detect_format(keys) is None:
            raise _no_lora(name, keys)
        tensors = {key: file.get(key).clone() for key in keys}
        metadata = dict(file.metadata)
    for key, tensor in tensors.items():
        # Attention kernels may turn NaN into zeros, so that nothing would show it later.
        if not bool(tensor.float().isfinite().all()):
            raise UserError(f"{name}: {key} has values that are not finite", "its training diverged; use another file")
    return tensors, metadata


def _no_lora(name: str, keys: Sequence[str]) -> UserError:
    example = f", e.g. {keys[0]}" if keys else ""
    return UserError(f"{name}: not a LoRA: none of its {len(keys)} tensors is a LoRA's{example}")


def read_layers(state_dict: Mapping[str, Tensor], name: str = "LoRA") -> Layers:
    """Return the tensors of a LoRA file of any format by layer and part; keys that mean nothing are counted.

    name: what an error or warning calls the file. Raises UserError when it is no LoRA at all, and for layers whose
    parts are incomplete or do not fit each other.
    """
    layers: Layers = {}
    foreign = []
    for key, tensor in state_dict.items():
        part = _PARTS.search(key)
        if not part:
            foreign.append(key)
            continue
        stem = key[: part.start()]
        path = layer_path(stem) if key.startswith(PREFIX) else _renamed(_unprefixed(stem), _FROM_DIFFUSERS)
        layers.setdefault(path, {})[_default_part(part[1])] = tensor
    layers = {path: parts for path, parts in layers.items() if set(parts) - {"alpha"}}
    if not layers:
        raise _no_lora(name, foreign)
    for path, parts in layers.items():
        if "dora_scale" not in parts:
            _weight_shape(parts, f"{name}: {path}")
    if foreign:
        logger.warning("%s: %d tensors are no part of a LoRA and ignored, e.g. %s", name, len(foreign), foreign[0])
    return layers


def _unprefixed(key: str) -> str:
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _renamed(path: str, names: Mapping[str, str]) -> str:
    """Return a layer's path with another name behind the number of its block; names that are not known stay."""
    block, name = _BLOCK.fullmatch(path).groups("")
    return block + names.get(name, name)


def _default_part(part: str) -> str:
    """Return the default format's name of a part; PEFT puts an adapter's name in between: lora_A.default.weight."""
    if part.startswith(("lora_A", "lora_B")):
        return "lora_down.weight" if part.startswith("lora_A") else "lora_up.weight"
    return part


def to_default(state_dict: Mapping[str, Tensor], name: str = "LoRA") -> dict[str, Tensor]:
    """Return a LoRA of any format with the keys of the default one; a missing alpha becomes the rank, an integer."""
    converted = {}
    for path, parts in read_layers(state_dict, name).items():
        down = parts.get("lora_down.weight")
        if down is not None and "alpha" not in parts:
            parts = {**parts, "alpha": torch.tensor(down.shape[0])}
        converted.update({f"{lora_name(path)}.{part}": tensor for part, tensor in parts.items()})
    return converted


def to_other(
    state_dict: Mapping[str, Tensor], prefix: str = "diffusion_model", name: str = "LoRA"
) -> dict[str, Tensor]:
    """Return a LoRA of any format with dotted keys behind `prefix`.

    prefix: with or without a dot behind it; empty for none. alpha is folded in: both factors of a LoRA are multiplied
    by the square root of alpha / rank. Factors of other kinds (LoHa, LoKr, plain differences) keep their names and
    alpha.
    """
    start = f"{prefix.rstrip('.')}." if prefix else ""
    converted = {}
    for path, parts in read_layers(state_dict, name).items():
        if "lora_down.weight" in parts:
            parts = _alpha_folded_in(parts, f"{name}: {path}")
        for part, tensor in parts.items():
            converted[f"{start}{path}.{_OTHER_PARTS.get(part, part)}"] = tensor
    return converted


def to_diffusers(
    state_dict: Mapping[str, Tensor], prefix: str = "transformer", name: str = "LoRA"
) -> dict[str, Tensor]:
    """Return a LoRA of any format with the layer names of diffusers' WanTransformer3DModel, alpha folded in.

    Raises UserError for what diffusers does not load: LoHa, LoKr, plain differences.
    """
    start = f"{prefix.rstrip('.')}." if prefix else ""
    converted = {}
    for path, parts in read_layers(state_dict, name).items():
        if foreign := sorted(set(parts) - _OTHER_PARTS.keys() - {"alpha"}):
            raise UserError(
                f"{name}: {path}.{foreign[0]}: diffusers loads plain LoRAs alone",
                "use --target other, or the file as it is",
            )
        layer = _renamed(path, _IN_DIFFUSERS)
        for part, tensor in _alpha_folded_in(parts, f"{name}: {path}").items():
            converted[f"{start}{layer}.{_OTHER_PARTS[part]}"] = tensor
    return converted


def _alpha_folded_in(parts: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return the parts of a LoRA layer without alpha, whose effect the two factors share."""
    rank = parts["lora_down.weight"].shape[0]
    alpha = parts.get("alpha", torch.tensor(rank)).reshape(())
    if alpha.dtype in FLOAT8:
        raise UserError(f"{where}: float8 numbers cannot be scaled", "use the LoRA file in bf16, fp16 or fp32")
    if alpha < 0:
        raise UserError(f"{where}: alpha is {float(alpha):g}, whose sign dotted keys cannot hold", "use it as it is")
    # In alpha's own dtype: files then equal those that other programs convert, bit by bit.
    factor = (alpha / rank).sqrt()
    return {
        part: tensor * factor if part in _OTHER_PARTS else tensor for part, tensor in parts.items() if part != "alpha"
    }


def with_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata with the two hashes of the tensors by which other programs tell LoRA files apart.

    sshs_model_hash: SHA-256 of the tensors' bytes in a safetensors file; sshs_legacy_hash: the start of the SHA-256 of
    64 KiB at 1 MiB of that file, whose header holds the ss_* metadata alone.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    content = memoryview(save({key: tensor.contiguous() for key, tensor in tensors.items()}, training))
    header = 8 + int.from_bytes(content[:8], "little")
    model_hash = hashlib.sha256(content[header:]).hexdigest()
    legacy_hash = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    return {**metadata, "sshs_model_hash": model_hash, "sshs_legacy_hash": legacy_hash}


def weight_deltas(
    files: Sequence[tuple[Path | str, float]], option: str = "--lora_weight"
) -> dict[str, Callable[[], Tensor]]:
    """Return, by name of a DiT weight, a function that computes what the LoRA files add to it together, in float32.

    files: (path, multiplier), in any known format. The sum runs in the order of the files. Raises UserError for files
    that are no LoRA.
    """
    return deltas([(read_lora(path, option)[0], multiplier, f"{option} {path}") for path, multiplier in files])


def added_shapes(state_dict: Mapping[str, Tensor], name: str) -> dict[str, tuple[int, ...]]:
    """Return, by name of a DiT weight, the shape of what a LoRA adds to it; name: what an error calls the LoRA.

    Raises as `weight_deltas` does.
    """
    shapes = {}
    for layer, parts in read_layers(state_dict, name).items():
        _refuse_dora(parts, f"{name}: {layer}")
        shape = _weight_shape(parts, f"{name}: {layer}")
        if shape is not None:
            shapes[f"{layer}.weight"] = shape
        if "diff_b" in parts:
            shapes[f"{layer}.bias"] = tuple(parts["diff_b"].shape)
    return shapes


def _refuse_dora(parts: Mapping[str, Tensor], where: str) -> None:
    if "dora_scale" in parts:
        raise UserError(f"{where} is a DoRA, which is not supported", "merge it with another program")


def deltas(loras: Sequence[tuple[Mapping[str, Tensor], float, str]]) -> dict[str, Callable[[], Tensor]]:
    """Return the functions of `weight_deltas` for LoRAs in memory: (state dict, multiplier, name for messages)."""
    terms: dict[str, list[tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor], float]]] = {}
    for state_dict, multiplier, name in loras:
        for path, parts in read_layers(state_dict, name).items():
            _refuse_dora(parts, f"{name}: {path}")
            if "diff_b" in parts:
                terms.setdefault(f"{path}.bias", []).append((_bias_delta, parts, multiplier))
            if _adds_to_weight(parts):
                terms.setdefault(f"{path}.weight", []).append((_kind_of(parts, f"{name}: {path}"), parts, multiplier))
    return {name: partial(_sum, weight_terms) for name, weight_terms in terms.items()}


def _sum(terms: Sequence[tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor], float]]) -> Tensor:
    delta, parts, multiplier = terms[0]
    total = multiplier * delta(parts)
    for delta, parts, multiplier in terms[1:]:
        total += multiplier * delta(parts)
    return total


def _kind_of(parts: Mapping[str, Tensor], where: str) -> Callable[[dict[str, Tensor]], Tensor]:
    """Return the function that multiplies out the parts of one layer."""
    for needed, delta in _KINDS:
        if needed <= set(parts):
            return delta
    raise UserError(f"{where}: incomplete, it has only {', '.join(sorted(parts))}", "use a complete LoRA file")


def _adds_to_weight(parts: Mapping[str, Tensor]) -> bool:
    return bool(set(parts) - {"alpha", "diff_b"})


def _weight_shape(parts: Mapping[str, Tensor], where: str) -> tuple[int, ...] | None:
    """Return the shape of what the parts of a layer add to its weight, None if only its bias changes.

    Raises UserError unless the parts are complete and fit each other. Nothing is computed.
    """
    if not _adds_to_weight(parts):
        return None
    delta = _kind_of(parts, where)
    try:
        return tuple(delta({part: x if part == "alpha" else x.to("meta") for part, x in parts.items()}).shape)
    except (RuntimeError, ValueError, IndexError):
        sizes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
        raise UserError(f"{where}: parts that do not fit each other: {sizes}", "use a complete LoRA file") from None


def _lora_delta(parts: dict[str, Tensor]) -> Tensor:
    """Return alpha / rank * up @ down; of a convolution's factors, in the shape of its weight."""
    down, up = parts["lora_down.weight"].float(), parts["lora_up.weight"].float()
    product = up.flatten(1) @ down.flatten(1)
    return _scale(parts, down.shape[0]) * product.reshape(up.shape[0], *down.shape[1:])


def _loha_delta(parts: dict[str, Tensor]) -> Tensor:
    """Return alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise between the two."""
    first = parts["hada_w1_a"].float() @ parts["hada_w1_b"].float()
    second = parts["hada_w2_a"].float() @ parts["hada_w2_b"].float()
    return _scale(parts, parts["hada_w1_b"].shape[0]) * first * second


def _lokr_delta(parts: dict[str, Tensor]) -> Tensor:
    """Return kron(w1, w2), scaled by alpha / rank where a factor is of low rank."""
    first, second = (_lokr_factor(parts, f"lokr_w{i}") for i in (1, 2))
    ranks = [parts[part].shape[0] for part in ("lokr_w2_b", "lokr_w1_b") if part in parts]
    return (_scale(parts, ranks[0]) if ranks else 1.0) * torch.kron(first, second)


def _lokr_factor(parts: dict[str, Tensor], name: str) -> Tensor:
    if name in parts:
        return parts[name].float()
    return parts[f"{name}_a"].float() @ parts[f"{name}_b"].float()


def _weight_delta(parts: dict[str, Tensor]) -> Tensor:
    return parts["diff"].float()


def _bias_delta(parts: dict[str, Tensor]) -> Tensor:
    return parts["diff_b"].float()


def _scale(parts: Mapping[str, Tensor], rank: int) -> float:
    return float(parts["alpha"]) / rank if "alpha" in parts else 1.0


_KINDS = (
    ({"lora_down.weight", "lora_up.weight"}, _lora_delta),
    ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, _loha_delta),
    ({"lokr_w1", "lokr_w2"}, _lokr_delta),
    ({"lokr_w1", "lokr_w2_a", "lokr_w2_b"}, _lokr_delta),
    ({"lokr_w1_a", "lokr_w1_b", "lokr_w2"}, _lokr_delta),
    ({"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}, _lokr_delta),
    ({"diff"}, _weight_delta),
)
