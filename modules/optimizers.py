"""Optimizer and learning-rate schedule by name."""

import ast
import importlib
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from utils.errors import UserError, first_line
from utils.options import option, suggest

logger = logging.getLogger(__name__)

_NAMES = {
    "adamw": "torch.optim.AdamW",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "adafactor": "transformers.optimization.Adafactor",
}
_FUSED = (torch.optim.Adam, torch.optim.AdamW)
_KERNELS = ("fused", "foreach", "differentiable", "capturable")  # arguments that choose between torch's kernels


def _steps_or_share(text: str) -> int | float:
    """Return "500" as 500 steps, "0.1" and "10%" as a tenth of all steps."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError(f"'{text}' is neither a number of steps nor a share such as 0.1 or 10%") from None
    return int(value) if value == 0 or (value >= 1 and value.is_integer()) else value


@dataclass(frozen=True)
class OptimizerOptions:
    """optimizer and learning rate"""

    optimizer_type: str = option(
        "AdamW",
        "AdamW, AdamW8bit (bitsandbytes), Adafactor, a class of torch.optim, or any class by its dotted path, such as "
        "schedulefree.AdamWScheduleFree",
    )
    optimizer_args: tuple[str, ...] = option(
        (), "arguments of the optimizer, key=value with Python literals: weight_decay=0.01 betas=0.9,0.99"
    )
    learning_rate: float = option(2e-6, "learning rate; usual are 1e-4 to 2e-4 for a LoRA, 1e-5 in fine-tuning")
    max_grad_norm: float = option(1.0, "gradients with a greater norm are scaled down to it; 0: never")
    lr_scheduler: str = option(
        "constant",
        "course of the learning rate",
        choices=(
            "constant",
            "constant_with_warmup",
            "linear",
            "cosine",
            "cosine_with_restarts",
            "polynomial",
            "inverse_sqrt",
            "cosine_with_min_lr",
            "warmup_stable_decay",
            "rex",
            "piecewise_constant",
        ),
    )
    lr_scheduler_type: str | None = option(
        None, "a class of torch.optim.lr_scheduler, or any by its dotted path, in place of --lr_scheduler"
    )
    lr_scheduler_args: tuple[str, ...] = option(
        (), "its arguments, key=value with Python literals; rex: rex_alpha, rex_beta; piecewise_constant: step_rules"
    )
    lr_warmup_steps: float = option(
        0, "optimizer steps over which the rate rises from 0, or their share: 500, 0.1, 10%", parse=_steps_or_share
    )
    lr_decay_steps: float = option(
        0, "warmup_stable_decay: steps over which the rate falls at the end, or their share", parse=_steps_or_share
    )
    lr_scheduler_num_cycles: int = option(1, "cosine_with_restarts: number of cycles")
    lr_scheduler_power: float = option(1, "polynomial: power")
    lr_scheduler_timescale: int | None = option(None, "inverse_sqrt: timescale (default: the warm-up's steps)")
    lr_scheduler_min_lr_ratio: float | None = option(
        None, "cosine_with_min_lr, warmup_stable_decay, rex: lowest rate as a share of --learning_rate"
    )


def check_optimizer(
    options: OptimizerOptions, device: torch.device, total_steps: int, shapes: Sequence[tuple[int, ...]] = ((64, 64),)
) -> str:
    """Return the optimizer's class by name; UserError for one, or a schedule, that cannot be built or fails to step.

    shapes: of the kinds of parameters that it has to take; below 64 * 64 numbers, 8-bit optimizers are not put to use.
    """
    if not options.learning_rate >= 0:
        raise UserError(f"--learning_rate {options.learning_rate:g}: must not be negative")
    if not options.max_grad_norm >= 0:
        raise UserError(f"--max_grad_norm {options.max_grad_norm:g}: must not be negative", "0 switches clipping off")
    weights = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    optimizer, name = make_optimizer(options, [{"params": weights, "lr": options.learning_rate}])
    make_schedule(options, optimizer, total_steps)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    try:
        if hasattr(optimizer, "train"):
            optimizer.train()
        optimizer.step()
    except Exception as error:
        raise UserError(
            f"--optimizer_type {options.optimizer_type}: cannot run on {device} ({first_line(error)})",
            "use --optimizer_type AdamW",
        ) from error
    return name.partition("(")[0]


def make_optimizer(
    options: OptimizerOptions, groups: Sequence[dict[str, Any]], fused: bool = True
) -> tuple[Optimizer, str]:
    """Return the optimizer of the parameter groups, and its description for metadata: "module.Class(args)".

    fused: by torch's fused kernels, where it has them and the arguments do not choose. They are several times faster
    than the others and need no copies of the parameters.
    """
    kind = _optimizer_class(options.optimizer_type)
    arguments = parse_arguments(options.optimizer_args, "--optimizer_args")
    known = inspect.signature(kind.__init__).parameters
    takes_any = any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    for name in arguments:
        if name not in known and not takes_any:
            raise UserError(
                f"--optimizer_args {name}: {kind.__name__} has no such argument",
                suggest(name, known) or f"it has {', '.join(list(known)[2:])}",
            )
    fuses = fused and kind in _FUSED and not any(arguments.get(name) is not None for name in _KERNELS)
    kernels = {"fused": True} if fuses else {}
    rate: float | None = options.learning_rate
    if _is_adafactor(kind) and arguments.get("relative_step", True):
        rate = None  # it finds its own, and knows --learning_rate as the one to start from alone
        groups = [{**group, "lr": None} for group in groups]
    try:
        optimizer = kind([dict(group) for group in groups], lr=rate, **arguments | kernels)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--optimizer_type {options.optimizer_type}: {kind.__name__} refuses its arguments ({first_line(error)})",
            "check --optimizer_args and --learning_rate",
        ) from error
    described = ",".join(f"{name}={value}" for name, value in arguments.items())
    name = f"{kind.__module__}.{kind.__name__}" + (f"({described})" if described else "")
    return optimizer, name


def make_schedule(options: OptimizerOptions, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """Return the schedule of the learning rate over `total_steps` optimizer steps."""
    inner = getattr(optimizer, "optimizer", optimizer)  # of accelerate's
    if options.lr_scheduler_type:
        return _schedule_of_class(options, inner)
    if type(inner).__name__.lower().endswith("schedulefree"):
        if options.lr_scheduler != "constant" or options.lr_warmup_steps:
            raise UserError(
                f"--lr_scheduler {options.lr_scheduler}: {type(inner).__name__} has no schedule",
                "leave out --lr_scheduler and --lr_warmup_steps; its own warm-up is an argument of the optimizer",
            )
        return LambdaLR(inner, lambda step: 1.0)
    if _is_adafactor(type(inner)) and inner.defaults["relative_step"]:
        from transformers.optimization import AdafactorSchedule

        return AdafactorSchedule(inner, options.learning_rate)
    warmup, decay = (_steps(steps, total_steps) for steps in (options.lr_warmup_steps, options.lr_decay_steps))
    if options.lr_scheduler == "constant":
        if warmup:
            raise UserError(
                f"--lr_warmup_steps {options.lr_warmup_steps}: --lr_scheduler constant has no warm-up",
                "use --lr_scheduler constant_with_warmup",
            )
        return LambdaLR(optimizer, lambda step: 1.0)
    floor = options.lr_scheduler_min_lr_ratio
    if options.lr_scheduler == "cosine_with_min_lr" and floor is None:
        raise UserError("--lr_scheduler cosine_with_min_lr: needs the lowest rate", "add --lr_scheduler_min_lr_ratio X")
    if warmup + decay > total_steps:
        raise UserError(
            f"--lr_warmup_steps and --lr_decay_steps: together {warmup + decay} of {total_steps} steps", "use fewer"
        )
    if options.lr_scheduler == "rex":
        shape = {"rex_alpha": 0.1, "rex_beta": 0.9} | parse_arguments(options.lr_scheduler_args, "--lr_scheduler_args")
        if unknown := shape.keys() - {"rex_alpha", "rex_beta"}:
            raise UserError(f"--lr_scheduler_args {min(unknown)}: rex has no such argument", "rex_alpha or rex_beta")
        course = partial(rex, warmup=warmup, total=total_steps, floor=0.01 if floor is None else floor)
        return LambdaLR(optimizer, lambda step: course(step, alpha=shape["rex_alpha"], beta=shape["rex_beta"]))
    if options.lr_scheduler == "piecewise_constant":
        given = parse_arguments(options.lr_scheduler_args, "--lr_scheduler_args")
        return LambdaLR(optimizer, piecewise_constant(str(given.get("step_rules", ""))))
    specific: dict[str, dict[str, Any]] = {
        "cosine_with_restarts": {"num_cycles": options.lr_scheduler_num_cycles},
        "polynomial": {"power": options.lr_scheduler_power},
        "inverse_sqrt": {"timescale": options.lr_scheduler_timescale},
        "cosine_with_min_lr": {"num_cycles": options.lr_scheduler_num_cycles / 2, "min_lr_rate": floor},
        "warmup_stable_decay": {"num_decay_steps": decay, "min_lr_ratio": floor or 0.0},
    }
    # Heavy, and needed by these schedules alone.
    from transformers.optimization import get_scheduler

    return get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=specific.get(options.lr_scheduler, {}),
    )


def rex(step: int, warmup: int, total: int, floor: float, alpha: float = 0.1, beta: float = 0.9) -> float:
    """Return the share of the learning rate at a step: after the warm-up, floor + (1 - floor) z / (alpha + beta z).

    z: the share of the steps that are left. Chen, Wolfe, Kyrillidis 2021, "REX: Revisiting Budgeted Training", with
    alpha = beta = 1/2 there.
    """
    if step < warmup:
        return step / warmup
    left = max(total - step, 0) / max(total - warmup, 1)
    return floor + (1 - floor) * left / (alpha + beta * left)


def piecewise_constant(rules: str) -> Callable[[int], float]:
    """Return the course of "1:5,0.5:20,0.1": the whole rate for 5 steps, half of it until step 20, then a tenth."""
    *parts, last = rules.split(",")
    try:
        pairs = [(float(share), int(until)) for share, until in (part.split(":") for part in parts)]
        rest = float(last)
    except ValueError:
        raise UserError(
            f"--lr_scheduler_args step_rules={rules!r}: no course of the learning rate",
            """write step_rules='"1:500,0.1"': all of it for 500 steps, then a tenth""",
        ) from None
    return lambda step: next((share for share, until in pairs if step < until), rest)


def _schedule_of_class(options: OptimizerOptions, optimizer: Optimizer) -> LRScheduler:
    name = options.lr_scheduler_type
    module_name, _, class_name = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module_name or "torch.optim.lr_scheduler"), class_name)
    except (ImportError, AttributeError) as error:
        known = [word for word in dir(torch.optim.lr_scheduler) if word[0].isupper()]
        fix = suggest(class_name, known) or "a class of torch.optim.lr_scheduler, or a dotted path"
        raise UserError(f"--lr_scheduler_type {name}: unknown ({first_line(error)})", fix) from None
    if not (isinstance(kind, type) and issubclass(kind, LRScheduler)) or kind is ReduceLROnPlateau:
        raise UserError(f"--lr_scheduler_type {name}: is no schedule that goes by steps alone", "use another class")
    try:
        return kind(optimizer, **parse_arguments(options.lr_scheduler_args, "--lr_scheduler_args"))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--lr_scheduler_type {name}: refuses its arguments ({first_line(error)})", "check --lr_scheduler_args"
        ) from None


def _is_adafactor(kind: type[Optimizer]) -> bool:
    return kind.__module__ == "transformers.optimization" and kind.__name__ == "Adafactor"


def parse_arguments(items: Sequence[str], option_name: str) -> dict[str, Any]:
    """Return `key=value` items with the values read as Python literals; only the first "=" separates."""
    arguments = {}
    for item in items:
        name, separator, value = item.partition("=")
        if not separator or not name.strip().isidentifier():
            raise UserError(
                f"{option_name} {item}: not of the form key=value", f"write {option_name} weight_decay=0.01"
            )
        try:
            arguments[name.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise UserError(
                f"{option_name} {item}: the value is no Python literal", "numbers go bare, words into inner quotes"
            ) from None
    return arguments


def _steps(steps: float, total: int) -> int:
    return steps if isinstance(steps, int) else round(steps * total)


def _optimizer_class(name: str) -> type[Optimizer]:
    path = _NAMES.get(name.lower(), name)
    module_name, _, class_name = path.rpartition(".")
    module_name = module_name or "torch.optim"
    try:
        kind = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, OSError, RuntimeError) as error:
        package = module_name.split(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        why = f"{package} is not installed" if missing else f"{module_name} cannot be imported ({first_line(error)})"
        raise UserError(f"--optimizer_type {name}: {why}", f"pip install {package}, or use AdamW") from None
    except AttributeError:
        known = [*_NAMES, *(word for word in dir(torch.optim) if word[0].isupper())]
        fix = suggest(name, known) or "AdamW, AdamW8bit, a class of torch.optim, or a dotted path"
        raise UserError(f"--optimizer_type {name}: unknown optimizer", fix) from None
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise UserError(f"--optimizer_type {name}: {path} is no optimizer class", "use AdamW or AdamW8bit")
    return kind
