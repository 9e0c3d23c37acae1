"""Branches of linear layers, the low-rank one above all, and a network of them: attach, detach, state dict."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MethodType

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
        # Or of a class made of it, as those that share out their weights among processes are.
        if any(kind.__name__ == BLOCK_CLASS for kind in type(block).__mro__):
            for path, layer in block.named_modules(prefix=block_path):
                if isinstance(layer, nn.Linear):
                    layers[path] = layer
    return layers


def targets_in(model: nn.Module) -> list[Target]:
    """Return the linear layers of the model's transformer blocks as targets."""
    return [Target(path, layer.in_features, layer.out_features) for path, layer in linear_layers(model).items()]


class Branch(nn.Module, ABC):
    """What is trained beside one linear layer: x -> alpha / rank * update(x), the update being made of a few factors.

    The parameters are the factors, and have the names that files give them. They are float32 (or what the caller makes
    them) and are cast to the input's dtype at use, so that a branch needs no autocast.
    """

    kind = ""  # what messages call a network of such branches
    parts: frozenset[str] = frozenset()  # what files may hold of a layer, besides alpha
    at_zero: tuple[str, ...] = ()  # the factors that start at zero, so that a new branch changes nothing
    arguments: tuple[str, ...] = ()  # of the network arguments, those that the constructor takes besides its own

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float, dropouts: Dropouts | None = None):
        super().__init__()
        self.inputs, self.outputs, self.rank, self.dropouts = inputs, outputs, rank, dropouts or Dropouts()
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        # A python float: reading the buffer in every forward would wait for the GPU.
        self.scale = float(alpha) / rank

    @property
    def activations(self) -> int:
        """How many numbers of a token the branch keeps for its backward pass, besides the layer's input."""
        return 0

    @property
    def scratch(self) -> int:
        """How many bytes the branch takes while it computes, whatever the number of tokens."""
        return 0

    @classmethod
    @abstractmethod
    def from_parts(cls, parts: Mapping[str, Tensor], dropouts: Dropouts) -> "Branch":
        """Return the branch of a layer in a file, with its weights; the parts are complete and fit each other."""

    @torch.no_grad()
    def load(self, parts: Mapping[str, Tensor]) -> None:
        """Take over trained weights of the same shapes, and the alpha they were trained with."""
        for name, parameter in self.named_parameters():
            parameter.copy_(parts[name])
        alpha = alpha_of(parts, self.rank)
        self.scale = alpha / self.rank
        self.alpha.fill_(alpha)

    @abstractmethod
    def forward(self, x: Tensor, multiplier: float = 1.0) -> Tensor:
        """Return the update of x [... inputs] as [... outputs] in x's dtype, times the multiplier."""

    @abstractmethod
    def norm(self) -> Tensor:
        """Return the Frobenius norm of what the branch adds to the layer's weight, in float64."""

    def skipped(self) -> bool:
        """Return whether module dropout leaves the branch out of this forward pass."""
        # torch's generator, which gradient checkpointing rewinds; Python's would differ in the recomputed pass.
        p = self.dropouts.module
        return bool(self.training and p and torch.rand(()).item() < p)

    @torch.no_grad()
    def shrink(self, ratio: float) -> None:
        """Multiply the update by a ratio, which all factors share equally."""
        factors = list(self.parameters())
        for factor in factors:
            factor *= ratio ** (1 / len(factors))


def alpha_of(parts: Mapping[str, Tensor], rank: int) -> float:
    """Return the alpha of a layer in a file: the rank, and so a strength of 1, where there is none."""
    return float(parts["alpha"]) if "alpha" in parts else float(rank)


def kept_ranks(rank: int, p: float, *shape: int, like: Tensor) -> Tensor:
    """Return a mask [*shape rank] that is 0 with probability p and otherwise so large that its mean is 1."""
    keep = 1 - p
    return (torch.rand((*shape, rank), device=like.device) < keep).to(like.dtype) / keep


class LoRABranch(Branch):
    """The low-rank update of one linear layer: x -> alpha / rank * up(down(x))."""

    kind = "LoRA"
    parts = frozenset({"lora_down.weight", "lora_up.weight"})
    at_zero = ("lora_up.weight",)

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float, dropouts: Dropouts | None = None):
        super().__init__(inputs, outputs, rank, alpha, dropouts)
        self.lora_down = nn.Linear(inputs, rank, bias=False)
        self.lora_up = nn.Linear(rank, outputs, bias=False)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)

    @property
    def activations(self) -> int:
        return self.rank

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], dropouts: Dropouts) -> "LoRABranch":
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]
        rank = down.shape[0]
        branch = cls(down.shape[1], up.shape[0], rank, alpha_of(parts, rank), dropouts)
        branch.load(parts)
        return branch

    def forward(self, x: Tensor, multiplier: float = 1.0) -> Tensor:
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
            ones = (1,) * (hidden.ndim - 2)
            hidden = hidden * kept_ranks(self.rank, self.dropouts.rank, hidden.shape[0], *ones, like=hidden)
        return hidden

    @torch.no_grad()
    def norm(self) -> Tensor:
        # Without forming the product.
        down, up = self.lora_down.weight.double(), self.lora_up.weight.double()
        return self.scale * ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()


class LoRANetwork(nn.Module):
    """Branches by LoRA name; the state dict is what LoRA files hold.

    Its keys are `<name>.alpha` and, of a LoRA, `<name>.lora_down.weight` and `<name>.lora_up.weight`.
    """

    def __init__(self, branches: Mapping[str, Branch], multiplier: float = 1.0, loraplus_ratio: float | None = None):
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

    def branches(self) -> Iterable[tuple[str, Branch]]:
        return self._modules.items()

    def attach(self, model: nn.Module) -> None:
        """Add each branch to its layer's output by replacing the layer's forward. Several models share the branches.

        Raises UserError when the model lacks a layer or has it in another size: the LoRA is for another model.
        """
        assert not any(model is other for other in self._attached), "the network is already attached to this model"
        layers = {lora_name(path): layer for path, layer in linear_layers(model).items()}
        self.check({name: (layer.in_features, layer.out_features) for name, layer in layers.items()})
        for name, branch in self.branches():
            self._restore.append(_attach(layers[name], self, branch))
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
            have = (branch.inputs, branch.outputs)
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
        slow, fast = [], []
        for _, branch in self.branches():
            for name, parameter in branch.named_parameters():
                (fast if name in branch.at_zero else slow).append(parameter)
        return [
            {"params": slow, "lr": learning_rate, "name": "unet"},
            {"params": fast, "lr": learning_rate * self.loraplus_ratio, "name": "unet plus"},
        ]

    @torch.no_grad()
    def scale_norms(self, limit: float) -> tuple[int, float, float]:
        """Shrink updates whose Frobenius norm exceeds `limit`; return (how many, mean norm, largest norm) after it."""
        norms = torch.stack([branch.norm() for _, branch in self.branches()])
        ratios = (limit / norms.clamp(min=1e-12)).clamp(max=1.0)
        for (_, branch), ratio in zip(self.branches(), ratios.tolist(), strict=True):
            if ratio < 1:
                branch.shrink(ratio)
        norms = norms * ratios
        return int((ratios < 1).sum()), norms.mean().item(), norms.max().item()


class _Adapted:
    """What an adapted layer holds as `adapted`: how it computes by itself, and the branches beside it."""

    def __init__(self, layer: nn.Linear):
        own = self.own = layer.__dict__.get("forward")  # set on the layer, where it is not its class's
        self.original = type(layer).forward if own is None else lambda layer, x: own(x)
        self.beside: list[tuple[LoRANetwork, Branch]] = []


def _adapted_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    """Add the branches' updates to what the layer computes.

    A method of the layer, which holds all that it uses: torch.compile then makes the same code serve all blocks.
    """
    adapted = layer.adapted
    updates = [
        branch(x, network.multiplier)
        for network, branch in adapted.beside
        if network.multiplier != 0 and not branch.skipped()
    ]
    # The large product comes last: gradient checkpointing, which runs a block again, stops before the very last.
    y = adapted.original(layer, x)
    for update in updates:
        y = update + y
    return y


def _attach(layer: nn.Linear, network: LoRANetwork, branch: Branch) -> Callable[[], None]:
    """Put a branch beside a layer, after those already there, and return what undoes it."""
    if "adapted" not in layer.__dict__:
        layer.adapted = _Adapted(layer)
        layer.forward = MethodType(_adapted_forward, layer)
    adapted, pair = layer.adapted, (network, branch)
    adapted.beside.append(pair)

    def restore() -> None:
        adapted.beside.remove(pair)
        if not adapted.beside:
            del layer.adapted, layer.forward
            if adapted.own is not None:
                layer.forward = adapted.own

    return restore
