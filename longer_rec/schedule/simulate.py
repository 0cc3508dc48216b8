"""Jobs on a shared cluster, event by event, under one policy.

EasyScale (arXiv 2208.14228), the planner between jobs: every job proposes how to grow; proposals are sorted by speedup
per device, then size, and approved while devices last. A job that waits takes a free device, or one that a running job
misses least. Work is counted in whole steps: a resize finds the job at the end of a step, and the step that it breaks
off is done again. Nothing depends on anything but the arguments.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from longer_rec.errors import ConfigError
from longer_rec.schedule.devices import Counts, Rates, best_share, growths, least_loss, replaced, throughput, trimmed
from longer_rec.schedule.jobs import Cluster, ClusterJob, PolicyName

Device = tuple[int, int]
Proposal = tuple[float, int, int]  # minus the speedup per device, minus the devices, job: the best is the least

# What happens at one moment happens in this order.
_CAPACITY, _FINISH, _SETTLED, _ARRIVAL = range(4)
_GANGS: Final = frozenset({"gang", "backfill"})


@dataclass(frozen=True)
class Segment:
    """A job on the same devices (type, number) from ``start_s`` to ``end_s``: a pause, then whole steps."""

    job: int
    start_s: float
    end_s: float
    devices: tuple[Device, ...]
    steps: int
    busy_s: float


@dataclass
class Tracked:
    """A job under way. ``devices`` by type; ``version`` makes what was planned for an earlier size void."""

    index: int
    spec: ClusterJob
    rates: Rates
    devices: list[list[int]]
    done: int = 0
    version: int = 0
    start_s: float = 0.0
    step_s: float = 0.0
    busy_s: float = 0.0
    before: tuple[Counts, float] | None = None  # devices and seconds of a step until it grew
    most: int | None = None  # devices, since more of them were slower
    proposed: list[tuple[int, "Proposal"]] = field(default_factory=list)
    first_s: float | None = None
    end_s: float | None = None
    resizes: int = -1

    @property
    def counts(self) -> Counts:
        return tuple(map(len, self.devices))


@dataclass(frozen=True)
class Outcome:
    """What became of the jobs, in order of arrival; ``capacity``: (time, device type, count) of each change."""

    policy: PolicyName
    jobs: Sequence[Tracked]
    segments: Sequence[Segment]
    capacity: Sequence[tuple[float, int, int]]


def simulate(cluster: Cluster, jobs: Sequence[ClusterJob], policy: PolicyName, pause_s: float,
             settle_s: float) -> Outcome:
    """Run all jobs to their end. ``ConfigError`` names a job that the devices can never start."""
    run = _Run(cluster, jobs, policy, pause_s, settle_s)
    run.run()
    return Outcome(policy, run.jobs, run.segments, run.capacity)


class _Run:
    def __init__(self, cluster: Cluster, jobs: Sequence[ClusterJob], policy: PolicyName, pause_s: float,
                 settle_s: float) -> None:
        self.types = types = tuple(cluster.devices)
        self.policy, self.pause_s, self.settle_s = policy, pause_s, settle_s
        self.jobs = [Tracked(i, job, job.rates_of(types), [[] for _ in types]) for i, job in enumerate(jobs)]
        self.free = [list(range(count)) for count in cluster.devices.values()]
        self.segments: list[Segment] = []
        self.waiting: list[int] = []
        self.running: dict[int, Tracked] = {}
        self.now, self.unfinished = 0.0, len(jobs)
        self.proposals: list[list[Proposal]] = [[] for _ in types]  # by device type, sorted
        self.capacity = [(0.0, i, count) for i, count in enumerate(cluster.devices.values())]
        self.capacity += [(each.at_s, types.index(each.type), each.count)
                          for each in sorted(cluster.changes, key=lambda each: each.at_s)]
        self.events = [(self.capacity[i][0], _CAPACITY, i, 0) for i in range(len(types), len(self.capacity))]
        self.events += [(job.arrival_s, _ARRIVAL, i, 0) for i, job in enumerate(jobs)]
        heapq.heapify(self.events)

    def run(self) -> None:
        while self.events and self.unfinished:
            self.now = self.events[0][0]
            while self.events and self.events[0][0] == self.now:
                self.handle(*heapq.heappop(self.events)[1:])
            (self.start_gangs if self.policy in _GANGS else self.share_out)()
        if self.waiting:
            job = self.jobs[self.waiting[0]].spec
            raise ConfigError(f"{self.policy}: job {job.name!r} of num_workers={job.num_workers} can never start on "
                              f"{sum(map(len, self.free))} free devices; add devices of its types, lower num_workers, "
                              "or leave the policy out")

    def handle(self, kind: int, index: int, value: int) -> None:
        if kind == _CAPACITY:
            self.change_capacity(*self.capacity[index][1:])
        elif kind == _ARRIVAL:
            insort(self.waiting, index)
        elif self.jobs[index].version == value:
            job = self.jobs[index]
            if kind == _FINISH:
                self.leave(job, job.spec.num_steps - job.done)
                job.end_s = self.now
                self.unfinished -= 1
            else:
                self.look_back(job)

    def change_capacity(self, kind: int, count: int) -> None:
        known = self.free[kind] + [each for job in self.running.values() for each in job.devices[kind]]
        self.free[kind] = [each for each in self.free[kind] if each < count]
        losers = [job for job in self.running.values() if max(job.devices[kind], default=-1) >= count]
        for job in losers:
            kept = replaced(job.counts, kind, sum(each < count for each in job.devices[kind]))
            held = job.devices
            self.leave(job)
            self.free[kind] = [each for each in self.free[kind] if each < count]
            if self.policy in _GANGS or not throughput(kept, job.rates, job.spec.num_workers):
                insort(self.waiting, job.index)
                job.rates = job.spec.rates_of(self.types)
            else:
                self.place(job, trimmed(kept, job.rates, job.spec.num_workers), held)
        self.free[kind] = sorted({*self.free[kind], *(each for each in range(count) if each not in known)})

    def leave(self, job: Tracked, steps: int | None = None) -> None:
        """End the segment under way; without ``steps`` those that are finished by now count."""
        if steps is None:
            worked_s = self.now - job.start_s - self.pause_s
            steps = min(max(0, int(worked_s / job.step_s)), job.spec.num_steps - job.done)
        job.done += steps
        held = tuple((kind, each) for kind, own in enumerate(job.devices) for each in own)
        if self.now > job.start_s:
            self.segments.append(Segment(job.index, job.start_s, self.now, held, steps, job.busy_s))
        for kind, each in held:
            insort(self.free[kind], each)
        job.devices = [[] for _ in job.devices]
        job.version, job.before = job.version + 1, None
        for kind, proposal in job.proposed:
            del self.proposals[kind][bisect_left(self.proposals[kind], proposal)]
        job.proposed = []
        del self.running[job.index]

    def place(self, job: Tracked, counts: Counts, kept: Sequence[Sequence[int]] = ()) -> None:
        """Start or continue a job that holds nothing, on free devices: those it has just left, then the lowest."""
        share = best_share(counts, job.rates, job.spec.num_workers)
        for kind, count in enumerate(counts):
            free = self.free[kind]
            own = [each for each in kept[kind] if each in free][:count] if kept else []
            own += [each for each in free if each not in own][:count - len(own)]
            job.devices[kind], self.free[kind] = own, [each for each in free if each not in own]
        job.start_s, job.resizes = self.now, job.resizes + 1
        job.first_s = self.now if job.first_s is None else job.first_s
        job.step_s, job.busy_s = share.step_s + job.spec.exchange_s * (sum(counts) - 1), share.busy_s
        self.running[job.index] = job
        left_s = self.pause_s + (job.spec.num_steps - job.done) * job.step_s
        heapq.heappush(self.events, (self.now + left_s, _FINISH, job.index, job.version))
        if self.policy not in _GANGS:
            settled_s = self.now + self.pause_s + self.settle_s
            heapq.heappush(self.events, (settled_s, _SETTLED, job.index, job.version))

    def resize(self, job: Tracked, counts: Counts) -> None:
        kept = job.devices
        self.leave(job)
        self.place(job, trimmed(counts, job.rates, job.spec.num_workers), kept)

    def look_back(self, job: Tracked) -> None:
        """Undo a growth that made the job slower; else let it propose the next one."""
        if job.before is not None and job.step_s > job.before[1]:
            job.most = sum(job.before[0])
            self.resize(job, job.before[0])
            return
        for speedup, kind, more in growths(job.counts, job.rates, job.spec.num_workers):
            if job.most is None or sum(job.counts) + more <= job.most:
                proposal = (-speedup, -more, job.index)
                insort(self.proposals[kind], proposal)
                job.proposed.append((kind, proposal))

    def start_gangs(self) -> None:
        """First come, first served: W devices of one type for each, or none; backfilling lets later ones pass."""
        for index in list(self.waiting):
            job, size = self.jobs[index], self.jobs[index].spec.num_workers
            kinds = [kind for kind, rate in enumerate(job.rates) if rate and len(self.free[kind]) >= size]
            if kinds:
                kind = max(kinds, key=lambda kind: job.rates[kind])
                self.waiting.remove(index)
                self.place(job, replaced(job.counts, kind, size))
            elif self.policy == "gang":
                return

    def share_out(self) -> None:
        """A device for each job that waits, while there are any; what is left for those that gain most by it."""
        in_vain: set[tuple[bool, ...]] = set()
        for index in list(self.waiting):
            job = self.jobs[index]
            usable = tuple(rate > 0 for rate in job.rates)
            if usable not in in_vain:
                kind = self.find_device(job)
                if kind is None:
                    in_vain.add(usable)
                    continue
                self.waiting.remove(index)
                if self.policy == "homogeneous":
                    job.rates = tuple(rate * (place == kind) for place, rate in enumerate(job.rates))
                self.place(job, replaced(job.counts, kind, 1))
        free, grown = [len(each) for each in self.free], dict[int, Counts]()
        queues = [[(proposal, kind) for proposal in self.proposals[kind]] for kind, count in enumerate(free) if count]
        for (_, more, index), kind in heapq.merge(*queues):
            job = self.jobs[index]
            if index not in grown and -more <= free[kind] and self.pays(job, counts := replaced(
                    job.counts, kind, job.counts[kind] - more)):
                free[kind] += more
                grown[index] = counts
        for index, counts in grown.items():
            job = self.jobs[index]
            before = job.counts, job.step_s
            self.resize(job, counts)
            job.before = before

    def find_device(self, job: Tracked) -> int | None:
        """The fastest free type; else a device of the running job that loses least by giving one away."""
        kinds = [kind for kind, rate in enumerate(job.rates) if rate]
        if not any(self.free[kind] for kind in kinds):
            losses = [(*loss, each.index) for each in self.running.values()
                      if (loss := least_loss(each.counts, each.rates, each.spec.num_workers, kinds))]
            if not losses:
                return None
            _, counts, victim = min(losses)
            self.resize(self.jobs[victim], counts)
        return max((kind for kind in kinds if self.free[kind]), key=lambda kind: job.rates[kind])

    def pays(self, job: Tracked, counts: Counts) -> bool:
        """Whether the steps that are left end sooner in spite of the pause."""
        left = job.spec.num_steps - job.done - max(0.0, self.now - job.start_s - self.pause_s) / job.step_s
        return left * (job.step_s - best_share(counts, job.rates, job.spec.num_workers).step_s) > self.pause_s
