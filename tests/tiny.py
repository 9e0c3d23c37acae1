"""Tiny checkpoints of every kind in the official key layouts, with random weights; and a tokenizer trained on the spot.

    python -m tests.tiny FOLDER

The key tables are written out here, apart from the model code, so that a wrong name or shape shows in a test.
"""

import argparse
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from utils.safetensors_io import save_file_atomically

Shapes = dict[str, tuple[int, ...]]
KINDS = ("dit_t2v", "dit_i2v", "dit_flf2v", "dit_fun", "dit_i2v_a14b", "vae", "t5", "tokenizer", "clip")
DIT_CHANNELS = {"dit_t2v": 16, "dit_i2v": 36, "dit_flf2v": 36, "dit_fun": 48, "dit_i2v_a14b": 36}
WORDS = (
    "red green blue yellow white black circle square triangle star moves turns left right up down slowly fast on a the"
)


def write_models(folder: Path, kinds: Iterable[str] = KINDS, seed: int = 0) -> dict[str, Path]:
    """Write the named kinds and return their paths; the tokenizer is a `spiece.model`, all else is .safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for kind in kinds:
        if kind == "tokenizer":
            paths[kind] = folder / "spiece.model"
            paths[kind].write_bytes(sentencepiece_model())
            continue
        paths[kind] = folder / f"{kind}.safetensors"
        save_file_atomically(state_dict(kind, seed), paths[kind], {"num_heads": {"clip": "16"}.get(kind, "3")})
    return paths


def state_dict(kind: str, seed: int = 0, **sizes: int) -> dict[str, Tensor]:
    """Return random weights of one kind in the official layout; `sizes` go to the kind's table of shapes."""
    if kind in DIT_CHANNELS:
        image = kind not in ("dit_t2v", "dit_i2v_a14b")
        table = dit_shapes(DIT_CHANNELS[kind], image, pairs=kind == "dit_flf2v", **sizes)
    else:
        table = {"vae": vae_shapes, "t5": t5_shapes, "clip": clip_shapes}[kind](**sizes)
    return random_weights(table, seed)


def random_weights(table: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Return weights that keep the size of what flows through them: uniform, variance 1 / inputs; gains around 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in table.items():
        noise = torch.rand(shape, generator=generator) * 2 - 1
        inputs = torch.Size(shape[1:]).numel()
        if key.endswith("gamma") or (key.endswith("weight") and len(shape) == 1):
            weights[key] = 1 + 0.15 * noise
        elif key.endswith("modulation") or "embedding" in key and "weight" not in key and len(shape) > 2:
            weights[key] = 0.5 * noise
        elif len(shape) < 2:
            weights[key] = 0.1 * noise
        else:
            weights[key] = noise * (3 / inputs) ** 0.5
    return weights


def dit_shapes(
    channels: int, image: bool, pairs: bool = False, dim: int = 96, ffn: int = 192, blocks: int = 2, text: int = 64
) -> Shapes:
    """Return the official DiT's keys and shapes; image: with the branch that looks at CLIP features."""
    frequencies = 64
    table: Shapes = {"patch_embedding.weight": (dim, channels, 1, 2, 2), "patch_embedding.bias": (dim,)}
    for name, inputs, outputs in (
        ("text_embedding.0", text, dim),
        ("text_embedding.2", dim, dim),
        ("time_embedding.0", frequencies, dim),
        ("time_embedding.2", dim, dim),
        ("time_projection.1", dim, 6 * dim),
        ("head.head", dim, 4 * 16),
    ):
        table |= _linear(name, inputs, outputs)
    table["head.modulation"] = (1, 2, dim)
    for i in range(blocks):
        block = f"blocks.{i}"
        table[f"{block}.modulation"] = (1, 6, dim)
        for attention in ("self_attn", "cross_attn"):
            extra = ("k_img", "v_img") if image and attention == "cross_attn" else ()
            for part in ("q", "k", "v", "o", *extra):
                table |= _linear(f"{block}.{attention}.{part}", dim, dim)
            for norm in ("norm_q", "norm_k", *(("norm_k_img",) if extra else ())):
                table[f"{block}.{attention}.{norm}.weight"] = (dim,)
        table |= {f"{block}.norm3.weight": (dim,), f"{block}.norm3.bias": (dim,)}
        table |= _linear(f"{block}.ffn.0", dim, ffn) | _linear(f"{block}.ffn.2", ffn, dim)
    if image:
        table |= {"img_emb.proj.0.weight": (1280,), "img_emb.proj.0.bias": (1280,)}
        table |= _linear("img_emb.proj.1", 1280, 1280) | _linear("img_emb.proj.3", 1280, dim)
        table |= {"img_emb.proj.4.weight": (dim,), "img_emb.proj.4.bias": (dim,)}
    if pairs:
        table["img_emb.emb_pos"] = (1, 514, 1280)
    return table


def vae_shapes(dim: int = 8, z: int = 16) -> Shapes:
    """Return the keys and shapes of the Wan2.1 VAE with base width `dim`."""
    table: Shapes = {}
    table |= _conv("encoder.conv1", 3, dim, 3, 3, 3)
    widths = [dim, dim, 2 * dim, 4 * dim, 4 * dim]
    k = 0
    for level, (before, width) in enumerate(zip(widths, widths[1:], strict=False)):
        for inputs in (before, width):
            table |= _residual(f"encoder.downsamples.{k}", inputs, width)
            k += 1
        if level < 3:
            table |= _conv(f"encoder.downsamples.{k}.resample.1", width, width, 3, 3)
            if level > 0:
                table |= _conv(f"encoder.downsamples.{k}.time_conv", width, width, 3, 1, 1)
            k += 1
    table |= _middle("encoder", 4 * dim) | _vae_head("encoder", 4 * dim, 2 * z)
    table |= _conv("conv1", 2 * z, 2 * z, 1, 1, 1) | _conv("conv2", z, z, 1, 1, 1)
    table |= _conv("decoder.conv1", z, 4 * dim, 3, 3, 3) | _middle("decoder", 4 * dim)
    k = 0
    for level, (inputs, width) in enumerate(((4, 4), (2, 4), (2, 2), (1, 1))):
        for first in (inputs, width, width):
            table |= _residual(f"decoder.upsamples.{k}", first * dim, width * dim)
            k += 1
        if level < 3:
            table |= _conv(f"decoder.upsamples.{k}.resample.1", width * dim, width * dim // 2, 3, 3)
            if level < 2:
                table |= _conv(f"decoder.upsamples.{k}.time_conv", width * dim, 2 * width * dim, 3, 1, 1)
            k += 1
    return table | _vae_head("decoder", dim, 3)


def t5_shapes(vocabulary: int = 320, dim: int = 64, heads: int = 3, ffn: int = 160, layers: int = 2) -> Shapes:
    """Return the official umT5 encoder's keys and shapes; the width of a head is 16."""
    inner = 16 * heads
    table: Shapes = {"token_embedding.weight": (vocabulary, dim), "norm.weight": (dim,)}
    for i in range(layers):
        block = f"blocks.{i}"
        table |= {f"{block}.norm1.weight": (dim,), f"{block}.norm2.weight": (dim,)}
        table |= {f"{block}.attn.{part}.weight": (inner, dim) for part in "qkv"}
        table |= {f"{block}.attn.o.weight": (dim, inner)}
        table |= {f"{block}.pos_embedding.embedding.weight": (32, heads)}
        table |= {f"{block}.ffn.gate.0.weight": (ffn, dim), f"{block}.ffn.fc1.weight": (ffn, dim)}
        table |= {f"{block}.ffn.fc2.weight": (dim, ffn)}
    return table


def clip_shapes(width: int = 1280, layers: int = 2, ffn: int = 64) -> Shapes:
    """Return the keys and shapes of the CLIP file's image tower, whose last layer is never used."""
    table: Shapes = {
        "log_scale": (),
        "visual.cls_embedding": (1, 1, width),
        "visual.pos_embedding": (1, 257, width),
        "visual.head": (width, 16),
        "visual.patch_embedding.weight": (width, 3, 14, 14),
    }
    for norm in ("pre_norm", "post_norm"):
        table |= {f"visual.{norm}.weight": (width,), f"visual.{norm}.bias": (width,)}
    for i in range(layers):
        block = f"visual.transformer.{i}"
        for norm in ("norm1", "norm2"):
            table |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        table |= _linear(f"{block}.attn.to_qkv", width, 3 * width) | _linear(f"{block}.attn.proj", width, width)
        table |= _linear(f"{block}.mlp.0", width, ffn) | _linear(f"{block}.mlp.2", ffn, width)
    return table


def sentencepiece_model(extra: str = "") -> bytes:
    """Return a small unigram model of words in the style of umT5's: pad 0, end 1, unknown 2, bytes for the rest."""
    import sentencepiece

    sentences = [f"{a} {b} {c}" for a in WORDS.split() for b in WORDS.split()[::3] for c in WORDS.split()[::5]] + [
        extra
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="unigram",
        vocab_size=310,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="identity",
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _conv(name: str, inputs: int, outputs: int, *kernel: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, *kernel), f"{name}.bias": (outputs,)}


def _residual(name: str, inputs: int, outputs: int) -> Shapes:
    table = {f"{name}.residual.0.gamma": (inputs, 1, 1, 1), f"{name}.residual.3.gamma": (outputs, 1, 1, 1)}
    table |= _conv(f"{name}.residual.2", inputs, outputs, 3, 3, 3)
    table |= _conv(f"{name}.residual.6", outputs, outputs, 3, 3, 3)
    return table | (_conv(f"{name}.shortcut", inputs, outputs, 1, 1, 1) if inputs != outputs else {})


def _middle(side: str, width: int) -> Shapes:
    name = f"{side}.middle"
    attention = {f"{name}.1.norm.gamma": (width, 1, 1)}
    attention |= _conv(f"{name}.1.to_qkv", width, 3 * width, 1, 1) | _conv(f"{name}.1.proj", width, width, 1, 1)
    return _residual(f"{name}.0", width, width) | attention | _residual(f"{name}.2", width, width)


def _vae_head(side: str, inputs: int, outputs: int) -> Shapes:
    return {f"{side}.head.0.gamma": (inputs, 1, 1, 1)} | _conv(f"{side}.head.2", inputs, outputs, 3, 3, 3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for path in write_models(given.folder, given.kinds, given.seed).values():
        print(path)
