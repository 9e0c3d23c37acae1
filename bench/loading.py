"""Compare how a file of the 1.3B's shape becomes a ready fp8 model with other ways to load it.

They are diffusers' loading with layerwise casting, and what "two-way" stands for: the whole file is read, then cast.

python -m bench.loading
python -m bench.loading --quick

Each loading has a process of its own, on the CPU; the file is in the system's cache, and imports are not counted.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bench.measure import TWO_WAY, Row, Setting, main
from bench.two_way import PlainDiT
from tests.tiny import dit_shapes
from wan.configs import TASKS
from wan.fp8 import FLOAT8, is_quantized
from wan.loading import load_dit
from wan.model import WanShape

TASK = TASKS["t2v-1.3B"]
FREQUENCIES = 64  # of tests.tiny.dit_shapes; the published model has 256
CHILD = "import sys; from bench.loading import report; report(*sys.argv[1:])"


def rows(setting: Setting) -> Iterator[Row]:
    blocks = 6 if setting.quick else TASK.blocks
    with tempfile.TemporaryDirectory() as folder:
        write_file(Path(folder, "small"), 1)
        write_file(Path(folder, "large"), blocks)
        measured = [[loaded(side, folder, setting) for side in LOADERS] for _ in range(setting.pairs + 1)][1:]
    ours, *others = zip(*measured, strict=True)
    size, name = ours[0]["size"], f"{blocks} blocks of the 1.3B, bf16 file > fp8 model"
    peak = max(run["peak"] for run in ours)
    for theirs, ending, goal in zip(others, ("", TWO_WAY), (0.8, 0.7), strict=True):
        times = [[run["seconds"] for run in side] for side in (ours, theirs)]
        ratio = median(a / b for a, b in zip(*times, strict=True))
        yield Row(f"{name}: time{ending}", *map(median, times), ratio, goal, "s")
        what = f"{name}: peak main memory; ratio: ours to the model's size{ending}"
        yield Row(what, peak / 1e9, max(run["peak"] for run in theirs) / 1e9, peak / size, 1.15, "GB")


def write_file(folder: Path, blocks: int) -> None:
    """Write a file of so many blocks of the 1.3B, and the configuration that diffusers needs to read it."""
    folder.mkdir()
    table = dit_shapes(16, False, dim=TASK.dim, ffn=TASK.ffn_dim, blocks=blocks, text=4096)
    noise = torch.randn(max(torch.Size(shape).numel() for shape in table.values()), dtype=torch.bfloat16) * 0.02
    tensors = {name: noise[: torch.Size(shape).numel()].view(shape).clone() for name, shape in table.items()}
    save_file(tensors, folder / "dit.safetensors")
    config = {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": TASK.heads,
        "attention_head_dim": TASK.dim // TASK.heads,
        "ffn_dim": TASK.ffn_dim,
        "num_layers": blocks,
        "freq_dim": FREQUENCIES,
    }
    Path(folder, "config.json").write_text(json.dumps(config))
    with open(folder / "dit.safetensors", "rb+") as file:
        os.fsync(file.fileno())  # or it would still be written while the first loadings are measured


def loaded(side: str, folder: str, setting: Setting) -> dict[str, float]:
    """Return {"seconds", "peak", "size"} of a loading in a process of its own; bytes."""
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-c", CHILD, side, folder, threads], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def report(side: str, folder: str, threads: str) -> None:
    """Load the small file and then, measured, the large one; print what loaded() returns."""
    torch.set_num_threads(int(threads))
    load = LOADERS[side]
    load(Path(folder, "small"))
    before, start = memory("VmRSS"), time.perf_counter()
    model = load(Path(folder, "large"))
    seconds = time.perf_counter() - start
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    print(json.dumps({"seconds": seconds, "peak": memory("VmHWM") - before, "size": size}))


def memory(name: str) -> int:
    """Return the bytes that Linux tells of this process: VmRSS, its main memory now, or VmHWM, at most so far.

    Not getrusage's, which begins with what the process that started this one had.
    """
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def load_ours(folder: Path) -> nn.Module:
    return load_dit(folder / "dit.safetensors", TASK, torch.bfloat16, "cpu", fp8=True)


def load_theirs(folder: Path) -> nn.Module:
    from diffusers import WanTransformer3DModel
    from diffusers.utils import logging

    logging.set_verbosity_error()
    model = WanTransformer3DModel.from_single_file(
        str(folder / "dit.safetensors"), config=str(folder), torch_dtype=torch.bfloat16
    )
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    return model


def load_plainly(folder: Path) -> nn.Module:
    weights = load_file(folder / "dit.safetensors")
    blocks = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    shape = WanShape(TASK.dim, TASK.ffn_dim, TASK.heads, blocks, in_channels=16, freq_dim=FREQUENCIES)
    with torch.device("meta"):
        model = PlainDiT(shape)
    held = {name: weight.to(FLOAT8) if is_quantized(name) else weight for name, weight in weights.items()}
    model.load_state_dict(held, assign=True)
    return model


LOADERS: dict[str, Callable[[Path], nn.Module]] = {
    "ours": load_ours,
    "theirs": load_theirs,
    "two-way": load_plainly,
}

if __name__ == "__main__":
    main(__doc__, {"loading": rows})
