"""A LoRA as what a run trains: made or read before the DiT loads, then attached to the frozen DiT."""

import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from modules.precision import frozen_precision
from modules.train_options import TrainOptions
from modules.trained import Trained, restore_module, shapes_of
from networks.formats import deltas, read_lora
from networks.lora import LoRANetwork
from utils.errors import UserError
from utils.options import option, suggest
from wan.dit_file import check_fp8
from wan.loading import Deltas
from wan.model import WanModel, WanShape
from wan.pair import DitPair, each_model
from wan.quantize import check_quantize

logger = logging.getLogger(__name__)

NETWORKS = ("networks.lora_wan", "networks.loha", "networks.lokr")


@dataclass(frozen=True)
class NetworkOptions:
    """the LoRA"""

    network_module: str = option(
        "networks.lora_wan", "module that makes the network: networks.lora_wan, networks.loha or networks.lokr"
    )
    network_dim: int | None = option(None, "rank (default: 4)")
    network_alpha: float = option(1.0, "the LoRA counts alpha / rank times; 0 stands for the rank")
    network_dropout: float | None = option(None, "probability of dropping a rank activation")
    network_args: tuple[str, ...] = option((), "more arguments, key=value (docs/lora_files.md)", metavar="KEY=VALUE")
    network_weights: Path | None = option(None, "LoRA file to start from")
    dim_from_weights: bool = option(False, "take ranks and alphas from --network_weights")
    scale_weight_norms: float | None = option(None, "shrink updates of a layer whose norm is greater")
    base_weights: tuple[Path, ...] = option((), "LoRA files to merge into the DiT before training")
    base_weights_multiplier: tuple[float, ...] = option((), "their strengths in turn (default: 1 each)")


class TrainedLora(Trained):
    """A LoRA beside a frozen DiT, in float32."""

    noun = "LoRA"
    architecture = "/lora"
    hashed = True
    beside = True
    network: LoRANetwork

    def __init__(self, options: NetworkOptions):
        self.options = options

    def check(
        self, options: TrainOptions, shape: WanShape, file_dtype: torch.dtype, device: torch.device, seed: int
    ) -> tuple[str, torch.dtype]:
        precision = options.precision
        check_numbers(self.options)
        check_fp8(options.dit.dit, precision.fp8_base, precision.fp8_scaled, quantize=precision.quantize)
        check_quantize(precision.quantize, shape, device)
        mixed_precision, dtype = frozen_precision(precision.mixed_precision, file_dtype, device)
        with torch.device("meta"):
            model = WanModel(shape)
        torch.manual_seed(seed)
        self.network = make_network(self.options, model)
        self.rank = max(branch.activations for _, branch in self.network.branches())
        self.scratch = max(branch.scratch for _, branch in self.network.branches())
        self.numbers = sum(parameter.numel() for parameter in self.network.parameters())
        self.deltas = base_deltas(self.options, model)
        return mixed_precision, dtype

    def attach(self, dit: WanModel | DitPair, device: torch.device) -> nn.Module:
        self.network.to(device).train()
        for model in each_model(dit):
            self.network.attach(model)
        return self.network

    def parameter_groups(self, learning_rate: float) -> list[dict]:
        return self.network.parameter_groups(learning_rate)

    def limit(self) -> dict[str, float]:
        if not self.options.scale_weight_norms:
            return {}
        names = ("max_norm/keys_scaled", "max_norm/average_key_norm", "max_norm/max_key_norm")
        return dict(zip(names, self.network.scale_norms(self.options.scale_weight_norms), strict=True))

    def tensors(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def expected_shapes(self) -> dict[str, torch.Size]:
        return shapes_of(self.network.state_dict())

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        restore_module(self.network, tensors)

    def file_dtype(self) -> torch.dtype:
        return torch.float32

    def training_metadata(self) -> dict[str, Any]:
        ranks = {branch.rank for _, branch in self.network.branches()}
        alphas = {branch.alpha.item() for _, branch in self.network.branches()}
        arguments = network_arguments(self.options.network_args)
        return {
            "network_module": self.options.network_module,
            "network_dim": ranks.pop() if len(ranks) == 1 else "Dynamic",
            "network_alpha": alphas.pop() if len(alphas) == 1 else "Dynamic",
            "network_dropout": self.options.network_dropout,
            **({"network_args": arguments} if arguments else {}),
            "full_bf16": False,
        }


def check_numbers(options: NetworkOptions) -> None:
    """Raise UserError for a rank, alpha, dropout or norm that cannot be."""
    if options.network_dim is not None and options.network_dim < 1:
        raise UserError(f"--network_dim {options.network_dim}: must be at least 1")
    if options.network_alpha < 0:
        raise UserError(f"--network_alpha {options.network_alpha:g}: must not be negative")
    if options.network_dropout is not None and not 0 <= options.network_dropout < 1:
        raise UserError(f"--network_dropout {options.network_dropout:g}: must be from 0 to below 1")
    if options.scale_weight_norms is not None and not options.scale_weight_norms > 0:
        raise UserError(f"--scale_weight_norms {options.scale_weight_norms:g}: must be greater than 0")


def make_network(options: NetworkOptions, model: WanModel) -> LoRANetwork:
    """Return the network for a model, known to fit it but not attached; its first weights are drawn from torch's RNG.

    model: may be on the meta device.
    """
    module = network_module(options.network_module)
    arguments = network_arguments(options.network_args)
    if options.network_weights is None:
        if options.dim_from_weights:
            raise UserError("--dim_from_weights: needs the LoRA file", "add --network_weights PATH")
        return module.create_network(
            model, options.network_dim, options.network_alpha, options.network_dropout, args=arguments
        )
    weights, _ = read_lora(options.network_weights, "--network_weights")
    try:
        if options.dim_from_weights:
            return module.create_network_from_weights(weights, model, dropout=options.network_dropout, args=arguments)
        network = module.create_network(
            model, options.network_dim, options.network_alpha, options.network_dropout, args=arguments
        )
        module.load_weights(network, weights)
        return network
    except UserError as error:
        if error.problem.startswith("--"):
            raise
        raise UserError(f"--network_weights {options.network_weights}: {error.problem}", error.fix) from None


def base_deltas(options: NetworkOptions, model: WanModel) -> Deltas | None:
    """Return what --base_weights adds to the model's weights, known to fit them; None where there is nothing."""
    paths, multipliers = options.base_weights, options.base_weights_multiplier
    if len(multipliers) > len(paths):
        raise UserError(f"--base_weights_multiplier: {len(multipliers)} numbers for {len(paths)} --base_weights files")
    if not paths:
        return None
    multipliers = (*multipliers, *[1.0] * (len(paths) - len(multipliers)))
    names = {name for name, _ in model.named_parameters()}
    loras = []
    for path, multiplier in zip(paths, multipliers, strict=True):
        lora = (read_lora(path, "--base_weights")[0], multiplier, f"--base_weights {path}")
        if unknown := sorted(deltas([lora]).keys() - names):
            raise UserError(
                f"--base_weights {path}: LoRA for another model: {len(unknown)} of its layers are not in the DiT, "
                f"e.g. {unknown[0]}"
            )
        loras.append(lora)
    return deltas(loras)


def network_module(name: str) -> ModuleType:
    """Return the module that makes the network; musubi_tuner's names of our modules are understood."""
    if name.partition(".")[0] == "lycoris":
        raise UserError(
            f"--network_module {name}: networks of the package lycoris-lora compute with the DiT's own weights in "
            "every step, which are not there where layers are swapped, quantised or shared out",
            "use networks.loha or networks.lokr, whose files have the form of theirs",
        )
    ours = name.removeprefix("musubi_tuner.")
    try:
        module = importlib.import_module(ours)
    except ImportError as error:
        raise UserError(
            f"--network_module {name}: cannot be imported ({error})", suggest(ours, NETWORKS) or f"use {NETWORKS[0]}"
        ) from None
    if not hasattr(module, "create_network"):
        raise UserError(f"--network_module {name}: is no network module", f"use {', '.join(NETWORKS)}")
    return module


def network_arguments(items: tuple[str, ...]) -> dict[str, str]:
    """Return `key=value` items as a dictionary; values may hold more equal signs."""
    arguments = {}
    for item in items:
        name, separator, value = item.partition("=")
        if not separator:
            raise UserError(
                f"--network_args {item}: not of the form key=value", "write --network_args rank_dropout=0.1"
            )
        arguments[name.strip()] = value
    return arguments
