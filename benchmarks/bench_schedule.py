"""Four policies over a sweep of loads, numbers of jobs and assumptions, and what the simulator itself takes.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_schedule --picture benchmarks/results/schedule.png

Prints the tables of benchmarks/results/schedule.md and draws its picture.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from longer_rec.schedule.command import measure
from longer_rec.schedule.jobs import Cluster, ClusterJob, PolicyName, Workload, draw_jobs
from longer_rec.schedule.simulate import simulate
from tests.reference.provenance import provenance

MIXED = Cluster(devices={"v100": 32, "p100": 16, "t4": 16})
SPEEDS = {"v100": 1.0, "p100": 0.5, "t4": 0.35}
ALIKE = Cluster(devices={"v100": 64})
POLICIES: tuple[PolicyName, ...] = ("gang", "backfill", "homogeneous", "easyscale")
SEEDS = (0, 1, 2, 3, 4)
LOADS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
NUM_JOBS = (100, 300, 1000, 2000)
_TICKS = (1, 2, 3, 5, 10, 15)
# Of the 68 jobs of the paper's simulator.
PAPER_SIZES = {4: 1 / 68, 8: 11 / 68, 16: 18 / 68, 32: 38 / 68}


def draw(cluster: Cluster, seed: int, **settings: Any) -> Workload:
    speeds = {name: SPEEDS[name] for name in cluster.devices}
    return Workload(**{"num_jobs": 300, "load": 0.9, "speeds": speeds, "seed": seed, **settings})


def named(jobs: Sequence[ClusterJob], cluster: Cluster, seed: int) -> list[ClusterJob]:
    """The jobs as users submit them who name a type: one that has W devices, each as often as all of it is fast."""
    random, asked = np.random.default_rng(seed), []
    for job in jobs:
        fit = {name: count * SPEEDS[name] for name, count in cluster.devices.items() if count >= job.num_workers}
        name = str(random.choice(list(fit), p=np.array(list(fit.values())) / sum(fit.values())))
        asked.append(job.model_copy(update={"rates": {name: job.rates[name]}}))
    return asked


def serial_mean_s(jobs: Sequence[ClusterJob], pause_s: float) -> float:
    """Mean time from arrival to end where one job runs at a time, on W devices of its fastest type."""
    now, spans = 0.0, []
    for job in jobs:
        now = max(now, job.arrival_s) + pause_s + job.mini_batches / (job.num_workers * max(job.rates.values()))
        spans.append(now - job.arrival_s)
    return statistics.mean(spans)


def means(arguments: tuple[Cluster, Workload, float, bool, Sequence[PolicyName]]) -> list[tuple[float, float]]:
    """(mean hours, part of the devices held) of each policy, then of one job at a time."""
    cluster, workload, pause_s, names, policies = arguments
    jobs = sorted(draw_jobs(workload, cluster), key=lambda job: job.arrival_s)
    asked = named(jobs, cluster, workload.seed) if names else jobs
    found = [measure(simulate(cluster, asked if policy in ("gang", "backfill") else jobs, policy, pause_s, 60.0))
             for policy in policies]
    return [*((each["mean_s"] / 3600, each["held"]) for each in found), (serial_mean_s(jobs, pause_s) / 3600, 0.0)]


def over_seeds(cluster: Cluster, pause_s: float = 10.0, names: bool = False,
               policies: Sequence[PolicyName] = POLICIES, **settings: Any) -> list[list[tuple[float, float]]]:
    with multiprocessing.Pool(2) as pool:
        return pool.map(means, [(cluster, draw(cluster, seed, **settings), pause_s, names, policies)
                                for seed in SEEDS], chunksize=1)


def row(title: str, cluster: Cluster, pause_s: float = 10.0, names: bool = False, **settings: Any) -> None:
    """Medians over the seeds, and the range of gang scheduling's mean over EasyScale's."""
    found = over_seeds(cluster, pause_s, names, **settings)
    hours = [statistics.median(each[i][0] for each in found) for i in range(len(POLICIES))]
    held = [statistics.median(each[i][1] for each in found) for i in (0, 3)]
    ratios = [sorted(each[0][0] / each[i][0] for each in found) for i in (2, 3)]
    serial = statistics.median(each[4][0] / each[3][0] for each in found)
    print(f"| {title} | " + " | ".join(f"{each:.1f}" for each in hours)
          + "".join(f" | {each[len(each) // 2]:.1f}" for each in ratios)
          + f" | {ratios[1][0]:.1f} to {ratios[1][-1]:.1f} | {serial:.0f} | {held[0]:.0%} / {held[1]:.0%} |",
          flush=True)


def sweep(kind: str) -> dict[int, list[list[float]]]:
    """By number of jobs, for each load: gang scheduling's mean over EasyScale's, sorted over the seeds."""
    print(f"\n| {kind}: jobs | " + " | ".join(f"load {load}" for load in LOADS) + " |\n"
          + (len(LOADS) + 1) * "|---" + "|")
    swept = {}
    for num_jobs in NUM_JOBS:
        swept[num_jobs] = [sorted(gang[0] / easyscale[0] for gang, easyscale, _ in over_seeds(
            MIXED, policies=("gang", "easyscale"), kind=kind, load=load, num_jobs=num_jobs)) for load in LOADS]
        cells = [f"{each[len(each) // 2]:.1f} ({each[0]:.1f} to {each[-1]:.1f})" for each in swept[num_jobs]]
        print(f"| {num_jobs:,} | " + " | ".join(cells) + " |", flush=True)
    return swept


def picture(path: Path, swept: dict[str, dict[int, list[list[float]]]]) -> None:
    figure, axes = plt.subplots(1, len(swept), figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, (kind, rows) in zip(axes, swept.items(), strict=True):
        for number, (num_jobs, ratios) in enumerate(rows.items()):
            axis.plot(LOADS, [each[len(each) // 2] for each in ratios], f"C{number}o-", label=f"{num_jobs:,} jobs")
            axis.fill_between(LOADS, [each[0] for each in ratios], [each[-1] for each in ratios], color=f"C{number}",
                              alpha=0.15, linewidth=0)
        axis.axhline(5, color="0.6", linestyle=":")
        axis.set(title=kind, xlabel="load", yscale="log")
        axis.set_yticks(_TICKS, [str(each) for each in _TICKS])
        axis.minorticks_off()
    axes[0].set_ylabel("mean time, gang / EasyScale")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=80)


def head(title: str) -> None:
    print(f"\n| {title} | gang h | backfill h | homogeneous h | easyscale h | gang / homogeneous | gang / easyscale | "
          "its range | one at a time / easyscale | devices held, gang / easyscale |\n" + 10 * "|---" + "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, required=True)
    arguments = parser.parse_args()
    picture(arguments.picture, {kind: sweep(kind) for kind in ("poisson", "trace")})
    head("load, 1,000 jobs")
    for kind in ("poisson", "trace"):
        for load in (0.5, 0.7, 0.9, 1.1):
            row(f"{kind} {load}", MIXED, kind=kind, load=load, num_jobs=1000)
    head("trace, 300 jobs, load 0.9, one assumption changed")
    row("none", MIXED, kind="trace")
    row("gang jobs wait for a type they name", MIXED, names=True, kind="trace")
    row("the paper's sizes", MIXED, kind="trace", sizes=PAPER_SIZES)
    row("the paper's sizes, and a type they name", MIXED, names=True, kind="trace", sizes=PAPER_SIZES)
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
