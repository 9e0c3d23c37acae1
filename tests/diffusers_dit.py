"""diffusers' WanTransformer3DModel with our weights: an independent implementation to compare the DiT with."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from wan.model import WanShape

# (official name, its name in diffusers). What the official files call norm3, diffusers calls norm2.
RENAMES = (
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"^img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"^img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"^img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
    (r"^img_emb\.emb_pos$", "condition_embedder.image_embedder.pos_embed"),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"^(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"^(blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"^(blocks\.\d+)\.ffn\.0\.", r"\1.ffn.net.0.proj."),
    (r"^(blocks\.\d+)\.ffn\.2\.", r"\1.ffn.net.2."),
    (r"^(blocks\.\d+)\.self_attn\.([qkv])\.", r"\1.attn1.to_\2."),
    (r"^(blocks\.\d+)\.self_attn\.o\.", r"\1.attn1.to_out.0."),
    (r"^(blocks\.\d+)\.self_attn\.", r"\1.attn1."),
    (r"^(blocks\.\d+)\.cross_attn\.([qkv])\.", r"\1.attn2.to_\2."),
    (r"^(blocks\.\d+)\.cross_attn\.o\.", r"\1.attn2.to_out.0."),
    (r"^(blocks\.\d+)\.cross_attn\.([kv])_img\.", r"\1.attn2.add_\2_proj."),
    (r"^(blocks\.\d+)\.cross_attn\.norm_k_img\.", r"\1.attn2.norm_added_k."),
    (r"^(blocks\.\d+)\.cross_attn\.", r"\1.attn2."),
)


def diffusers_dit(state_dict: Mapping[str, Tensor], shape: WanShape) -> nn.Module:
    """Return diffusers' DiT with these weights, which have the official names."""
    from diffusers import WanTransformer3DModel

    image_dim = shape.clip_dim if shape.clip_dim else None
    with torch.device("meta"):
        model = WanTransformer3DModel(
            patch_size=shape.patch,
            num_attention_heads=shape.heads,
            attention_head_dim=shape.dim // shape.heads,
            in_channels=shape.in_channels,
            out_channels=shape.out_channels,
            text_dim=shape.text_dim,
            freq_dim=shape.freq_dim,
            ffn_dim=shape.ffn_dim,
            num_layers=shape.blocks,
            image_dim=image_dim,
            added_kv_proj_dim=shape.dim if image_dim else None,
            pos_embed_seq_len=shape.image_tokens,
        )
    # The rotary table is computed on construction, so it must not be made without memory.
    model.rope = type(model.rope)(shape.dim // shape.heads, shape.patch, 1024)
    model.load_state_dict({_renamed(name): tensor for name, tensor in state_dict.items()}, assign=True, strict=True)
    return model.requires_grad_(False).eval()


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMES:
        new, hits = re.subn(pattern, replacement, name)
        if hits:
            return new
    return name


def padded(text: list[Tensor], length: int = 512) -> Tensor:
    """Return prompts' rows with zeros behind them [B length D], which diffusers leaves to the caller."""
    return torch.stack([nn.functional.pad(rows, (0, 0, 0, length - len(rows))) for rows in text])
