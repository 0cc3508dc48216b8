"""What is scheduled: a cluster of device types, jobs, or a workload that they are drawn from."""

import math
from collections import Counter
from typing import Annotated, Literal, Self, TypeVar

import numpy as np
import pydantic

from longer_rec.config import Config
from longer_rec.errors import ConfigError
from longer_rec.schedule.devices import Rates

PolicyName = Literal["gang", "backfill", "homogeneous", "easyscale"]
Positive = pydantic.Field(gt=0)
EntriesT = TypeVar("EntriesT", dict[str, int], dict[str, float], dict[int, float], tuple[PolicyName, ...])

_MOST_TIMES_MEDIAN = 100
_MOST_DEVICES = 100_000


def _check_entries(entries: EntriesT) -> EntriesT:
    """In place of pydantic's ``min_length``, which counts a faulty entry as none and tells of two faults."""
    if not entries:
        raise ValueError("0 entries are given, 1 is the least; add one")
    return entries


Some = Annotated[EntriesT, pydantic.AfterValidator(_check_entries)]


class Change(Config):
    """From ``at_s`` on there are ``count`` devices of ``type``; those of the highest numbers come and go."""

    at_s: float = pydantic.Field(ge=0)
    type: str
    count: int = pydantic.Field(ge=0)


class Cluster(Config):
    devices: Some[dict[str, int]] = pydantic.Field(description="device type -> how many")
    changes: tuple[Change, ...] = ()

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.devices.values()) < 0 or not any(self.devices.values()):
            raise ValueError(f"devices={self.devices}: no count may be below 0 and one must be above; add devices")
        if (most := max(*self.devices.values(), *(change.count for change in self.changes), 0)) > _MOST_DEVICES:
            raise ValueError(f"{most} devices of a type are more than the {_MOST_DEVICES} to simulate; use fewer")
        for change in self.changes:
            if change.type not in self.devices:
                raise ValueError(f"changes: device type {change.type!r} is unknown; use one of "
                                 f"{', '.join(self.devices)}")
        return self


class ClusterJob(Config):
    """``rates`` are measured mini-batches a second of one device; types that are not named cannot run the job.

    ``exchange_s`` is what each device beyond the first adds to a step; the planner does not know of it.
    """

    name: str
    num_workers: int = pydantic.Field(ge=1)
    arrival_s: float = pydantic.Field(0.0, ge=0)
    mini_batches: int = pydantic.Field(ge=1)
    rates: Some[dict[str, float]]
    exchange_s: float = pydantic.Field(0.0, ge=0)

    @pydantic.field_validator("rates")
    @classmethod
    def _check_rates(cls, rates: dict[str, float]) -> dict[str, float]:
        for name, rate in rates.items():
            if rate <= 0:
                raise ValueError(f"{name}={rate} must be above 0 mini-batches a second; measure it, or leave it out")
        return rates

    @property
    def num_steps(self) -> int:
        return math.ceil(self.mini_batches / self.num_workers)

    def rates_of(self, types: tuple[str, ...]) -> Rates:
        return tuple(self.rates.get(name, 0.0) for name in types)


class Workload(Config):
    """Jobs drawn from a seed; the kinds and ``load`` are those of docs/scheduling.md.

    Durations are of W devices of the fastest type and at most 100 times the median; they do not depend on W.
    """

    kind: Literal["poisson", "trace"] = "poisson"
    num_jobs: int = pydantic.Field(ge=1, le=20_000)
    load: float = Positive
    speeds: Some[dict[str, float]] = pydantic.Field(description="relative speed of each device type")
    median_s: float = pydantic.Field(3600.0, gt=0)
    sigma: float = pydantic.Field(1.2, ge=0, description="of the logarithm of the durations")
    sizes: Some[dict[int, float]] = pydantic.Field({1: 0.4, 2: 0.15, 4: 0.2, 8: 0.15, 16: 0.1},
                                                   description="W -> share of the jobs")
    exchange: float = pydantic.Field(0.0, ge=0, description="exchange_s in mini-batches of the fastest type")
    seed: int = 0


class Simulation(Config):
    """``pause_s`` passes without progress at each start and resize, ``settle_s`` more before a job is resized again."""

    name: str
    cluster: Cluster
    jobs: tuple[ClusterJob, ...] = ()
    workload: Workload | None = None
    pause_s: float = pydantic.Field(10.0, ge=0)
    settle_s: float = pydantic.Field(60.0, ge=0)
    policies: Some[tuple[PolicyName, ...]] = ("gang", "backfill", "homogeneous", "easyscale")

    @pydantic.field_validator("policies")
    @classmethod
    def _check_policies(cls, policies: tuple[PolicyName, ...]) -> tuple[PolicyName, ...]:
        for name, count in Counter(policies).items():
            if count > 1:
                raise ValueError(f"{name!r} is given {count} times; give it once")
        return policies

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.jobs) == (self.workload is not None):
            raise ValueError("either jobs or a workload is needed, and not both; leave one out")
        twice = [name for name, count in Counter(job.name for job in self.jobs).items() if count > 1]
        if twice:
            raise ValueError(f"jobs: name {twice[0]!r} is given twice; rename one of them")
        named = {f"job {job.name!r}: rates": job.rates for job in self.jobs}
        for owner, types in {**named, "workload: speeds": self.workload.speeds if self.workload else {}}.items():
            unknown = [name for name in types if name not in self.cluster.devices]
            if unknown:
                raise ValueError(f"{owner}: device type {unknown[0]!r} is unknown; use one of "
                                 f"{', '.join(self.cluster.devices)}")
        return self


def all_jobs(simulation: Simulation) -> list[ClusterJob]:
    """The jobs in order of arrival."""
    jobs = simulation.jobs if simulation.workload is None else draw_jobs(simulation.workload, simulation.cluster)
    return sorted(jobs, key=lambda job: job.arrival_s)


def draw_jobs(workload: Workload, cluster: Cluster) -> list[ClusterJob]:
    """A function of the settings alone."""
    if min(workload.speeds.values()) <= 0 or min(workload.sizes) < 1 or min(workload.sizes.values()) <= 0:
        raise ConfigError(f"workload: speeds={workload.speeds} and sizes={workload.sizes} must be above 0; raise them")
    random, count = np.random.default_rng(workload.seed), workload.num_jobs
    shares = np.array(list(workload.sizes.values()))
    size = random.choice(list(workload.sizes), count, p=shares / shares.sum())
    duration = np.exp(random.normal(0, workload.sigma, count))
    gap = random.exponential(1, count)
    if workload.kind == "trace":
        tail = random.random(count) < 0.2
        duration = np.where(tail, 1 + random.pareto(1.2, count), duration)
        begins = random.random(count) < 0.4  # of a burst: the others follow at once, with its size
        gap *= np.where(begins, 1.0, 0.01)
        first = np.maximum.accumulate(np.where(begins, np.arange(count), 0))
        size = size[first]
    duration_s = workload.median_s * np.minimum(duration, _MOST_TIMES_MEDIAN)
    fastest = max(workload.speeds.values())
    devices = sum(cluster.devices[name] * speed / fastest for name, speed in workload.speeds.items())
    if not devices:
        raise ConfigError(f"workload: the cluster has no device of {', '.join(workload.speeds)}; add some")
    span_s = float((duration_s * size).sum() / (workload.load * devices))
    arrival = np.cumsum(gap)
    arrival_s = (arrival - arrival[0]) / max(arrival[-1] - arrival[0], 1e-9) * span_s
    if workload.kind == "trace":
        arrival_s = np.array([_by_day(float(at)) for at in arrival_s])
    base = np.exp(random.uniform(0, math.log(5), count))
    jitter = np.exp(random.normal(0, 0.1, (count, len(workload.speeds))))
    drawn = []
    for i in range(count):
        rates = {name: float(base[i] * speed / fastest * jitter[i, k])
                 for k, (name, speed) in enumerate(workload.speeds.items())}
        drawn.append(ClusterJob(
            name=f"job-{i:04}", num_workers=int(size[i]), arrival_s=float(arrival_s[i]), rates=rates,
            mini_batches=max(1, round(float(duration_s[i] * size[i] * base[i]))),
            exchange_s=workload.exchange / float(base[i])))
    return drawn


def _by_day(at_s: float) -> float:
    """Arrivals four times as dense in the 12 hours of the day as in those of the night, the day's number kept."""
    day, part = divmod(at_s / 86400, 1.0)
    return 86400 * (day + (part * 0.625 if part < 0.8 else 0.5 + (part - 0.8) * 2.5))
