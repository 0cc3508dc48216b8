"""What logical workers cost: a step beside a plain data-parallel step, eight workers on one process, and memory.

    longer-rec prepare completejourney --out data/completejourney
    python -m benchmarks.bench_elastic configs/first.yaml

Steps of the two sides alternate in blocks on the same batches, so that both see the same machine; figures are medians
over blocks. Ratios are told for the wall clock and for the processor time of a rank, which other work on the machine
disturbs less.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.profiler import ProfilerActivity, profile

from longer_rec.batch import RequestBatch
from longer_rec.config import load_config
from longer_rec.data.history import Dataset, open_dataset
from longer_rec.data.loader import TrainLoader
from longer_rec.job import Job
from longer_rec.runtime.distributed import World, joined_world
from longer_rec.train.digests import state_digests
from longer_rec.train.parallelize import parallelize
from longer_rec.train.run import prepare_process
from longer_rec.train.trainer import Trainer
from tests.reference.ranks import run_ranks

_BLOCK_STEPS = 5


def build(config: Path, world: World, dataset: Dataset, num_workers: int) -> Trainer:
    job = load_config(Job, config, ["run_dir=unused", "data.loader_processes=0"])
    return Trainer(job, dataset, world, parallelize(job, dataset, world), num_workers)


def prepare(config: Path) -> Dataset:
    prepare_process()
    return open_dataset(load_config(Job, config, ["run_dir=unused"]).data.dir, verify=False)


def make_steps(trainer: Trainer, count: int) -> list[list[RequestBatch]]:
    loader = TrainLoader(trainer.dataset, trainer.job.data, seed=0, num_workers=trainer.num_workers,
                         workers=trainer.workers, start_step=0, num_steps=count)
    return [loader.make_step(step) for step in range(count)]


def plain_step(trainer: Trainer, batch: RequestBatch) -> None:
    """One graph from the tables to the loss, one backward, one all-reduce of the flat dense gradient, AdamW."""
    parallel = trainer.parallel
    parallel.optimizer.set_lr_factor(1.0)
    parallel.optimizer.zero_grad()
    logit_CY = parallel.ranker(batch)
    (binary_cross_entropy_with_logits(logit_CY, batch.label_CY) / trainer.world.size).backward()
    gradients = [p.grad for p in parallel.tower_parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat.mul_(min(1.0, trainer.job.train.clip_norm / (flat.norm().item() + 1e-6)))
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
    parallel.optimizer.step()


def interleave(sides: dict[str, Callable[[int], None]], blocks: int) -> dict[str, list[tuple[float, float]]]:
    """(wall, processor) seconds a call of each side, block by block, the first block being warm-up."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for block in range(blocks + 1):
        for name, call in sides.items():
            dist.barrier()
            start = time.perf_counter(), time.process_time()
            for index in range(_BLOCK_STEPS):
                call(block * _BLOCK_STEPS + index)
            processor_s = time.process_time() - start[1]
            dist.barrier()
            if block:
                wall_s = time.perf_counter() - start[0]
                seconds[name].append((wall_s / _BLOCK_STEPS, processor_s / _BLOCK_STEPS))
    return seconds


def against_plain(rank: int, size: int, config: Path, blocks: int) -> dict[str, list[tuple[float, float]]]:
    dataset = prepare(config)
    with joined_world() as world:
        trainer = build(config, world, dataset, num_workers=size)
        steps = make_steps(trainer, _BLOCK_STEPS * (blocks + 1))
        return interleave({"plain": lambda i: plain_step(trainer, steps[i][0]),
                           "logical": lambda i: trainer.train_step(steps[i]) and None}, blocks)


def eight_on_one(rank: int, size: int, config: Path, blocks: int) -> dict[str, list[tuple[float, float]]]:
    dataset = prepare(config)
    with joined_world() as world:
        one, eight = build(config, world, dataset, 1), build(config, world, dataset, 8)
        steps = make_steps(eight, _BLOCK_STEPS * (blocks + 1))

        def one_by_one(index: int) -> None:
            for batch in steps[index]:
                one.train_step([batch])

        return interleave({"8 x one worker": one_by_one,
                           "eight workers": lambda i: eight.train_step(steps[i]) and None}, blocks)


def peak_memory(rank: int, size: int, config: Path, num_workers: int) -> dict[str, float]:
    """MiB above the built model: resident at the peak of a few steps, and of tensors in one; a worker's lookup."""
    dataset = prepare(config)
    with joined_world() as world:
        trainer = build(config, world, dataset, num_workers)
        steps = make_steps(trainer, 4)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        for batches in steps:
            trainer.train_step(batches)
        resident = _status("VmHWM") - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            trainer.train_step(steps[-1])
        changes = sorted((event.start_ns(), event.nbytes()) for event in profiler.profiler.kineto_results.events()
                         if event.name() == "[memory]")
        tensors = int(torch.tensor([size for _, size in changes]).cumsum(0).max())
        lookup = trainer.parallel.ranker.lookup(steps[-1][0])
        looked_up = sum(value.numel() * value.element_size() for value in lookup.values())
        return {"resident": resident, "tensors": tensors / 2**20, "looked up": looked_up / 2**20}


def digest_time(rank: int, size: int, config: Path) -> tuple[int, float]:
    """Values of the state, and milliseconds of a digest of all of them."""
    dataset = prepare(config)
    with joined_world() as world:
        state = build(config, world, dataset, 1).parallel.state_dict()
        num_values = sum(value.size().numel() for value in state.values())
        times = []
        for _ in range(9):
            start = time.process_time()
            state_digests(state, world)
            times.append(time.process_time() - start)
        return num_values, statistics.median(times) * 1e3


def _status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def report(title: str, seconds: dict[str, list[tuple[float, float]]]) -> None:
    (base_name, base), (name, own) = seconds.items()
    for index, clock in enumerate(("wall", "processor")):
        a, b = [block[index] for block in base], [block[index] for block in own]
        ratios = sorted(y / x for x, y in zip(a, b, strict=True))
        print(f"| {title} | {clock} | {base_name} | {statistics.median(a) * 1e3:.0f} | {name} | "
              f"{statistics.median(b) * 1e3:.0f} | {statistics.median(ratios):.3f} | "
              f"{ratios[len(ratios) // 4]:.3f} to {ratios[-1 - len(ratios) // 4]:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--blocks", type=int, default=12)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print("| measurement | clock | base | ms | ours | ms | ratio, median | middle half |\n" + 8 * "|---" + "|")
    report("a step, 2 ranks", run_ranks(against_plain, 2, arguments.config, arguments.blocks, timeout_s=900)[0])
    report("8 workers on one process",
           run_ranks(eight_on_one, 1, arguments.config, arguments.blocks // 3, timeout_s=900)[0])
    print("\n| workers on one process | tensors, peak MiB | resident, peak MiB | looked up, MiB a worker |\n"
          + 4 * "|---" + "|")
    for num_workers in (1, 2, 4, 8, 16):
        found: dict[str, Any] = run_ranks(peak_memory, 1, arguments.config, num_workers, timeout_s=300)[0]
        print(f"| {num_workers} | {found['tensors']:.0f} | {found['resident']:.0f} | {found['looked up']:.1f} |")
    num_values, digest_ms = run_ranks(digest_time, 1, arguments.config, timeout_s=300)[0]
    print(f"\nA digest of {num_values:,} values: {digest_ms:.0f} ms of one processor")


if __name__ == "__main__":
    main()
