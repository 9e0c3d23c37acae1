"""Networks of branches for Wan's DiT, new or from a file: which layers get one, and what `--network_args` say."""

import ast
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from networks.formats import read_layers
from networks.lora import Branch, Dropouts, LoRABranch, LoRANetwork, Target, lora_name, targets_in
from utils.errors import UserError
from utils.options import suggest

logger = logging.getLogger(__name__)

DEFAULT_RANK = 4
# By the first letters of a part's name, what trains on it.
_MODULES = {"lora_": "networks.lora_wan", "hada_": "networks.loha", "lokr_": "networks.lokr"}
_DEFAULT_EXCLUSION = r".*(patch_embedding|text_embedding|time_embedding|time_projection|norm|head).*"


@dataclass(frozen=True)
class NetworkArguments:
    """What `--network_args key=value ...` can say."""

    exclude_patterns: tuple[re.Pattern, ...] = ()  # full matches of dotted layer paths get no branch ...
    include_patterns: tuple[re.Pattern, ...] = ()  # ... unless one of these matches too
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    loraplus_lr_ratio: float | None = None  # learning rate of the factors that start at zero, over that of the others
    verbose: bool = False
    factor: int = -1  # of LoKr
    conv_dim: int | None = None  # there are no convolutions in Wan's blocks; accepted for other scripts' sake
    conv_alpha: float | None = None


def parse_network_args(args: Mapping[str, str] | None, branch_type: type[Branch] = LoRABranch) -> NetworkArguments:
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
        **({"factor": _factor} if "factor" in branch_type.arguments else {}),
    }
    for name in args or {}:
        if name not in readers:
            fix = suggest(name, readers) or f"choose from {', '.join(readers)}"
            raise UserError(f"--network_args {name}: unknown network argument", fix)
    return NetworkArguments(**{name: readers[name](name, value) for name, value in (args or {}).items()})


def create_network(
    branch_type: type[Branch],
    model: nn.Module,
    dim: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    multiplier: float = 1.0,
    args: Mapping[str, str] | None = None,
) -> LoRANetwork:
    """Return a new network for the model's blocks, not yet attached; it changes nothing until it is trained.

    dim: rank, 4 when None. alpha: the update is scaled by alpha / rank; None or 0 stands for the rank.
    args: raw `--network_args`. Raises UserError when no layer is left.
    """
    options = parse_network_args(args, branch_type)
    rank = dim or DEFAULT_RANK
    dropouts = Dropouts(dropout or 0.0, options.rank_dropout, options.module_dropout)
    own = {name: getattr(options, name) for name in branch_type.arguments}
    targets = selected(targets_in(model), options)
    branches = {
        target.name: branch_type(target.inputs, target.outputs, rank, alpha or rank, dropouts, **own)
        for target in targets
    }
    logger.info("%s: rank %d, alpha %g, %d layers", branch_type.kind, rank, alpha or rank, len(branches))
    if options.verbose:
        for target in targets:
            numbers = sum(parameter.numel() for parameter in branches[target.name].parameters())
            logger.info("  %s: %d > %d, %s numbers", target.path, target.inputs, target.outputs, f"{numbers:,}")
    return LoRANetwork(branches, multiplier, options.loraplus_lr_ratio)


def create_network_from_weights(
    branch_type: type[Branch],
    state_dict: Mapping[str, Tensor],
    model: nn.Module | None = None,
    multiplier: float = 1.0,
    dropout: float | None = None,
    args: Mapping[str, str] | None = None,
) -> LoRANetwork:
    """Return a network with the ranks, alphas and weights of a file in any known format, not yet attached.

    Raises UserError when the file is of another kind, or one for another model than `model`.
    """
    options = parse_network_args(args, branch_type)
    dropouts = Dropouts(dropout or 0.0, options.rank_dropout, options.module_dropout)
    branches = {
        name: branch_type.from_parts(parts, dropouts)
        for name, parts in trainable_parts(state_dict, branch_type).items()
    }
    network = LoRANetwork(branches, multiplier, options.loraplus_lr_ratio)
    if model is not None:
        network.check({target.name: (target.inputs, target.outputs) for target in targets_in(model)})
    return network


def load_weights(network: LoRANetwork, state_dict: Mapping[str, Tensor]) -> None:
    """Start the network from a file of the same kind and rank, in any known format; alphas come from the file.

    Layers that only one side has are counted in a warning. Raises UserError when ranks differ or nothing fits.
    """
    branches = dict(network.branches())
    branch_type = type(next(iter(branches.values())))
    weights = trainable_parts(state_dict, branch_type)
    common = [name for name in branches if name in weights]
    if not common:
        raise UserError("LoRA for another model: none of its layers is in this network", "check the file")
    for name in common:
        branch, there = branches[name], branch_type.from_parts(weights[name], Dropouts())
        if (there.inputs, there.outputs) != (branch.inputs, branch.outputs):
            raise UserError(
                f"LoRA for another model: {name} maps {there.inputs} to {there.outputs} channels, the model's layer"
                f" {branch.inputs} to {branch.outputs}"
            )
        if _shapes(there) != _shapes(branch):
            if there.rank != branch.rank:
                raise UserError(
                    f"{name} has rank {there.rank}, the network rank {branch.rank}",
                    f"add --dim_from_weights, or use --network_dim {there.rank}",
                )
            raise UserError(
                f"{name} is made of other factors: {_shapes(there)}, the network's are {_shapes(branch)}",
                "add --dim_from_weights",
            )
        branch.load(weights[name])
    missing, unused = len(branches) - len(common), len(weights) - len(common)
    if missing or unused:
        logger.warning("%d layers start from zero, %d layers of the file are not used", missing, unused)


def _shapes(branch: Branch) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in branch.named_parameters()}


def trainable_parts(state_dict: Mapping[str, Tensor], branch_type: type[Branch]) -> dict[str, dict[str, Tensor]]:
    """Return the parts of each layer by LoRA name. Raises UserError for what such branches cannot go on with."""
    layers = read_layers(state_dict)
    for path, parts in layers.items():
        if foreign := sorted(set(parts) - branch_type.parts - {"alpha"}):
            module = _module_for(foreign[0])
            fix = "it can be merged into the base model with --base_weights, but not trained on"
            if module and module != _module_for(min(branch_type.parts)):
                fix = f"use --network_module {module}"
            raise UserError(f"not a plain {branch_type.kind}: it has {path}.{foreign[0]}", fix)
        if any(tensor.ndim != 2 for part, tensor in parts.items() if part != "alpha"):
            raise UserError(
                f"{branch_type.kind}: {path} is no linear layer", "use a file for the blocks' linear layers"
            )
    return {lora_name(path): parts for path, parts in layers.items()}


def _module_for(part: str) -> str | None:
    return next((module for start, module in _MODULES.items() if part.startswith(start)), None)


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


def _factor(name: str, value: str) -> int:
    number = _number(name, value, int)
    if number < 1 and number != -1:
        raise UserError(f"--network_args {name}={value}: must be at least 1, or -1 for factors of about the same size")
    return number
