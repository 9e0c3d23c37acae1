"""Count the memory that a step of generation or of LoRA training takes, and calculate its time on a GPU.

python -m bench.memory --task t2v-14B --size 832 480 --frames 81 --fp8 --swap 20
python -m bench.memory --task t2v-14B --size 1280 720 --frames 1 --fp8 --swap 40 --train
python -m bench.memory --decode --size 1280 720 --frames 81
python -m bench.memory --table

The project's own code runs on tensors that have sizes and no memory, so any model fits any machine; counted is which of
them are alive. With --device cuda it runs for real, and is measured.
"""

import argparse
import contextlib
import itertools
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.steps import (
    RANK,
    Work,
    attached_lora,
    decoding,
    generation_step,
    random_dit,
    random_vae,
    swap,
    task_shape,
    training_step,
)
from utils.files import atomic_path
from wan.block_swap import Ring, SwapOptions, streamed_blocks, streaming_device
from wan.checkpointing import Offload, offloading, save_memory
from wan.configs import TASKS
from wan.model import WanModel
from wan.streaming import CpuDevice, Device
from wan.vae import VaeShape

aten = torch.ops.aten
GIB = 1 << 30
MARGIN = 0.8  # GiB of a card for CUDA's context, the libraries' workspaces and what the allocator cannot use
SMALL_CARDS = (8, 12, 16, 24)
CARDS = (*SMALL_CARDS, 32, 48, 80)
BEGIN, END = "<!-- python -m bench.memory --into docs/memory.md -->", "<!-- end -->"


@dataclass(frozen=True)
class Rates:
    """What a GPU's kernels reach in such models, operations a second, and its link to main memory, bytes a second."""

    matrices: float
    attention: float
    attention_training: float  # of forward and backward pass together
    link: float


RATES = {
    "RTX 4090": Rates(150e12, 165e12, 130e12, 25e9),
    "H200": Rates(740e12, 620e12, 480e12, 52e9),
}


@dataclass(frozen=True)
class Plan:
    """What a row of the table is about."""

    task: str = "t2v-14B"
    width: int = 832
    height: int = 480
    frames: int = 81
    fp8: bool = False
    swapped: int = 0
    train: bool = False
    checkpointing: bool = True
    offload: bool = False  # of what checkpointing keeps
    rank: int = RANK

    @property
    def work(self) -> Work:
        size = self.width, self.height, self.frames
        return Work(task_shape(TASKS[self.task]), *size, fp8=self.fp8, swapped=self.swapped)

    @property
    def command(self) -> str:
        words = f"python -m bench.memory --task {self.task} --size {self.width} {self.height} --frames {self.frames}"
        words += " --fp8" * self.fp8 + f" --swap {self.swapped}" * bool(self.swapped) + " --train" * self.train
        words += " --no_checkpointing" * (not self.checkpointing) + " --offload" * self.offload
        return words + f" --rank {self.rank}" * (self.rank != RANK)


@dataclass(frozen=True)
class Cost:
    """What a step takes; a number that was not found out is None."""

    device_bytes: int  # at most, weights and all
    main_bytes: int | None  # at most, from loading on, beside what Python and torch take
    matrix_flops: int = 0
    attention_flops: int = 0
    copied_bytes: int = 0  # from main memory to the device, in a step
    seconds: float | None = None  # where it ran for real

    def seconds_on(self, rates: Rates, train: bool = False) -> float:
        """Return how long a GPU computes or copies, whichever takes longer, for they run beside each other."""
        attention = rates.attention_training if train else rates.attention
        computing = self.matrix_flops / rates.matrices + self.attention_flops / attention
        return max(computing, self.copied_bytes / rates.link)

    @property
    def card(self) -> int | None:
        """GiB of the smallest usual card that holds it, or None."""
        return next((card for card in CARDS if self.device_bytes / GIB + MARGIN <= card), None)


# -------------------------------------------------------------------------------------------------------- counting
class Tracker(TorchDispatchMode):
    """Counts bytes of the tensors alive, on the device and in main memory, the most there were, and operations."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.alive: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self._main = False
        self._whole = {torch.ops.prim.device.default}  # operations that are not made of others
        if hasattr(aten, "_fused_rms_norm_backward"):  # or only where CUDA has no kernel for them
            self._whole.add(aten._fused_rms_norm.default)
        self._watched: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is aten._local_scalar_dense.default and (isinstance(args[0], FakeTensor) or args[0].is_meta):
            return 1  # sizes have no values; what is asked here is whether all is finite
        count = flop_registry.get(function.overloadpacket)
        if count is None and function not in self._whole:
            with self:  # in inference mode what is made of other operations comes here in one piece
                out = function.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
            self._whole.add(function)
        out = function(*args, **(kwargs or {}))
        if count:
            kind = "attention" if "attention" in str(function) else "matrices"
            self.flops[kind] += count(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._watch(tensor)
        return out

    @contextlib.contextmanager
    def in_main_memory(self) -> Iterator[None]:
        """Count what is made inside as main memory, whatever its device."""
        before, self._main = self._main, True
        yield
        self._main = before

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._watched:
            return
        where = "main" if self._main or tensor.device.type != self.device.type else "device"
        size = storage.nbytes()

        def gone(_: weakref.ref) -> None:
            del self._watched[key]
            self.alive[where] -= size

        self._watched[key] = weakref.ref(storage, gone)
        self.alive[where] += size
        self.peak[where] = max(self.peak[where], self.alive[where])


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
    """Return what the kernels for long sequences would, none of which holds a number for each pair of tokens."""
    if attn_mask is None and q.shape[-1] <= 256:
        return aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, torch.is_grad_enabled())[0]


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Return the norm by the kernel that CUDA has for it, where other devices spell it out."""
    return aten._fused_rms_norm(x, shape, weight, eps)[0]


def like_cuda() -> contextlib.ExitStack:
    """Return what in its body takes the kernels that CUDA has."""
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _attention))
    if hasattr(aten, "_fused_rms_norm_backward"):  # before torch 2.9 CUDA has none either
        stack.enter_context(mock.patch.object(torch, "rms_norm", _rms_norm))
    return stack


class SizesDevice(CpuDevice):
    """A GPU of which only the memory is there; what a block is at home in counts as main memory."""

    def __init__(self, device: torch.device, tracker: Tracker):
        self.device, self.tracker = device, tracker

    def home(self, size: int) -> Tensor:
        with self.tracker.in_main_memory():
            return torch.empty(size, dtype=torch.uint8, device=self.device)

    def slot(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)


@contextlib.contextmanager
def sizes_alone(device: torch.device, main_memory: bool = False) -> Iterator[Tracker]:
    """Make tensors without memory in the body, which the tracker counts; "meta" stands for a GPU.

    main_memory: tensors of main memory have none either, and come and go; which takes several times as long.
    """
    without = FakeTensorMode(allow_non_fake_inputs=True) if main_memory else contextlib.nullcontext()
    with (
        without,
        like_cuda() if device.type == "meta" else contextlib.nullcontext(),
        Tracker(device) as tracker,
        # Storages without memory are all at 0, which the ring would take for one and the same.
        mock.patch.object(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata),
        mock.patch("wan.vae.free_memory", lambda device: 1 << 62),
    ):
        yield tracker


def calculated(plan: Plan, work: Work | None = None, device: str = "meta", main_memory: bool = False) -> Cost:
    """Return what a step of the plan takes, from the sizes of the tensors that are alive while the code runs."""
    work, where = work or plan.work, torch.device(device)
    with sizes_alone(where, main_memory) as tracker:
        return counted(plan, work, where, tracker)


def by_fewer_blocks(plan: Plan, work: Work | None = None, few: tuple[int, int] = (6, 8)) -> Cost:
    """Return what calculated() does, from two DiTs of fewer blocks: each further block adds what the last ones do.

    Of the plan's blocks as many are swapped as are not, or all, or none.
    """
    work = work or plan.work
    share = work.swapped / work.shape.blocks
    assert share in (0, 0.5, 1), f"{work.swapped} of {work.shape.blocks} blocks"
    less, more = (
        astuple(calculated(plan, replace(work, shape=replace(work.shape, blocks=n), swapped=int(share * n))))[:-1]
        for n in few
    )
    steps = (work.shape.blocks - few[1]) // (few[1] - few[0])
    return Cost(*(b + (b - a) * steps for a, b in zip(less, more, strict=True)))


def counted(plan: Plan, work: Work, device: torch.device, tracker: Tracker) -> Cost:
    """Return what the tracker counts: the most of two steps, the first of which keeps things for others; the second."""

    def parked(weight: Tensor) -> Tensor:
        with tracker.in_main_memory():
            return weight.clone()

    dit, ring = prepared(plan, work, device, SizesDevice(device, tracker), parked)
    offload = Offload(partial(SizesDevice, device, tracker)) if plan.offload else None
    step = step_of(plan, work, dit, device, offload)
    tracker.peak["device"] = tracker.alive["device"]
    step()
    tracker.flops.clear()
    before = _copied(ring, offload)
    step()
    return Cost(
        tracker.peak["device"],
        tracker.peak["main"],
        tracker.flops["matrices"],
        tracker.flops["attention"],
        _copied(ring, offload) - before,
    )


def _copied(ring: Ring | None, offload: Offload | None) -> int:
    return (ring.bytes_copied if ring else 0) + (offload.bytes_back if offload else 0)


def prepared(
    plan: Plan, work: Work, device: torch.device, streaming: Device | None, move: Callable[[Tensor], Tensor]
) -> tuple[WanModel, Ring | None]:
    """Return the DiT of a plan as loading leaves it; its swapped blocks are moved before they are packed."""
    swapped = streamed_blocks(work.shape.blocks, work.swapped)
    dit = random_dit(work.shape, device, work.dtype, work.fp8, swapped, move)
    return dit, swap(dit, work.swapped, streaming) if work.swapped else None


def step_of(
    plan: Plan, work: Work, dit: WanModel, device: torch.device, offload: Offload | None
) -> Callable[[], Tensor]:
    if plan.train:
        save_memory(dit, plan.checkpointing, offload)
        return training_step(dit, attached_lora(dit, device, plan.rank), work, device)
    return generation_step(dit, work, device)


def measured(plan: Plan, device: torch.device) -> Cost:
    """Return what a step of the plan takes on a GPU."""
    work = plan.work
    streaming = streaming_device(device, SwapOptions()) if work.swapped else None
    dit, ring = prepared(plan, work, device, streaming, Tensor.cpu)
    offload = offloading(device) if plan.offload else None
    step = step_of(plan, work, dit, device, offload)
    step()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, start = _copied(ring, offload), time.perf_counter()
    step()
    torch.cuda.synchronize(device)
    seconds, copied = time.perf_counter() - start, _copied(ring, offload) - before
    return Cost(torch.cuda.max_memory_allocated(device), None, copied_bytes=copied, seconds=seconds)


def decoded(width: int, height: int, frames: int, cache_cpu: bool = False, tile: int | None = None) -> Cost:
    """Return what decoding a video with the VAE takes, in bfloat16, frames leaving the device as they come."""
    device = torch.device("meta")
    with sizes_alone(device, main_memory=True) as tracker:
        vae = random_vae(VaeShape(), device, torch.bfloat16)
        vae.cache_cpu, vae.tile = cache_cpu, tile
        decode = decoding(vae, width, height, frames, device)
        tracker.peak["device"] = tracker.alive["device"]
        decode()
        return Cost(tracker.peak["device"], tracker.peak["main"], tracker.flops["matrices"], tracker.flops["attention"])


# --------------------------------------------------------------------------------------------------------- the table
def plans() -> Iterator[Plan]:
    """Yield the rows of the table in order."""
    for train, task in ((False, "t2v-1.3B"), (False, "t2v-14B"), (True, "t2v-1.3B"), (True, "t2v-14B")):
        for size in ((832, 480), (1280, 720)):
            for frames in (1, 25, 81):
                yield from _held(task, *size, frames, train)
    for train, frames in ((False, 81), (True, 25)):
        for size in ((832, 480), (1280, 720)):
            yield from _held("i2v-14B", *size, frames, train)


def _held(task: str, width: int, height: int, frames: int, train: bool) -> Iterator[Plan]:
    blocks = TASKS[task].blocks
    for fp8 in (False, True):
        for swapped in (0, blocks // 2, blocks):
            plan = Plan(task, width, height, frames, fp8, swapped, train)
            yield plan
            if train and frames > 1 and swapped == blocks:
                yield replace(plan, offload=True)


HEADINGS = ("", "video", "weights", "swapped", "peak VRAM", "card", "peak RAM", *(f"s/step {gpu}" for gpu in RATES))


def lines() -> Iterator[str]:
    """Yield the lines of the table, Markdown, each row ending in the command that makes it again; and of fitting()."""
    yield from _head((*HEADINGS, "calculated by"))
    cards = {}
    for plan in plans():
        cost = by_fewer_blocks(plan)
        cards[plan] = cost.card
        yield _line((*row(plan, cost), f"`{plan.command}`"))
    yield ""
    yield from fitting(cards)


def fitting(cards: Mapping[Plan, int | None]) -> Iterator[str]:
    """Yield a table of what has to be given up for a card, by the smallest card of each plan; the fastest that fits."""
    yield from _head(("fits on", "video", *(f"{card} GB" for card in SMALL_CARDS)))
    same = itertools.groupby(cards, key=lambda plan: (_name(plan), _video(plan)))
    for names, held in same:
        by_speed = sorted(held, key=lambda plan: (plan.offload, plan.swapped, plan.fp8))
        fastest = (
            next((plan for plan in by_speed if cards[plan] and cards[plan] <= card), None) for card in SMALL_CARDS
        )
        yield _line((*names, *("" if plan is None else _setting(plan) for plan in fastest)))


def _name(plan: Plan) -> str:
    return f"{plan.task} LoRA" if plan.train else plan.task


def _video(plan: Plan) -> str:
    return f"{plan.width}x{plan.height}, {plan.frames}"


def _setting(plan: Plan) -> str:
    words = ("fp8" if plan.fp8 else "bf16") + f", swap {plan.swapped}" * bool(plan.swapped)
    return words + ", offload" * plan.offload


def _head(cells: Sequence[str]) -> Iterator[str]:
    yield _line(cells)
    yield "| --- " * len(cells) + "|"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def row(plan: Plan, cost: Cost) -> tuple[str, ...]:
    """Return the cells of a plan's row."""
    times = [f"{float(f'{cost.seconds_on(rates, plan.train):.2g}'):g}" for rates in RATES.values()]
    return (
        _name(plan),
        _video(plan),
        "fp8" if plan.fp8 else "bf16",
        f"{plan.swapped}" + ", offload" * plan.offload,
        f"{cost.device_bytes / GIB:.1f}",
        f"{cost.card} GB" if cost.card else "",
        "" if cost.main_bytes is None else f"{cost.main_bytes / GIB:.1f}",
        *times,
    )


def insert(page: Path, table: str) -> None:
    """Put the table into a page in place of the one between its marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"{page} lacks {BEGIN} or {END}"
    with atomic_path(page) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """Return what reads the options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--task", default="t2v-14B", choices=TASKS)
    options.add_argument("--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), default=(832, 480))
    options.add_argument("--frames", type=int, default=81)
    options.add_argument("--fp8", action="store_true", help="hold the blocks' linear weights as float8")
    options.add_argument("--swap", type=int, default=0, metavar="N", help="hold N blocks in main memory")
    options.add_argument("--train", action="store_true", help="a step of training a LoRA, not one of generation")
    options.add_argument("--no_checkpointing", action="store_true", help="train without gradient checkpointing")
    options.add_argument("--offload", action="store_true", help="train with --gradient_checkpointing_cpu_offload")
    options.add_argument("--rank", type=int, default=RANK, help=f"of the LoRA (default: {RANK})")
    options.add_argument("--decode", action="store_true", help="decoding with the VAE instead")
    options.add_argument("--vae_cache_cpu", action="store_true")
    options.add_argument("--tile", type=int, help="pixels of the VAE's tiles")
    options.add_argument("--device", default="meta", help="cuda measures; meta, the default, calculates")
    options.add_argument("--table", action="store_true", help="all rows of docs/memory.md")
    options.add_argument("--into", type=Path, metavar="PAGE", help="put them into this page")
    return options


def plan_of(given: argparse.Namespace) -> Plan:
    held = {name: getattr(given, name) for name in ("fp8", "train", "offload", "rank")} | {"swapped": given.swap}
    return Plan(given.task, *given.size, given.frames, checkpointing=not given.no_checkpointing, **held)


def main(argv: list[str] | None = None) -> None:
    given = parser().parse_args(argv)
    if given.table or given.into:
        made = []
        for line in lines():
            print(line, flush=True)
            made.append(line)
        if given.into:
            insert(given.into, "\n".join(made))
    elif given.decode:
        cost = decoded(*given.size, given.frames, given.vae_cache_cpu, given.tile)
        report = f"peak VRAM {cost.device_bytes / GIB:.2f} GB, {cost.matrix_flops / 1e12:.0f} TFLOP, calculated"
        print(f"decoding {given.size[0]}x{given.size[1]}, {given.frames} frames: {report}")
    else:
        plan = plan_of(given)
        cost = calculated(plan) if given.device == "meta" else measured(plan, torch.device(given.device))
        print("\n".join(_described(plan, cost)))


def _described(plan: Plan, cost: Cost) -> Iterator[str]:
    yield f"peak VRAM {cost.device_bytes / GIB:.2f} GB, {'calculated' if cost.seconds is None else 'measured'}"
    if cost.main_bytes is not None:
        yield f"peak RAM {cost.main_bytes / GIB:.2f} GB beside Python and torch, calculated"
        yield f"{cost.matrix_flops / 1e12:.0f} TFLOP of matrices, {cost.attention_flops / 1e12:.0f} of attention"
        for gpu, rates in RATES.items():
            yield f"{cost.seconds_on(rates, plan.train):.3g} s a step on {gpu}, calculated"
    if cost.copied_bytes:
        yield f"{cost.copied_bytes / GIB:.2f} GB copied from main memory in a step"
    if cost.seconds is not None:
        yield f"{cost.seconds:.3g} s a step, measured"


if __name__ == "__main__":
    main()
