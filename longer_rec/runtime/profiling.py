"""Where the time of a step goes."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Measured:
    """A few steps: ``seconds`` of one by part, of the slowest rank; ``weights`` and ``optimizer`` bytes of the tables
    by rank.

    ``batches``: history lengths and candidate counts of each of rank 0's workers in each profiled step, and ``peaks``:
    the most bytes that one of that step's forward and backward passes held at once.
    """

    seconds: dict[str, float]
    weights: list[int]
    optimizer: list[int]
    batches: list[list[tuple[list[int], list[int]]]]
    peaks: list[int]


class StepClock:
    """Seconds per named part, summed since the last ``take``.

    On a GPU the parts are times of the host: kernels run on after the part that launched them, so only sums over
    a whole step, which ends in a host synchronisation, are exact there.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with torch.profiler.record_function(name):
            yield
        self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def take(self) -> tuple[dict[str, float], float]:
        """Seconds per part and the wall time since the last call; both start again from zero."""
        now = time.perf_counter()
        taken, elapsed = self._seconds, now - self._started
        self._seconds, self._started = {}, now
        return taken, elapsed


@contextmanager
def quiet_profiler() -> Iterator[None]:
    """The profiler writes of its start, and of blocks that are older than itself, to stderr, past every setting."""
    kept, silent = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(silent)
