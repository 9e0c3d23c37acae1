"""The two DiTs of Wan2.2, one for noisy and one for less noisy latents, behind the calls of a single one."""

import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.devices import release_memory
from utils.errors import UserError
from utils.options import option
from wan.auto_swap import AutoSwap
from wan.block_swap import SwapOptions
from wan.configs import TASKS, WanConfig
from wan.dit_file import check_dit, check_fp8, dit_dtype
from wan.model import Context, WanModel, WanShape
from wan.streaming import CpuDevice, CudaDevice, Device

logger = logging.getLogger(__name__)

HIGH = "--dit_high_noise"
Load = Callable[[Path, str], WanModel]  # of a file, and the option that names it


def read_boundary(word: str) -> float:
    """Return a noise level from 0 to 1; numbers above 1 are in thousandths. Raises ValueError for what is none."""
    number = float(word)
    level = number / 1000 if number > 1 else number
    if not 0 < level < 1:
        raise ValueError(f"'{word}' is not between 0 and 1, nor between 1 and 1000")
    return level


@dataclass(frozen=True)
class PairOptions:
    """the two models of Wan2.2"""

    dit_high_noise: Path | None = option(
        None, "the model for high noise levels, --dit being that for low ones (default: --dit alone)", remote=True
    )
    timestep_boundary: float | None = option(
        None,
        "noise level from which that one is used, 0.875 or 875 (default: the task's)",
        parse=read_boundary,
        metavar="X",
    )
    offload_inactive_dit: bool = option(False, "keep the model that is not in use in main memory")
    force_v2_1_time_embedding: bool = option(
        False, "accepted for musubi-tuner's command lines: one time embedding for a whole video is the only way here"
    )


def task_config(task: str, options: PairOptions) -> WanConfig:
    """Return what a task has, with the boundary that is asked for. Raises UserError for a task of one model."""
    config = TASKS[task]
    if config.boundary is None:
        pairs = " or ".join(name for name, other in TASKS.items() if other.boundary is not None)
        for name in ("dit_high_noise", "timestep_boundary", "offload_inactive_dit"):
            if getattr(options, name):
                raise UserError(f"--{name}: {task} has one model", f"use --task {pairs}, or leave it out")
    if options.offload_inactive_dit and options.dit_high_noise is None:
        logger.warning("--offload_inactive_dit: ignored without --dit_high_noise")
    if options.force_v2_1_time_embedding:
        logger.info("--force_v2_1_time_embedding: is how the time is embedded here anyway, with the same result")
    return config if options.timestep_boundary is None else replace(config, boundary=options.timestep_boundary)


def check_pair(
    options: PairOptions,
    low: Path,
    shape: WanShape,
    config: WanConfig,
    fp8: bool,
    fp8_scaled: bool,
    fp8_fast: bool = False,
    quantize: str | None = None,
) -> None:
    """Raise UserError unless the file for high noise goes with that for low noise, whose sizes are given."""
    high = options.dit_high_noise
    if high is None:
        return
    other = check_dit(high, config, HIGH)
    if other != shape:
        raise UserError(f"{HIGH} {high}: is of another size than --dit {low}", "use two files of one model")
    check_fp8(high, fp8, fp8_scaled, fp8_fast, quantize, HIGH)
    dtypes = {dit_dtype(low), dit_dtype(high, HIGH)}
    if dtypes == {torch.float16, torch.bfloat16}:
        raise UserError(f"{HIGH} {high}: one of the two files is in fp16, the other in bf16", "use two of one kind")
    if os.path.samefile(low, high):
        logger.warning("%s %s: is the same file as --dit; both sides of the boundary have the same model", HIGH, high)


def load_pair(
    load: Load,
    low: Path,
    options: PairOptions,
    config: WanConfig,
    device: torch.device,
    swap: SwapOptions,
    lazy: bool = False,
) -> "WanModel | DitPair":
    """Return the DiT of --dit, or the pair of it and --dit_high_noise.

    lazy: only one of them is ever in memory, and loaded when the first step asks for it.
    """
    if options.dit_high_noise is None:
        return load(low, "--dit")
    offload = options.offload_inactive_dit
    if swap.auto and not offload and not lazy:
        logger.info("--blocks_to_swap auto: the model that is not in use waits in main memory")
        offload = True
    files = {False: (low, "--dit"), True: (options.dit_high_noise, HIGH)}
    return DitPair(lambda high: load(*files[high]), config.boundary, parking_device(device, swap), offload, lazy)


class DitPair:
    """Two DiTs, of which each call goes to the one for its noise level.

    What WanModel's callers use of one model is here for both: calling it, context(), chosen(), device, dtype.
    offload: the one that is not in use waits in main memory; lazy: it is not even loaded.
    """

    def __init__(
        self,
        load: Callable[[bool], WanModel],
        boundary: float,
        parking: Device,
        offload: bool = False,
        lazy: bool = False,
    ):
        self.boundary, self.parking, self.offload, self.lazy = boundary, parking, offload, lazy
        self._load, self._prepared = load, []
        self._models: dict[bool, WanModel] = {}
        self._high: bool | None = None  # whether the model in use is that for high noise
        self._contexts: weakref.WeakSet[PairContext] = weakref.WeakSet()
        if not lazy:
            self._models[False] = load(False)
            if offload:
                park(self._models[False], parking)
                release_memory(parking.where)
            self._models[True] = load(True)
            self._high = True

    @property
    def models(self) -> list[WanModel]:
        """The models that are in memory."""
        return list(self._models.values())

    @property
    def current(self) -> WanModel:
        """The model in use; of a pair that loads them late, the one that is there."""
        return self._models[self._high]

    @property
    def device(self) -> torch.device:
        return self.parking.where

    @property
    def dtype(self) -> torch.dtype:
        return self.current.dtype

    @property
    def auto_swap(self) -> AutoSwap | None:
        return CurrentAutoSwap(self) if any(hasattr(model, "auto_swap") for model in self.models) else None

    def prepare(self, change: Callable[[WanModel], None]) -> None:
        """Change both models, those that are loaded later when they are."""
        self._prepared.append(change)
        for model in self.models:
            change(model)

    def sides(self, timestep: Tensor) -> list[bool]:
        """Return of each timestep [B], 0 to 1000, whether it is one of the model for high noise."""
        return (timestep >= 1000 * self.boundary).tolist()

    def at(self, high: bool) -> WanModel:
        """Return the model of a side, ready to compute."""
        if self._high is not high:
            # What is made in inference mode could not be used by a training step later.
            with torch.inference_mode(False), torch.no_grad():
                self._switch(high)
            self._high = high
        return self._models[high]

    def _switch(self, high: bool) -> None:
        for context in self._contexts:
            context.forget()
        if self.lazy:
            self._models.clear()
            release_memory(self.device)
            logger.info("loading the model for %s noise", "high" if high else "low")
            self._models[high] = self._load(high)
            for change in self._prepared:
                change(self._models[high])
        elif self.offload:
            exchange(self._models[high], self._models[not high], self.parking)

    def __call__(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Sequence[Tensor],
        y: Tensor | None = None,
        image_features: Tensor | None = None,
        frame_indices: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """Return what WanModel does; without gradients also for samples on both sides of the boundary."""
        sides = self.sides(timestep)
        if len(set(sides)) == 1:
            return self.at(sides[0])(x, timestep, text, y, image_features, frame_indices)
        assert not torch.is_grad_enabled(), "a batch in training is on one side of the boundary"
        found = torch.empty_like(x, dtype=torch.float32)
        for high in (True, False):
            rows = [row for row, side in enumerate(sides) if side is high]
            pictures = None if image_features is None else image_features.unflatten(0, (len(x), -1))[rows].flatten(0, 1)
            found[rows] = self.at(high)(
                x[rows],
                timestep[rows],
                [text[row] for row in rows],
                None if y is None else y[rows],
                pictures,
                None if frame_indices is None else [frame_indices[row] for row in rows],
            )
        return found

    def context(
        self, text: Sequence[Tensor], image_features: Tensor | None = None, reused: bool = False
    ) -> "PairContext":
        """Return what stands for text and image_features in the passes of chosen()."""
        context = PairContext(text, image_features, reused)
        self._contexts.add(context)
        return context

    def chosen(
        self, timestep: float, passes: Mapping[str, Mapping[str, Any]]
    ) -> tuple[WanModel, dict[str, dict[str, Any]]]:
        """Return the model for a timestep, ready to compute, and passes by name with contexts of its own."""
        model = self.at(timestep >= 1000 * self.boundary)
        return model, {name: {**each, "text": each["text"].of(model)} for name, each in passes.items()}


class PairContext:
    """What a batch should show, of which the model in use makes something of its own."""

    def __init__(self, *seen: Any):
        self._seen, self._made = seen, None

    def of(self, model: WanModel) -> Context:
        """Return the context of the model in use."""
        if self._made is None:
            self._made = model.context(*self._seen)
        return self._made

    def twin(self) -> "PairContext":
        """Return another context, whose model's context shares with this one's what is made once."""
        return TwinContext(self)

    def forget(self) -> None:
        """Give memory back before another model comes into use: keys and values can be a gigabyte."""
        self._made = None


class TwinContext(PairContext):
    """See PairContext.twin()."""

    def __init__(self, of: PairContext):
        super().__init__()
        self._of = of

    def of(self, model: WanModel) -> Context:
        return replace(self._of.of(model))


def twin(context: Context | PairContext) -> Context | PairContext:
    """Return another context of the same, which shares what is made of it once."""
    return context.twin() if isinstance(context, PairContext) else replace(context)


class CurrentAutoSwap(AutoSwap):
    """That of whichever model of a pair is in use when memory runs out."""

    def __init__(self, pair: DitPair):
        self.pair = pair

    def widen(self, line: str) -> None:
        self.pair.current.auto_swap.widen(line)


def each_model(dit: "WanModel | DitPair") -> list[WanModel]:
    """Return the models that a DiT is, one or two."""
    return dit.models if isinstance(dit, DitPair) else [dit]


def prepare(dit: "WanModel | DitPair", change: Callable[[WanModel], None]) -> None:
    """Change a DiT, or both models of a pair."""
    dit.prepare(change) if isinstance(dit, DitPair) else change(dit)


# ------------------------------------------------------------------------------------------------ from here to there
def parking_device(device: torch.device, swap: SwapOptions) -> Device:
    """Return how whole models get from a device to main memory and back."""
    if device.type == "cuda":
        return CudaDevice(device, swap.use_pinned_memory_for_block_swap)
    return CpuDevice()


def park(model: WanModel, device: Device) -> None:
    """Move a model to main memory, where it waits to be exchanged or fetched."""
    _rest(model)
    for tensor in _resident(model).values():
        tensor.data = _at_home(tensor, device)
    if device.where.type == "cuda":
        torch.cuda.synchronize(device.where)  # the device may go, with what it has page-locked


def fetch(model: WanModel, device: Device) -> None:
    """Move a model back to the device."""
    for tensor in _resident(model).values():
        tensor.data = tensor.data.to(device.where)
    _resume(model)


def exchange(coming: WanModel, going: WanModel, device: Device) -> None:
    """Let two models change places, tensor by tensor: neither place needs room for more than one tensor besides."""
    _rest(going)
    there, here = _resident(coming), _resident(going)
    for name in dict.fromkeys(chain(here, there)):
        comes, goes = there.get(name), here.get(name)
        if comes is not None and goes is not None and _alike(comes, goes):
            place, home = goes.data, comes.data
            waiting = place.clone()
            place.copy_(home, non_blocking=True)
            home.copy_(waiting, non_blocking=True)
            comes.data, goes.data = place, home
            continue
        if goes is not None:
            goes.data = _at_home(goes, device)
        if comes is not None:
            comes.data = comes.data.to(device.where)
    _resume(coming)


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype)


def _at_home(tensor: Tensor, device: Device) -> Tensor:
    """Return a copy of a tensor in main memory."""
    home = device.home(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
    return home.copy_(tensor.data, non_blocking=True)


def _resident(model: WanModel) -> dict[str, Tensor]:
    """Return the tensors of a model by name but for those of swapped blocks, whose home is elsewhere already."""
    streamed = tuple(f"blocks.{number}." for number in model.ring.numbers) if hasattr(model, "ring") else ()
    return {name: tensor for name, tensor in _named_tensors(model) if not (streamed and name.startswith(streamed))}


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def _rest(model: WanModel) -> None:
    if hasattr(model, "ring"):
        model.ring.rest()


def _resume(model: WanModel) -> None:
    if hasattr(model, "ring"):
        model.ring.resume()
