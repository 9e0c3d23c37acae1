"""The same DiT as people run it today: plain eager layers, and blocks that are exchanged with main memory both ways.

What "two-way" in the tables stands for. Norms in float32 and modulation are steps of their own, rotary factors are
complex128, the prompt is padded to 512 rows, embedded and turned into keys and values at every step, and one pass comes
after the other.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.diffusers_dit import padded
from wan.model import WanModel, WanShape


class PlainDiT(nn.Module):
    """A DiT without image branch, its parameters under their official names."""

    def __init__(self, shape: WanShape):
        super().__init__()
        self.shape, dim = shape, shape.dim
        self.gradient_checkpointing = False
        self.patch_embedding = nn.Conv3d(shape.in_channels, dim, shape.patch, stride=shape.patch)
        self.text_embedding = nn.Sequential(nn.Linear(shape.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(shape.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(PlainBlock(shape) for _ in range(shape.blocks))
        self.head = PlainHead(shape)

    def forward(self, x: Tensor, timestep: Tensor, text: Sequence[Tensor]) -> Tensor:
        """Return the velocity [B 16 F H W], float32; arguments are those of WanModel.forward()."""
        dtype, (pf, ph, pw) = self.blocks[0].ffn[0].bias.dtype, self.shape.patch
        tokens = self.patch_embedding(x.to(dtype))
        grid = tokens.shape[2:]
        tokens = rearrange(tokens, "b d f h w -> b (f h w) d").float()
        half = self.shape.freq_dim // 2
        rates = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=x.device) / half)
        angle = torch.outer(timestep.double(), rates)
        waves = torch.cat([angle.cos(), angle.sin()], dim=1).float()
        time = in_float32(self.time_embedding, waves)
        modulation = rearrange(in_float32(self.time_projection, time), "b (six d) -> b six d", six=6)
        context = self.text_embedding(padded(list(text), self.shape.text_length).to(x.device, dtype))
        rope = rotary_table(self.shape.dim // self.shape.heads, *grid).to(x.device)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, modulation, rope, context, use_reentrant=False)
            else:
                tokens = block(tokens, modulation, rope, context)
        features = self.head(tokens, time)
        names = dict(zip("fhw", grid, strict=True)) | {"pf": pf, "ph": ph, "pw": pw}
        return rearrange(features, "b (f h w) (pf ph pw c) -> b c (f pf) (h ph) (w pw)", **names)


class PlainBlock(nn.Module):
    def __init__(self, shape: WanShape):
        super().__init__()
        self.eps = shape.eps
        self.self_attn, self.cross_attn = PlainAttention(shape), PlainAttention(shape)
        self.norm3 = nn.LayerNorm(shape.dim, shape.eps)
        self.ffn = nn.Sequential(
            nn.Linear(shape.dim, shape.ffn_dim), nn.GELU("tanh"), nn.Linear(shape.ffn_dim, shape.dim)
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, shape.dim))

    def forward(self, x: Tensor, modulation: Tensor, rope: Tensor, text: Tensor) -> Tensor:
        dtype = text.dtype
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (self.modulation.float() + modulation).chunk(6, dim=1)
        y = F.layer_norm(x.float(), x.shape[-1:], eps=self.eps) * (1 + scale) + shift
        y = y.to(dtype)
        x = x + self.self_attn(y, y, rope).float() * gate
        y = F.layer_norm(x.float(), x.shape[-1:], self.norm3.weight.float(), self.norm3.bias.float(), self.eps)
        x = x + self.cross_attn(y.to(dtype), text)
        y = F.layer_norm(x.float(), x.shape[-1:], eps=self.eps) * (1 + scale_mlp) + shift_mlp
        return x + self.ffn(y.to(dtype)).float() * gate_mlp


class PlainAttention(nn.Module):
    def __init__(self, shape: WanShape):
        super().__init__()
        self.heads = shape.heads
        self.q, self.k, self.v, self.o = (nn.Linear(shape.dim, shape.dim) for _ in "qkvo")
        self.norm_q, self.norm_k = (EagerNorm(shape.dim, shape.eps) for _ in "qk")

    def forward(self, x: Tensor, seen: Tensor, rope: Tensor | None = None) -> Tensor:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(seen)), self.v(seen)
        q, k, v = (rearrange(y, "b l (h d) -> b h l d", h=self.heads) for y in (q, k, v))
        if rope is not None:
            q, k = turned(q, rope), turned(k, rope)
        return self.o(rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)"))


class EagerNorm(nn.Module):
    """A root mean square norm in float32, step by step."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class PlainHead(nn.Module):
    def __init__(self, shape: WanShape):
        super().__init__()
        self.eps = shape.eps
        self.head = nn.Linear(shape.dim, torch.Size(shape.patch).numel() * shape.out_channels)
        self.modulation = nn.Parameter(torch.empty(1, 2, shape.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation.float() + time[:, None]).chunk(2, dim=1)
        return in_float32(self.head, F.layer_norm(x.float(), x.shape[-1:], eps=self.eps) * (1 + scale) + shift)


def in_float32(layers: nn.Module, x: Tensor) -> Tensor:
    """Return what layers, whatever their weights are held in, make of x in float32."""
    weights = {name: weight.float() for name, weight in layers.named_parameters()}
    return torch.func.functional_call(layers, weights, x.float())


def rotary_table(head_dim: int, frames: int, height: int, width: int) -> Tensor:
    """Return the rotation of each token [L D/2], complex128."""
    side = head_dim // 6
    axes = []
    for axis, (length, pairs) in enumerate(((frames, head_dim // 2 - 2 * side), (height, side), (width, side))):
        rates = 10000.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
        angle = torch.outer(torch.arange(length, dtype=torch.float64), rates)
        shape = [length if i == axis else 1 for i in range(3)]
        axes.append(torch.polar(torch.ones_like(angle), angle).view(*shape, pairs).expand(frames, height, width, pairs))
    return torch.cat(axes, dim=-1).flatten(0, 2)


def turned(x: Tensor, rope: Tensor) -> Tensor:
    """Return x [B H L D] with its channel pairs turned by rope [L D/2], in float64."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope).flatten(-2).to(x.dtype)


def plain_twin(model: WanModel) -> PlainDiT:
    """Return the plain DiT with the weights of ours: the same memory, not a copy."""
    with torch.device("meta"):
        twin = PlainDiT(model.shape)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.requires_grad_(False).eval()


def velocities(model: nn.Module, x: Tensor, timestep: Tensor, passes: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """Return the velocities of several passes, one after the other."""
    return [model(x, timestep, **conditions) for conditions in passes]


class Exchange:
    """All blocks in main memory: each moves to the device for every pass and back again after it."""

    def __init__(self, blocks: nn.ModuleList, device: torch.device | str):
        self.device, self.bytes_copied = device, 0
        for block in blocks:
            block.forward = partial(self.run, [*block.parameters(), *block.buffers()], block.forward)

    def run(self, tensors: Sequence[Tensor], forward: Callable[..., Tensor], *args: Any) -> Tensor:
        homes = [tensor.data for tensor in tensors]
        for tensor in tensors:
            tensor.data = tensor.data.to(self.device, copy=True)
        out = forward(*args)
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home.copy_(tensor.data)
            self.bytes_copied += 2 * home.nbytes
        return out
