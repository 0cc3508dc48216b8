"""Seconds and steps for which a save holds the trainer, at once and in the background, in one interleaved run.

    OMP_NUM_THREADS=1 python benchmarks/bench_checkpoint.py

Forked ranks (gloo), tables sharded by rows with rowwise momentum, a replicated tower with AdamW's state. A step
is matrix products and one all-reduce of the tower's gradient, as in training. Rank 0's times; the group keeps ranks
in step.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed._shard.sharded_tensor.shard import Shard

from longer_rec.checkpoint.manager import CheckpointManager

TOWER = {f"block_{i}.{name}": (256, width) for i in range(8) for name, width in (("attention", 1024), ("ffn", 2048))}


def build_state(rank: int, ranks: int, table_mb: int) -> dict[str, dict[str, Tensor]]:
    """A ranker-like state: four tables of width 32 and their momenta, a tower of 25 MB and twice as much state."""
    rows = table_mb * 1_000_000 // (4 * 33 * 4 * ranks)

    def sharded(*trailing: int) -> Tensor:
        offsets = [rank * rows, *(0 for _ in trailing)]
        shard = Shard.from_tensor_and_offsets(torch.rand(rows, *trailing), offsets, rank)
        return init_from_local_shards([shard], [rows * ranks, *trailing])

    tables = {f"table_{i}": sharded(32) for i in range(4)}
    momenta = {f"table_{i}/momentum": sharded() for i in range(4)}
    tower = {name: torch.rand(shape) for name, shape in TOWER.items()}
    moments = {f"{name}/{moment}": torch.rand(shape) for name, shape in TOWER.items() for moment in ("m", "v")}
    return {"model": {**tables, **tower}, "optimizer": {**momenta, **moments}}


class Step:
    """Matrix products of about ``step_s`` seconds, the all-reduce of a gradient, an update of everything."""

    def __init__(self, state: dict[str, dict[str, Tensor]], step_s: float) -> None:
        self._a, self._b = torch.rand(768, 768), torch.rand(768, 768)
        self._gradient = torch.rand(sum(state["model"][name].numel() for name in TOWER))
        self._tower = [state["model"][name] for name in TOWER]
        self._tables = [shard.tensor for value in state["model"].values() if hasattr(value, "local_shards")
                        for shard in value.local_shards()]
        self._products = 10
        # Rank 0's own count, on all: unequal work would be waiting for each other.
        count = torch.tensor([self._products * step_s / min(self() for _ in range(5))])
        dist.broadcast(count, src=0)
        self._products = max(1, int(count))

    def __call__(self) -> float:
        """Seconds that the step took."""
        start = time.perf_counter()
        for _ in range(self._products):
            torch.mm(self._a, self._b)
        dist.all_reduce(self._gradient)
        self._gradient.mul_(0.5)
        for value in self._tower:
            value.mul_(0.999)
        for value in self._tables:
            value[::97].mul_(0.999)
        return time.perf_counter() - start


def measure(rank: int, arguments: argparse.Namespace, directory: Path) -> dict[str, list[float]]:
    state = build_state(rank, arguments.ranks, arguments.table_mb)
    step = Step(state, arguments.step_s)
    times: dict[str, list[float]] = {name: [] for name in (
        "undisturbed", "beside", "save", "save_async", "first", "first, prepared", "write")}
    number = 0

    def held(call: Callable[..., object], name: str) -> None:
        nonlocal number
        number += 1
        dist.barrier()
        start = time.perf_counter()
        call(number, state, {"step": number})
        times[name].append(time.perf_counter() - start)

    for name in ("first", "first, prepared"):
        manager = CheckpointManager(directory / "checkpoints", keep=1)
        if name != "first":
            manager.prepare(state)
        held(manager.save_async, name)
        manager.wait()
    for _ in range(arguments.turns):
        times["undisturbed"] += [step() for _ in range(arguments.steps)]
        held(manager.save, "save")
        times["undisturbed"] += [step() for _ in range(arguments.steps)]
        start = time.perf_counter()
        held(manager.save_async, "save_async")
        # Until the checkpoint stands on both ranks, so that both take the same number of steps.
        while not everywhere(manager.latest() == directory / "checkpoints" / f"step-{number}"):
            times["beside"].append(step())
        times["write"].append(time.perf_counter() - start)
        manager.wait()
    return times


def everywhere(done: bool) -> bool:
    value = torch.tensor([float(done)])
    dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return bool(value)


def fork_rank(rank: int, arguments: argparse.Namespace, directory: Path) -> int:
    pid = os.fork()
    if pid == 0:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=arguments.ranks,
                                timeout=datetime.timedelta(seconds=60))
        times = measure(rank, arguments, directory)
        (directory / f"times-{rank}.json").write_text(json.dumps(times))
        dist.barrier()
        os._exit(0)
    return pid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--table-mb", type=int, default=200, help="tables and momenta of all ranks together")
    parser.add_argument("--step-s", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=10, help="undisturbed steps before each save")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--dir", type=Path, default=None, help="where to write (default: a temporary one)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # ShardedTensor, which TorchRec still uses
    with tempfile.TemporaryDirectory(dir=arguments.dir) as scratch:
        for pid in [fork_rank(rank, arguments, Path(scratch)) for rank in range(arguments.ranks)]:
            if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
                raise SystemExit("a rank failed")
        times = json.loads((Path(scratch) / "times-0.json").read_text())
    step = statistics.median(times["undisturbed"])
    beside = statistics.median(times["beside"])
    print(f"{platform.platform()}, Python {platform.python_version()}, torch {torch.__version__}, "
          f"{time.strftime('%Y-%m-%d')}")
    print(f"step {step * 1e3:.0f} ms ({len(times['undisturbed'])}); beside a save {beside * 1e3:.0f} ms "
          f"({len(times['beside'])}), {100 * (beside / step - 1):.0f} % longer")
    print("\n| call | held s, median | max | steps, median | max |\n|---|---|---|---|---|")
    for name, call in (("save", "save"), ("save_async", "save_async"), ("first", "save_async, the first of a run"),
                       ("first, prepared", "save_async, the first, after prepare")):
        median, worst = statistics.median(times[name]), max(times[name])
        print(f"| {call} | {median:.3f} | {worst:.3f} | {median / step:.2f} | {worst / step:.2f} |")
    print(f"\nfrom save_async to the commit: {statistics.median(times['write']):.2f} s")


if __name__ == "__main__":
    main()
