"""Try every sharding type and kernel on two ranks, each in processes of its own: some of them crash.

Run as ``python -m longer_rec.sparse.trial DEVICE RANKS [bandwidth]``; prints one JSON object a line. Imports happen
once, ranks are forked from them, so that a crash costs one trial and a trial costs no import. Everything is compared
with the unsharded tables: a kernel that runs and computes something else has failed.
"""

import datetime
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast, get_args

import torch
import torch.distributed as dist
from torchrec.optim.optimizers import in_backward_optimizer_filter

from longer_rec.batch import RequestBatch
from longer_rec.runtime.cluster_check import all_to_all, exchange_s
from longer_rec.schema import Feature, Schema, Table
from longer_rec.sparse.init import initialize_tables
from longer_rec.sparse.lookup import SparseTables
from longer_rec.sparse.optimizers import apply_table_optimizer
from longer_rec.sparse.planfile import SparsePlan
from longer_rec.sparse.planner import place_table
from longer_rec.sparse.sharding import shard_ranker
from longer_rec.sparse.tables import (
    TRAINED_KERNELS,
    KernelName,
    ShardingName,
    SparseConfig,
    build_tables,
    find_collections,
    table_configs,
)

_TIMEOUT_S = 15.0
_PROBE_BYTES = 1 << 24
_TOLERANCE = 1e-5
_LR = 0.1
_SEQUENCE = Schema(tables=(Table(name="item", num_rows=48),), item_features=(Feature(name="item", table="item"),),
                   tasks=("label",))
_POOLED = Schema(tables=(Table(name="item", num_rows=48), Table(name="tag", num_rows=48)),
                 item_features=(Feature(name="item", table="item"),),
                 user_features=(Feature(name="tags", table="tag", multi_valued=True),), tasks=("label",))


def _batch(schema: Schema, rank: int) -> RequestBatch:
    generator = torch.Generator().manual_seed(rank)
    length_B = torch.tensor([3, 0, 5])
    item_T = torch.randint(0, 48, (8,), generator=generator)
    pooled = bool(schema.user_features)
    return RequestBatch(
        history={"item": item_T}, history_time_T=torch.arange(8), history_length_B=length_B,
        candidates={"item": item_T[:3]}, candidate_dense_CF=torch.zeros(3, 0),
        num_candidates_B=torch.ones(3, dtype=torch.int64),
        label_CY=torch.zeros(3, 1), users={"tags": item_T} if pooled else {},
        user_length_B={"tags": length_B} if pooled else {}, user_dense_BF=torch.zeros(3, 0),
        request_time_B=torch.full((3,), 100), request_row_B=torch.arange(3))


def _device(name: str, rank: int) -> torch.device:
    return torch.device(name, rank) if name == "cuda" else torch.device(name)


def _trial(rank: int, world_size: int, device_name: str, pooled: bool, sharding_type: str, kernel: str) -> str:
    """"works", or how the numbers differ."""
    schema, device = _POOLED if pooled else _SEQUENCE, _device(device_name, rank)
    config = SparseConfig(default_dim=16, optimizer="sgd", lr=_LR, pooling="sum",
                          kernel="fused" if kernel == "dense" else cast(KernelName, kernel))
    reference = build_tables(schema, config, "cpu")
    initialize_tables(reference, 0, config)
    tables = build_tables(schema, config)
    # Of the pooled schema the sequence table is a bystander, placed where it is known to work.
    placed = [place_table(path, collection, table, cast(ShardingName, sharding_type if path == "ebc" or not pooled
                                                        else "table_wise"), config, [0] * world_size)
              for path, collection in find_collections(tables).items() for table in table_configs(collection)]
    plan = SparsePlan(world_size=world_size, ranks_per_host=world_size, device=device_name, tables=tuple(placed))
    model = shard_ranker(tables, plan, config, device)
    initialize_tables(model, 0, config)
    batches = [_batch(schema, other) for other in range(world_size)]
    worst = _compare(model, reference, batches, rank, device)
    apply_table_optimizer(reference.parameters(), config)
    for tables, own in ((model, [batches[rank].to(device)]), (reference, batches)):
        torch.stack([value.square().sum() for value in tables(*own).values()]).sum().backward()
    with torch.no_grad():
        for _, replica in in_backward_optimizer_filter(model.named_parameters()):
            replica.sub_(replica.grad, alpha=_LR * world_size)  # averaged by TorchRec, a sum is meant
    worst = max(worst, _compare(model, reference, batches, rank, device))
    return "works" if worst < _TOLERANCE else f"wrong numbers (by {worst:.1e})"


@torch.no_grad()
def _compare(model: torch.nn.Module, reference: SparseTables, batches: list[RequestBatch], rank: int,
             device: torch.device) -> float:
    embedded, expected = model(batches[rank].to(device)), reference(batches[rank])
    return max(float((embedded[key].cpu() - value).abs().max()) for key, value in expected.items())


def _bandwidth(rank: int, world_size: int, device_name: str) -> str:
    """GB a second and rank through all-to-all."""
    best_s = exchange_s(all_to_all, torch.zeros(_PROBE_BYTES // 4, device=_device(device_name, rank)))
    return f"{_PROBE_BYTES / best_s / 1e9:.2f} GB/s per rank"


def _child(rank: int, world_size: int, device_name: str, folder: Path, function: Callable[..., str],
           arguments: tuple[Any, ...]) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    try:
        if device_name == "cuda":
            torch.cuda.set_device(rank)
        dist.init_process_group("cuda:nccl,cpu:gloo" if device_name == "cuda" else "gloo", rank=rank,
                                init_method=f"file://{folder}/store", world_size=world_size,
                                timeout=datetime.timedelta(seconds=_TIMEOUT_S))
        outcome = function(rank, world_size, device_name, *arguments)
        dist.barrier()
    except Exception as error:  # any failure is the result of the trial
        outcome = f"fails with {type(error).__name__}: {' '.join(str(error).split())[:90]}"
    (folder / f"rank-{rank}").write_text(outcome)
    os._exit(0)


def _run(world_size: int, device_name: str, function: Callable[..., str], *arguments: Any) -> str:
    """The outcome of the first rank to have a bad one."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        pids = {}
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                _child(rank, world_size, device_name, folder, function, arguments)
            pids[pid] = rank
        ended = _wait(set(pids))
        crashed = [status for status in ended.values() if status]
        if crashed:
            by_signal = os.WIFSIGNALED(crashed[0])
            return f"crashes ({signal.Signals(os.WTERMSIG(crashed[0])).name})" if by_signal else "fails"
        if len(ended) < world_size:
            return f"hangs for {_TIMEOUT_S:.0f} s"
        outcomes = [(folder / f"rank-{rank}").read_text() for rank in range(world_size)]
    return next((outcome for outcome in outcomes if not outcome.startswith("works")), outcomes[0])


def _wait(pids: set[int]) -> dict[int, int]:
    """Exit status of those that ended by themselves in time; the rest is killed."""
    deadline = time.monotonic() + _TIMEOUT_S
    ended: dict[int, int] = {}
    while len(ended) < len(pids) and time.monotonic() < deadline:
        for pid in pids - ended.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ended[pid] = status
                if status:
                    deadline = min(deadline, time.monotonic() + 1.0)
        time.sleep(0.005)
    for pid in pids - ended.keys():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return ended


def trials() -> Iterator[tuple[bool, str, str]]:
    """(pooled, sharding type, kernel) of everything worth trying."""
    for pooled in (False, True):
        for sharding_type in get_args(ShardingName):
            for kernel in ("dense",) if sharding_type == "data_parallel" else TRAINED_KERNELS:
                yield pooled, sharding_type, kernel


def main(device_name: str, world_size: int, bandwidth_only: bool = False) -> None:
    """Print every trial's outcome, then the bandwidth's."""
    torch.set_num_threads(1)
    for pooled, sharding_type, kernel in () if bandwidth_only else trials():
        outcome = _run(world_size, device_name, _trial, pooled, sharding_type, kernel)
        print(json.dumps({"pooled": pooled, "sharding_type": sharding_type, "kernel": kernel, "outcome": outcome}),
              flush=True)
    print(json.dumps({"bandwidth": _run(world_size, device_name, _bandwidth)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:] == ["bandwidth"])
