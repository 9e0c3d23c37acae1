"""The low-rank branch of a linear layer, and a network of them: attach, detach, state dict."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError

BLOCK_CLASS = "WanAttentionBlock"
PREFIX = "lora_unet_"


@dataclass(frozen=True)
class Target:
    """A linear layer that may get a branch."""

    path: str  # dotted, within the model: "blocks.0.self_attn.q"
    inputs: int
    outputs: int

    @property
    def name(self) -> str:
        return lora_name(self.path)


@dataclass(frozen=True)
class Dropouts:
    """Probabilities of what a branch leaves out during training."""

    neuron: float = 0.0  # single rank activations
    rank: float = 0.0  # whole ranks, per sample
    module: float = 0.0  # the branch


def lora_name(path: str) -> str:
    """Return a layer's name in LoRA files: "lora_unet_blocks_0_self_attn_q"."""
    return PREFIX + path.replace(".", "_")


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every linear layer inside the model's transformer blocks by its dotted path, in the model's order."""
    layers = {}
    for block_path, block in model.named_modules():
        if type(block).__name__ == BLOCK_CLASS:
            for path, layer in block.named_modules(prefix=block_path):
                if isinstance(layer, nn.Linear):
                    layers[path] = layer
    return layers


def targets_in(model: nn.Module) -> list[Target]:
    """Return the linear layers of the model's transformer blocks as targets."""
    return [Target(path, layer.in_features, layer.out_features) for path, layer in linear_layers(model).items()]


class LoRABranch(nn.Module):
    """The low-rank update of one linear layer: x -> alpha / rank * up(down(x)).

    The weights are float32 (or what the caller makes them) and are cast to the input's dtype at use, so that the
    branch needs no autocast.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float, dropouts: Dropouts | None = None):
        super().__init__()
        self.rank, self.dropouts = rank, dropouts or Dropouts()
        self.lora_down = nn.Linear(inputs, rank, bias=False)
        self.lora_up = nn.Linear(rank, outputs, bias=False)
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        # A python float: reading the buffer in every forward would wait for the GPU.
        self.scale = float(alpha) / rank
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)

    @torch.no_grad()
    def load(self, down: Tensor, up: Tensor, alpha: float) -> None:
        """Take over trained weights of the same rank, and the alpha they were trained with."""
        self.lora_down.weight.copy_(down)
        self.lora_up.weight.copy_(up)
        self.alpha.fill_(alpha)
        self.scale = alpha / self.rank

    def forward(self, x: Tensor, multiplier: float = 1.0) -> Tensor:
        """Return the update of x [... inputs] as [... outputs] in x's dtype, times the multiplier."""
        hidden = F.linear(x, self.lora_down.weight.to(x.dtype))
        if self.training:
            hidden = self._dropped(hidden)
        # Scaled where it is narrow: [... rank], not [... outputs].
        return F.linear(hidden * (self.scale * multiplier), self.lora_up.weight.to(x.dtype))

    def _dropped(self, hidden: Tensor) -> Tensor:
        """Apply dropout to rank activations [B ... rank]."""
        if self.dropouts.neuron:
            hidden = F.dropout(hidden, self.dropouts.neuron)
        if self.dropouts.rank:
            keep = 1 - self.dropouts.rank
            shape = (hidden.shape[0],) + (1,) * (hidden.ndim - 2) + (self.rank,)
            hidden = hidden * (torch.rand(shape, device=hidden.device) < keep).to(hidden.dtype) / keep
        return hidden

    def skipped(self) -> bool:
        """Return whether module dropout leaves the branch out of this forward pass."""
        # torch's generator, which gradient checkpointing rewinds; Python's would differ in the recomputed pass.
        p = self.dropouts.module
        return bool(self.training and p and torch.rand(()).item() < p)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Return the Frobenius norm of alpha / rank * up @ down without forming the product."""
        down, up = self.lora_down.weight.double(), self.lora_up.weight.double()
        return self.scale * ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()


class LoRANetwork(nn.Module):
    """Branches by LoRA name; the state dict is what LoRA files hold.

    Its keys are `<name>.lora_down.weight`, `<name>.lora_up.weight` and `<name>.alpha`.
    """

    def __init__(
        self, branches: Mapping[str, LoRABranch], multiplier: float = 1.0, loraplus_ratio: float | None = None
    ):
        super().__init__()
        self.multiplier, self.loraplus_ratio = multiplier, loraplus_ratio
        for name, branch in branches.items():
            self.add_module(name, branch)
        # Only the way back: kept apart from the modules so that the model is never saved or moved with the LoRA.
        self._restore: list[Callable[[], None]] = []
        self._attached: list[nn.Module] = []

    @property
    def names(self) -> list[str]:
        """LoRA names of the adapted layers, in the model's order."""
        return list(self._modules)

    def branches(self) -> Iterable[tuple[str, LoRABranch]]:
        return self._modules.items()

    def attach(self, model: nn.Module) -> None:
        """Add each branch to its layer's output by replacing the layer's forward. Several models share the branches.

        Raises UserError when the model lacks a layer or has it in another size: the LoRA is for another model.
        """
        assert not any(model is other for other in self._attached), "the network is already attached to this model"
        layers = {lora_name(path): layer for path, layer in linear_layers(model).items()}
        self.check({name: (layer.in_features, layer.out_features) for name, layer in layers.items()})
        for name, branch in self.branches():
            self._restore.append(_attach(layers[name], _Adapted(self, branch, layers[name].forward).forward))
        self._attached.append(model)

    def detach(self) -> None:
        """Give the models their own forwards back."""
        for restore in self._restore:
            restore()
        self._restore, self._attached = [], []

    def check(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Raise UserError unless every branch has a layer of its size; sizes: (inputs, outputs) by LoRA name."""
        unknown = [name for name in self.names if name not in sizes]
        if unknown:
            raise UserError(
                f"LoRA for another model: {len(unknown)} of its {len(self.names)} layers are not in this model,"
                f" e.g. {unknown[0]}",
                "use the LoRA with the task and model size it was trained for",
            )
        for name, branch in self.branches():
            have = (branch.lora_down.in_features, branch.lora_up.out_features)
            if have != sizes[name]:
                raise UserError(
                    f"LoRA for another model: {name} maps {have[0]} to {have[1]} channels, the model's layer"
                    f" {sizes[name][0]} to {sizes[name][1]}",
                    "use the LoRA with the task and model size it was trained for",
                )

    def parameter_groups(self, learning_rate: float) -> list[dict]:
        """Return the optimizer's parameter groups, each with the name under which its learning rate is logged."""
        if not self.loraplus_ratio:
            return [{"params": list(self.parameters()), "lr": learning_rate, "name": "unet"}]
        downs = [branch.lora_down.weight for _, branch in self.branches()]
        ups = [branch.lora_up.weight for _, branch in self.branches()]
        return [
            {"params": downs, "lr": learning_rate, "name": "unet"},
            {"params": ups, "lr": learning_rate * self.loraplus_ratio, "name": "unet plus"},
        ]

    @torch.no_grad()
    def scale_norms(self, limit: float) -> tuple[int, float, float]:
        """Shrink updates whose Frobenius norm exceeds `limit`; return (how many, mean norm, largest norm) after it."""
        norms = torch.stack([branch.norm() for _, branch in self.branches()])
        ratios = (limit / norms.clamp(min=1e-12)).clamp(max=1.0)
        for (_, branch), ratio in zip(self.branches(), ratios.sqrt().tolist(), strict=True):
            if ratio < 1:
                branch.lora_down.weight *= ratio
                branch.lora_up.weight *= ratio
        norms = norms * ratios
        return int((ratios < 1).sum()), norms.mean().item(), norms.max().item()


class _Adapted:
    """A layer's forward and the branch beside it.

    A bound method, because torch.compile then makes the same code serve the layers of all blocks; not so a partial.
    """

    def __init__(self, network: LoRANetwork, branch: LoRABranch, original: Callable[[Tensor], Tensor]):
        self.network, self.branch, self.original = network, branch, original

    def forward(self, x: Tensor) -> Tensor:
        if self.network.multiplier == 0 or self.branch.skipped():
            return self.original(x)
        # The large product comes last: gradient checkpointing, which runs a block again, stops before the very last.
        return self.branch(x, self.network.multiplier) + self.original(x)


def _attach(layer: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Give the layer another forward and return what undoes it, whether its own was its class's or set on it."""
    own = layer.__dict__.get("forward")
    layer.forward = forward

    def restore() -> None:
        if own is None:
            del layer.forward
        else:
            layer.forward = own

    return restore
