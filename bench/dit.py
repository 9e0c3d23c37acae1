"""Compare the DiT's forward pass with diffusers' on the same weights: seconds, ratio and distance, one table.

    python -m bench.dit
    python -m bench.dit --quick
    python -m bench.dit --device cuda --dtype bf16

Both run in turn in one process, so that whatever else the machine does slows both. Ratios below 1 are in our favour.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from tests.diffusers_dit import diffusers_dit, padded
from tests.tiny import state_dict
from utils.devices import parse_dtype
from wan.loading import build_dit

#       name                   dim  ffn  heads blocks text  latent frames, rows, columns
SIZES = {
    "d=256, 4 blocks, S=1040": (256, 1024, 2, 4, 256, (5, 26, 32)),
    "d=256, 4 blocks, S=128": (256, 1024, 2, 4, 256, (2, 16, 16)),
    "d=1536, ffn 8960, 2 blocks, S=480": (1536, 8960, 12, 2, 4096, (2, 24, 40)),
}


def measure(
    size: tuple[int, int, int, int, int, tuple[int, int, int]], pairs: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, float, float, float]:
    """Return seconds of our forward pass and of diffusers', the median ratio of a pair, and their relative distance."""
    dim, ffn, heads, blocks, text_dim, grid = size
    weights = state_dict("dit_t2v", dim=dim, ffn=ffn, blocks=blocks, text=text_dim)
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    ours = build_dit(weights, heads, dtype).to(device)
    theirs = diffusers_dit(weights, ours.shape).to(device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, *grid, generator=generator).to(device)
    text = [torch.randn(60, text_dim, generator=generator).to(device, dtype)]
    timestep = torch.tensor([500.0], device=device)

    def run_ours() -> Tensor:
        return ours(x, timestep, text)

    def run_theirs() -> Tensor:
        return theirs(x.to(dtype), timestep, padded(text), return_dict=False)[0].float()

    with torch.no_grad():
        distance = ((run_ours() - run_theirs()).norm() / run_theirs().norm()).item()
        times = [(seconds(run_ours), seconds(run_theirs)) for _ in range(pairs)]
    mine, other = (median(column) for column in zip(*times, strict=True))
    return mine, other, median(a / b for a, b in times), distance


def seconds(run: Callable[[], Tensor]) -> float:
    """Return how long a call takes until its result is there."""
    start = time.perf_counter()
    run()[(0,) * 5].item()  # waits for a GPU
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m bench.dit"
    )
    parser.add_argument("--pairs", type=int, default=15, help="forward passes of each (default: 15)")
    parser.add_argument("--quick", action="store_true", help="the two small sizes only, five pairs")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--dtype", default="fp32", type=parse_dtype)
    args = parser.parse_args()
    sizes, pairs = (list(SIZES)[:2], 5) if args.quick else (list(SIZES), max(args.pairs, 5))
    print(f"torch {torch.__version__}, {args.device}, {args.dtype}, {torch.get_num_threads()} threads, {pairs} pairs\n")
    print("| DiT forward | ours, s | diffusers, s | ratio | relative distance |\n|---|---|---|---|---|")
    for name in sizes:
        mine, other, ratio, distance = measure(SIZES[name], pairs, args.device, args.dtype)
        print(f"| {name} | {mine:.4f} | {other:.4f} | {ratio:.2f} | {distance:.1e} |", flush=True)


if __name__ == "__main__":
    main()
