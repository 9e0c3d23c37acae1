"""LoRA for Wan's DiT: which layers get a branch, and what `--network_module networks.lora_wan` finds."""

import ast
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from networks.formats import to_default
from networks.lora import Dropouts, LoRABranch, LoRANetwork, Target, targets_in
from utils.errors import UserError
from utils.options import suggest

logger = logging.getLogger(__name__)

DEFAULT_RANK = 4
_DEFAULT_EXCLUSION = r".*(patch_embedding|text_embedding|time_embedding|time_projection|norm|head).*"


@dataclass(frozen=True)
class NetworkArguments:
    """What `--network_args key=value ...` can say."""

    exclude_patterns: tuple[re.Pattern, ...] = ()  # full matches of dotted layer paths get no branch ...
    include_patterns: tuple[re.Pattern, ...] = ()  # ... unless one of these matches too
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    loraplus_lr_ratio: float | None = None  # learning rate of lora_up, as a multiple of lora_down's
    verbose: bool = False
    conv_dim: int | None = None  # there are no convolutions in Wan's blocks; accepted for other scripts' sake
    conv_alpha: float | None = None


def parse_network_args(args: Mapping[str, str] | None) -> NetworkArguments:
    """Return the network arguments checked and typed. Raises UserError for unknown names and values of no use."""
    readers = {
        "exclude_patterns": _patterns,
        "include_patterns": _patterns,
        "rank_dropout": _probability,
        "module_dropout": _probability,
        "loraplus_lr_ratio": lambda name, value: _number(name, value, float, above=0),
        "verbose": lambda name, value: value == "True",
        "conv_dim": lambda name, value: _number(name, value, int, above=0),
        "conv_alpha": lambda name, value: _number(name, value, float),
    }
    for name in args or {}:
        if name not in readers:
            fix = suggest(name, readers) or f"choose from {', '.join(readers)}"
            raise UserError(f"--network_args {name}: unknown network argument", fix)
    return NetworkArguments(**{name: readers[name](name, value) for name, value in (args or {}).items()})


def create_network(
    model: nn.Module,
    dim: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    multiplier: float = 1.0,
    args: Mapping[str, str] | None = None,
) -> LoRANetwork:
    """Return a new LoRA for the model's blocks, not yet attached; it changes nothing until it is trained.

    dim: rank, 4 when None. alpha: the update is scaled by alpha / rank; None or 0 stands for the rank.
    args: raw `--network_args`. Raises UserError when no layer is left.
    """
    options = parse_network_args(args)
    rank = dim or DEFAULT_RANK
    dropouts = Dropouts(dropout or 0.0, options.rank_dropout, options.module_dropout)
    targets = selected(targets_in(model), options)
    branches = {
        target.name: LoRABranch(target.inputs, target.outputs, rank, alpha or rank, dropouts) for target in targets
    }
    logger.info("LoRA: rank %d, alpha %g, %d layers", rank, alpha or rank, len(branches))
    if options.verbose:
        for target in targets:
            logger.info("  %s: %d > %d > %d", target.path, target.inputs, rank, target.outputs)
    return LoRANetwork(branches, multiplier, options.loraplus_lr_ratio)


def create_network_from_weights(
    state_dict: Mapping[str, Tensor],
    model: nn.Module | None = None,
    multiplier: float = 1.0,
    dropout: float | None = None,
    args: Mapping[str, str] | None = None,
) -> LoRANetwork:
    """Return a network with the ranks, alphas and weights of a LoRA file in any known format, not yet attached.

    Raises UserError when the file is no LoRA, or one for another model than `model`.
    """
    options = parse_network_args(args)
    dropouts = Dropouts(dropout or 0.0, options.rank_dropout, options.module_dropout)
    branches = {}
    for name, (down, up, alpha) in plain_weights(state_dict).items():
        branches[name] = LoRABranch(down.shape[1], up.shape[0], down.shape[0], alpha, dropouts)
        branches[name].load(down, up, alpha)
    network = LoRANetwork(branches, multiplier, options.loraplus_lr_ratio)
    if model is not None:
        network.check({target.name: (target.inputs, target.outputs) for target in targets_in(model)})
    return network


def load_weights(network: LoRANetwork, state_dict: Mapping[str, Tensor]) -> None:
    """Start the network from a LoRA file of the same rank, in any known format; alphas come from the file.

    Layers that only one side has are counted in a warning. Raises UserError when ranks differ or nothing fits.
    """
    weights, branches = plain_weights(state_dict), dict(network.branches())
    common = [name for name in branches if name in weights]
    if not common:
        raise UserError("LoRA for another model: none of its layers is in this network", "check the file")
    for name in common:
        (down, up, alpha), branch = weights[name], branches[name]
        if down.shape[0] != branch.rank:
            raise UserError(
                f"{name} has rank {down.shape[0]}, the network rank {branch.rank}",
                f"add --dim_from_weights, or use --network_dim {down.shape[0]}",
            )
        if (down.shape, up.shape) != (branch.lora_down.weight.shape, branch.lora_up.weight.shape):
            raise UserError(
                f"LoRA for another model: {name} maps {down.shape[1]} to {up.shape[0]} channels, the model's layer"
                f" {branch.lora_down.in_features} to {branch.lora_up.out_features}"
            )
        branch.load(down, up, alpha)
    missing, unused = len(branches) - len(common), len(weights) - len(common)
    if missing or unused:
        logger.warning("%d layers start from zero, %d layers of the file are not used", missing, unused)


def plain_weights(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return (down, up, alpha) by LoRA name. Raises UserError for what is no plain LoRA of linear layers."""
    weights = to_default(state_dict)
    foreign = [key for key in weights if not key.endswith((".lora_down.weight", ".lora_up.weight", ".alpha"))]
    if foreign:
        raise UserError(
            f"not a plain LoRA: {len(foreign)} tensors of another kind, e.g. {foreign[0]}",
            "it can be merged into the base model, but not trained on",
        )
    layers = {}
    for key in [key for key in weights if key.endswith(".lora_down.weight")]:
        name = key.removesuffix(".lora_down.weight")
        down, up = weights[key], weights.get(f"{name}.lora_up.weight")
        if up is None or down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
            raise UserError(f"LoRA: {name} has no lora_down and lora_up that fit together", "use a complete LoRA file")
        layers[name] = (down, up, float(weights[f"{name}.alpha"]))
    return layers


def selected(targets: Sequence[Target], options: NetworkArguments) -> list[Target]:
    """Return the targets that the patterns leave. Raises UserError when none is left."""
    exclude = [re.compile(_DEFAULT_EXCLUSION), *options.exclude_patterns]

    def wanted(path: str) -> bool:
        excluded = any(pattern.fullmatch(path) for pattern in exclude)
        return not excluded or any(pattern.fullmatch(path) for pattern in options.include_patterns)

    left = [target for target in targets if wanted(target.path)]
    if targets and not left:
        raise UserError(
            f"--network_args exclude_patterns: all {len(targets)} layers are excluded",
            f"patterns must match whole names such as {targets[0].path}; include_patterns re-admits layers",
        )
    return left


def _patterns(name: str, value: str) -> tuple[re.Pattern, ...]:
    """Return the regular expressions in a Python list such as "[r'.*ffn.*']"."""
    try:
        texts = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        texts = None
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"--network_args {name}={value}: not a list of regular expressions",
            f"write it as a Python list: \"{name}=[r'.*ffn.*']\"",
        )
    try:
        return tuple(re.compile(text) for text in texts)
    except re.error as error:
        raise UserError(f"--network_args {name}={value}: not a regular expression ({error})") from None


def _number(name: str, value: str, kind: type, above: float = float("-inf")) -> float:
    try:
        number = kind(value)
    except ValueError:
        raise UserError(f"--network_args {name}={value}: not a number") from None
    if not number > above:
        raise UserError(f"--network_args {name}={value}: must be greater than {above}")
    return number


def _probability(name: str, value: str) -> float:
    number = _number(name, value, float)
    if not 0 <= number < 1:
        raise UserError(f"--network_args {name}={value}: must be from 0 to below 1")
    return number
