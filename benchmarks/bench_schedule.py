"""Four policies over a sweep of loads and assumptions, and what the simulator itself takes.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_schedule
"""

import statistics
import time
from typing import Any

from longer_rec.schedule.command import measure
from longer_rec.schedule.jobs import Cluster, PolicyName, Workload, draw_jobs
from longer_rec.schedule.simulate import simulate
from tests.reference.provenance import provenance

MIXED = Cluster(devices={"v100": 32, "p100": 16, "t4": 16})
ALIKE = Cluster(devices={"v100": 64})
POLICIES: tuple[PolicyName, ...] = ("gang", "backfill", "homogeneous", "easyscale")
SEEDS = (0, 1, 2)


def draw(cluster: Cluster, seed: int, **settings: Any) -> Workload:
    speeds = {name: speed for name, speed in {"v100": 1.0, "p100": 0.5, "t4": 0.35}.items() if name in cluster.devices}
    return Workload(**{"num_jobs": 300, "load": 1.0, "speeds": speeds, "seed": seed, **settings})


def row(title: str, cluster: Cluster, pause_s: float = 10.0, settle_s: float = 60.0, **settings: Any) -> None:
    """Mean hours by policy and gang scheduling's over EasyScale's, medians over the seeds, with their range."""
    means = {policy: [] for policy in POLICIES}  # type: dict[str, list[float]]
    held = {policy: [] for policy in POLICIES}  # type: dict[str, list[float]]
    for seed in SEEDS:
        jobs = sorted(draw_jobs(draw(cluster, seed, **settings), cluster), key=lambda job: job.arrival_s)
        for policy in POLICIES:
            found = measure(simulate(cluster, jobs, policy, pause_s, settle_s))
            means[policy].append(found["mean_s"] / 3600)
            held[policy].append(found["held"])
    ratios = sorted(gang / own for gang, own in zip(means["gang"], means["easyscale"], strict=True))
    alike = statistics.median(gang / own for gang, own in zip(means["gang"], means["homogeneous"], strict=True))
    print(f"| {title} | " + " | ".join(f"{statistics.median(means[policy]):.1f}" for policy in POLICIES)
          + f" | {alike:.1f} | {ratios[1]:.1f} | {ratios[0]:.1f} to {ratios[-1]:.1f} | "
          + f"{statistics.median(held['gang']):.0%} / {statistics.median(held['easyscale']):.0%} |", flush=True)


def head(title: str) -> None:
    print(f"\n| {title} | gang h | backfill h | homogeneous h | easyscale h | gang / homogeneous | gang / easyscale | "
          "its range | devices held, gang / easyscale |\n" + 9 * "|---" + "|")


def main() -> None:
    head("load, 300 jobs on 64 devices of three types")
    for kind in ("poisson", "trace"):
        for load in (0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5):
            row(f"{kind} {load}", MIXED, kind=kind, load=load)
    head("one assumption changed: trace, load 0.9")
    row("none", MIXED, kind="trace", load=0.9)
    row("100 jobs", MIXED, kind="trace", load=0.9, num_jobs=100)
    row("1,000 jobs", MIXED, kind="trace", load=0.9, num_jobs=1000)
    row("64 devices alike", ALIKE, kind="trace", load=0.9)
    row("all jobs of W = 1", MIXED, kind="trace", load=0.9, sizes={1: 1.0})
    row("W = 4, 8, 16 alone", MIXED, kind="trace", load=0.9, sizes={4: 0.4, 8: 0.3, 16: 0.3})
    row("exchange 1 % a device", MIXED, kind="trace", load=0.9, exchange=0.01)
    row("exchange 5 % a device", MIXED, kind="trace", load=0.9, exchange=0.05)
    row("pause 0 s", MIXED, kind="trace", load=0.9, pause_s=0.0)
    row("pause 300 s", MIXED, kind="trace", load=0.9, pause_s=300.0)
    row("durations alike", MIXED, kind="poisson", load=0.9, sigma=0.0)
    print("\n| jobs | devices | kind | policy | processor s | placements |\n" + 6 * "|---" + "|")
    large = Cluster(devices={"v100": 512, "p100": 256, "t4": 256})
    for kind in ("poisson", "trace"):
        jobs = sorted(draw_jobs(draw(large, 0, num_jobs=1000, kind=kind), large), key=lambda job: job.arrival_s)
        for policy in POLICIES:
            start = time.process_time()
            outcome = simulate(large, jobs, policy, 10.0, 60.0)
            print(f"| 1,000 | 1,024 | {kind} | {policy} | {time.process_time() - start:.1f} | "
                  f"{len(outcome.segments):,} |", flush=True)
    print("\n" + provenance("python -m benchmarks.bench_schedule", "numpy"))


if __name__ == "__main__":
    main()
