"""Blocks that live in main memory and visit the device: a ring of buffers that frozen weights stream through."""

import contextlib
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.files import require_writable_folder
from utils.options import option
from wan.disk import Disk, DiskHome
from wan.memory import aligned
from wan.model import WanModel
from wan.recompute import saving
from wan.streaming import CpuDevice, CudaDevice, Device

logger = logging.getLogger(__name__)

AUTO = "auto"
_GIB = 1 << 30


def number_or_auto(word: str) -> int | str:
    """Return a whole number, or AUTO; raises ValueError for anything else."""
    try:
        return AUTO if word.lower() == AUTO else int(word)
    except ValueError:
        raise ValueError(f"'{word}' is neither a whole number nor auto") from None


@dataclass(frozen=True)
class SwapOptions:
    """block swap"""

    blocks_to_swap: int | str = option(
        0,
        "DiT blocks whose weights are held in main memory, up to all of them; auto: as many as free memory asks for",
        parse=number_or_auto,
        metavar="N|auto",
    )
    block_swap_ring_size: int | None = option(
        None, "how many of these are on the GPU at a time, the one in use and the next (default: 2)"
    )
    use_pinned_memory_for_block_swap: bool = option(
        True, "page-lock that main memory, which copies need to run beside the computation"
    )

    block_swap_h2d_only: bool = option(
        False, "accepted for musubi-tuner's command lines: weights that stay as they are only ever travel one way here"
    )
    weights_on_disk: bool = option(
        False, "leave these blocks on the disk instead of in main memory, and read each ahead of its use"
    )
    weights_on_disk_dir: Path | None = option(
        None, "folder for those that --dit does not hold as they are needed (default: the folder of --dit)"
    )

    @property
    def auto(self) -> bool:
        return self.blocks_to_swap == AUTO

    @property
    def slots(self) -> int:
        return slots_for(self.blocks_to_swap, self.block_swap_ring_size)


def slots_for(swapped: int, ring_size: int | None) -> int:
    """Return how many of so many swapped blocks are on the device at a time."""
    return min(ring_size or 2, swapped)


def check_swap(options: SwapOptions, blocks: int) -> None:
    """Raise UserError for numbers that a DiT of so many blocks has no use for."""
    swapped, slots = options.blocks_to_swap, options.block_swap_ring_size
    check_count(swapped, blocks, "the DiT", "--blocks_to_swap")
    most = blocks if options.auto else swapped
    if slots is not None and slots < 1:
        raise UserError(
            f"--block_swap_ring_size {slots}: there must be room for the block in use", "use 2, or leave it out"
        )
    if slots is not None and not most:
        logger.warning("--block_swap_ring_size %d: ignored without --blocks_to_swap", slots)
    elif slots is not None and slots > most:
        what = f"the DiT's {blocks} blocks" if options.auto else f"--blocks_to_swap {swapped}"
        raise UserError(f"--block_swap_ring_size {slots}: is more than {what}", "leave it out, or use fewer")
    if options.block_swap_h2d_only:
        logger.info("--block_swap_h2d_only: is how frozen blocks are swapped here anyway")
    folder = options.weights_on_disk_dir
    if options.weights_on_disk and not most:
        raise UserError("--weights_on_disk: is for blocks that are swapped", "add --blocks_to_swap auto")
    if folder is not None and not options.weights_on_disk:
        raise UserError(f"--weights_on_disk_dir {folder}: is for --weights_on_disk", "add that, or leave this out")
    if folder is not None:
        require_writable_folder(folder, "--weights_on_disk_dir")


def check_count(swapped: int | str, blocks: int, model: str, option: str) -> None:
    """Raise UserError for a number of blocks to swap that a model of so many blocks does not have."""
    if swapped != AUTO and swapped < 0:
        raise UserError(f"{option} {swapped}: must not be negative", "0 keeps all blocks on the GPU")
    if swapped != AUTO and swapped > blocks:
        raise UserError(f"{option} {swapped}: {model} has {blocks} blocks", f"use {blocks} or fewer, or auto")


def streamed_blocks(blocks: int, swapped: int) -> list[int]:
    """Return the numbers of the blocks to swap, spread evenly, so that each copy has as long to run as the others."""
    return [(2 * i + 1) * blocks // (2 * swapped) for i in range(swapped)]


def stream_blocks(
    model: WanModel, numbers: Sequence[int], slots: int, device: "Device", disk: Disk | None = None
) -> "Ring":
    """Make the model hold the weights of the blocks with these numbers in main memory; return their ring.

    The blocks are frozen, and may be on any device. Names, outputs and gradients stay the same. disk: where they are
    kept instead of in main memory.
    """
    model.ring = ring = Ring(model.blocks, device, disk)
    model.forward = partial(ring.record, model.forward)
    model.velocities = partial(ring.velocities, model)
    ring.stream(numbers, slots)
    return ring


def streaming_device(device: torch.device | str, options: SwapOptions, name: str = "--blocks_to_swap") -> Device:
    """Return how weights are streamed to a device; name: of the option that asks for it."""
    if torch.device(device).type == "cuda":
        return CudaDevice(torch.device(device), options.use_pinned_memory_for_block_swap)
    if not (options.auto or options.weights_on_disk):
        logger.warning("%s: saves nothing on a CPU, whose memory is main memory", name)
    return CpuDevice(options.weights_on_disk)


class Packed:
    """The tensors of a block one after the other in bytes [block_bytes], uint8."""

    def __init__(self, data: Tensor, like: Sequence[Tensor]):
        self.data, self.views, start = data, [], 0
        for tensor in like:
            view = data[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            self.views.append(view)
            start += aligned(tensor.nbytes)

    def show(self, tensors: Sequence[Tensor]) -> None:
        """Make tensors, the first or all of those whose values the bytes are, views of them."""
        for tensor, view in zip(tensors, self.views, strict=False):
            tensor.data = view


class Home:
    """The weights of a block while it is not on the device: packed, in main memory."""

    def __init__(self, tensors: Sequence[Tensor], size: int, device: Device):
        self.packed, self.device = Packed(device.home(size), tensors), device
        for view, tensor in zip(self.packed.views, tensors, strict=True):
            view.copy_(tensor)
        self.show(tensors)

    def show(self, tensors: Sequence[Tensor]) -> None:
        """Make the block's tensors what they are while it is not on the device."""
        self.packed.show(tensors)

    def send(self, slot: Tensor) -> Any:
        """Start to bring the weights into a slot, or as many of the first as fit; return what to wait for."""
        return self.device.copy(slot, self.packed.data[: len(slot)])

    def wait(self, copy: Any) -> None:
        """Let computation that begins from now on see the weights in the slot."""
        self.device.wait(copy)


class Streamed(NamedTuple):
    """A view of a streamed weight that a backward pass will need, in place of memory that others overwrite by then."""

    bytes: Callable[[], Tensor]  # returns the slot that the weight is in then
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # in the slot, in elements

    def tensor(self) -> Tensor:
        return self.bytes().view(self.dtype).as_strided(self.size, self.stride, self.offset)


class Ring:
    """A few slots on the device for the weights of blocks that are needed in order, again and again, or there and back.

    Each streamed block's weights are packed into one run of bytes in main memory, their home, and only ever copied from
    there. They are views of their home but for those of the block last used, which are views of its slot. Where their
    home is on the disk, they read as NaN. A rank is the place of a block among those that are streamed.

    What only makes keys and values of a text is packed last, and not copied where these are kept from an earlier step.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: Device, disk: Disk | None = None):
        self.device, self.disk = device, disk
        named = [sorted((*block.named_parameters(), *block.named_buffers()), key=_is_spared) for block in blocks]
        self.names = [[f"blocks.{number}.{name}" for name, _ in each] for number, each in enumerate(named)]
        self.tensors = [[tensor for _, tensor in each] for each in named]
        self.needed = sum(not _is_spared(each) for each in named[0])  # tensors that are always copied
        for tensors in self.tensors:
            assert not any(tensor.requires_grad for tensor in tensors), "weights in training cannot be streamed"
            assert [(x.shape, x.dtype) for x in tensors] == [(x.shape, x.dtype) for x in self.tensors[0]]
        self.block_bytes = packed_bytes(self.tensors[0])
        self.needed_bytes = packed_bytes(self.tensors[0][: self.needed])
        self.loads, self.bytes_copied = 0, 0
        self.numbers: list[int] = []  # of the streamed blocks, by rank
        self.homes: list[Home | DiskHome] = []
        self.slots: list[Packed] = []
        self._count = 0  # of slots, also while the ring rests
        self._held: list[int | None] = []  # the rank in each slot
        self._whole: list[bool] = []  # whether all of it is there
        self._copies: list[Any] = []
        self._spared: Callable[[int], bool] = lambda number: False  # whether a block's keys and values are kept
        self._by_address: dict[int, int] = {}
        self._last: int | None = None  # the rank in use
        for number, block in enumerate(blocks):
            block.forward = partial(self.run, number, block.forward)

    def stream(self, numbers: Sequence[int], slots: int) -> None:
        """Stream the blocks with these numbers from now on, among them those that are streamed already."""
        assert set(self.numbers) <= set(numbers) and slots <= len(numbers), f"{slots} slots for blocks {numbers}"
        homes = dict(zip(self.numbers, self.homes, strict=True))
        # What is made in inference mode could not be used by a training step later.
        with torch.inference_mode(False), torch.no_grad():
            self.rest()
            for number in numbers:  # one by one, so that there is never a second copy of all
                if number not in homes:
                    homes[number] = self._home(number)
            self.numbers = sorted(numbers)
            self.homes = [homes[number] for number in self.numbers]
        self.resume(slots)
        if not numbers:
            return
        logger.info(
            "block swap: %d of %d blocks (%.2f GiB each) %s, %d of them on the device at a time: %.2f GiB less",
            *(len(numbers), len(self.tensors), self.block_bytes / _GIB),
            "in main memory" if self.disk is None else "on the disk",
            slots,
            (len(numbers) - slots) * self.block_bytes / _GIB,
        )

    def _home(self, number: int) -> Home | DiskHome:
        if self.disk is not None:
            return DiskHome(self.disk, self.names[number], self.tensors[number], self.device)
        return Home(self.tensors[number], self.block_bytes, self.device)

    def resume(self, slots: int | None = None) -> None:
        """Take so many slots, all empty, after rest(); None: as many as there were before."""
        self._count = slots = self._count if slots is None else slots
        with torch.inference_mode(False), torch.no_grad():
            self.slots = [Packed(self.device.slot(self.block_bytes), self.tensors[0]) for _ in range(slots)]
        self._by_address = {slot.data.untyped_storage().data_ptr(): i for i, slot in enumerate(self.slots)}
        self._held, self._whole, self._copies = [None] * slots, [False] * slots, [None] * slots

    def rest(self) -> None:
        """Bring all streamed weights home and give the slots back."""
        for held, copy in zip(self._held, self._copies, strict=True):
            if held is not None:
                self.homes[held].wait(copy)
        if self._last is not None:
            self._weights(self._last, self.homes[self._last])
        self.slots, self._held, self._whole, self._copies, self._by_address, self._last = [], [], [], [], {}, None

    def _weights(self, rank: int, place: Home | DiskHome | Packed, whole: bool = True) -> None:
        """Make the weights of a block, or those that are always copied, what its home or a slot holds."""
        place.show(self.tensors[self.numbers[rank]][: None if whole else self.needed])

    def record(self, forward: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
        """Return what the model computes, its backward pass being told to find streamed weights by rank.

        Around the model, so that what blocks do in the same way comes first (wan/recompute.py).
        """
        if not self.slots:
            return forward(*args, **named)
        with saving(self._packed):
            return forward(*args, **named)

    def run(self, number: int, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Return what a block computes."""
        if number not in self.numbers:
            return forward(*args, **named)
        rank = self.numbers.index(number)
        # Where autograd looks on, a block that is not after the last one is being computed again in the backward pass,
        # or is the first of a new pass, before which nothing else needs to be fetched.
        backward = torch.is_grad_enabled() and self._last is not None and rank <= self._last
        self.use(rank, backward, whole=not self._spared(number))
        return forward(*args, **named)

    def velocities(
        self, model: WanModel, x: Tensor, timestep: Tensor, passes: Sequence[Mapping[str, Any]]
    ) -> list[Tensor]:
        """Return what WanModel.velocities() does, the passes taking turns, so that a block is copied once for all.

        Not where the tokens that wait would take more memory than a block: so many hide the copies anyway.
        """
        waiting = (len(passes) - 1) * model.token_bytes(x)
        if not self.slots or torch.is_grad_enabled() or waiting > self.block_bytes:
            return [model(x, timestep, **conditions) for conditions in passes]
        skipped = [conditions.get("skip_blocks", ()) for conditions in passes]
        seen = [{name: value for name, value in each.items() if name != "skip_blocks"} for each in passes]
        begun = [model.embed(x, timestep, **conditions) for conditions in seen]
        tokens, contexts, finish = map(list, zip(*begun, strict=True))
        kept = [() if context.keys_values is None else context.keys_values for _, _, context, *_ in contexts]
        with self._sparing(lambda number: all(model.blocks[number].cross_attn in each for each in kept)):
            for number, block in enumerate(model.blocks):
                for i, context in enumerate(contexts):
                    if number not in skipped[i]:
                        tokens[i] = block(tokens[i], *context)
        return [end(out) for end, out in zip(finish, tokens, strict=True)]

    @contextlib.contextmanager
    def _sparing(self, spared: Callable[[int], bool]) -> Iterator[None]:
        before, self._spared = self._spared, spared
        try:
            yield
        finally:
            self._spared = before

    def use(self, rank: int, backward: bool = False, whole: bool = True) -> Tensor:
        """Return the slot that a block's weights are in, and have those that come next on their way.

        whole: with what makes keys and values of a text.
        """
        if rank != self._last or (whole and not self._whole[self._held.index(rank)]):
            upcoming = self._upcoming(rank, backward)
            for near in upcoming:
                complete = whole if near == rank else not self._spared(self.numbers[near])
                if near not in self._held or (complete and not self._whole[self._held.index(near)]):
                    self._load(near, upcoming, complete)
            if self._last is not None:
                self._weights(self._last, self.homes[self._last])
            slot = self._held.index(rank)
            self.homes[rank].wait(self._copies[slot])
            self._weights(rank, self.slots[slot], self._whole[slot])
            self._last = rank
        return self.slots[self._held.index(rank)].data

    def _upcoming(self, rank: int, backward: bool) -> Collection[int]:
        """Return the ranks that belong into the ring, this one first.

        Where a backward pass will come, the last of the forward pass stay for it, and its last for the next step.
        """
        count = len(self.slots)
        if backward:
            return range(rank, max(rank - count, -1), -1)
        if torch.is_grad_enabled():
            return range(rank, min(rank + count, len(self.homes)))
        return [(rank + i) % len(self.homes) for i in range(count)]

    def _load(self, rank: int, keep: Collection[int], whole: bool) -> None:
        """Start the copy of a block's weights over those of a block that is not to be kept, or once more."""
        again = self._held.index(rank) if rank in self._held else None
        slot = next(i for i, held in enumerate(self._held) if held not in keep) if again is None else again
        size = self.block_bytes if whole else self.needed_bytes
        self._held[slot], self._whole[slot] = rank, whole
        self._copies[slot] = self.homes[rank].send(self.slots[slot].data[:size])
        self.loads += 1
        self.bytes_copied += size

    def _packed(self, tensor: Tensor) -> Streamed | None:
        slot = self._by_address.get(tensor.untyped_storage().data_ptr())
        if slot is None:
            return None
        find = partial(self.use, self._held[slot], backward=True)
        return Streamed(find, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())


def _is_spared(named: tuple[str, Tensor]) -> bool:
    """Return whether a block's tensor does nothing but make keys and values of a text or a picture."""
    return re.match(r"cross_attn\.(norm_k|k|v)(_img)?\.", named[0]) is not None


def packed_bytes(like: Iterable[Tensor]) -> int:
    """Return how many bytes such tensors take when they are packed."""
    return sum(aligned(tensor.nbytes) for tensor in like)
