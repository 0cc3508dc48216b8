"""One job on unequal devices: how many logical workers each hosts, and what more devices would bring.

EasyScale (arXiv 2208.14228), the planner of one job. Device types are places in tuples: ``counts`` N_i devices held,
``rates`` C_i mini-batches a second of one of them (0: it cannot run the job), ``workers`` A_i logical workers on each.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final

Counts = tuple[int, ...]
Rates = tuple[float, ...]

MAX_WASTE: Final = 0.3


@dataclass(frozen=True)
class Share:
    """``step_s`` is f, the seconds that the slowest device needs for its workers' mini-batches of one step.

    ``waste`` is the part of the devices' mini-batches a second that waits for others; ``throughput`` what is left.
    """

    counts: Counts
    rates: Rates
    num_workers: int
    workers: Counts

    @cached_property
    def slowest(self) -> int:
        """The type that the others wait for."""
        used = [i for i, n in enumerate(self.counts) if n and self.rates[i]]
        return max(used, key=lambda i: self.workers[i] / self.rates[i])

    @cached_property
    def step_s(self) -> float:
        return self.workers[self.slowest] / self.rates[self.slowest]

    @cached_property
    def throughput(self) -> float:
        return self.num_workers / self.step_s

    @cached_property
    def surplus(self) -> int:
        """Places for workers beyond the W that there are."""
        return sum(n * a for n, a in zip(self.counts, self.workers, strict=True)) - self.num_workers

    @property
    def waste(self) -> float:
        devices = list(zip(self.counts, self.rates, self.workers, strict=True))
        idle = sum(n * (c - a / self.step_s) for n, c, a in devices)
        return (idle + self.surplus / self.step_s) / sum(n * c for n, c, _ in devices)

    @cached_property
    def given_up(self) -> Counts:
        """How many devices of each type host one worker less, so that W are hosted in all: of the slowest types."""
        left, taken = self.surplus, [0] * len(self.counts)
        for i in sorted(range(len(taken)), key=lambda i: -self.workers[i] / self.rates[i] if self.rates[i] else 0.0):
            taken[i] = min(left, self.counts[i])
            left -= taken[i]
        return tuple(taken)

    @property
    def busy_s(self) -> float:
        """Device-seconds of one step's mini-batches."""
        return sum((n * a - less) / c for n, a, less, c in zip(
            self.counts, self.workers, self.given_up, self.rates, strict=True) if c)

    @property
    def by_device(self) -> list[int]:
        """Logical workers of each device, type by type; they add up to W."""
        return [workers for n, a, less in zip(self.counts, self.workers, self.given_up, strict=True)
                for workers in [*(n - less) * [a], *less * [a - 1]]]


@lru_cache(maxsize=1 << 18)
def best_share(counts: Counts, rates: Rates, num_workers: int) -> Share:
    """The share of least waste, which is the one of least f: the waste is the sum of N_i C_i - W / f.

    From the A_i that a step of W / sum(N_i C_i) seconds has time for, the type whose next worker ends first takes one
    more until all W have a place. (EasyScale tries floor and ceil of t C_i at one t: W = 19 on one device of rate 10
    and five of rate 1 needs 14 and 1 there, neither of them next to 12.7 and 1.3.)
    """
    used = [i for i, n in enumerate(counts) if n and rates[i]]
    step_s = num_workers / sum(counts[i] * rates[i] for i in used)
    workers = [math.floor(step_s * rates[i]) if counts[i] else 0 for i in range(len(counts))]
    missing = num_workers - sum(counts[i] * workers[i] for i in used)
    while missing > 0:
        first = used[0] if len(used) == 1 else min(used, key=lambda i: (workers[i] + 1) / rates[i])
        workers[first] += 1
        missing -= counts[first]
    return Share(counts, rates, num_workers, tuple(workers))


def throughput(counts: Counts, rates: Rates, num_workers: int) -> float:
    """Mini-batches a second; 0 on devices that cannot run the job."""
    can_run = any(n and c for n, c in zip(counts, rates, strict=True))
    return best_share(counts, rates, num_workers).throughput if can_run else 0.0


@lru_cache(maxsize=1 << 18)
def trimmed(counts: Counts, rates: Rates, num_workers: int) -> Counts:
    """Without the devices that add nothing to the throughput, slowest types first."""
    step_s = best_share(counts, rates, num_workers).step_s * (1 + 1e-9)
    places = [math.floor(step_s * rate) for rate in rates]
    spare = sum(n * a for n, a in zip(counts, places, strict=True)) - num_workers
    kept = list(counts)
    for i in sorted(range(len(counts)), key=lambda i: rates[i]):
        kept[i] -= min(kept[i], spare // places[i]) if places[i] else kept[i]
        spare -= (counts[i] - kept[i]) * places[i]
    return tuple(kept)


def growths(counts: Counts, rates: Rates, num_workers: int) -> Iterator[tuple[float, int, int]]:
    """(speedup per device, device type, devices more) of each way to grow that is faster and wastes at most 30 %.

    At most as many devices more as there are, of one type at a time; they may leave slower ones without work.
    """
    now = throughput(counts, rates, num_workers)
    for i, rate in enumerate(rates):
        best = now * (1 + 1e-9)
        for more in range(1, min(sum(counts), num_workers) + 1) if rate else ():
            grown = trimmed(replaced(counts, i, counts[i] + more), rates, num_workers)
            share = best_share(grown, rates, num_workers)
            if share.throughput > best and share.waste <= MAX_WASTE:
                best = share.throughput
                yield (best / now - 1) / more, i, more


def replaced(counts: Counts, place: int, value: int) -> Counts:
    return (*counts[:place], value, *counts[place + 1:])


def least_loss(counts: Counts, rates: Rates, num_workers: int, wanted: Sequence[int]) -> tuple[float, Counts] | None:
    """(slowdown, what is kept) of giving away one device of a ``wanted`` type; None when it would be the last."""
    if sum(counts) < 2:
        return None
    now = throughput(counts, rates, num_workers)
    kept = [replaced(counts, i, counts[i] - 1) for i in wanted if counts[i]]
    left = [(now / rate - 1, counts) for counts in kept if (rate := throughput(counts, rates, num_workers))]
    return min(left, default=None)
