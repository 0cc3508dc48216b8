"""Whether the ranks of a run reach each other and are alike, and how fast they exchange data."""

import hashlib
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import longer_rec
from longer_rec.errors import ConfigError, LongerRecError
from longer_rec.runtime.distributed import World, gather
from longer_rec.runtime.machine import installed_version, numerics

_SIZES = {"latency": 4, "1 MiB": 1 << 20, "64 MiB": 1 << 26}
_REPEATS = 5
# Beyond that, times in logs of different hosts cannot be compared, and file systems misjudge what is newer.
_CLOCK_TOLERANCE_S = 1.0


@dataclass(frozen=True)
class Check:
    """One question and its answer; ``status`` is "ok", "warn" or "fail", ``remedy`` a line to type, or ""."""

    name: str
    status: str
    detail: str
    remedy: str = ""


def check_cluster(world: World, data: Callable[[], str] | None = None) -> list[Check]:
    """The checks of all ranks, the same on each; collective.

    ``data`` tells which data set this rank reads. Raises its fault when every rank has it, and ``ConfigError`` where
    there is nothing to compare.
    """
    if world.size < 2:
        raise ConfigError("--distributed compares ranks, and this is the only one; start it with torchrun or srun, as "
                          "training will be")
    facts, fault = _own_facts(world.device), None
    if data is not None:
        try:
            facts["data"] = data()
        except LongerRecError as error:
            facts["data"], fault = "none that can be read", error
    everyone: list[tuple[dict[str, str], LongerRecError | None]] = gather((facts, fault))
    faults = [other for _, other in everyone if other is not None]
    if len(faults) == world.size:
        raise faults[0]
    checks = [_check_pairs(world), *compare_facts([other for other, _ in everyone])]
    checks += [Check(f"data of rank {rank}", "fail", str(other)) for rank, (_, other) in enumerate(everyone) if other]
    dist.barrier()
    checks.append(check_clocks(gather(time.time())))
    for name, operation in (("all-reduce", _all_reduce), ("all-to-all", all_to_all)):
        checks += [_measure(world, f"{name} {size}", operation, num_bytes) for size, num_bytes in _SIZES.items()]
    return checks


def _own_facts(device: torch.device) -> dict[str, str]:
    """What has to be the same everywhere, and the host."""
    return {"host": socket.gethostname(), "longer_rec": f"{longer_rec.__version__} ({_source_digest()})",
            "fbgemm": installed_version("fbgemm-gpu-cpu") or installed_version("fbgemm-gpu") or "none",
            "torchrec": installed_version("torchrec") or "none",
            **{name: str(value) for name, value in numerics(device).items()}}


def _source_digest() -> str:
    """Of the package's own files: a checkout that a host has not updated has the same version."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def compare_facts(facts: Sequence[Mapping[str, str]]) -> list[Check]:
    """One check for the hosts and one for each other fact; ranks that differ from most are named."""
    hosts = [of_rank["host"] for of_rank in facts]
    on_host = Counter(hosts)
    uneven = len(set(on_host.values())) > 1
    checks = [Check("hosts", "warn" if uneven else "ok",
                    ", ".join(f"{host} ({count} rank{'s' * (count > 1)})" for host, count in on_host.items()))]
    for name in facts[0]:
        if name == "host":
            continue
        usual = Counter(of_rank[name] for of_rank in facts).most_common(1)[0][0]
        others = [f"rank {rank} on {of_rank['host']} has {of_rank[name]}" for rank, of_rank in enumerate(facts)
                  if of_rank[name] != usual]
        checks.append(Check(name, "fail" if others else "ok", "; ".join([*others, f"the others {usual}"]) if others
                            else f"{usual} on every rank"))
    return checks


def check_clocks(times: Sequence[float]) -> Check:
    """``times`` are the ranks' clocks at the same moment, up to the delay of a barrier."""
    middle = sorted(times)[len(times) // 2]
    off = [f"rank {rank} by {moment - middle:+.1f} s" for rank, moment in enumerate(times)
           if abs(moment - middle) > _CLOCK_TOLERANCE_S]
    if off:
        return Check("clocks", "warn", f"off: {', '.join(off)}", "chronyc makestep")
    return Check("clocks", "ok", f"within {(max(times) - min(times)) * 1e3:.1f} ms")


def _check_pairs(world: World) -> Check:
    """Each rank sends its number to each other one, on the device that training uses."""
    sent = torch.full((world.size,), world.rank, device=world.device)
    right = torch.tensor(int(all_to_all(sent).tolist() == list(range(world.size))), device=world.device)
    dist.all_reduce(right, dist.ReduceOp.MIN)
    backend = "NCCL" if world.device.type == "cuda" else "gloo"
    return Check("pairs", "ok" if int(right) else "fail", f"{world.size} ranks {'all' if int(right) else 'do not'} "
                 f"reach each other ({backend})")


def _all_reduce(values: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(values)
    return values


def all_to_all(values: torch.Tensor) -> torch.Tensor:
    """A block to each rank, and one from each."""
    received = torch.empty_like(values)
    dist.all_to_all_single(received, values)
    return received


def _measure(world: World, name: str, operation: Callable[[torch.Tensor], torch.Tensor], num_bytes: int) -> Check:
    values = torch.zeros(-(-num_bytes // 4 // world.size) * world.size, device=world.device)
    best_s = exchange_s(operation, values)
    size = values.numel() * values.element_size()
    return Check(name, "ok", f"{best_s * 1e6:.0f} µs" if size < 1 << 16 else
                 f"{best_s * 1e3:.2f} ms, {size / best_s / 1e9:.2f} GB/s per rank")


def exchange_s(operation: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor) -> float:
    """Seconds that the slowest rank takes, in the best of a few repeats; collective."""
    best_s = float("inf")
    for _ in range(_REPEATS):
        dist.barrier()
        start = time.perf_counter()
        float(operation(values)[0])  # a GPU has finished when the value is here
        slowest = torch.tensor(time.perf_counter() - start, device=values.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        best_s = min(best_s, float(slowest))
    return best_s
