"""Processes of unequal speed: whether a step takes what the shares and the mini-batches a second say it will.

    longer-rec prepare completejourney --out data/completejourney
    OMP_NUM_THREADS=1 python -m benchmarks.bench_shares configs/first.yaml

Two processes on a core each, W = 8. The second is a slower device: a control group lets it have its core for a half, or
a third, of every 10 ms (needs the right to make one: root). C_i is measured at equal shares: mini-batches by the
seconds of process i's tower; so is what a step takes beside the slowest tower. From these the step of every other pair
is predicted. Shares alternate in blocks on the same batches; figures are medians over blocks, by the wall clock:
nothing else may run.
"""

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from longer_rec.batch import RequestBatch
from longer_rec.config import load_config
from longer_rec.data.history import open_dataset
from longer_rec.data.loader import TrainLoader
from longer_rec.elastic.assignment import ElasticConfig
from longer_rec.job import Job
from longer_rec.runtime.distributed import joined_world
from longer_rec.schedule.devices import best_share
from longer_rec.train.parallelize import parallelize
from longer_rec.train.run import prepare_process
from longer_rec.train.trainer import Trainer
from tests.reference.provenance import provenance
from tests.reference.ranks import run_ranks

W, EQUAL = 8, (4, 4)
SHARES = (EQUAL, (5, 3), (6, 2))
_BLOCK_STEPS = 3
_PERIOD_US = 10_000
_ROOT = Path("/sys/fs/cgroup")
Seconds = dict[tuple[int, ...], list[tuple[float, list[float]]]]


@contextmanager
def slow_group(slower: int) -> Iterator[Path]:
    """A control group (version 1 or 2) whose processes together have 1 / ``slower`` of a core."""
    parent = _ROOT / "cpu" if (_ROOT / "cpu").is_dir() else _ROOT
    group, quota_us = parent / f"bench_shares-{os.getpid()}", _PERIOD_US // slower
    group.mkdir()
    try:
        if (group / "cpu.max").exists():
            (group / "cpu.max").write_text(f"{quota_us} {_PERIOD_US}")
        else:
            (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(quota_us))
        yield group
    finally:
        time.sleep(0.2)  # until the kernel has taken the ended processes out
        group.rmdir()


class Clocked(Trainer):
    """``tower_s``: seconds of the towers."""

    tower_s = 0.0

    def worker_backward(self, worker: int, batch: RequestBatch, leaves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        start = time.perf_counter()
        result = super().worker_backward(worker, batch, leaves)
        self.tower_s += time.perf_counter() - start
        return result


def time_steps(rank: int, size: int, config: Path, overrides: list[str], group: Path, blocks: int) -> Seconds:
    """By shares: for each block the seconds of a step, and those of each process' towers in it."""
    prepare_process()
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    base = load_config(Job, config, ["run_dir=unused", "data.loader_processes=0", *overrides])
    dataset = open_dataset(base.data.dir, verify=False)
    with joined_world() as world:
        found: Seconds = defaultdict(list)
        trainers = {}
        for shares in SHARES:
            job = base.model_copy(update={"elastic": ElasticConfig(num_workers=W, shares=shares)})
            trainers[shares] = Clocked(job, dataset, world, parallelize(job, dataset, world), W)
        if rank == 1:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        for block in range(blocks + 1):
            for shares, trainer in trainers.items():
                loader = TrainLoader(dataset, trainer.job.data, seed=0, num_workers=W, workers=trainer.workers,
                                     start_step=0, num_steps=1)
                batches = [loader.make_step(block * _BLOCK_STEPS + step) for step in range(_BLOCK_STEPS)]
                dist.barrier()
                trainer.tower_s, start = 0.0, time.perf_counter()
                for own in batches:
                    trainer.train_step(own)
                own_s = (time.perf_counter() - start) / _BLOCK_STEPS, trainer.tower_s / _BLOCK_STEPS
                everyone = [own_s] * size
                dist.all_gather_object(everyone, own_s)
                if block:
                    found[shares].append((max(step for step, _ in everyone), [tower for _, tower in everyone]))
        return dict(found)


def report(slower: int, found: Seconds) -> None:
    step = {shares: statistics.median(one for one, _ in blocks) for shares, blocks in found.items()}
    rates = tuple(4 / statistics.median(towers[i] for _, towers in found[EQUAL]) for i in (0, 1))
    beside = statistics.median(one - max(towers) for one, towers in found[EQUAL])
    best = best_share((1, 1), rates, W)
    print(f"\nSecond process with 1/{slower} of its core: C = {rates[0]:.1f} and {rates[1]:.1f} mini-batches/s; the "
          f"planner shares {best.by_device}; beside the towers a step takes {1e3 * beside:.0f} ms.\n")
    print("| shares | predicted ms | measured ms | off | middle half of blocks | times as fast as equal shares |\n"
          + 6 * "|---" + "|")
    for shares, measured in step.items():
        predicted = max(a / c for a, c in zip(shares, rates, strict=True)) + beside
        blocks = sorted(1e3 * one for one, _ in found[shares])
        print(f"| {list(shares)} | {1e3 * predicted:.0f} | {1e3 * measured:.0f} | {measured / predicted - 1:+.1%} | "
              f"{blocks[len(blocks) // 4]:.0f} to {blocks[-1 - len(blocks) // 4]:.0f} | {step[EQUAL] / measured:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="settings on top")
    parser.add_argument("--blocks", type=int, default=9)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for slower in (2, 3):
        with slow_group(slower) as group:
            report(slower, run_ranks(time_steps, 2, arguments.config, arguments.overrides, group, arguments.blocks,
                                     timeout_s=1500)[0])
    print("\n" + provenance(f"python -m benchmarks.bench_shares {arguments.config}", "torch", "torchrec"))


if __name__ == "__main__":
    main()
