"""Measure generation, LoRA training and the VAE on a GPU, with random weights of the published sizes made on it.

python bench/gpu.py --json rows.json
python bench/gpu.py --only 1.3B
python bench/gpu.py --device cpu --scale small

Needs no files, and of packages torch, safetensors, einops, transformers and accelerate. The quick rows come first, and
each stands for itself: one that fails says why, and the next begins. After --minutes no other one is begun. The 14B
takes 28 GB in bf16, in main memory too once its blocks are swapped. Where diffusers is installed its DiT is the other
side of the forward passes, else the plain twin of bench/two_way.py: both attend by what torch chooses by itself.
"""

import argparse
import contextlib
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

if not __package__:  # called as a file, from wherever
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.dit import velocity_of_theirs
from bench.measure import distance
from bench.steps import (
    Work,
    attached_lora,
    decoding,
    generation_step,
    prompt,
    random_dit,
    random_vae,
    swap,
    task_shape,
    training_step,
)
from bench.two_way import plain_twin
from utils.files import atomic_path
from wan.attention import ATTENTION_MODES
from wan.block_swap import SwapOptions, streaming_device
from wan.checkpointing import offloading, save_memory
from wan.configs import TASKS
from wan.model import WanModel, WanShape, call
from wan.vae import VaeShape

GIB = 1 << 30
REPEATS, ENOUGH = 3, 8.0  # measurements at most; seconds of them after which there are no more
LONG = 20.0  # seconds of a round that need no warming up: what a first one takes longer is under 2 s
BEHIND = 1.3  # what a row may take beyond its estimate


@dataclass(frozen=True)
class Scale:
    """The sizes behind the names in the rows."""

    models: dict[str, WanShape]
    videos: dict[str, tuple[int, int, int]]  # width, height, frames
    vae: VaeShape


_TINY = WanShape(dim=48, ffn_dim=96, heads=2, blocks=2, in_channels=16, text_dim=32, freq_dim=32)
SCALES = {
    "full": Scale(
        {"1.3B": task_shape(TASKS["t2v-1.3B"]), "14B": task_shape(TASKS["t2v-14B"])},
        {
            "480p81": (832, 480, 81),
            "720p81": (1280, 720, 81),
            "720p25": (1280, 720, 25),
            "720p image": (1280, 720, 1),
        },
        VaeShape(),
    ),
    "small": Scale(
        {"1.3B": _TINY, "14B": replace(_TINY, blocks=3)},
        {"480p81": (48, 32, 9), "720p81": (64, 48, 9), "720p25": (64, 48, 5), "720p image": (64, 48, 1)},
        VaeShape(width=8, levels=(8, 16, 32, 32), residuals=1),
    ),
}


@dataclass(frozen=True)
class Line:
    """A row: what was measured, or in the note why it was not."""

    name: str
    ours: float | None = None
    theirs: float | None = None
    ratio: float | None = None
    goal: float | None = None  # for the ratio where there is one, else for ours; not to be exceeded
    unit: str = "s"
    note: str = ""


@dataclass
class Lab:
    """One device, at most one DiT on it, and the time that is left."""

    device: torch.device
    scale: Scale
    deadline: float
    attn_mode: str = "torch"
    rate: float | None = None  # operations a second, of the last row
    dit: WanModel | None = None
    held: tuple[str, bool, bool] | None = None  # which DiT that is: model, fp8, fp8_fast
    swapped: bool = False
    known: dict[str, float] = field(default_factory=dict)  # seconds of rows that others are compared with

    def work(self, model: str, video: str, fp8: bool = False, fp8_fast: bool = False) -> Work:
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return Work(self.scale.models[model], *self.scale.videos[video], dtype=dtype, fp8=fp8, fp8_fast=fp8_fast)

    def model(self, name: str, fp8: bool = False, swapped: bool = False, fp8_fast: bool = False) -> WanModel:
        """Return a DiT, the one on the device where it is the same; its blocks are all swapped, or none is."""
        if self.held != (name, fp8, fp8_fast) or (self.swapped and not swapped):
            self.forget()
            work = self.work(name, next(iter(self.scale.videos)))
            self.dit = random_dit(work.shape, self.device, work.dtype, fp8, fp8_fast=fp8_fast)
            self.dit.attn_mode = self.attn_mode
            self.held = name, fp8, fp8_fast
        if swapped and not self.swapped:
            swap(self.dit, len(self.dit.blocks), streaming_device(self.device, SwapOptions()))
            self.swapped = True
        return self.dit

    def forget(self) -> None:
        self.dit, self.held, self.swapped = None, None, False
        release(self.device)

    def seconds(self, *runs: Callable[[], Tensor], flops: float = 0) -> list[float]:
        """Return the median time of each run, in turn. flops: operations of the first.

        The first round warms up. It counts only where it takes so long that this is hardly seen in it.
        """
        rounds = [[self.once(run) for run in runs]]
        if sum(rounds[0]) < LONG:
            until = min(self.deadline, time.monotonic() + ENOUGH)
            rounds.clear()
            while not rounds or (len(rounds) < REPEATS and time.monotonic() < until):
                rounds.append([self.once(run) for run in runs])
        times = [median(column) for column in zip(*rounds, strict=True)]
        if flops:
            self.rate = flops / times[0]
        return times

    def once(self, run: Callable[[], Tensor]) -> float:
        wait(self.device)
        start = time.perf_counter()
        run()
        wait(self.device)
        return time.perf_counter() - start

    def lacks_time_for(self, flops: float) -> str:
        """Return why a row of so many operations is not begun, or ""."""
        left, takes = self.deadline - time.monotonic(), flops / self.rate * BEHIND if self.rate else 0
        return "" if left > takes else f"not begun: {max(left, 0):.0f} s are left, it would take about {takes:.0f} s"


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def peak_bytes(device: torch.device) -> Iterator[list[int]]:
    """Yield a list that then holds the most memory that was taken on the device meanwhile; nothing on a CPU."""
    counted: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield counted
    if device.type == "cuda":
        counted.append(torch.cuda.max_memory_allocated(device))


@dataclass(frozen=True)
class Bench:
    """What makes a row, and its operations with all repeats, to tell whether there is time for it."""

    name: str
    measure: Callable[[Lab], Line]
    flops: Callable[[Lab], float]


# ------------------------------------------------------------------------------------------------------------- rows
def benches() -> Iterator[Bench]:
    """Yield all rows: the quick ones first, and those of one DiT together, since another one has to be made."""
    step, swapped = "step with guidance", "all blocks swapped"
    small = (
        # video, what, measured by, goal
        ("480p81", "forward", forward, None),
        ("480p81", f"{step}, bf16", guidance, None),
        ("480p81", "LoRA step, bf16", training, None),
    )
    large = (
        ("480p81", "forward", forward, 0.65),
        ("480p81", f"{step}, bf16", guidance, 5.3),
        ("720p81", "forward", forward, 0.62),
        ("480p81", "LoRA step, bf16", training, 13.0),
        ("720p81", f"{step}, bf16", guidance, 21.5),
        ("480p81", f"{step}, bf16, {swapped}", against_resident, 1.03),
        ("720p81", f"{step}, bf16, {swapped}: VRAM", generation_peak, 7.0),
        ("480p81", f"{step}, fp8_fast", guidance, 4.2),
        ("720p image", f"LoRA step, fp8, {swapped}: VRAM", training_peak, 6.0),
        ("720p25", f"LoRA step, fp8, {swapped}: VRAM", training_peak, 10.0),
        ("720p81", f"{step}, fp8_fast", guidance, 17.0),
    )
    yield from (_bench("1.3B", *row) for row in small)
    yield Bench("VAE decode 480p81", vae_decode, lambda lab: 0)
    yield from (_bench("14B", *row) for row in large)


# How many forward passes take as long as what a row computes at least once, theirs half as long again.
PASSES = {"forward": 2.5, "step": 2, "LoRA": 4}


def _bench(model: str, video: str, what: str, measure: Callable, goal: float | None) -> Bench:
    name, passes = f"{model} {video} {what}", PASSES[what.split()[0]]
    fast, fp8 = "fp8_fast" in what, "fp8," in what
    line = Line(name, goal=goal)
    return Bench(
        name,
        lambda lab: measure(lab, line, model, lab.work(model, video, fp8, fast)),
        lambda lab: passes * lab.work(model, video).forward_flops,
    )


@torch.no_grad()
def forward(lab: Lab, line: Line, model: str, work: Work) -> Line:
    """Compare the forward pass with that of another implementation on the same weights."""
    dit, text = lab.model(model), prompt(work, lab.device)
    x = torch.randn(1, 16, *work.grid, device=lab.device)
    timestep = torch.full((1,), 500.0, device=lab.device)
    run_theirs, whose = other_forward(dit, x, timestep, text)
    run_ours = partial(dit, x, timestep, text)
    found: dict[str, Tensor] = {}
    runs = (lambda: found.update(ours=run_ours()), lambda: found.update(theirs=run_theirs()))
    ours, theirs = lab.seconds(*runs, flops=work.forward_flops)
    apart = distance(found["ours"], found["theirs"])
    note = f"against {whose}; relative distance {apart:.1e}; {work.forward_flops / ours / 1e12:.0f} TFLOP/s"
    return replace(line, ours=ours, theirs=theirs, ratio=ours / theirs, note=note)


def other_forward(dit: WanModel, x: Tensor, timestep: Tensor, text: list[Tensor]) -> tuple[Callable[[], Tensor], str]:
    """Return the same forward pass by diffusers, or where it is not installed by the plain twin; and which it is."""
    try:
        from tests.diffusers_dit import diffusers_dit

        theirs = diffusers_dit(dit.state_dict(), dit.shape).to(x.device)
    except ImportError:
        return partial(plain_twin(dit), x, timestep, text), "the plain twin (diffusers is not installed)"
    return partial(velocity_of_theirs, theirs, x.to(dit.dtype), timestep, text), "diffusers"


def guidance(lab: Lab, line: Line, model: str, work: Work) -> Line:
    """Time a step of generation with guidance."""
    step = generation_step(lab.model(model, work.fp8, fp8_fast=work.fp8_fast), work, lab.device)
    (ours,) = lab.seconds(step, flops=2 * work.forward_flops)
    lab.known[f"{model} {work.grid} {work.fp8 or work.fp8_fast}"] = ours
    return replace(line, ours=ours, note=f"{2 * work.forward_flops / ours / 1e12:.0f} TFLOP/s")


def against_resident(lab: Lab, line: Line, model: str, work: Work) -> Line:
    """Compare a step with all blocks swapped with the same step without, which was timed before."""
    resident = lab.known.get(f"{model} {work.grid} {work.fp8}")
    if resident is None:
        resident = guidance(lab, line, model, work).ours
    step = generation_step(lab.model(model, swapped=True), work, lab.device)
    (ours,) = lab.seconds(step)
    return replace(line, ours=ours, theirs=resident, ratio=ours / resident, note="against all blocks on the device")


def generation_peak(lab: Lab, line: Line, model: str, work: Work) -> Line:
    step = generation_step(lab.model(model, swapped=True), work, lab.device)
    return _peak(lab, line, step)


@contextlib.contextmanager
def lora_on(dit: WanModel, work: Work, device: torch.device, offload: bool = False) -> Iterator[Callable[[], Tensor]]:
    """Yield what takes the next step of training a LoRA with gradient checkpointing; the DiT is then as it was.

    offload: what checkpointing keeps waits in main memory.
    """
    network = attached_lora(dit, device)
    save_memory(dit, True, offloading(device) if offload else None)
    try:
        yield training_step(dit, network, work, device)
    finally:
        network.detach()
        dit.run_block = call


def training(lab: Lab, line: Line, model: str, work: Work) -> Line:
    """Time a step of training a LoRA."""
    with lora_on(lab.model(model), work, lab.device) as step:
        (ours,) = lab.seconds(step)
    return replace(line, ours=ours)


def training_peak(lab: Lab, line: Line, model: str, work: Work) -> Line:
    with lora_on(lab.model(model, fp8=True, swapped=True), work, lab.device, offload=True) as step:
        step()  # the first one has no optimizer states yet
        return _peak(lab, line, step)


def _peak(lab: Lab, line: Line, step: Callable[[], Tensor]) -> Line:
    release(lab.device)
    with peak_bytes(lab.device) as counted:
        note = f"{lab.once(step):.2f} s a step"
    if not counted:
        return replace(line, unit="GiB", note=f"{note}; only a GPU counts its memory")
    return replace(line, ours=counted[0] / GIB, unit="GiB", note=note)


def vae_decode(lab: Lab) -> Line:
    """Count the operations of decoding a video, of all its convolutions, in a second."""
    work = lab.work("1.3B", "480p81")
    vae = random_vae(lab.scale.vae, lab.device, work.dtype)
    decode = decoding(vae, work.width, work.height, work.frames, lab.device)
    counter = FlopCounterMode(display=False)
    with counter:
        decode()
    (seconds,) = lab.seconds(decode)
    rate = counter.get_total_flops() / seconds / 1e12
    note = f"{seconds:.2f} s; more is better, the goal is 140 or more: twice the 70 that others reach"
    return Line("VAE decode 480p81", ours=rate, goal=140.0, unit="TFLOP/s", note=note)


# -------------------------------------------------------------------------------------------------------- the table
def measured(bench: Bench, lab: Lab) -> Line:
    """Return a row, or the reason why there is none."""
    if late := lab.lacks_time_for(bench.flops(lab)):
        return Line(bench.name, note=late)
    try:
        return bench.measure(lab)
    except Exception as error:  # out of memory, a kernel that the card lacks: the other rows are still worth having
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    lab.forget()
    return Line(bench.name, note=f"failed: {reason}")


def shown(line: Line) -> str:
    """Return a row as Markdown."""
    sides = ["" if value is None else f"{value:.4g} {line.unit}" for value in (line.ours, line.theirs)]
    ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
    goal = "" if line.goal is None else f"{line.goal:g}"
    return f"| {' | '.join((line.name, *sides, ratio, goal, line.note))} |"


def write(path: Path, lines: list[Line], where: dict[str, str]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps([asdict(line) | where for line in lines], indent=1), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--scale", default="full", choices=SCALES, help="small: the same rows on models of no size")
    parser.add_argument("--minutes", default=9.5, type=float, help="after which no row is begun (default: 9.5)")
    parser.add_argument("--only", nargs="+", metavar="WORDS", help="rows whose names hold one of these")
    parser.add_argument("--attn_mode", default="torch", choices=ATTENTION_MODES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file too, after each one")
    given = parser.parse_args(argv)
    begun = time.monotonic()
    lab = Lab(given.device, SCALES[given.scale], begun + 60 * given.minutes, given.attn_mode)
    name = torch.cuda.get_device_name(given.device) if given.device.type == "cuda" else given.device.type
    where = {"device": name, "torch": torch.__version__, "scale": given.scale, "attn_mode": given.attn_mode}
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print("\n| | ours | theirs | ratio | goal | |\n|---|---|---|---|---|---|")
    lines: list[Line] = []
    for bench in benches():
        if given.only and not any(words in bench.name for words in given.only):
            continue
        lines.append(measured(bench, lab))
        print(shown(lines[-1]), flush=True)
        if given.json:
            write(given.json, lines, where)
    print(f"\n{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
