"""Four policies over a sweep of loads and assumptions, and what the simulator itself takes.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_schedule
"""

import multiprocessing
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
    return Workload(**{"num_jobs": 300, "load": 0.9, "speeds": speeds, "seed": seed, **settings})


def means(arguments: tuple[Cluster, Workload, float]) -> list[tuple[float, float]]:
    """(mean hours, part of the devices held) of each policy."""
    cluster, workload, pause_s = arguments
    jobs = sorted(draw_jobs(workload, cluster), key=lambda job: job.arrival_s)
    found = [measure(simulate(cluster, jobs, policy, pause_s, 60.0)) for policy in POLICIES]
    return [(each["mean_s"] / 3600, each["held"]) for each in found]


def row(title: str, cluster: Cluster, pause_s: float = 10.0, **settings: Any) -> None:
    """Medians over the seeds, and the range of gang scheduling's mean over EasyScale's."""
    with multiprocessing.Pool(len(SEEDS)) as pool:
        found = pool.map(means, [(cluster, draw(cluster, seed, **settings), pause_s) for seed in SEEDS])
    hours = [statistics.median(each[i][0] for each in found) for i in range(len(POLICIES))]
    held = [statistics.median(each[i][1] for each in found) for i in (0, 3)]
    ratios = [sorted(each[0][0] / each[i][0] for each in found) for i in (2, 3)]
    print(f"| {title} | " + " | ".join(f"{each:.1f}" for each in hours)
          + "".join(f" | {each[len(each) // 2]:.1f}" for each in ratios)
          + f" | {ratios[1][0]:.1f} to {ratios[1][-1]:.1f} | {held[0]:.0%} / {held[1]:.0%} |", flush=True)


def head(title: str) -> None:
    print(f"\n| {title} | gang h | backfill h | homogeneous h | easyscale h | gang / homogeneous | gang / easyscale | "
          "its range | devices held, gang / easyscale |\n" + 9 * "|---" + "|")


def main() -> None:
    for num_jobs, loads in ((300, (0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5)), (1000, (0.5, 0.7, 0.9, 1.1))):
        head(f"load, {num_jobs:,} jobs")
        for kind in ("poisson", "trace"):
            for load in loads:
                row(f"{kind} {load}", MIXED, kind=kind, load=load, num_jobs=num_jobs)
    head("trace, 300 jobs, load 0.9, one assumption changed")
    row("none", MIXED, kind="trace")
    row("64 devices alike", ALIKE, kind="trace")
    row("all of W = 1", MIXED, kind="trace", sizes={1: 1.0})
    row("W = 4, 8, 16", MIXED, kind="trace", sizes={4: 0.4, 8: 0.3, 16: 0.3})
    row("exchange 1 % a device", MIXED, kind="trace", exchange=0.01)
    row("exchange 5 % a device", MIXED, kind="trace", exchange=0.05)
    row("pause 300 s", MIXED, kind="trace", pause_s=300.0)
    row("sigma 2", MIXED, kind="trace", sigma=2.0)
    row("all durations equal", MIXED, kind="poisson", sigma=0.0)
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
