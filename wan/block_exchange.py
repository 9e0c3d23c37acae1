"""Blocks in training that live in main memory and visit the device: what is changed there travels back."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from wan.block_swap import Packed, Streamed, packed_bytes
from wan.model import WanModel
from wan.recompute import saving
from wan.streaming import Device

logger = logging.getLogger(__name__)

# What travels of a block: its weights, the sums of their gradients, and what the optimizer remembers of each weight.
WEIGHTS, GRADIENTS, STATES = KINDS = ("weights", "gradients", "states")


def exchange_blocks(model: WanModel, numbers: Sequence[int], slots: int, device: Device, fused: bool) -> "Exchange":
    """Make the model hold the blocks with these numbers in main memory, to be trained; return what moves them.

    fused: the weights are updated in the backward pass. Names, outputs and gradients stay the same.
    """
    blocks = [model.blocks[number] for number in numbers]
    exchange = Exchange(blocks, slots, device, fused)
    for rank, block in enumerate(blocks):
        block.forward = partial(exchange.run, rank, block.forward)
    model.forward = partial(exchange.record, model.forward)
    logger.info(
        "block swap: %d of %d blocks (%.2f GiB each) with what their training takes in main memory, %d of them on the "
        "device at a time",
        *(len(blocks), len(model.blocks), exchange.block_bytes / 2**30, slots),
    )
    return exchange


@dataclass
class Slot:
    """Room on the device for a block, and how much of the block is there."""

    rooms: dict[str, Packed]  # by kind
    rank: int | None = None
    there: set[str] = field(default_factory=set)  # kinds whose newest values are there, or on their way
    fresh: set[str] = field(default_factory=set)  # those of them that are not waited for yet
    changed: set[str] = field(default_factory=set)  # those of them that are newer than at home
    copies: list[Any] = field(default_factory=list)


class Exchange:
    """A few slots on the device for blocks in training, each of which goes home with what was changed there.

    It goes before its slot is used for another block. A rank is the place of a block among those that are swapped.
    A forward pass takes the weights to the device. A fused backward pass, which updates each weight as soon as its
    gradient is there, takes the optimizer's states as well. A plain one takes the gradients so far, and the update,
    which comes after it in the order of the blocks, takes all three.

    Weights, gradients and states are views of the slot from the time that they are needed until the block leaves it,
    and of their home at all other times. Before main memory is read, settle() waits for what is on its way there.
    """

    def __init__(self, blocks: Sequence[nn.Module], slots: int, device: Device, fused: bool):
        assert 1 <= slots <= len(blocks), f"{slots} slots for {len(blocks)} blocks"
        self.device, self.fused = device, fused
        self.parameters = [list(block.parameters()) for block in blocks]
        for block, parameters in zip(blocks, self.parameters, strict=True):
            assert not list(block.buffers()), "what is no parameter is not swapped"
            assert [x.shape for x in parameters] == [x.shape for x in self.parameters[0]]
        self.block_bytes = packed_bytes(self.parameters[0])
        self.bytes_copied, self.bytes_returned = 0, 0
        self._place = {p: (rank, i) for rank, each in enumerate(self.parameters) for i, p in enumerate(each)}
        self._homes: list[dict[str, Packed]] = [{} for _ in blocks]  # by kind
        for parameters, homes in zip(self.parameters, self._homes, strict=True):  # never a second copy of all
            home = _room(homes, WEIGHTS, parameters, device.home)
            for view, parameter in zip(home.views, parameters, strict=True):
                view.copy_(parameter.detach())
            home.show(parameters)
        self._slots = [Slot({}) for _ in range(slots)]
        for slot in self._slots:
            _room(slot.rooms, WEIGHTS, self.parameters[0], device.slot)
        self._by_address = {slot.rooms[WEIGHTS].data.untyped_storage().data_ptr(): slot for slot in self._slots}
        self._summed: set[int] = set()  # the ranks that have gradients
        self._optimizer: Mapping[nn.Parameter, dict[str, Any]] = {}  # its states
        self._entries: list[list[tuple[int, str]]] = [[] for _ in blocks]  # number of parameter and name of states kept
        self._now: tuple[int, Sequence[str]] | None = None  # the rank in use, and for what
        self._forward = False  # in a forward pass that a backward pass may follow

    def record(self, forward: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
        """Return what the model computes, its backward pass being told to find swapped weights by rank."""
        self._forward = True
        try:
            with saving(self._saved):
                return forward(*args, **named)
        finally:
            self._forward = False

    def run(self, rank: int, forward: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
        """Return what a block computes, in a backward pass for gradient checkpointing."""
        self._use(rank, backward=torch.is_grad_enabled() and not self._forward)
        return forward(*args, **named)

    def stow(self, parameter: nn.Parameter) -> None:
        """Have the gradient of a swapped weight travel with its block."""
        rank, number = self._place[parameter]
        slot = self._use(rank, backward=True)
        view = _room(slot.rooms, GRADIENTS, self.parameters[rank], self.device.slot).views[number]
        if parameter.grad is not view:
            parameter.grad = view.copy_(parameter.grad)
        slot.there.add(GRADIENTS)
        slot.changed.add(GRADIENTS)
        self._summed.add(rank)

    def update(
        self,
        parameters: Sequence[nn.Parameter],
        states: Mapping[nn.Parameter, dict[str, Any]],
        step: Callable[[Sequence[nn.Parameter]], None],
    ) -> None:
        """Step parameters and drop their gradients, each swapped block while it is on the device.

        parameters: in the order of the model, the only ones with gradients; step: steps those among the given ones that
        have gradients, each on its own; states: the optimizer's, by parameter.
        """
        self._optimizer = states
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None  # an optimizer passes over what has no gradient
        pairs = ((p, gradient) for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None)
        for rank, run in groupby(pairs, key=lambda pair: self._place.get(pair[0], (None,))[0]):
            present = []
            for parameter, gradient in run:
                parameter.grad = gradient
                present.append(parameter)
            if rank is None:
                step(present)
            else:
                self._update(rank, present, step)
            for parameter in present:
                parameter.grad = None

    def settle(self) -> None:
        """Return once homes hold what was sent there, so that main memory can be read."""
        self.device.settle()

    def _update(
        self, rank: int, parameters: Sequence[nn.Parameter], step: Callable[[Sequence[nn.Parameter]], None]
    ) -> None:
        slot = self._use(rank, backward=True) if self.fused else self._visit(rank, self._next(rank), KINDS)
        for parameter in parameters:  # what an optimizer has made before its first step, where the weight was then
            for name, value in self._optimizer.get(parameter, {}).items():
                if _travels(value) and value.device != parameter.device:
                    self._optimizer[parameter][name] = value.to(parameter.device)
        step(parameters)
        kinds = {WEIGHTS, STATES} if self._states(rank) else {WEIGHTS}
        slot.there.update(kinds)
        slot.changed.update(kinds)
        slot.there.discard(GRADIENTS)
        slot.changed.discard(GRADIENTS)
        self._summed.discard(rank)

    def _use(self, rank: int, backward: bool) -> Slot:
        """Return the slot of a block that is there for a pass; those that come next are on their way."""
        if backward:
            upcoming = range(rank, max(rank - len(self._slots), -1), -1)
            return self._visit(rank, upcoming, (WEIGHTS, STATES if self.fused else GRADIENTS))
        return self._visit(rank, self._next(rank), (WEIGHTS,))

    def _next(self, rank: int) -> Collection[int]:
        """Return the ranks that belong onto the device on the way forward, this one first.

        Where a backward pass will come the last ones stay for it, and its last ones for the next pass.
        """
        count, blocks = len(self._slots), len(self._homes)
        if torch.is_grad_enabled():
            return range(rank, min(rank + count, blocks))
        return [(rank + i) % blocks for i in range(count)]

    def _slot(self, rank: int) -> Slot | None:
        """Return the slot that holds a block, if any."""
        return next((slot for slot in self._slots if slot.rank == rank), None)

    def _visit(self, rank: int, upcoming: Collection[int], kinds: Sequence[str]) -> Slot:
        """Return the slot of a block of which these kinds are there; those of upcoming blocks are on their way."""
        if (rank, kinds) != self._now:
            # Pictures are made in inference mode, and what is allocated in it could not be trained on later.
            with torch.inference_mode(False), torch.no_grad():
                for near in upcoming:
                    self._fetch(near, kinds, upcoming)
                self._receive(rank)
            self._now = rank, kinds
        return self._slot(rank)

    def _fetch(self, rank: int, kinds: Sequence[str], keep: Collection[int]) -> None:
        """Start the copies of what lacks of a block, in the place of a block that is not to be kept."""
        slot, homes = self._slot(rank), self._homes[rank]
        if slot is None:
            slot = next(slot for slot in self._slots if slot.rank not in keep)
            self._send_home(slot)
            slot.rank = rank
        for kind in kinds:
            if kind in slot.there or kind not in homes or (kind == GRADIENTS and rank not in self._summed):
                continue
            room = _room(slot.rooms, kind, homes[kind].views, self.device.slot)
            slot.copies.append(self.device.copy(room.data, homes[kind].data))
            self.bytes_copied += homes[kind].data.nbytes
            slot.there.add(kind)
            slot.fresh.add(kind)

    def _receive(self, rank: int) -> None:
        """Wait for what is on its way to a block's slot, and show it there."""
        slot = self._slot(rank)
        for copy in slot.copies:
            self.device.wait(copy)
        self._show(rank, slot.fresh, slot.rooms)
        slot.copies.clear()
        slot.fresh.clear()

    def _send_home(self, slot: Slot) -> None:
        """Start the copies of what was changed in a slot, and show its block at home."""
        if slot.rank is None:
            return
        pairs = [pair for kind in KINDS if kind in slot.changed for pair in self._changes(slot.rank, kind, slot)]
        if pairs:
            self.device.back(pairs)
            self.bytes_returned += sum(home.nbytes for home, _ in pairs)
        self._show(slot.rank, slot.there - slot.fresh, self._homes[slot.rank])
        for each in (slot.there, slot.fresh, slot.changed, slot.copies):
            each.clear()

    def _changes(self, rank: int, kind: str, slot: Slot) -> list[tuple[Tensor, Tensor]]:
        """Return (home, tensor on the device) of what was changed of one kind, as few pairs as possible."""
        if kind != STATES:
            room = slot.rooms[kind]
            return [(_room(self._homes[rank], kind, room.views, self.device.home).data, room.data)]
        self._entries[rank] = self._states(rank)
        values = [self._optimizer[self.parameters[rank][number]][name] for number, name in self._entries[rank]]
        home = _room(self._homes[rank], kind, values, self.device.home)
        views = slot.rooms[kind].views if kind in slot.rooms else []
        if len(views) == len(values) and all(view is value for view, value in zip(views, values, strict=True)):
            return [(home.data, slot.rooms[kind].data)]
        return list(zip(home.views, values, strict=True))  # which the optimizer has just made

    def _states(self, rank: int) -> list[tuple[int, str]]:
        """Return which states a block has on the device."""
        return [
            (number, name)
            for number, parameter in enumerate(self.parameters[rank])
            for name, value in self._optimizer.get(parameter, {}).items()
            if _travels(value) and value.device == parameter.device
        ]

    def _show(self, rank: int, kinds: Collection[str], packs: Mapping[str, Packed]) -> None:
        """Make some kinds of a block's tensors views of a place. Weights first: gradients have to be where they are."""
        parameters = self.parameters[rank]
        if WEIGHTS in kinds:
            packs[WEIGHTS].show(parameters)
        if GRADIENTS in kinds:
            for parameter, view in zip(parameters, packs[GRADIENTS].views, strict=True):
                if parameter.grad is not None:
                    parameter.grad = view
        if STATES in kinds:
            for (number, name), view in zip(self._entries[rank], packs[STATES].views, strict=True):
                self._optimizer[parameters[number]][name] = view

    def _saved(self, tensor: Tensor) -> Streamed | None:
        """Return what to keep of a view of a slot that the backward pass needs: where it was."""
        slot = self._by_address.get(tensor.untyped_storage().data_ptr())
        if slot is None:
            return None
        return Streamed(
            partial(self._weights, slot.rank), tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()
        )

    def _weights(self, rank: int) -> Tensor:
        """Return the weights of a block in its slot, in a backward pass."""
        return self._use(rank, backward=True).rooms[WEIGHTS].data


def _travels(state: Any) -> bool:
    """Return whether a part of an optimizer's state takes memory; counts of steps stay where the optimizer has them."""
    return isinstance(state, Tensor) and state.ndim > 0


def _room(packs: dict[str, Packed], kind: str, like: Sequence[Tensor], allocate: Callable[[int], Tensor]) -> Packed:
    """Return the place for such tensors among those by kind; it is made, or made anew, where it does not fit."""
    layout = [(tensor.shape, tensor.dtype) for tensor in like]
    if kind not in packs or [(view.shape, view.dtype) for view in packs[kind].views] != layout:
        packs[kind] = Packed(allocate(packed_bytes(like)), like)
    return packs[kind]
