"""The DiT's own weights as what a run trains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modules.precision import trained_precision
from modules.train_options import TrainOptions
from modules.trained import Trained, restore_module
from utils.devices import FLOAT8
from utils.errors import UserError
from utils.options import option
from utils.safetensors_io import open_tensors
from wan.block_exchange import Exchange, exchange_blocks
from wan.model import WanModel, WanShape
from wan.streaming import Device


@dataclass(frozen=True)
class FullOptions:
    """fine-tuning"""

    full_bf16: bool = option(
        False, "hold and train the weights in bfloat16, rounded at random after float32 steps (default: float32)"
    )
    fused_backward_pass: bool = option(
        False,
        "update each weight in the backward pass as soon as its gradient is there, and drop the gradient: less memory; "
        "--max_grad_norm then limits the norm of each weight's gradient alone (0: no limit)",
    )


class TrainedDit(Trained):
    """All weights of the DiT, in float32 or, with --full_bf16, in bfloat16."""

    noun = "weights"
    shapes = ((64, 64), (64,), (64, 16, 1, 2, 2))
    dit: WanModel
    exchange: Exchange | None = None  # of the blocks that are swapped

    def __init__(self, options: FullOptions):
        self.options = options
        self.fused = options.fused_backward_pass

    def check(
        self, options: TrainOptions, shape: WanShape, file_dtype: torch.dtype, device: torch.device, seed: int
    ) -> tuple[str, torch.dtype]:
        for name in ("fp8_base", "fp8_scaled", "quantize"):
            if getattr(options.precision, name):
                raise UserError(f"--{name}: is not available in fine-tuning, such weights are frozen", "leave it out")
        if file_dtype in FLOAT8:
            raise UserError(
                f"--dit {options.dit.dit}: holds float8 weights, which are too coarse to train", "use the bf16 file"
            )
        steps = options.training.gradient_accumulation_steps
        if self.fused and steps > 1:
            raise UserError(
                f"--fused_backward_pass: keeps no gradients for --gradient_accumulation_steps {steps} to add up",
                "leave one of them out",
            )
        self._file_dtype, self._seed = file_dtype, seed
        own = ("ss_", "sshs_", "modelspec.")  # what a file says of its own training and tensors
        with open_tensors(options.dit.dit, "--dit") as file:
            inherited = {key: text for key, text in file.metadata.items() if not key.startswith(own)}
        self._file_metadata = {**inherited, "num_heads": str(shape.heads)}
        return trained_precision(options.precision.mixed_precision, self.options.full_bf16)

    def hold(self, dit: WanModel, numbers: Sequence[int], slots: int, device: Device) -> None:
        self.exchange = exchange_blocks(dit, numbers, slots, device, self.fused)

    def attach(self, dit: WanModel, device: torch.device) -> nn.Module:
        self.dit = dit.requires_grad_(True).train()
        if self.exchange:
            dit.register_state_dict_pre_hook(lambda *_: self.exchange.settle())
            self.stowed = () if self.fused else {p for block in self.exchange.parameters for p in block}
        # Its own, and with the same seed in all processes: their weights would drift apart otherwise.
        self.generator = torch.Generator(device).manual_seed(self._seed)
        return dit

    def parameter_groups(self, learning_rate: float) -> list[dict]:
        return [{"params": list(self.dit.parameters()), "lr": learning_rate, "name": "unet"}]

    def step(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        def step(parameters: Sequence[nn.Parameter]) -> None:
            if self.options.full_bf16:
                step_in_float32(optimizer, parameters, self.generator)
            else:
                optimizer.step()

        if self.exchange:
            self.exchange.update(parameters, optimizer.state, step)
        else:
            step(parameters)

    def stow(self, parameter: nn.Parameter) -> None:
        self.exchange.stow(parameter)

    def settle(self) -> None:
        self.exchange.settle()

    def tensors(self) -> dict[str, Tensor]:
        return self.dit.state_dict()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.dit.state_dict()  # settles what is on its way
        restore_module(self.dit, tensors)

    def generators(self) -> dict[str, torch.Generator]:
        return {"rounding": self.generator}

    def file_dtype(self) -> torch.dtype:
        return self._file_dtype

    def training_metadata(self) -> dict[str, Any]:
        return {"full_bf16": self.options.full_bf16, "fused_backward_pass": self.options.fused_backward_pass}

    def file_metadata(self) -> Mapping[str, str]:
        return self._file_metadata


@torch.no_grad()
def step_in_float32(optimizer: Optimizer, parameters: Sequence[nn.Parameter], generator: torch.Generator) -> None:
    """Step the parameters one by one, each as float32 for that moment, and round it back at random.

    Most steps are smaller than half the distance between two bfloat16 numbers: rounded to the nearest one, they would
    all be lost. The optimizer's own state is float32. It must treat each parameter on its own, as Adam does.
    """
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None  # an optimizer passes over what has no gradient
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        stored = parameter.data
        parameter.data = stored.float()
        parameter.grad = gradient.float()
        optimizer.step()
        parameter.grad = None
        stored.copy_(rounded_at_random(parameter.data, generator))
        parameter.data = stored


def rounded_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return float32 numbers as one of the two nearest bfloat16 numbers, by chance the nearer the likelier.

    The mean over many draws is x. bfloat16 is the upper half of float32's bits: what is added to the lower half carries
    over with a probability of its value.
    """
    bits = torch.randint(0, 1 << 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    bits.add_(x.view(torch.int32)).bitwise_and_(-(1 << 16))
    return bits.view(torch.float32).to(torch.bfloat16)
