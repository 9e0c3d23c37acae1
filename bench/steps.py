"""Steps of generation and of LoRA training, and decoding, on random weights: no file, and never a second copy."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modules.flow_matching import noised
from modules.losses import flow_loss
from modules.solvers import FIRST_UNIPC_SIGMA, Memory, unipc_step
from networks.lora import LoRANetwork
from networks.lora_wan import create_network
from wan.block_swap import Ring, stream_blocks, streamed_blocks
from wan.configs import WanConfig
from wan.fp8 import FLOAT8, replace_linears
from wan.loading import block_linears
from wan.model import WanModel, WanShape
from wan.streaming import Device
from wan.vae import VaeShape, WanVAE

STEPS, SHIFT, SCALE = 50, 5.0, 5.0
PROMPT_ROWS = 60
RANK = 32


@dataclass(frozen=True)
class Work:
    """What a step computes, and how the DiT's weights are held meanwhile."""

    shape: WanShape
    width: int  # pixels; so is height
    height: int
    frames: int
    dtype: torch.dtype = torch.bfloat16
    fp8: bool = False
    fp8_fast: bool = False
    swapped: int = 0  # blocks in main memory

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent frames, rows, columns."""
        return (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8

    @property
    def forward_flops(self) -> float:
        """Operations of the DiT's forward pass, with a padded prompt."""
        frames, height, width = self.grid
        shape, tokens = self.shape, frames * (height // 2) * (width // 2)
        dim, text = shape.dim, shape.text_length
        matrices = tokens * (12 * dim**2 + 4 * dim * shape.ffn_dim) + 4 * text * dim**2
        return shape.blocks * (matrices + 4 * dim * tokens * (tokens + text))


def task_shape(config: WanConfig) -> WanShape:
    """Return the published sizes of a task's DiT."""
    return WanShape(
        dim=config.dim,
        ffn_dim=config.ffn_dim,
        heads=config.heads,
        blocks=config.blocks,
        in_channels=config.in_channels,
        clip_dim=1280 if config.clip else None,
        image_tokens=514 if config.clip and len(config.images) == 2 else None,
    )


def random_dit(
    shape: WanShape,
    device: torch.device,
    dtype: torch.dtype,
    fp8: bool = False,
    elsewhere: Collection[int] = (),
    move: Callable[[Tensor], Tensor] = Tensor.cpu,
    fp8_fast: bool = False,
) -> WanModel:
    """Return a frozen DiT with weights drawn on the device, one after the other; scales are 1.

    elsewhere: numbers of the blocks whose weights do not stay there; move: where they go.
    """
    with torch.device("meta"):
        model = WanModel(shape).requires_grad_(False)
    linears = block_linears(shape, dtype, device, fp8 or fp8_fast, fast=fp8_fast)
    for number, block in enumerate(model.blocks):
        if make := linears(number):
            replace_linears(block, make)
    moved = {f"blocks.{number}" for number in elsewhere}
    weights = {}
    for name, like in model.state_dict().items():
        if name.endswith(".scale_weight"):
            weight = torch.ones(like.shape, device=device)
        else:
            weight = random_weight(like.shape, device, dtype).to(like.dtype if like.dtype == FLOAT8 else dtype)
        weights[name] = move(weight) if ".".join(name.split(".")[:2]) in moved else weight
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


def random_vae(shape: VaeShape, device: torch.device, dtype: torch.dtype) -> WanVAE:
    """Return a frozen VAE with weights drawn on the device."""
    with torch.device("meta"):
        vae = WanVAE(shape).requires_grad_(False)
    weights = {name: random_weight(like.shape, device, dtype) for name, like in vae.state_dict().items()}
    vae.load_state_dict(weights, assign=True)
    return vae.eval()


def random_weight(shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a matrix that keeps the size of what flows through it, or a vector of small numbers."""
    inputs = shape[1:].numel()
    return torch.randn(shape, device=device, dtype=dtype).mul_(inputs**-0.5 if inputs > 1 else 0.1)


def swap(dit: WanModel, blocks: int, device: Device) -> Ring:
    """Make so many blocks of the DiT live in main memory, as --blocks_to_swap does."""
    return stream_blocks(dit, streamed_blocks(len(dit.blocks), blocks), min(2, blocks), device)


def conditions(dit: WanModel, work: Work, device: torch.device) -> dict[str, Tensor | None]:
    """Return what a model for pictures or control videos sees besides text, by argument of WanModel.forward()."""
    extra = work.shape.in_channels - work.shape.out_channels
    pictures = (work.shape.image_tokens or 257) // 257
    return {
        "y": torch.randn(1, extra, *work.grid, device=device) if extra else None,
        "image_features": torch.randn(pictures, 257, 1280, device=device) if work.shape.clip_dim else None,
    }


def prompt(work: Work, device: torch.device) -> list[Tensor]:
    return [torch.randn(PROMPT_ROWS, work.shape.text_dim, device=device, dtype=work.dtype)]


def generation_step(dit: WanModel, work: Work, device: torch.device) -> Callable[[], Tensor]:
    """Return what takes the next step of a denoising with guidance and returns its latents [1 16 f h w]."""
    seen = conditions(dit, work, device)
    x = torch.randn(1, work.shape.out_channels, *work.grid, device=device)
    with torch.inference_mode():
        contexts = [dit.context(prompt(work, device), seen["image_features"], reused=True) for _ in range(2)]
    passes = [{"text": context, "y": seen["y"]} for context in contexts]
    # In Python numbers: tensors without memory, which memory.py runs this on, have none.
    grid = [FIRST_UNIPC_SIGMA * (1 - i / STEPS) for i in range(STEPS + 1)]
    sigmas = tuple(SHIFT * sigma / (1 + (SHIFT - 1) * sigma) for sigma in grid)
    memory, number = Memory(), 0

    @torch.inference_mode()
    def step() -> Tensor:
        nonlocal x, memory, number
        timestep = torch.full((1,), 1000 * sigmas[number], device=device)
        wanted, unwanted = dit.velocities(x, timestep, passes)
        x, memory = unipc_step(unwanted + SCALE * (wanted - unwanted), x, number, sigmas, memory)
        number += 1
        return x

    return step


def attached_lora(dit: WanModel, device: torch.device, rank: int = RANK) -> LoRANetwork:
    """Return a new LoRA on every linear layer of the DiT's blocks."""
    with device:
        network = create_network(dit, rank, rank).train()
    network.attach(dit)
    return network


def training_step(dit: WanModel, network: LoRANetwork, work: Work, device: torch.device) -> Callable[[], Tensor]:
    """Return what takes the next step of training a LoRA that is attached to the DiT, and returns the loss."""
    parameters = list(network.parameters())
    optimizer = ByteStates(parameters, 1e-4)
    seen, text = conditions(dit, work, device), prompt(work, device)
    latents = torch.randn(1, work.shape.out_channels, *work.grid, device=device)

    def step() -> Tensor:
        t = torch.full((1,), 0.5, device=device)
        x_t, velocity = noised(latents, torch.randn_like(latents), t)
        loss = flow_loss(dit(x_t, 1000 * t, text, **seen), velocity)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


class ByteStates(torch.optim.Optimizer):
    """Plain gradient descent that holds two bytes a number, as 8-bit Adam does: its memory without its library."""

    def __init__(self, parameters: list[nn.Parameter], rate: float):
        super().__init__(parameters, {"lr": rate})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    zeros = torch.zeros(2, parameter.numel(), dtype=torch.uint8, device=parameter.device)
                    self.state[parameter]["moments"] = zeros
                parameter.sub_(parameter.grad, alpha=group["lr"])


def decoding(vae: WanVAE, width: int, height: int, frames: int, device: torch.device) -> Callable[[], Tensor]:
    """Return what decodes a video chunk by chunk and returns its last frames."""
    scale, length = vae.shape.pixels_per_latent, vae.shape.frames_per_latent
    size = ((frames - 1) // length + 1, height // scale, width // scale)
    latents = torch.randn(1, vae.shape.latent_channels, *size, device=device)

    def decode() -> Tensor:
        frames = latents
        for chunk in vae.decode_chunks(latents):
            frames = chunk
        return frames

    return decode
