"""Layers of the causal video VAE: what a frame becomes depends on it and on earlier frames only.

A video passes in chunks; between two chunks a FrameCache holds the last input frames of each layer that looks back in
time. So a video of any length is computed exactly, with the memory of one chunk. Layers that see a few pixels around
each pixel, all but the attention, can run in tiles as well, with the memory of one tile.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn


class FrameCache:
    """What the layers remember of the earlier chunks of one video, and which part of the video is computed now.

    in_main_memory: frames wait there instead of on the layers' device. is_first, is_last: of the chunks; tile: number
    of the current one.
    """

    def __init__(self, in_main_memory: bool = False):
        self.in_main_memory = in_main_memory
        self.is_first, self.is_last, self.tile = True, False, 0
        self._frames: dict[tuple[nn.Module, int], Tensor] = {}

    def take(self, layer: nn.Module, device: torch.device) -> Tensor | None:
        """Return the frames [B C f H W] that the layer kept at the previous chunk, or None; they are then forgotten."""
        frames = self._frames.pop((layer, self.tile), None)
        return None if frames is None else frames.to(device)

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        """Keep a copy of these frames for the next chunk, if there is one."""
        if not self.is_last:
            # A copy, because a view would hold on to the memory of all frames.
            self._frames[layer, self.tile] = frames.to("cpu" if self.in_main_memory else frames.device, copy=True)


class CausalConv3d(nn.Conv3d):
    """3-D convolution that sees zeros before the first frame and nothing after the current one."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int]):
        super().__init__(inputs, outputs, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.memory = kernel[0] - 1

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        """x [B C f H W] > [B C' f H W]."""
        return super().forward(x) if self.memory == 0 else self.convolve(self.gather(x, cache))

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            # For small videos torch would take a kernel that is up to 6 times slower.
            return torch.mkldnn_convolution(x, weight, bias, self.padding, self.stride, self.dilation, self.groups)
        return super()._conv_forward(x, weight, bias)

    def gather(self, x: Tensor, cache: FrameCache, norm: "ChannelNorm | None" = None) -> Tensor:
        """Return what the convolution sees [B C F H W]: earlier frames, then x [B C f H W] or silu(norm(x)).

        All in one buffer. It is a step of its own so that x may go before convolve() makes the result.
        """
        past = cache.take(self, x.device)
        batch, channels, frames, height, width = x.shape
        before = 0 if past is None else past.shape[2]
        # Before a video's first frame are only zeros. A single frame does without them: see convolve().
        zeros = 0 if frames == 1 else self.memory - before
        known = x.new_empty(batch, channels, zeros + before + frames, height, width)
        known[:, :, :zeros] = 0
        if past is not None:
            known[:, :, zeros : zeros + before] = past
            del past  # before keep() makes the next one
        now = known[:, :, zeros + before :]
        if norm is None:
            now.copy_(x)
        else:
            F.silu(norm(x, out=now), inplace=True)
        cache.keep(self, known[:, :, -self.memory :])
        return known

    def convolve(self, known: Tensor) -> Tensor:
        """known [B C F H W], from gather() > [B C' f H W]."""
        if known.shape[2] > self.memory + 1:
            return super().forward(known)
        # One frame comes out: the frames it sees are channels of a 2-D convolution, which is faster. The taps of frames
        # before the first are left out.
        taps = self.weight[:, :, -known.shape[2] :].flatten(1, 2)
        y = F.conv2d(known.flatten(1, 2), taps, self.bias, padding=self.padding[1:])
        return rearrange(y, "b c h w -> b c 1 h w")


class ChannelNorm(nn.Module):
    """Scales the channels of each pixel to a mean square of 1, then by gamma."""

    def __init__(self, channels: int, axes: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [B C ...] > the same shape; out: where to write it."""
        if x.dtype == torch.float32:  # several times faster on a CPU than vector_norm
            norm = x.square().sum(dim=1, keepdim=True).sqrt_().clamp_min_(1e-12)
        else:  # squares would overflow in float16; this sums in float32 without a float32 copy of x
            norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min_(1e-12)
        # The upper limit keeps black pixels at 0 in float16, where 0 times infinity would be NaN.
        scale = (math.sqrt(x.shape[1]) / norm).clamp_max(torch.finfo(x.dtype).max).to(x.dtype)
        return torch.mul(x, scale, out=out).mul_(self.gamma)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); a 1x1x1 convolution on x where the number of channels changes."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        # Named by their places in the original's list, where activations and dropout count too.
        self.residual = nn.ModuleDict(
            {
                "0": ChannelNorm(inputs, axes=3),
                "2": CausalConv3d(inputs, outputs, (3, 3, 3)),
                "3": ChannelNorm(outputs, axes=3),
                "6": CausalConv3d(outputs, outputs, (3, 3, 3)),
            }
        )
        self.shortcut = CausalConv3d(inputs, outputs, (1, 1, 1)) if inputs != outputs else None

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        """x [B C f H W] > [B C' f H W]."""
        y = self.residual["2"].convolve(self.residual["2"].gather(x, cache, norm=self.residual["0"]))
        known = self.residual["6"].gather(y, cache, norm=self.residual["3"])
        del y  # a gigabyte at high resolution, and not needed any more
        y = self.residual["6"].convolve(known)
        return y.add_(x if self.shortcut is None else self.shortcut(x, cache))


class Head(nn.ModuleDict):
    """conv(silu(norm(x))) at the end of encoder and decoder."""

    def __init__(self, channels: int, outputs: int):
        super().__init__({"0": ChannelNorm(channels, axes=3), "2": CausalConv3d(channels, outputs, (3, 3, 3))})

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        """x [B C f H W] > [B C' f H W]."""
        return self["2"].convolve(self["2"].gather(x, cache, norm=self["0"]))


class AttentionBlock(nn.Module):
    """x + single-head attention among the pixels of each frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels, axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        """x [B C f H W] > the same shape."""
        frames = rearrange(x, "b c f h w -> (b f) c h w")
        qkv = self.to_qkv(self.norm(frames))
        q, k, v = rearrange(qkv, "n (three c) h w -> three n 1 (h w) c", three=3)
        y = F.scaled_dot_product_attention(q, k, v)
        y = self.proj(rearrange(y, "n 1 (h w) c -> n c h w", h=x.shape[3]))
        return x + rearrange(y, "(b f) c h w -> b c f h w", b=x.shape[0])


class Downsample(nn.Module):
    """Halves height and width; `in_time`: also the number of frames, except that the first frame stays alone."""

    def __init__(self, channels: int, in_time: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if in_time else None

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        """x [B C f H W] > [B C f' H/2 W/2]: f' = 1 in the first chunk, f/2 in the others."""
        batch = x.shape[0]
        x = F.pad(rearrange(x, "b c f h w -> (b f) c h w"), (0, 1, 0, 1))
        x = rearrange(self.resample["1"](x), "(b f) c h w -> b c f h w", b=batch)
        if self.time_conv is None:
            return x
        past = cache.take(self, x.device)
        cache.keep(self, x[:, :, -1:])
        return x if past is None else self.time_conv(torch.cat([past, x], dim=2))


class Upsample(nn.Module):
    """Doubles height and width and halves the channels; `in_time`: also doubles the frames, except the first one."""

    def __init__(self, channels: int, in_time: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels // 2, 3, padding=1)})
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if in_time else None

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        """x [B C f H W] > [B C/2 f' 2H 2W]: f' = 1 in the first chunk, 2f in the others."""
        # The very first frame is neither doubled nor seen by the time convolution of the frames after it.
        if self.time_conv is not None and not cache.is_first:
            x = rearrange(self.time_conv(x, cache), "b (two c) f h w -> b c (f two) h w", two=2)
        conv, frames = self.resample["1"], rearrange(x, "b c f h w -> (b f) c h w")
        if x.device.type == "cpu" and x.dtype == torch.float32:
            # The 3x3 taps on doubled pixels see only 2x2 different ones. Weights of equal pixels added up make a
            # transposed convolution with 4/9 of the work; in 16 bits the sums would be rounded once more.
            taps = F.avg_pool2d(conv.weight.flip(2, 3), 2, stride=1, padding=1, divisor_override=1).transpose(0, 1)
            y = F.conv_transpose2d(frames, taps, conv.bias, stride=2, padding=1)
        else:
            y = conv(repeat(frames, "n c h w -> n c (h two_h) (w two_w)", two_h=2, two_w=2))
        return rearrange(y, "(b f) c h w -> b c f h w", b=x.shape[0])


# ----------------------------------------------------------------------------------------------------------- tiles
def in_tiles(layers: Sequence[nn.Module], x: Tensor, cache: FrameCache, tile: int) -> Tensor:
    """Return what the layers make of x, computed in tiles of up to tile x tile pixels: the same up to rounding.

    x [B C f H W]; exactly one of the layers doubles or halves height and width, and none looks farther than reach().
    tile, and all lengths here, count in pixels of the larger side of the two. Each tile is computed with as many pixels
    around it as the layers see, and cut out of that.
    """
    enlarging = any(isinstance(layer, Upsample) for layer in layers)
    per_input, per_output = (2, 1) if enlarging else (1, 2)
    height, width = x.shape[-2] * per_input, x.shape[-1] * per_input
    halo, y = reach(layers), None
    for cache.tile, (rows, columns) in enumerate(itertools.product(cuts(height, tile), cuts(width, tile))):
        top, left = max(0, rows.start - halo), max(0, columns.start - halo)
        part = x[..., _slice(top, rows.stop + halo, per_input), _slice(left, columns.stop + halo, per_input)]
        for layer in layers:
            part = layer(part, cache)
        if y is None:
            y = part.new_empty(*part.shape[:3], height // per_output, width // per_output)
        y[..., _slice(rows.start, rows.stop, per_output), _slice(columns.start, columns.stop, per_output)] = part[
            ...,
            _slice(rows.start - top, rows.stop - top, per_output),
            _slice(columns.start - left, columns.stop - left, per_output),
        ]
    cache.tile = 0
    return y


def reach(layers: Sequence[nn.Module]) -> int:
    """Return how many pixels around a pixel the layers see at most, rounded up to an even number.

    In pixels of the larger side of the one layer that doubles or halves; the others are all on that side.
    """
    convolutions = (m for layer in layers for m in layer.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    pixels = sum(convolution.kernel_size[-1] // 2 for convolution in convolutions)
    return pixels + pixels % 2


def cuts(length: int, tile: int) -> list[range]:
    """Return even lengths of up to `tile` that make up an even length, all about as long."""
    assert length % 2 == tile % 2 == 0 < tile, (length, tile)
    count = -(-length // tile)
    ends = [2 * (length // 2 * i // count) for i in range(count + 1)]
    return [range(start, end) for start, end in itertools.pairwise(ends)]


def _slice(start: int, stop: int, divisor: int) -> slice:
    return slice(start // divisor, stop // divisor)
