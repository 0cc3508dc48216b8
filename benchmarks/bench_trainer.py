"""What the trainer costs and saves beside its tower: one figure a line, both sides of a ratio interleaved in one run.

    longer-rec prepare completejourney --out data/completejourney
    python -m benchmarks.bench_trainer data/completejourney [--only batching lookup …]

Ratios are medians over pairs of neighbouring blocks. Each figure runs in processes of its own.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen

from longer_rec.batch import RequestBatch, deduplicate
from longer_rec.config import load_config
from longer_rec.data.history import open_dataset
from longer_rec.elastic.assignment import resolve_num_workers
from longer_rec.elastic.step import backward_through_lookup, cut_lookup, keep_gradients, worker_leaves
from longer_rec.job import Job
from longer_rec.runtime.distributed import joined_world
from longer_rec.schema import Schema
from longer_rec.sparse.lookup import spread
from longer_rec.sparse.tables import widths
from longer_rec.train.measure import peak_of_tower
from longer_rec.train.parallelize import parallelize
from longer_rec.train.run import prepare_process
from longer_rec.train.trainer import Trainer
from tests.reference.ranks import run_ranks

CONFIGS = Path("configs")
Call = Callable[[], Any]


def build(config: str, data: Path, *overrides: str) -> Trainer:
    """Inside a joined world."""
    job = load_config(Job, CONFIGS / config, ["run_dir=unused", f"data.dir={data}", *overrides])
    prepare_process()
    dataset = open_dataset(job.data.dir, verify=False)
    with joined_world() as world:
        num_workers = resolve_num_workers(job.elastic, world.size)
        return Trainer(job, dataset, world, parallelize(job, dataset, world), num_workers)


def made_up(schema: Schema, lengths: Sequence[int], num_candidates: int, seed: int = 0) -> RequestBatch:
    """Requests with histories and candidates of these numbers; ids follow Zipf's law."""
    random = np.random.default_rng(seed)
    events, requests = sum(lengths), len(lengths)
    candidates, length_B = requests * num_candidates, torch.tensor(lengths)

    def ids(table: str, count: int) -> torch.Tensor:
        return torch.from_numpy(random.zipf(1.2, count) % schema.num_rows[table])

    def ones() -> torch.Tensor:
        return torch.ones(requests, dtype=torch.int64)

    time_T = torch.cat([torch.arange(length) * 3600 for length in lengths])
    return deduplicate(RequestBatch(
        history={feature.name: ids(feature.table, events) for feature in schema.history_features},
        history_time_T=time_T, history_length_B=length_B,
        candidates={feature.name: ids(feature.table, candidates) for feature in schema.item_features},
        candidate_dense_CF=torch.from_numpy(random.random((candidates, len(schema.item_dense)), np.float32)),
        num_candidates_B=ones() * num_candidates,
        label_CY=torch.from_numpy((random.random((candidates, len(schema.tasks))) < 0.1).astype(np.float32)),
        users={feature.name: ids(feature.table, requests) for feature in schema.user_features},
        user_length_B={feature.name: ones() for feature in schema.user_features},
        user_dense_BF=torch.zeros(requests, len(schema.user_dense)), request_time_B=length_B * 3600 + 1,
        request_row_B=torch.arange(requests)), schema)


def interleave(sides: dict[str, Call], pairs: int) -> dict[str, list[float]]:
    """Seconds of each call of each side, in turn; the first two of each are warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(pairs + 2):
        for name, call in sides.items():
            dist.barrier()
            start = time.perf_counter()
            call()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def batching(rank: int, size: int, data: Path) -> list[str]:
    """Candidates a second of a training step at 50 candidates a request, and at one."""
    trainer = build("completejourney.yaml", data)
    many, one = (made_up(trainer.dataset.schema, [1000] * 8, count) for count in (50, 1))
    found = interleave({"50": lambda: trainer.train_step([many]), "1": lambda: trainer.train_step([one])}, 9)
    ratio = 50 / median_ratio(found["50"], found["1"])
    return [f"| candidates/s of a training step, 50 candidates a request over one (completejourney.yaml, L = 1000) | "
            f">= 12 | {ratio:.1f} | {400 / statistics.median(found['50']):,.0f} and "
            f"{8 / statistics.median(found['1']):,.0f} candidates/s |"]


def bare_tables(trainer: Trainer, batch: RequestBatch, raw: bool) -> Call:
    """Forward and fused update of FBGEMM's own modules, one for each width and one that pools, on every id or, of the
    tables read row by row, the distinct ones."""
    schema, width = trainer.dataset.schema, widths(trainer.dataset.schema, trainer.job.sparse)
    groups: dict[tuple[int, PoolingMode], dict[str, list[torch.Tensor]]] = {}
    for table, keys in schema.row_keys.items():
        groups.setdefault((width[keys[0]], PoolingMode.NONE), {})[table] = (
            [batch.ids(key) for key in keys] if raw else [batch.distinct[table]])
    for table, keys in schema.pooled_keys.items():
        groups.setdefault((width[keys[0]], PoolingMode.SUM), {})[table] = [batch.ids(key) for key in keys]
    calls = []
    for (dim, pooling), tables in groups.items():
        module = SplitTableBatchedEmbeddingBagsCodegen(
            [(schema.num_rows[table], dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for table in tables],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD, learning_rate=0.01, pooling_mode=pooling)
        ids = [torch.cat(each) for each in tables.values()]
        lengths = [each.numel() for each in ids]
        if pooling == PoolingMode.SUM:
            lengths = [length for keys in schema.pooled_keys.values() for key in keys
                       for length in batch.user_length_B[key.partition(".")[2]].tolist()]
        offsets = torch.tensor([0, *np.cumsum(lengths)])
        calls.append((module, torch.cat(ids), offsets))
    gradients = [torch.randn_like(module(ids, offsets)) for module, ids, offsets in calls]

    def run() -> None:
        for (module, ids, offsets), gradient in zip(calls, gradients, strict=True):
            module(ids, offsets).backward(gradient)

    return run


def table_call(trainer: Trainer, batch: RequestBatch) -> Call:
    """The whole way of the rows, there and back: spread over the events, and exchanged by one rank with itself."""
    ranker, gradients = trainer.parallel.ranker, dict[str, torch.Tensor]()

    def run() -> None:
        rows, tables = cut_lookup(ranker.receive(ranker.send([batch])))
        (leaves,) = worker_leaves(rows, [batch])
        embedded = spread(batch, leaves, ranker.schema)
        if not gradients:
            gradients.update({key: torch.randn_like(value) for key, value in embedded.items()})
        torch.autograd.backward(list(embedded.values()), [gradients[key] for key in embedded])
        keep_gradients(leaves)
        backward_through_lookup(tables, rows)

    return run


def lookup(rank: int, size: int, data: Path) -> list[str]:
    lines = []
    for config in ("first.yaml", "completejourney.yaml"):
        trainer = build(config, data, "data.loader_processes=0")
        batch = trainer.loader(1).make_step(0)[0]
        found = interleave({"ours": table_call(trainer, batch), "bare": bare_tables(trainer, batch, raw=True),
                            "bare, distinct ids": bare_tables(trainer, batch, raw=False)}, 25)
        num_pooled = sum(batch.ids(key).numel() for keys in trainer.dataset.schema.pooled_keys.values() for key in keys)
        num_ids, num_distinct = (num_pooled + sum(map(len, ids.values())) for ids in (batch.place, batch.distinct))
        times = ", ".join(f"{name} {1e3 * statistics.median(each):.2f} ms" for name, each in found.items())
        lines.append("| lookup + fused update over a bare table-batched embedding on the same "
                     f"{num_ids:,} ids ({config}) | <= 1.2 | {median_ratio(found['ours'], found['bare']):.2f} | "
                     f"{times}; {num_distinct:,} distinct |")
    return lines


def shares(rank: int, size: int, data: Path) -> list[str]:
    """Of a step as ``Trainer.fit`` takes it, batches made by its own process."""
    lines = []
    for config in ("first.yaml", "completejourney.yaml"):
        trainer = build(config, data)
        loader = trainer.loader(45)
        for step, (batches, upcoming) in enumerate(pairwise(chain(loader, [None]))):
            if step == 5:
                trainer.clock.take()
                loader.take_wait()
            assert batches is not None
            trainer.train_step(batches, upcoming)
        parts, elapsed = trainer.clock.take()
        waited = loader.take_wait()
        rest = elapsed - parts["time_tower_s"] - parts["time_lookup_s"] - parts["time_sparse_s"] - waited
        made = trainer.loader(1).make_step
        start = time.perf_counter()
        for step in range(10):
            made(step)
        loading = (time.perf_counter() - start) / 10
        lines += [f"| trainer outside tower, tables and data ({config}) | <= 10 % | {rest / elapsed:.1%} | of "
                  f"{1e3 * elapsed / 40:.1f} ms |",
                  f"| waiting for data ({config}) | <= 2 % | {waited / elapsed:.1%} | |",
                  f"| a step over making its batch ({config}) | >= 5 | "
                  f"{elapsed / 40 / loading:.1f} | {1e3 * loading:.1f} ms to make a batch |"]
    return lines


@dataclass(frozen=True)
class Side:
    """24 steps of one rank: seconds of all, the share of tables and reduction with their waiting in them, processor
    seconds of each, events of its own batches."""

    elapsed_s: float
    tables_share: float
    busy_s: list[float]
    events: int


def scaling_side(rank: int, size: int, data: Path, config: str, ahead: bool) -> Side:
    trainer = build(config, data, "data.loader_processes=0")
    loader = trainer.loader(30)
    steps: list[Any] = [*(loader.make_step(step) for step in range(30)), None]
    busy_s = []
    for step in range(30):
        if step == 6:
            dist.barrier()
            trainer.clock.take()
        start = time.process_time()
        trainer.train_step(steps[step], steps[step + 1] if ahead else None)
        trainer.step += 1
        busy_s.append(time.process_time() - start)
    parts, elapsed = trainer.clock.take()
    return Side(elapsed, 1 - (parts["time_tower_s"] + parts["time_dense_s"]) / elapsed, busy_s[6:],
                sum(batch.num_events for own in steps[6:30] for batch in own))


def scaling(data: Path, config: str, repeats: int) -> list[str]:
    """Twice the requests on two ranks, per event, of which both sides have different numbers by chance.

    Where others use the cores, two ranks have less than twice what one has. Processor time does not see them: if each
    rank had a core, a step would take what the slower rank of it was busy, and what a message is under way.
    """
    rates: dict[str, list[float]] = {"one": [], "two": [], "not ahead": []}
    busy: dict[str, list[float]] = {name: [] for name in rates}
    shares = []
    for _ in range(repeats):
        for name, size, ahead in (("one", 1, True), ("two", 2, True), ("not ahead", 2, False)):
            sides: list[Side] = run_ranks(scaling_side, size, data, config, ahead, timeout_s=280)
            events = sum(side.events for side in sides)
            rates[name].append(events / sides[0].elapsed_s)
            busy[name].append(events / sum(map(max, zip(*(side.busy_s for side in sides), strict=True))))
            shares += [sides[0].tables_share] * (name == "two")
    return [f"| events/s of two ranks over one, each on a core, same batch each ({config}) | >= 0.85 | "
            f"{median_ratio(rates['two'], rates['one']) / 2:.2f} | {statistics.median(rates['two']):,.0f} and "
            f"{statistics.median(rates['one']):,.0f}; tables and reduction with their waiting "
            f"{statistics.median(shares):.0%} of the step |",
            f"| the same per second of processor time of the slower rank of each step ({config}) | >= 0.85 | "
            f"{median_ratio(busy['two'], busy['one']) / 2:.2f} | |",
            f"| ids sent ahead over not, two ranks, events/s ({config}) | | "
            f"{median_ratio(rates['two'], rates['not ahead']):.3f} | |"]


PAPER = ("model.merge_size=8", "model.inner_trans={num_heads: 2}", "model.num_queries=100", "model.width=32")


def memory(rank: int, size: int, data: Path, longest: int, requests: int, recompute: str) -> tuple[float, float]:
    """GiB resident at the peak of a process that trains, and seconds of a step, at the paper's shape."""
    trainer = build("completejourney.yaml", data, *PAPER, f"data.max_events={longest}", f"train.recompute={recompute}",
                    "data.loader_processes=0")
    batch, times = made_up(trainer.dataset.schema, [longest] * requests, 20), []
    for _ in range(2):
        start = time.perf_counter()
        trainer.train_step([batch])
        times.append(time.perf_counter() - start)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20, min(times)


def memories(data: Path) -> list[str]:
    lines = []
    for recompute in ("[]", "[input, merge]"):
        gib, step_s = run_ranks(memory, 1, data, 10_000, 32, recompute, timeout_s=280)[0]
        lines.append(f"| GiB resident, L = 10,000, 32 requests of 20 candidates, recompute {recompute} | <= 8 | "
                     f"{gib:.2f} | {step_s:.1f} s a step |")
    return lines


def recomputed(rank: int, size: int, data: Path) -> list[str]:
    """Peak of the activations, by torch's profiler, and time of a step."""
    every, lines = "[input, merge, cross, self, head, interaction]", []
    for parts, whole in ((every, "true"), ("[merge]", "true"), ("[input, merge]", "true"), (every, "false")):
        trainers = {recompute: build("completejourney.yaml", data, *PAPER, "data.max_events=4096",
                                     f"train.recompute={recompute}", f"train.recompute_matmuls={whole}",
                                     "data.loader_processes=0")
                    for recompute in ("[]", parts)}
        batch = made_up(trainers[parts].dataset.schema, [4096] * 16, 20)
        peaks = {name: peak_of_tower(trainer, [batch]) for name, trainer in trainers.items()}
        found = interleave({name: partial(trainer.train_step, [batch]) for name, trainer in trainers.items()}, 5)
        name = parts + ", matmuls kept" * (whole == "false")
        lines += [f"| peak activations, recompute {name} over none (paper's shape, L = 4096) | <= 0.5 | "
                  f"{peaks[parts] / peaks['[]']:.2f} | {peaks[parts] / 2**20:.0f} and {peaks['[]'] / 2**20:.0f} MiB |",
                  f"| step, recompute {name} over none | <= 1.35 | {median_ratio(found[parts], found['[]']):.2f} | |"]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    figures: dict[str, Callable[[Path], list[str]]] = {
        "batching": lambda data: run_ranks(batching, 1, data, timeout_s=280)[0],
        "lookup": lambda data: run_ranks(lookup, 1, data, timeout_s=280)[0],
        "shares": lambda data: run_ranks(shares, 1, data, timeout_s=280)[0],
        "scaling": lambda data: scaling(data, "first.yaml", 5),
        "scaling_large": lambda data: scaling(data, "completejourney.yaml", 3),
        "memory": memories, "recompute": lambda data: run_ranks(recomputed, 1, data, timeout_s=290)[0]}
    parser.add_argument("--only", nargs="+", choices=figures, default=list(figures))
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print("| figure | wanted | measured | |\n|---|---|---|---|")
    for name in args.only:
        print("\n".join(figures[name](args.data)), flush=True)


if __name__ == "__main__":
    main()
