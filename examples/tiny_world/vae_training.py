"""Train the tiny VAE on drawn clips: the one place of the project that trains a VAE.

    python -m examples.tiny_world.vae_training --folder output/tiny_world/vae --steps 4000

Stopped at any time, the same command goes on from the last checkpoint. The result is `vae.safetensors` in that folder,
in the official layout, with latents whose mean and deviation are those that the official normalisation expects.
"""

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from examples.tiny_world.training import Training
from examples.tiny_world.world import draw, random_scene
from utils.errors import run_script
from utils.options import option, parse_options
from utils.safetensors_io import save_file_atomically
from wan.vae import LATENT_MEAN, LATENT_STD, VaeShape, WanVAE
from wan.vae_layers import AttentionBlock, CausalConv3d, ChannelNorm, Downsample, ResidualBlock, Upsample

FRAMES, SIDE = 17, 64  # of a drawn clip
# (frames, side) of what a batch shows.
_PICTURES, _CROPS, _WHOLE = [(1, 64)], [(5, 32), (9, 32), (9, 32)], [(9, 64), (9, 64), (9, 64)]


@dataclass(frozen=True)
class VaeTrainingOptions:
    """training the tiny VAE"""

    folder: Path | None = option(None, "where checkpoints and the result go", required=True)
    steps: int = option(4000, "optimizer steps")
    clips: int = option(2000, "clips to learn from")
    width: int = option(12, "channels at full resolution")
    batch_pixels: int = option(16 * 64 * 64, "pixels of all frames of a batch")
    learning_rate: float = option(4e-3, "of Muon, which takes the convolutions; AdamW takes the rest with half of it")
    kl: float = option(1e-3, "weight of the KL term, per latent number")
    seed: int = option(0, "of weights and clips")
    threads: int = option(2, "CPU threads")
    save_every: int = option(200, "steps between checkpoints")


# ------------------------------------------------------------------------------------- the whole video at once
def encode(vae: WanVAE, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log variance [B z f h w], not normalised, of videos [B 3 F H W], with gradients."""
    x = _conv(vae.encoder.conv1, pixels)
    for layer in (*vae.encoder.downsamples, *vae.encoder.middle):
        x = _layer(layer, x)
    x = _conv(vae.encoder.head["2"], F.silu(_norm(vae.encoder.head["0"], x)))
    mean, log_variance = _conv(vae.conv1, x).chunk(2, dim=1)
    return mean, log_variance.clamp(-12, 4)


def decode(vae: WanVAE, latents: Tensor) -> Tensor:
    """Return the videos [B 3 F H W] of latents [B z f h w] that are not normalised, with gradients."""
    x = _conv(vae.decoder.conv1, _conv(vae.conv2, latents))
    for layer in (*vae.decoder.middle, *vae.decoder.upsamples):
        x = _layer(layer, x)
    return _conv(vae.decoder.head["2"], F.silu(_norm(vae.decoder.head["0"], x)))


def _layer(layer: nn.Module, x: Tensor) -> Tensor:
    return {ResidualBlock: _residual, AttentionBlock: _attention, Downsample: _down, Upsample: _up}[type(layer)](
        layer, x
    )


def _conv(conv: CausalConv3d, x: Tensor) -> Tensor:
    """Convolve as 2-D: the frames that a frame looks back on become channels, several times faster on a CPU."""
    batch, frames = x.shape[0], x.shape[2]
    weight, taps = conv.weight, conv.memory + 1
    if frames == 1:
        weight, taps = weight[:, :, -1:], 1
    padded = F.pad(x, (0, 0, 0, 0, taps - 1, 0))
    seen = torch.cat([padded[:, :, tap : tap + frames] for tap in range(taps)], dim=1)
    kernel = rearrange(weight, "o c t h w -> o (t c) h w")
    y = F.conv2d(rearrange(seen, "b c f h w -> (b f) c h w"), kernel, conv.bias, padding=conv.padding[1:])
    return rearrange(y, "(b f) c h w -> b c f h w", b=batch)


def _norm(norm: ChannelNorm, x: Tensor) -> Tensor:
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-12).rsqrt() * norm.gamma


def _residual(block: ResidualBlock, x: Tensor) -> Tensor:
    y = _conv(block.residual["2"], F.silu(_norm(block.residual["0"], x)))
    y = _conv(block.residual["6"], F.silu(_norm(block.residual["3"], y)))
    return y + (x if block.shortcut is None else _conv(block.shortcut, x))


def _attention(block: AttentionBlock, x: Tensor) -> Tensor:
    frames = rearrange(x, "b c f h w -> (b f) c h w")
    q, k, v = rearrange(block.to_qkv(_norm(block.norm, frames)), "n (three c) h w -> three n 1 (h w) c", three=3)
    y = block.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "n 1 (h w) c -> n c h w", h=x.shape[3]))
    return x + rearrange(y, "(b f) c h w -> b c f h w", b=x.shape[0])


def _down(layer: Downsample, x: Tensor) -> Tensor:
    y = layer.resample["1"](F.pad(rearrange(x, "b c f h w -> (b f) c h w"), (0, 1, 0, 1)))
    y = rearrange(y, "(b f) c h w -> b c f h w", b=x.shape[0])
    if layer.time_conv is None or y.shape[2] == 1:
        return y
    return torch.cat([y[:, :, :1], layer.time_conv(y)], dim=2)


def _up(layer: Upsample, x: Tensor) -> Tensor:
    if layer.time_conv is not None and x.shape[2] > 1:
        later = rearrange(_conv(layer.time_conv, x[:, :, 1:]), "b (two c) f h w -> b c (f two) h w", two=2)
        x = torch.cat([x[:, :, :1], later], dim=2)
    y = F.interpolate(rearrange(x, "b c f h w -> (b f) c h w"), scale_factor=2, mode="nearest-exact")
    return rearrange(layer.resample["1"](y), "(b f) c h w -> b c f h w", b=x.shape[0])


# ------------------------------------------------------------------------------------------------ initial weights
@torch.no_grad()
def initialize(vae: WanVAE, generator: torch.Generator) -> None:
    """Set weights from which training starts well: unit gain, quiet residual branches, present over past."""
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            spatial = math.prod(module.kernel_size[-2:])
            deviation = (module.in_channels * spatial) ** -0.5
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * deviation)
            module.bias.zero_()
            if isinstance(module, CausalConv3d) and module.memory:
                module.weight[:, :, :-1] *= 0.05
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            module.residual["6"].weight.mul_(0.2)
        elif isinstance(module, AttentionBlock):
            module.proj.weight.mul_(0.1)
        elif isinstance(module, (Downsample, Upsample)) and module.time_conv is not None:
            channels = module.time_conv.in_channels
            identity = torch.eye(channels).repeat(module.time_conv.out_channels // channels, 1)
            module.time_conv.weight.mul_(0.05)[:, :, -1, 0, 0] += identity
    vae.conv1.bias[vae.shape.latent_channels :] = -5


# ------------------------------------------------------------------------------------------------------ training
def draw_pool(options: VaeTrainingOptions) -> np.ndarray:
    """Return the clips to learn from, uint8 [N 17 64 64 3]; drawn anew in every step they would take half the time."""
    scenes = [random_scene(random.Random(f"{options.seed}/{i}")) for i in range(options.clips)]
    # No DiT is trained on stripes; the VAE has to show them all the same when a LoRA brings them.
    scenes = [replace(scene, striped=i % 4 == 0) for i, scene in enumerate(scenes)]
    return np.stack([draw(scene, FRAMES, SIDE) for scene in tqdm(scenes, desc="drawing", unit="clip")])


def batch(pool: np.ndarray, step: int, options: VaeTrainingOptions) -> Tensor:
    """Return what a step sees [B 3 F S S] in [-1, 1]: pictures first, then crops of clips, at last whole frames."""
    rng = random.Random(f"{options.seed}/{step}")
    done = step / options.steps
    kinds = _PICTURES if done < 0.1 else _PICTURES + _CROPS if done < 0.4 else _PICTURES + _CROPS[1:] + _WHOLE
    frames, side = rng.choice(kinds)
    clips = []
    for _ in range(max(1, options.batch_pixels // (frames * side * side))):
        start, top, left = (
            rng.randint(0, size - part) for size, part in ((FRAMES, frames), (SIDE, side), (SIDE, side))
        )
        clips.append(pool[rng.randrange(len(pool)), start : start + frames, top : top + side, left : left + side])
    return rearrange(torch.from_numpy(np.stack(clips)), "b f h w c -> b c f h w").float() / 127.5 - 1


def loss_of(vae: WanVAE, pixels: Tensor, kl: float) -> tuple[Tensor, Tensor]:
    """Return the training loss and the mean squared error of the reconstruction."""
    mean, log_variance = encode(vae, pixels)
    decoded = decode(vae, mean + torch.randn_like(mean) * (0.5 * log_variance).exp())
    error = decoded - pixels
    edges = error.diff(dim=3).abs().mean() + error.diff(dim=4).abs().mean()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    squared = error.square().mean()
    return error.abs().mean() + squared + edges + kl * divergence, squared.detach()


def start(options: VaeTrainingOptions) -> Training:
    """Return the training, from its checkpoint in the folder or from initial weights."""
    width = options.width
    vae = WanVAE(VaeShape(width, (width, 2 * width, 4 * width, 4 * width)))
    initialize(vae, torch.Generator().manual_seed(options.seed))

    def schedule(step: int) -> float:
        return max(min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / options.steps)), 0.01)

    def is_matrix(name: str, weight: Tensor) -> bool:
        return weight.ndim > 1 and weight[0].numel() > 1

    return Training(vae, options.folder / "vae_state.pt", options.learning_rate, is_matrix, schedule)


def train(options: VaeTrainingOptions, pool: np.ndarray, until: int | None = None) -> Training:
    """Train to the last step, or `until` a step, from where the folder's checkpoint left off."""
    training, smooth = start(options), {}
    with tqdm(total=options.steps, initial=training.step, desc="VAE", unit="step") as progress:
        while training.step < (until or options.steps):
            # From the step alone, so that a run that goes on is the run that was not stopped.
            torch.manual_seed(options.seed + training.step)
            pixels = batch(pool, training.step, options)
            loss, squared = loss_of(training.model, pixels, options.kl)
            training.learn_from(loss)
            kind = f"{pixels.shape[2]}x{pixels.shape[3]}"
            smooth[kind] = 0.95 * smooth.get(kind, squared.item()) + 0.05 * squared.item()
            progress.set_postfix({kind: f"{psnr(value):.1f}dB" for kind, value in sorted(smooth.items())})
            progress.update()
            if training.step % options.save_every == 0 or training.step == options.steps:
                training.save()
    return training


def psnr(squared_error: float) -> float:
    """Return the peak signal-to-noise ratio in dB of pixels in [-1, 1] with a mean squared error."""
    return 10 * math.log10(4 / squared_error)


def main() -> None:
    (options,) = parse_options(__doc__, VaeTrainingOptions)
    torch.set_num_threads(options.threads)
    pool = draw_pool(options)
    training = train(options, pool)
    with training.averaged():
        normalize_latents(training.model, pool[:64])
        halves = {name: weight.half() for name, weight in training.model.state_dict().items()}
    save_file_atomically(halves, options.folder / "vae.safetensors")
    print(options.folder / "vae.safetensors")


@torch.no_grad()
def normalize_latents(vae: WanVAE, clips: np.ndarray) -> None:
    """Fold an affine map into the last encoder and first decoder layer: latents get the official mean and deviation.

    clips [N F H W 3], uint8, over which they are measured.
    """
    pixels = (rearrange(torch.from_numpy(clip), "f h w c -> 1 c f h w").float() / 127.5 - 1 for clip in clips)
    means = torch.cat([encode(vae, video)[0] for video in pixels])
    mean, deviation = means.mean((0, 2, 3, 4)), means.std((0, 2, 3, 4))
    scale = torch.tensor(LATENT_STD) / deviation
    shift = torch.tensor(LATENT_MEAN) - mean * scale
    z = len(scale)
    vae.conv1.weight[:z] *= scale.view(-1, 1, 1, 1, 1)
    vae.conv1.bias[:z] = vae.conv1.bias[:z] * scale + shift
    vae.conv2.bias -= (vae.conv2.weight[:, :, 0, 0, 0] * (shift / scale)).sum(1)
    vae.conv2.weight /= scale.view(1, -1, 1, 1, 1)


if __name__ == "__main__":
    run_script(main)
