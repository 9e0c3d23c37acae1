"""diffusers' AutoencoderKLWan with our weights: an independent implementation to compare the VAE with."""

import re

from torch import nn

from wan.vae import VaeShape, WanVAE


def diffusers_vae(ours: WanVAE) -> nn.Module:
    """Return diffusers' model of the same sizes and weights, float32."""
    from diffusers import AutoencoderKLWan

    shape = ours.shape
    theirs = AutoencoderKLWan(
        base_dim=shape.width,
        z_dim=16,
        dim_mult=[level // shape.width for level in shape.levels],
        num_res_blocks=shape.residuals,
        temperal_downsample=list(shape.in_time),
    ).eval()
    theirs.load_state_dict({diffusers_name(k, shape): v for k, v in ours.state_dict().items()})
    return theirs


def diffusers_name(name: str, shape: VaeShape) -> str:
    """Return diffusers' name of a weight of the official layout."""
    if match := re.match(r"decoder\.upsamples\.(\d+)\.(.*)", name):
        level, layer = divmod(int(match[1]), shape.residuals + 2)
        inside = f"resnets.{layer}" if layer <= shape.residuals else "upsamplers.0"
        name = f"decoder.up_blocks.{level}.{inside}.{match[2]}"
    for ours, theirs in (
        (r"^conv1", "quant_conv"),
        (r"^conv2", "post_quant_conv"),
        (r"coder\.conv1", "coder.conv_in"),
        (r"downsamples", "down_blocks"),
        (r"middle\.1", "mid_block.attentions.0"),
        (r"middle\.0", "mid_block.resnets.0"),
        (r"middle\.2", "mid_block.resnets.1"),
        (r"residual\.0", "norm1"),
        (r"residual\.2", "conv1"),
        (r"residual\.3", "norm2"),
        (r"residual\.6", "conv2"),
        (r"shortcut", "conv_shortcut"),
        (r"head\.0", "norm_out"),
        (r"head\.2", "conv_out"),
    ):
        name = re.sub(ours, theirs, name)
    return name
