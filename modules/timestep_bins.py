"""Errors of examples by how noisy they are: ten bins from clean to pure noise."""

from collections.abc import Iterable

import torch
from torch import Tensor

BINS = 10
NAMES = tuple(f"t{1000 * i // BINS}-{1000 * (i + 1) // BINS}" for i in range(BINS))


class TimestepBins:
    """Sums and numbers of errors in each bin; the lower bound of a bin belongs to it, and 1000 to the last."""

    def __init__(self, pairs: Iterable[Iterable[float]] = ()):
        """pairs: as pairs() returned them."""
        self.sums, self.counts = [0.0] * BINS, [0] * BINS
        for number, (total, count) in enumerate(pairs):
            self.sums[number], self.counts[number] = float(total), int(count)

    def add(self, t: Tensor, errors: Tensor) -> None:
        """Count the errors [B] of examples at t [B] in [0, 1]."""
        for place, error in zip(t.tolist(), errors.tolist(), strict=True):
            # 0.3 as float32 is to be 300 and not a little less.
            number = min(int(round(1000 * place, 3) * BINS / 1000), BINS - 1)
            self.sums[number] += error
            self.counts[number] += 1

    def pairs(self) -> tuple[tuple[float, int], ...]:
        """Return (sum, number) of each bin."""
        return tuple(zip(self.sums, self.counts, strict=True))

    def tensor(self) -> Tensor:
        """Return the pairs as numbers that several processes can add up, float64 [10 2]."""
        return torch.tensor(self.pairs(), dtype=torch.float64)

    def mean(self) -> float:
        return sum(self.sums) / max(sum(self.counts), 1)

    def means(self, prefix: str) -> dict[str, float]:
        """Return the mean error of each bin that has any, by name: "t0-100" behind a prefix."""
        named = zip(NAMES, self.sums, self.counts, strict=True)
        return {f"{prefix}{name}": total / count for name, total, count in named if count}


def in_words(means: dict[str, float]) -> str:
    """Return means by bin in a line for the log: "0-100 0.512, 100-200 0.340 ..."."""
    return ", ".join(f"{name.rpartition('t')[2]} {mean:.3f}" for name, mean in means.items())
