"""The DiT: noisy latents, how noisy they are, and what they should show > velocity."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan.attention import attention, can_add_bias
from wan.recompute import kept, recomputed
from wan.rope import rope_factors, rotate, rotate_

KEPT_BELOW = 16  # tokens of a video for each of its text and pictures, above which their keys are computed each time


@dataclass(frozen=True)
class WanShape:
    """The sizes of a DiT, all of which can be read from its weights but for the number of heads."""

    dim: int
    ffn_dim: int
    heads: int
    blocks: int
    in_channels: int
    out_channels: int = 16
    text_dim: int = 4096
    text_length: int = 512
    freq_dim: int = 256
    patch: tuple[int, int, int] = (1, 2, 2)  # frames, rows, columns of latents in a token
    eps: float = 1e-6
    clip_dim: int | None = None  # width of the CLIP features, where there is a branch for them
    image_tokens: int | None = None  # 514 where those of two pictures have learned positions


@dataclass(frozen=True)
class Context:
    """What a batch of videos should show, as the blocks see it: the same in all steps of a denoising."""

    text: Tensor  # [B S D]
    text_bias: Tensor | None  # [B S], what the attention logits of the text are raised by; None for 0
    images: Tensor | None  # [B 257 D], [B 514 D], or None for a model without that branch
    keys_values: dict[nn.Module, tuple[Tensor, ...]] | None = None  # of layers that have seen it; None: keep none


class WanModel(nn.Module):
    """The DiT of Wan2.1, and those of Wan2.2 whose timestep is one number for a whole video.

    Linear layers compute in `dtype`; the time path, modulation, norms, sums and the head in float32, whatever the dtype
    of their weights, and without autocast; between them the residual stream is held in `residual_dtype`. Parameters
    have the names of the official files.
    """

    def __init__(self, shape: WanShape):
        super().__init__()
        self.shape = shape
        self.residual_dtype = torch.float32
        self.run_block: Callable[..., Tensor] = call  # wan/checkpointing.py has others, which train in less memory
        self.attn_mode = "torch"
        self.split_attn = False
        self.second_picture_as_text = False  # musubi-tuner's way, for what was trained with it
        self.riflex: int | None = None  # see rope_factors(); not for hand-picked frame indices
        dim = shape.dim
        self.patch_embedding = nn.Conv3d(shape.in_channels, dim, shape.patch, stride=shape.patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(shape.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(Linear32(shape.freq_dim, dim), nn.SiLU(), Linear32(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear32(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanAttentionBlock(shape) for _ in range(shape.blocks))
        self.head = Head(shape)
        if shape.clip_dim:
            self.img_emb = ImageEmbedding(shape.clip_dim, dim, shape.image_tokens)
        # Whole grids are kept, because most steps of a run use the same one.
        self._rope_factors = lru_cache(maxsize=8)(rope_factors)

    @property
    def dtype(self) -> torch.dtype:
        """What linear layers compute in, also where their weights are held as float8."""
        return self.blocks[0].self_attn.q.bias.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Sequence[Tensor] | Context,
        y: Tensor | None = None,
        image_features: Tensor | None = None,
        frame_indices: Sequence[Sequence[int]] | None = None,
        skip_blocks: Collection[int] = (),
    ) -> Tensor:
        """Return the velocity [B 16 F H W] in float32.

        x [B 16 F H W] noisy latents; timestep [B], 0 to 1000; text: B tensors [n<=512 text_dim], not padded, or what
        context() made of them and of image_features.
        y [B C F H W]: more channels to see (mask, image, control). image_features [B 257 1280] from CLIP, or
        [2B 257 1280], each video's first and last picture one after the other; zeros where there is no picture.
        frame_indices: for each video the temporal position of each of its F frames, instead of 0 to F-1.
        skip_blocks: numbers of the blocks to leave out, for skip-layer guidance.
        """
        tokens, context, finish = self.embed(x, timestep, text, y, image_features, frame_indices)
        for number, block in enumerate(self.blocks):
            if number not in skip_blocks:
                tokens = self.run_block(block, tokens, *context)
        return finish(tokens)

    def velocities(self, x: Tensor, timestep: Tensor, passes: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """Return the velocities [B 16 F H W] of several passes; each is the other arguments of forward() by name."""
        return [self(x, timestep, **conditions) for conditions in passes]

    def embed(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Sequence[Tensor] | Context,
        y: Tensor | None = None,
        image_features: Tensor | None = None,
        frame_indices: Sequence[Sequence[int]] | None = None,
    ) -> tuple[Tensor, tuple, Callable[[Tensor], Tensor]]:
        """Return the tokens [B L D] to go through the blocks, what each block sees besides, and what ends the pass.

        Arguments and the result of the ending are those of forward().
        """
        x = x if y is None else torch.cat([x, y.to(x)], dim=1)
        channels = self.shape.in_channels
        assert x.shape[1] == channels, f"{x.shape[1]} channels of latents and conditions, the model takes {channels}"
        tokens, grid = self.patchify(x)
        time = self.time_embedding(sinusoid(timestep.to(x.device), self.shape.freq_dim))
        modulation = rearrange(self.time_projection(time), "b (six d) -> six b d", six=6)
        context = text if isinstance(text, Context) else self.context(text, image_features)
        rope = self.rope(grid, frame_indices, x.device)

        def finish(tokens: Tensor) -> Tensor:
            return self.unpatchify(self.head(tokens, time), grid)

        return tokens.to(self.residual_dtype), (modulation, rope, context, self.attn_mode, self.split_attn), finish

    def token_bytes(self, x: Tensor) -> int:
        """Return how many bytes the residual stream [B L D] of noisy latents x [B 16 F H W] takes."""
        tokens = len(x) * math.prod(x.shape[2:]) // math.prod(self.shape.patch)
        return tokens * self.shape.dim * self.residual_dtype.itemsize

    def context(self, text: Sequence[Tensor], image_features: Tensor | None = None, reused: bool = False) -> Context:
        """Return what forward() makes of text and image_features, to give it in place of the text.

        reused: for several steps, without gradients; then the layers that look at it also keep their keys and values.
        """
        tokens, bias = self.embed_text(text)
        images = self.embed_images(image_features, len(text))
        if self.second_picture_as_text and self.shape.image_tokens:
            images, second = images.chunk(2, dim=1)
            tokens = torch.cat([second, tokens], dim=1)
            bias = None if bias is None else F.pad(bias, (second.shape[1], 0))
        return Context(tokens, bias, images, {} if reused else None)

    def patchify(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Return tokens [B L D] in (frame, row, column) order, float32, and the numbers of frames, rows, columns.

        The convolution's stride is its kernel, so that it is a matrix product over patches, with the same bits.
        """
        frames, height, width = self.shape.patch
        grid = (x.shape[2] // frames, x.shape[3] // height, x.shape[4] // width)
        patches = rearrange(
            x.float(), "b c (f pf) (h ph) (w pw) -> b (f h w) (c pf ph pw)", pf=frames, ph=height, pw=width
        )
        conv = self.patch_embedding
        return F.linear(patches, conv.weight.float().flatten(1), conv.bias.float()), grid

    def unpatchify(self, features: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Return the latents [B C F H W] that tokens' features [B L pf*ph*pw*C] spell out."""
        names = dict(zip("fhw", grid, strict=True)) | dict(zip(("pf", "ph", "pw"), self.shape.patch, strict=True))
        return rearrange(features, "b (f h w) (pf ph pw c) -> b c (f pf) (h ph) (w pw)", **names)

    def embed_text(self, text: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return the tokens of B prompts [B L D] and what their attention logits are raised by [B L], or None for 0.

        The rows of zeros behind a prompt, up to 512, count and are not masked. They are all the same token: where the
        kernel can add log(number of rows) to its logit, one stands for all. In 16 bits that sum would lose digits.
        """
        longest, length = max(len(rows) for rows in text), self.shape.text_length
        assert longest <= length, f"{longest} rows of text, the model takes {length}"
        bias = None
        if self.dtype == torch.float32 and can_add_bias(self.attn_mode) and longest < length - 1:
            lengths, length = [len(rows) for rows in text], longest + 1
            place = torch.arange(length)
            counts = [torch.where(place == n, self.shape.text_length - n, place < n) for n in lengths]
            bias = torch.stack(counts).log().to(self.device)
        rows = torch.stack([F.pad(rows.to(self.device, self.dtype), (0, 0, 0, length - len(rows))) for rows in text])
        return self.text_embedding(rows), bias

    def embed_images(self, features: Tensor | None, batch: int) -> Tensor | None:
        """Return the tokens of the pictures [B 257 D] or [B 514 D], or None for a model without that branch."""
        clip_dim = self.shape.clip_dim
        if clip_dim is None:
            return None
        if features is None:
            pictures = (self.shape.image_tokens or 257) // 257
            features = torch.zeros(batch * pictures, 257, clip_dim)
        return self.img_emb(features.to(self.device, self.dtype))

    def rope(
        self, grid: tuple[int, int, int], frame_indices: Sequence[Sequence[int]] | None, device: torch.device
    ) -> Tensor:
        """Return the rotary factors of a grid [L 1 D/2H], or [B L 1 D/2H] for videos with positions of their own."""
        frames, height, width = grid
        head_dim = self.shape.dim // self.shape.heads
        # What is made in inference mode could not be used by a training step later.
        with torch.inference_mode(False):
            if frame_indices is None:
                return self._rope_factors(head_dim, frames, height, width, device, self.riflex)
            rows = [tuple(int(index) for index in row) for row in frame_indices]
            assert all(len(row) == frames for row in rows), f"frame indices {rows} for {frames} frames"
            return torch.stack([self._rope_factors(head_dim, row, height, width, device) for row in rows])


class WanAttentionBlock(nn.Module):
    """Tokens look at each other, then at text and pictures, then each goes through an MLP."""

    def __init__(self, shape: WanShape):
        super().__init__()
        self.eps = shape.eps
        self.self_attn = SelfAttention(shape)
        self.norm3 = LayerNorm32(shape.dim, shape.eps)
        self.cross_attn = CrossAttention(shape)
        self.ffn = nn.Sequential(
            nn.Linear(shape.dim, shape.ffn_dim), GELU(approximate="tanh"), nn.Linear(shape.ffn_dim, shape.dim)
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, shape.dim))
        nn.init.normal_(self.modulation, std=shape.dim**-0.5)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rope: Tensor,
        context: Context,
        attn_mode: str = "torch",
        split_attn: bool = False,
    ) -> Tensor:
        """Return the residual stream after this block: [B L D] in the dtype of x; without gradients, in its memory.

        modulation [6 B D], float32: shift, scale and gate of self-attention, then of the MLP. rope: see rotate().
        """
        keys_values = self.cross_attn.keys_values(context, x.shape[1])
        return self.compute(x, modulation, rope, keys_values, context.text_bias, attn_mode, split_attn)

    def compute(
        self,
        x: Tensor,
        modulation: Tensor,
        rope: Tensor,
        keys_values: tuple[Tensor, ...],
        text_bias: Tensor | None,
        attn_mode: str,
        split_attn: bool,
    ) -> Tensor:
        """Return what forward() does, given what is looked at as keys and values: tensors in and a tensor out.

        All that takes time, without what is kept from one call to the next; so it can be compiled.
        """
        dtype = keys_values[0].dtype
        own = rearrange(self.modulation.float(), "1 six d -> six 1 d")
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = own + modulation
        attn, how = self.self_attn, (attn_mode, split_attn)
        # What has been used keeps no name, so that its memory is free for what comes next.
        h = kept(attn.attend)(*attn.project(modulated_norm(x, shift_attn, scale_attn, self.eps, dtype), rope), *how)
        x = gated_sum(x, attn.output(h), gate_attn)
        h = self.norm3(x, dtype)
        x = plain_sum(x, self.cross_attn(h, keys_values, text_bias, *how))
        h = modulated_norm(x, shift_ffn, scale_ffn, self.eps, dtype)
        for layer in self.ffn:
            h = layer(h)
        return gated_sum(x, h, gate_ffn)


class SelfAttention(nn.Module):
    def __init__(self, shape: WanShape):
        super().__init__()
        self.heads = shape.heads
        self.q, self.k, self.v, self.o = (nn.Linear(shape.dim, shape.dim) for _ in "qkvo")
        self.norm_q, self.norm_k = (RMSNorm(shape.dim, shape.eps) for _ in "qk")

    def project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [B L H D] of tokens x [B L D]. The norms run over all heads together."""
        q, k, v = (self._heads(y) for y in (self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)))
        return rotate(q, rope), rotate(k, rope), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *how: Any) -> Tensor:
        """Return the attention [B L H D] of the tokens; processes that share them put an exchange around this."""
        return attention(q, k, v, *how)

    def output(self, y: Tensor) -> Tensor:
        """Return what the tokens see [B L D], of which y [B L H D] is what each head sees."""
        return recomputed_layer(self.o, rearrange(y, "b l h d -> b l (h d)"))

    def _heads(self, y: Tensor) -> Tensor:
        return rearrange(y, "b l (h d) -> b l h d", h=self.heads)


class CrossAttention(SelfAttention):
    def __init__(self, shape: WanShape):
        super().__init__(shape)
        if shape.clip_dim:
            self.k_img, self.v_img = (nn.Linear(shape.dim, shape.dim) for _ in "kv")
            self.norm_k_img = RMSNorm(shape.dim, shape.eps)

    def forward(
        self,
        x: Tensor,
        keys_values: tuple[Tensor, ...],
        text_bias: Tensor | None = None,
        attn_mode: str = "torch",
        split_attn: bool = False,
    ) -> Tensor:
        """Let the video's tokens x [B L D] look at the text, and separately at the pictures; the sum of both."""
        q = self._heads(self.norm_q(recomputed_layer(self.q, x)))
        k, v, *images = keys_values
        out = attention(q, k, v, attn_mode, split_attn, text_bias)
        if images:
            out = out + attention(q, *images, attn_mode, split_attn)
        del q
        return self.output(out)

    def keys_values(self, context: Context, tokens: int) -> tuple[Tensor, ...]:
        """Return keys and values [B S H D] of the text, and of the pictures where there are any.

        They are kept with a context that keeps them, but not where the video has so many tokens that computing them
        again takes no time to speak of: those of all blocks together can be a gigabyte.
        """
        kept = context.keys_values
        if kept is not None and self in kept:
            return kept[self]
        pairs = [(self.norm_k(self.k(context.text)), self.v(context.text))]
        if context.images is not None:
            pairs.append((self.norm_k_img(self.k_img(context.images)), self.v_img(context.images)))
        result = tuple(self._heads(y) for pair in pairs for y in pair)
        if kept is not None and tokens <= KEPT_BELOW * sum(k.shape[1] for k, _ in pairs):
            kept[self] = result
        return result


class ImageEmbedding(nn.Module):
    """CLIP features of one or two pictures a video > tokens of the DiT's width."""

    def __init__(self, clip_dim: int, dim: int, tokens: int | None):
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(clip_dim),
            nn.Linear(clip_dim, clip_dim),
            nn.GELU(),
            nn.Linear(clip_dim, dim),
            nn.LayerNorm(dim),
        )
        self.emb_pos = nn.Parameter(torch.zeros(1, tokens, clip_dim)) if tokens else None

    def forward(self, features: Tensor) -> Tensor:
        """Return [B L D] for features [B L C]; with learned positions, for pairs [2B L/2 C] of first and last."""
        if self.emb_pos is not None:
            features = rearrange(features, "(b pair) l c -> b (pair l) c", pair=2) + self.emb_pos
        return self.proj(features)


class Head(nn.Module):
    """Tokens > the velocity of their patch."""

    def __init__(self, shape: WanShape):
        super().__init__()
        self.eps = shape.eps
        self.head = Linear32(shape.dim, math.prod(shape.patch) * shape.out_channels)
        self.modulation = nn.Parameter(torch.empty(1, 2, shape.dim))
        nn.init.normal_(self.modulation, std=shape.dim**-0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return [B L pf*ph*pw*C], the channel fastest, float32. x [B L D]; time [B D], float32."""
        shift, scale = rearrange(self.modulation.float(), "1 two d -> two 1 d") + time
        return self.head(modulated_norm(x, shift, scale, self.eps, torch.float32))


class Linear32(nn.Linear):
    """A linear layer that computes in float32 whatever its weights are held in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class LayerNorm32(nn.LayerNorm):
    """A layer norm that computes in float32 whatever its input and weights are held in."""

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps, dtype)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class GELU(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        return gelu(x, self.approximate)


def call(module: nn.Module, *args: Any) -> Tensor:
    return module(*args)


def overwriting(in_place: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a function of what nobody needs any more one that puts its result there where no gradients are recorded.

    in_place: what does that, with the same result.
    """

    def decorated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(function)
        def run(*args: Any) -> Tensor:
            return (function if torch.is_grad_enabled() else in_place)(*args)

        return run

    return decorated


# What a block is made of besides its large products is so cheap that training need not keep the results.
recomputed_layer = recomputed(call, layer=True)
rotate = overwriting(rotate_)(recomputed(rotate))


@overwriting(lambda x, approximate: torch.ops.aten.gelu_(x, approximate=approximate))
@recomputed
def gelu(x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


@recomputed
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(dtype)


@recomputed
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


@recomputed
def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return LayerNorm(x) (1 + scale) + shift in dtype for x [B L D] and shift, scale [B D], computed in float32."""
    x, width = x.float(), x.shape[-1:]
    if len(x) == 1:  # then it is the affine map that the norm's kernel has built in
        return F.layer_norm(x, width, 1 + scale[0], shift[0], eps).to(dtype)
    return torch.addcmul(shift[:, None], F.layer_norm(x, width, eps=eps), 1 + scale[:, None]).to(dtype)


@overwriting(lambda x, update, gate: x.addcmul_(update, gate[:, None]))
@recomputed
def gated_sum(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """Return x + update * gate in the dtype of x for x and update [B L D] and gate [B D], computed in float32."""
    return torch.addcmul(x.float(), update.float(), gate[:, None]).to(x.dtype)


@overwriting(Tensor.add_)
@recomputed
def plain_sum(x: Tensor, update: Tensor) -> Tensor:
    """Return x + update in the dtype of x, computed in float32."""
    return (x.float() + update).to(x.dtype)


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """Return cosines, then sines, of timestep [B] at dim/2 frequencies from 1 down to nearly 1/10000: [B dim] float32.

    Computed in float64: at timestep 1000 float32 would lose three digits of the fast components.
    """
    half = dim // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angle = torch.outer(timestep.double(), frequencies)
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()
