"""The umT5 text encoder: transformers' class with the weights of the official file, and prompts to embeddings."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.options import option
from utils.safetensors_io import open_tensors
from wan.auto_swap import AutoSwap, smallest_swap
from wan.block_swap import (
    AUTO,
    Ring,
    SwapOptions,
    check_count,
    number_or_auto,
    slots_for,
    streamed_blocks,
    streaming_device,
)
from wan.fp8 import FLOAT8, Float8Linear, cast_weight, use_float8_linears
from wan.memory import held_bytes
from wan.streaming import Device
from wan.tokenizer import Tokenizer, load_tokenizer, tokenize
from wan.weights import InMemory, Weights, check_names, describe, place, wrong_kind

if TYPE_CHECKING:  # importing transformers takes seconds, which --help should not
    from transformers import UMT5Config, UMT5EncoderModel

logger = logging.getLogger(__name__)

MAX_TOKENS = 512
SWAP = "--t5_blocks_to_swap"
# Names in the official file and in transformers, without ".weight".
NAMES = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
BLOCK_NAMES = {  # of blocks.N and of encoder.block.N
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_TIED = "encoder.embed_tokens.weight"  # the same table as shared.weight
_OFFICIAL_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.weight")


@dataclass(frozen=True)
class T5Options:
    """the text encoder"""

    t5: Path | None = option(
        None,
        "weights of the text encoder: models_t5_umt5-xxl-enc-bf16.pth or a .safetensors file; hf:// too",
        remote=True,
    )
    t5_tokenizer: Path | None = option(
        None,
        "its tokenizer: a folder, tokenizer.json or spiece.model of google/umt5-xxl (default: from the Hugging Face "
        "cache, else downloaded)",
    )
    fp8_t5: bool = option(False, "hold the text encoder's linear weights as fp8 (e4m3fn): 6 GB instead of 11")
    t5_blocks_to_swap: int | str = option(
        AUTO,
        "text encoder blocks whose weights are held in main memory, up to all of them; auto: as many as free memory "
        "asks for",
        parse=number_or_auto,
        metavar="N|auto",
    )


class TextEncoder:
    """Prompts to the embeddings that the DiT reads: umT5 with its tokenizer."""

    def __init__(self, model: "UMT5EncoderModel", tokenizer: Tokenizer, auto: AutoSwap | None = None):
        self.model, self.tokenizer, self.auto = model, tokenizer, auto

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens each prompt has for the encoder: its own and the end token, 512 at most."""
        _, mask = tokenize(self.tokenizer, prompts, MAX_TOKENS)
        return mask.sum(dim=1).tolist()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Return the embeddings [n D] of each prompt's n <= 512 tokens, the end token included.

        All prompts go through together, padded to the longest of them, which no valid row sees: its scores are so low
        that their exponentials are zero. With whom a prompt goes matters only as far as sums are rounded otherwise in
        another shape: by 1e-6 of the features' norm in float32 and 3e-3, less than a step, in bfloat16 (two layers).
        """
        ids, mask = tokenize(self.tokenizer, prompts, MAX_TOKENS)
        lengths = mask.sum(dim=1).tolist()
        device = self.model.shared.weight.device
        ids, mask = (x[:, : max(lengths)].to(device) for x in (ids, mask))
        run = partial(self.model, input_ids=ids, attention_mask=mask)
        rows = (self.auto.retry(run) if self.auto else run()).last_hidden_state
        # Copies, because a view would keep the padding of the whole batch in memory.
        return [row[:length].clone() for row, length in zip(rows, lengths, strict=True)]


def load_t5(
    path: Path | str | None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    tokenizer: Path | str | None = None,
    fp8: bool = False,
    option: str = "--t5",
    blocks_to_swap: int | str = 0,
) -> TextEncoder:
    """Return the frozen text encoder of a .pth or .safetensors file, with its tokenizer.

    dtype: what it computes in; fp8: hold the linear weights as float8. blocks_to_swap: how many blocks are held in main
    memory and stream through a ring, none of them ever on the device as a whole but there; AUTO: as many as it takes
    to encode one text of full length, and more once memory runs out. Raises UserError for files that hold something
    else.
    """
    with open_tensors(path, option, "the weights of the text encoder") as weights:
        where = f"{option} {path}"
        config = t5_config(weights, where)
        cutter = load_tokenizer(tokenizer)
        if cutter.size > config.vocab_size:
            raise UserError(
                f"--t5_tokenizer: it has {cutter.size} tokens, but the text encoder {path} knows {config.vocab_size}",
                "use the tokenizer of google/umt5-xxl",
            )
        check_count(blocks_to_swap, config.num_layers, "the text encoder", SWAP)
        if not blocks_to_swap:
            return TextEncoder(_build(weights, config, where, dtype, device, fp8), cutter)
        streaming = streaming_device(device, SwapOptions(blocks_to_swap), SWAP)
        swapped = blocks_to_swap if blocks_to_swap != AUTO else _fitting_swap(config, dtype, fp8, streaming)
        numbers = streamed_blocks(config.num_layers, swapped)
        model = _build(weights, config, where, dtype, device, fp8, numbers)
    ring = Ring(model.encoder.block, streaming)
    ring.stream(numbers, slots_for(swapped, None))
    fix = "use --fp8_t5, or encode fewer texts at once with --batch_size"
    return TextEncoder(model, cutter, AutoSwap(ring, option=SWAP, fix=fix) if blocks_to_swap == AUTO else None)


def _fitting_swap(config: "UMT5Config", dtype: torch.dtype, fp8: bool, streaming: Device) -> int:
    """Return how many blocks to swap so that a text of full length can be encoded; say so where there are any."""
    model, free = empty_t5(config, fp8), streaming.free()
    block, every = held_bytes(model.encoder.block[0], dtype), held_bytes(model, dtype)
    rest = every - config.num_layers * block
    working = encoding_bytes(config, dtype, fp8)
    swapped = smallest_swap(config.num_layers, block, None, lambda swapped: rest + working, free)
    if swapped:
        logger.info(
            "%s auto: %d of %d blocks of the text encoder stream from main memory; free are %.2f GB, it takes %.2f GB",
            *(SWAP, swapped, config.num_layers, free / 1e9, (every + working) / 1e9),
        )
    return swapped


def encoding_bytes(config: "UMT5Config", dtype: torch.dtype, fp8: bool = False) -> int:
    """Return about how many bytes encoding one text of full length takes beside the weights: no less."""
    inner = config.num_heads * config.d_kv
    values = 4 * config.d_model + max(5 * inner, 4 * config.d_ff)
    logits = config.num_heads * MAX_TOKENS**2 * (4 * dtype.itemsize + 3 * torch.float32.itemsize)
    dequantized = config.d_model * max(config.d_ff, inner) * dtype.itemsize if fp8 else 0
    return MAX_TOKENS * values * max(dtype.itemsize, 4) + logits + dequantized


def build_t5(
    state_dict: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, fp8: bool = False
) -> "UMT5EncoderModel":
    """Return the frozen encoder of tensors in memory, under any of the names that load_t5 takes."""
    weights, where = InMemory(state_dict), "T5 weights"
    return _build(weights, t5_config(weights, where), where, dtype, "cpu", fp8)


def empty_t5(config: "UMT5Config", fp8: bool = False) -> "UMT5EncoderModel":
    """Return the encoder without memory for its weights; fp8: its linear layers take float8 weights."""
    from transformers import UMT5EncoderModel

    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    model.encoder.embed_tokens = model.shared
    if fp8:
        for block in model.encoder.block:
            block.layer[1].DenseReluDense = _FeedForward(block.layer[1].DenseReluDense)
        use_float8_linears(model.encoder, scaled=False)
    return model.eval()


def t5_config(weights: Weights, where: str = "T5 weights") -> "UMT5Config":
    """Return transformers' configuration of the encoder that the weights' shapes belong to."""
    from transformers import UMT5Config

    shapes = {name: weights.shape(key) for key, name in transformers_names(weights.keys()).items()}
    if describe(weights.keys()) != "a T5 text encoder":
        raise wrong_kind(where, weights, "umT5's text encoder", "use models_t5_umt5-xxl-enc-bf16.pth")
    attention, gate = "encoder.block.0.layer.0.SelfAttention.", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    needed = ("shared.weight", f"{attention}q.weight", f"{attention}relative_attention_bias.weight", gate)
    missing = [name for name in needed if len(shapes.get(name, ())) != 2]
    if missing:
        raise UserError(
            f"{where}: not umT5's encoder, or damaged: {', '.join(missing)} missing",
            "use models_t5_umt5-xxl-enc-bf16.pth",
        )
    buckets, heads = shapes[f"{attention}relative_attention_bias.weight"]
    return UMT5Config(
        vocab_size=shapes["shared.weight"][0],
        d_model=shapes["shared.weight"][1],
        d_kv=shapes[f"{attention}q.weight"][0] // heads,
        d_ff=shapes[gate][0],
        num_layers=len({name.split(".")[2] for name in shapes if name.startswith("encoder.block.")}),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        # The other implementations round differently from the official code in bfloat16.
        attn_implementation="eager",
    )


def transformers_names(keys: Iterable[str]) -> dict[str, str]:
    """Return {key: transformers' name} for a file in the official layout, the same behind "encoder.", or transformers'.

    A tokenizer kept among the weights (ComfyUI) and the second name of the embedding table are left out.
    """
    keys = [key for key in keys if key != "spiece_model"]
    if any(key.startswith("encoder.block.") for key in keys):
        tied = "shared.weight" in keys
        names = {key: "shared.weight" if key == _TIED else key for key in keys}
        return {key: name for key, name in names.items() if not (tied and key == _TIED)}
    return {key: _transformers_name(key.removeprefix("encoder.")) for key in keys}


def _transformers_name(official: str) -> str:
    """Return transformers' name for an official one; a name that is not official comes back as it is."""
    if match := _OFFICIAL_BLOCK.fullmatch(official):
        layer = BLOCK_NAMES.get(match[2])
        return f"encoder.block.{match[1]}.{layer}.weight" if layer else official
    name = NAMES.get(official.removesuffix(".weight"))
    return f"{name}.weight" if name else official


class _FeedForward(nn.Module):
    """transformers' gated layer without its cast of activations to the weights' dtype, which would make them float8."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.wi_0, self.wi_1, self.wo, self.act = layer.wi_0, layer.wi_1, layer.wo, layer.act

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.act(self.wi_0(x)) * self.wi_1(x))


def _build(
    weights: Weights,
    config: "UMT5Config",
    where: str,
    dtype: torch.dtype,
    device: torch.device | str,
    fp8: bool,
    swapped: Sequence[int] = (),
) -> "UMT5EncoderModel":
    """Return the encoder on a device, but for blocks with these numbers, which are left in main memory."""
    model = empty_t5(config, fp8)
    keys = {name: key for key, name in transformers_names(weights.keys()).items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != _TIED}
    check_names(where, expected, {name: weights.shape(key) for name, key in keys.items()})
    in_main_memory = tuple(f"encoder.block.{number}." for number in swapped)
    for name in expected:
        tensor = weights.get(keys[name])
        home = "cpu" if name.startswith(in_main_memory) else device
        if isinstance(model.get_submodule(name.rpartition(".")[0]), Float8Linear):
            place(model, name, cast_weight(tensor.to(device)), FLOAT8, home)
        else:
            place(model, name, tensor, dtype, home)
    return model
