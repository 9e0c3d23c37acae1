"""The bar of a training run: its rate is that of training steps alone, the time left includes saves and samples."""

import contextlib
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tqdm import tqdm

_WINDOW = 200  # of the last steps, whose mean is the time that a step takes


class RunBar(tqdm):
    """tqdm over the optimizer steps of a run.

    left: how many files, states and samples are still planned after a step, by kind.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        left: Callable[[int], Mapping[str, int]] = lambda step: {},
        silent: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._left, self._clock = left, clock
        self._steps: deque[float] = deque(maxlen=_WINDOW)
        self._aside: defaultdict[str, list[float]] = defaultdict(list)
        self._since, self._counted = clock(), 0
        bar = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{eta}, {rate_fmt}{postfix}]"
        super().__init__(total=total, initial=initial, desc="steps", disable=silent, unit="it", bar_format=bar)

    def step(self) -> float:
        """Count a step and return the seconds that it has taken, without what was done aside."""
        now = self._clock()
        seconds, self._since = now - self._since, now
        if self._counted == 1:  # the first, with compilation and first allocations, told until there is another
            self._steps.clear()
        self._counted += 1
        self._steps.append(seconds)
        self.update()
        return seconds

    @contextlib.contextmanager
    def aside(self, kind: str) -> Iterator[None]:
        """Count the time of the body as that of a file, a state or samples, not of a step."""
        start = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - start
            self._aside[kind].append(seconds)
            self._since += seconds

    def remaining(self) -> float | None:
        """Return the seconds that the run still takes by what its steps, saves and samples took; None at first."""
        if not self._steps:
            return None
        aside = sum(
            count * statistics.mean(self._aside[kind])
            for kind, count in self._left(self.n).items()
            if self._aside.get(kind)
        )
        return (self.total - self.n) * statistics.mean(self._steps) + aside

    @property
    def format_dict(self) -> dict[str, Any]:
        values, left = super().format_dict, self.remaining()
        rate = 1 / max(statistics.mean(self._steps), 1e-9) if self._steps else None
        return {**values, "rate": rate, "eta": "?" if left is None else tqdm.format_interval(left)}
