"""The Wan2.1 VAE: videos to latents, 8 x 8 pixels and 4 frames to one, and back.

Both directions run chunk by chunk, one latent frame at a time, and give what the whole video at once would give. Where
memory is short, all but the smallest size runs in tiles, which changes no more than the rounding.
"""

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from utils.devices import dtype_name, free_memory, parse_dtype
from utils.errors import UserError
from utils.options import option
from utils.safetensors_io import open_tensors
from wan.vae_layers import (
    AttentionBlock,
    CausalConv3d,
    Downsample,
    FrameCache,
    Head,
    ResidualBlock,
    Upsample,
    in_tiles,
    reach,
)
from wan.weights import InMemory, Weights, check_names, describe, place, shapes_of

logger = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LATENT_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENT_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)

TILE = 256  # pixels a side, where tiles are asked for and no size is
SMALLER_TILES = (512, 256, 128)  # where memory is short: the largest that fits
# Memory that a level takes at most while it is computed, in sizes of its frames: 3.5 as tensors (counted), and as much
# as a convolution's input and output again, 2.5, for kernels that want them in another layout.
WORKING_COPIES = 6.0


def _vae_dtype(name: str) -> str:
    try:
        dtype = parse_dtype(name)
    except UserError as error:
        raise ValueError(str(error)) from None
    if dtype not in DTYPES:
        raise ValueError(f"the VAE computes in bf16, fp16 or fp32, not in {name}")
    return name


def _tile(text: str) -> int:
    pixels = int(text)
    if pixels < 32 or pixels % 2:
        raise ValueError(f"tiles need an even number of pixels, 32 or more, not {pixels}")
    return pixels


@dataclass(frozen=True)
class VaeOptions:
    """the VAE"""

    vae: Path | None = option(
        None, "weights of the Wan2.1 VAE: Wan2.1_VAE.pth or wan_2.1_vae.safetensors; hf:// too", remote=True
    )
    vae_dtype: str | None = option(
        None, "number format that the VAE computes in: bf16, fp16 or fp32 (default: bf16)", parse=_vae_dtype
    )
    vae_cache_cpu: bool = option(
        False, "keep the VAE's memory of earlier frames in main memory: saves about 1 to 4 GB of VRAM, costs time"
    )
    vae_tiling: bool = option(
        False, "compute the VAE's large sizes in tiles: the same result, less memory; without it where memory is short"
    )
    vae_spatial_tile_sample_min_size: int | None = option(
        None, f"pixels of a tile each way, an even number; turns --vae_tiling on (default: {TILE})", parse=_tile
    )

    @property
    def tile(self) -> int | None:
        """Pixels of a tile each way; None: tiles only where memory is short."""
        return self.vae_spatial_tile_sample_min_size or (TILE if self.vae_tiling else None)


@dataclass(frozen=True)
class VaeShape:
    """Sizes of a VAE; the defaults are the published ones."""

    width: int = 96  # channels at full resolution
    levels: tuple[int, ...] = (96, 192, 384, 384)  # channels at full, half, ... resolution
    residuals: int = 2  # residual blocks per level of the encoder; the decoder has one more
    in_time: tuple[bool, ...] = (False, True, True)  # between two levels: halves the frames too?
    latent_channels: int = 16

    @property
    def pixels_per_latent(self) -> int:
        """Height, and width, in pixels of one latent."""
        return 2 ** len(self.in_time)

    @property
    def frames_per_latent(self) -> int:
        """Frames in one latent frame; the first one holds a single frame."""
        return 2 ** sum(self.in_time)


class Coder(nn.Module):
    """What encoder and decoder have in common: layers that run one after the other on a chunk of frames."""

    def stages(self) -> list[list[nn.Module]]:
        """Return the layers in order, in groups: those of one size in pixels and the layer that changes it."""
        raise NotImplementedError

    def forward(self, x: Tensor, cache: FrameCache, tile: int | None = None) -> Tensor:
        """Encoder: x [B 3 f H W], f = 1 or 4 > [B 2z 1 H/8 W/8]. Decoder: x [B z 1 h w] > [B 3 f 8h 8w], f alike.

        tile: compute all but the smallest size in tiles of so many pixels a side.
        """
        for layers in self.stages():
            if tile and any(isinstance(layer, Downsample | Upsample) for layer in layers):
                x = in_tiles(layers, x, cache, tile)
            else:
                for layer in layers:
                    x = layer(x, cache)
        return x

    def remembered(self, height: int, width: int, margin: float = 1) -> float:
        """Return about how many values the frame cache holds between two chunks of height x width pixels.

        margin: what the caches of tiles hold, with the pixels around them, in relation to the tiles alone.
        """
        values, stages = 0.0, self.stages()
        for level, layers in enumerate(stages if isinstance(self, Encoder) else reversed(stages)):
            frames = sum(
                module.memory * module.in_channels
                for layer in layers
                for module in layer.modules()
                if isinstance(module, CausalConv3d)
            )
            values += frames * (height >> level) * (width >> level) * (margin if level < len(stages) - 1 else 1)
        return values


class Encoder(Coder):
    """Pixels to the mean and the logarithm of the variance of latents, one chunk of frames."""

    def __init__(self, shape: VaeShape):
        super().__init__()
        self.conv1 = CausalConv3d(3, shape.width, (3, 3, 3))
        layers, channels = [], shape.width
        for level, outputs in enumerate(shape.levels):
            for _ in range(shape.residuals):
                layers.append(ResidualBlock(channels, outputs))
                channels = outputs
            if level < len(shape.in_time):
                layers.append(Downsample(channels, shape.in_time[level]))
        self.downsamples = nn.ModuleList(layers)
        self.middle = _middle(channels)
        self.head = Head(channels, 2 * shape.latent_channels)

    def stages(self) -> list[list[nn.Module]]:
        stages: list[list[nn.Module]] = [[self.conv1]]
        for layer in self.downsamples:
            stages[-1].append(layer)
            if isinstance(layer, Downsample):
                stages.append([])
        stages[-1] += [*self.middle, self.head]
        return stages


class Decoder(Coder):
    """Latents to pixels, one chunk of latent frames."""

    def __init__(self, shape: VaeShape):
        super().__init__()
        channels = shape.levels[-1]
        self.conv1 = CausalConv3d(shape.latent_channels, channels, (3, 3, 3))
        self.middle = _middle(channels)
        layers = []
        for level, outputs in reversed(list(enumerate(shape.levels))):
            for _ in range(shape.residuals + 1):
                layers.append(ResidualBlock(channels, outputs))
                channels = outputs
            if level > 0:
                layers.append(Upsample(channels, shape.in_time[level - 1]))
                channels //= 2
        self.upsamples = nn.ModuleList(layers)
        self.head = Head(channels, 3)

    def stages(self) -> list[list[nn.Module]]:
        stages: list[list[nn.Module]] = [[self.conv1, *self.middle]]
        for layer in self.upsamples:
            if isinstance(layer, Upsample):
                stages.append([])
            stages[-1].append(layer)
        stages[-1].append(self.head)
        return stages


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)]
    )


class WanVAE(nn.Module):
    """The VAE with weights under their official names; latents leave and enter it normalised per channel.

    cache_cpu: the frame caches wait in main memory. tile: pixels of a tile each way; None: tiles only where memory is
    short.
    """

    def __init__(self, shape: VaeShape, cache_cpu: bool = False, tile: int | None = None):
        super().__init__()
        self.shape, self.cache_cpu, self.tile = shape, cache_cpu, tile
        self._told: set[tuple] = set()
        self.encoder, self.decoder = Encoder(shape), Decoder(shape)
        self.conv1 = CausalConv3d(2 * shape.latent_channels, 2 * shape.latent_channels, (1, 1, 1))
        self.conv2 = CausalConv3d(shape.latent_channels, shape.latent_channels, (1, 1, 1))

    @property
    def dtype(self) -> torch.dtype:
        return self.conv2.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv2.weight.device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return the latents [B z f h w] of videos, float32, on the pixels' device.

        pixels [B 3 F H W] in [-1, 1], on any device: only a chunk at a time goes to the VAE's. f = (F - 1) // 4 + 1:
        frames beyond the last 4n + 1 are dropped. An image is a video of one frame.
        """
        scale, length = self.shape.pixels_per_latent, self.shape.frames_per_latent
        _, channels, frames, height, width = pixels.shape
        assert channels == 3 and height % scale == width % scale == 0 < pixels.numel(), tuple(pixels.shape)
        ends = range(1, frames + 1, length)
        chunks = [pixels[:, :, max(0, end - length) : end] for end in ends]
        mean, std = self._statistics(pixels.device)
        tile = self.tile or self._tile_that_fits(self.encoder, pixels.shape[0], frames, height, width)
        latents = pixels.new_empty(
            (len(pixels), self.shape.latent_channels, len(chunks), height // scale, width // scale), dtype=torch.float32
        )
        for i, (chunk, cache) in enumerate(self._with_cache(chunks)):
            x = self.conv1(self.encoder(chunk.to(self.device, self.dtype), cache, tile), cache)
            latents[:, :, i : i + 1] = x.chunk(2, dim=1)[0]
        self._require_finite(latents, "encoded latents")
        return latents.sub_(mean).div_(std)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the videos [B 3 4f-3 8h 8w] of normalised latents [B z f h w], float32 in [-1, 1], on their device."""
        batch, _, count, height, width = latents.shape
        scale, frames = self.shape.pixels_per_latent, self.shape.frames_per_latent * (count - 1) + 1
        pixels = torch.empty((batch, 3, frames, scale * height, scale * width), device=latents.device)
        done = 0
        for chunk in self.decode_chunks(latents):
            pixels[:, :, done : done + chunk.shape[2]] = chunk
            done += chunk.shape[2]
        return pixels

    def decode_chunks(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the frames of decode() as they come: first 1, then 4 for each latent frame, [B 3 f 8h 8w]."""
        assert latents.shape[1] == self.shape.latent_channels and latents.numel() > 0, tuple(latents.shape)
        mean, std = self._statistics(latents.device)
        x = latents.float() * std + mean
        batch, _, count, height, width = latents.shape
        scale, frames = self.shape.pixels_per_latent, self.shape.frames_per_latent * (count - 1) + 1
        tile = self.tile or self._tile_that_fits(self.decoder, batch, frames, scale * height, scale * width)
        for chunk, cache in self._with_cache(x.split(1, dim=2)):
            with torch.no_grad():
                y = self.decoder(self.conv2(chunk.to(self.device, self.dtype), cache), cache, tile)
            self._require_finite(y, "decoded frames")  # clamped, an infinite pixel would pass for a white one
            yield y.to(latents.device, torch.float32).clamp_(-1, 1)

    def peak_bytes(
        self, coder: Encoder | Decoder, batch: int, frames: int, height: int, width: int, tile: int | None = None
    ) -> int:
        """Return about how much memory encoding or decoding videos takes beside weights, input and result: no less.

        coder: self.encoder or self.decoder. frames, height, width, tile: in pixels of the video.
        """
        shape, chunk = self.shape, min(frames, self.shape.frames_per_latent)
        largest, margin = 0.0, 1.0
        for level, channels in enumerate(shape.levels):
            tall, wide = height >> level, width >> level
            length = max(1, chunk >> sum(shape.in_time[:level]))
            copies = WORKING_COPIES * channels * length * tall * wide
            if tile and level < len(shape.levels) - 1:
                halo = reach(coder.stages()[level])
                around = min(tall, tile + 2 * halo) * min(wide, tile + 2 * halo)
                # Besides one tile's there are the whole frames that the tiles are cut from and put together to.
                whole = (channels if level else 3) * length + shape.levels[level + 1] * length / 4
                copies = WORKING_COPIES * channels * length * around + whole * tall * wide
                overlaps = (-(-tall // tile) - 1, -(-wide // tile) - 1)
                margin = max(margin, (1 + 2 * halo * overlaps[0] / tall) * (1 + 2 * halo * overlaps[1] / wide))
            largest = max(largest, copies)
        if frames > 1 and not self.cache_cpu:
            largest += coder.remembered(height, width, margin)
        return math.ceil(batch * largest * self.dtype.itemsize)

    def _tile_that_fits(self, coder: Encoder | Decoder, batch: int, frames: int, height: int, width: int) -> int | None:
        """Return None where there is memory for whole frames, else the size of tiles to compute, in pixels."""
        size = batch, frames, height, width
        free, needed = free_memory(self.device), self.peak_bytes(coder, *size)
        if needed <= free:
            return None
        tile = next((tile for tile in SMALLER_TILES if self.peak_bytes(coder, *size, tile) <= free), SMALLER_TILES[-1])
        if (coder, *size, tile) not in self._told:
            self._told.add((coder, *size, tile))
            logger.info(
                "%s %dx%d in tiles of %d pixels: whole frames take about %.1f GB, tiles %.1f GB, free are %.1f GB",
                "encoding" if coder is self.encoder else "decoding",
                *(width, height, tile, needed / 1e9, self.peak_bytes(coder, *size, tile) / 1e9, free / 1e9),
            )
        return tile

    def _require_finite(self, x: Tensor, name: str) -> None:
        """Raise UserError where float16 has overflowed, or the weights or what came in are broken."""
        if not bool(torch.isfinite(x).all()):
            wide = self.dtype != torch.float16
            raise UserError(
                f"--vae_dtype {dtype_name(self.dtype)}: the {name} are not finite",
                "check the weights of --vae, they may be damaged" if wide else "use --vae_dtype bf16 or fp32",
            )

    def _statistics(self, device: torch.device) -> Iterator[Tensor]:
        """Return mean and deviation [z 1 1 1] of each latent channel, always in float32."""
        return (rearrange(torch.tensor(values, device=device), "z -> z 1 1 1") for values in (LATENT_MEAN, LATENT_STD))

    def _with_cache(self, chunks: Sequence[Tensor]) -> Iterator[tuple[Tensor, FrameCache]]:
        """Yield the chunks of a video in turn, with the cache that knows which one it is."""
        cache = FrameCache(in_main_memory=self.cache_cpu)
        for i, chunk in enumerate(chunks):
            cache.is_first, cache.is_last = i == 0, i == len(chunks) - 1
            yield chunk, cache


def load_vae(
    path: Path | str | None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    cache_cpu: bool = False,
    tile: int | None = None,
    option: str = "--vae",
) -> WanVAE:
    """Return the frozen VAE of a .pth or .safetensors file; raises UserError for a file that is something else."""
    if dtype not in DTYPES:
        raise UserError(
            f"--vae_dtype {dtype_name(dtype)}: the VAE cannot compute in this format", "use bf16, fp16 or fp32"
        )
    with open_tensors(path, option, "the weights of the Wan2.1 VAE") as weights:
        vae = _build(weights, f"{option} {path}", dtype, device)
    vae.cache_cpu, vae.tile = cache_cpu, tile
    return vae


def check_vae(path: Path | str | None, option: str = "--vae") -> None:
    """Raise UserError unless the file is the Wan2.1 VAE, and whole; only its header is read."""
    with open_tensors(path, option, "the weights of the Wan2.1 VAE") as weights:
        _empty_vae(weights, f"{option} {path}")


def build_vae(state_dict: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> WanVAE:
    """Return the frozen VAE of tensors under their official names; its sizes follow from their shapes."""
    return _build(InMemory(state_dict), "VAE weights", dtype, "cpu")


def vae_shape(weights: Weights, where: str = "VAE weights") -> VaeShape:
    """Return the sizes of a VAE from the shapes of its encoder's tensors."""
    keys = set(weights.keys())
    kind = describe(keys)
    first, latent = "encoder.conv1.weight", "conv2.weight"
    if kind != "the Wan2.1 VAE" or not {first, latent} <= keys:
        fix = "use Wan2.1_VAE.pth or wan_2.1_vae.safetensors"
        if "Wan2.2" in kind:
            fix = "the 14B models of Wan2.2 work with the Wan2.1 VAE too: " + fix
        if kind == "the Wan2.1 VAE":
            raise UserError(f"{where}: {first} or {latent} is missing", "the file may be damaged or incomplete")
        raise UserError(f"{where}: this seems to be {kind}, not the Wan2.1 VAE", fix)
    if weights.shape(latent)[0] != len(LATENT_MEAN):
        raise UserError(
            f"{where}: {weights.shape(latent)[0]} latent channels, but the Wan2.1 VAE has {len(LATENT_MEAN)}",
            "use Wan2.1_VAE.pth or wan_2.1_vae.safetensors",
        )
    levels: list[list[int]] = [[]]
    in_time: list[bool] = []
    for k in range(1 + max(int(m[1]) for key in keys if (m := re.match(r"encoder\.downsamples\.(\d+)\.", key)))):
        layer = f"encoder.downsamples.{k}"
        if f"{layer}.residual.2.weight" in keys:
            levels[-1].append(weights.shape(f"{layer}.residual.2.weight")[0])
        else:
            levels.append([])
            in_time.append(f"{layer}.time_conv.weight" in keys)
    if not all(levels):
        raise UserError(f"{where}: layers of the encoder are missing", "the file may be damaged or incomplete")
    return VaeShape(
        width=weights.shape(first)[0],
        levels=tuple(level[-1] for level in levels),
        residuals=max(len(level) for level in levels),
        in_time=tuple(in_time),
        latent_channels=weights.shape(latent)[0],
    )


def _build(weights: Weights, where: str, dtype: torch.dtype, device: torch.device | str) -> WanVAE:
    vae = _empty_vae(weights, where)
    for name in vae.state_dict():
        place(vae, name, weights.get(name), dtype, device)
    return vae.eval()


def _empty_vae(weights: Weights, where: str) -> WanVAE:
    """Return the VAE that the tensors' names and shapes belong to, without memory for its own."""
    with torch.device("meta"):
        vae = WanVAE(vae_shape(weights, where))
    check_names(where, {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}, shapes_of(weights))
    return vae
