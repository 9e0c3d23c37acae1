"""What a run trains and saves: the one thing in which training a LoRA and fine-tuning the DiT differ."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modules.states import check_shapes
from modules.train_options import TrainOptions
from wan.loading import Deltas
from wan.model import WanModel, WanShape
from wan.pair import DitPair
from wan.streaming import Device


class Trained(ABC):
    """What is trained. Used in the order of its methods: checked before the DiT loads, then attached to it."""

    options: Any  # a group of options, of what is trained
    noun = ""  # what the log calls it
    architecture = ""  # what the name of the model's family gets in the metadata of files
    deltas: Deltas | None = None  # what is added to the DiT's weights while they load
    shapes: tuple[tuple[int, ...], ...] = ((64, 64),)  # of parameters like those to train, to try an optimizer on
    fused = False  # each parameter is updated as soon as its gradient is there
    hashed = False  # files are told apart by hashes of their tensors
    hold: Callable[[WanModel, Sequence[int], int, Device], None] | None = None  # makes a DiT run with swapped blocks
    stowed: Collection[nn.Parameter] = ()  # those whose gradients leave the device during the backward pass
    beside = False  # a network beside the DiT, whose own weights stay as they are
    rank = 0  # the most activations of a token that a layer of such a network keeps
    scratch = 0  # the most bytes that a layer of it takes while it computes
    numbers = 0  # how many it has

    @abstractmethod
    def check(
        self, options: TrainOptions, shape: WanShape, file_dtype: torch.dtype, device: torch.device, seed: int
    ) -> tuple[str, torch.dtype]:
        """Return the mixed precision, as metadata and the log name it, and the dtype to load the DiT in.

        Raises UserError for what would fail later. shape, file_dtype: of the DiT, which is not loaded yet.
        """

    @abstractmethod
    def attach(self, dit: WanModel | DitPair, device: torch.device) -> nn.Module:
        """Make the loaded DiT and what is trained with it ready, and return the module with the parameters."""

    @abstractmethod
    def parameter_groups(self, learning_rate: float) -> list[dict]:
        """Return the optimizer's parameter groups, each with the name under which its learning rate is logged."""

    def step(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        """Apply the gradients, which only these parameters have."""
        optimizer.step()

    def stow(self, parameter: nn.Parameter) -> None:
        """Take charge of the gradient of one of the stowed parameters, which a batch has just been added to."""
        raise NotImplementedError(f"{type(self).__name__} stows no gradients")

    def settle(self) -> None:
        """Return once stowed gradients can be read."""
        raise NotImplementedError(f"{type(self).__name__} stows no gradients")

    def limit(self) -> dict[str, float]:
        """Hold what is trained within its limits after a step; return what to log of it."""
        return {}

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return what a file holds."""

    def expected_shapes(self) -> dict[str, torch.Size] | None:
        """Return the shapes of tensors() by name once checked, None where they are known with the DiT alone."""
        return None

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what tensors() returned in the run that goes on; UserError where it does not fit."""

    def generators(self) -> dict[str, torch.Generator]:
        """Return by name what it draws random numbers from, beside torch's own generators."""
        return {}

    @abstractmethod
    def file_dtype(self) -> torch.dtype:
        """Return the dtype of files where no other is asked for."""

    @abstractmethod
    def training_metadata(self) -> dict[str, Any]:
        """Return by name what its files say of how it was trained, besides what they say of every run."""

    def file_metadata(self) -> Mapping[str, str]:
        """Return what else its files say of themselves."""
        return {}


def restore_module(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fill a module with saved tensors, in place."""
    held = module.state_dict()
    check_shapes(shapes_of(tensors), shapes_of(held))
    with torch.no_grad():
        for name, tensor in tensors.items():
            held[name].copy_(tensor)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
