"""The tower on one GPU in bf16: model FLOPs utilisation by part, events a second, peak memory, by width and length.

    python -m benchmarks.gpu > benchmarks/results/gpu.md

Needs torch and this package's model/ alone: no TorchRec, no FBGEMM, no data. Recomputation and the path without
padding (``train.attention: flex``) are on and off side by side, their steps interleaved. ``--device cpu --toy`` runs
all of it in seconds, to see that it runs.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from longer_rec.model.attention_plan import AttentionPath, use_attention
from longer_rec.model.flops import tower_flops
from longer_rec.model.inputs import CandidateSide, InputWidths, UserSide
from longer_rec.model.longer import LongerTower
from longer_rec.model.precision import Precision, mixed_precision
from longer_rec.model.profile import REST, named_parts, part_times
from longer_rec.model.recompute import apply_recompute
from longer_rec.model.tower import TowerConfig, build_tower
from longer_rec.runtime.machine import gpus, numerics
from longer_rec.runtime.peak import measure_peak

WIDTHS = InputWidths(item={"item": 64, "category": 16}, event={"action": 8}, user={"user": 32}, num_dense=0,
                     num_item_dense=4)
RECOMPUTED = ("input", "merge", "cross", "self")
Step = Callable[[], None]


def lengths_of(num_requests: int, longest: int) -> list[int]:
    """A quarter of the histories cut at the longest, the others spread evenly down to a tenth of it."""
    whole = num_requests // 4
    return [longest] * whole + [longest * (10 + 90 * i // max(num_requests - whole, 1)) // 100
                                for i in range(num_requests - whole)]


def make_sides(lengths: list[int], num_candidates: int, device: torch.device) -> tuple[UserSide, CandidateSide]:
    events, requests, candidates = sum(lengths), len(lengths), len(lengths) * num_candidates

    def rows(widths: dict[str, int], count: int) -> dict[str, torch.Tensor]:
        return {name: torch.randn(count, width, device=device, requires_grad=True) for name, width in widths.items()}

    def ids(names: object, count: int) -> dict[str, torch.Tensor]:
        return {name: torch.randint(0, 1000, (count,), device=device) for name in names}  # type: ignore[attr-defined]

    ages = torch.cat([torch.arange(length, 0, -1, device=device) for length in lengths]) * 3600
    user = UserSide(rows({**WIDTHS.item, **WIDTHS.event}, events), ids([*WIDTHS.item, *WIDTHS.event], events), ages,
                    torch.tensor(lengths, device=device), rows(dict(WIDTHS.user), requests),
                    torch.zeros(requests, 0, device=device))
    return user, CandidateSide(rows(dict(WIDTHS.item), candidates), ids(WIDTHS.item, candidates),
                               torch.randn(candidates, WIDTHS.num_item_dense, device=device),
                               torch.full((requests,), num_candidates, device=device))


def build(config: TowerConfig, longest: int, recompute: bool, device: torch.device) -> LongerTower:
    torch.manual_seed(0)
    tower = build_tower(config, WIDTHS, 1, longest).to(device)
    assert isinstance(tower, LongerTower)
    apply_recompute(tower, RECOMPUTED if recompute else ())
    return tower.train()


def make_step(tower: LongerTower, sides: tuple[UserSide, CandidateSide], precision: Precision, path: AttentionPath,
              device: torch.device) -> Step:
    def step() -> None:
        if path != "grouped" or device.type == "cuda":
            use_attention(path, device)
        with record_function("step"):
            with mixed_precision(tower, precision, {}, device):
                logit_CY = tower.score(tower.encode(sides[0]), sides[1])
            logit_CY.float().square().mean().backward()
        for parameter in tower.parameters():
            parameter.grad = None

    return step


def seconds(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_mib(step: Step, device: torch.device) -> str:
    if device.type != "cuda":
        return "–"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:,.0f}"


def measure(args: argparse.Namespace, merged_width: int, longest: int, peak: float) -> None:
    device = torch.device(args.device)
    config = TowerConfig(width=merged_width // 4, merge_size=4, num_queries=args.queries, num_self_layers=2,
                         inner_trans={"num_heads": 2}, num_heads=max(merged_width // 64, 1))
    lengths = lengths_of(args.requests, longest)
    flops = tower_flops(config, WIDTHS, 1, lengths, [args.candidates] * args.requests)
    sides = make_sides(lengths, args.candidates, device)
    paths: list[AttentionPath] = ["grouped", "flex"] if device.type == "cuda" else ["grouped"]
    steps = {(path, recompute): make_step(build(config, longest, recompute, device), sides, args.precision, path,
                                          device)
             for path, recompute in itertools.product(paths, (False, True))}
    for step in [*steps.values()] * 2:
        step()
    times: dict[tuple[AttentionPath, bool], list[float]] = {key: [] for key in steps}
    for _, (key, step) in itertools.product(range(args.repeats), steps.items()):
        times[key].append(seconds(step, device))
    for (path, recompute), step in steps.items():
        spent = statistics.median(times[path, recompute])
        print(f"| {merged_width} | {longest:,} | {path} | {'yes' if recompute else 'no'} | {1e3 * spent:.2f} | "
              f"{3 * flops.total / spent / peak:.1%} | {sum(lengths) / spent:,.0f} | {peak_mib(step, device)} | "
              f"{by_part(args, config, longest, sides, path, recompute, peak)} |", flush=True)


def by_part(args: argparse.Namespace, config: TowerConfig, longest: int, sides: tuple[UserSide, CandidateSide],
            path: AttentionPath, recompute: bool, peak: float) -> str:
    """Utilisation of each part; of the rest, which has no matmuls, its share of the step."""
    device = torch.device(args.device)
    tower, on_gpu = build(config, longest, recompute, device), device.type == "cuda"
    step = make_step(tower, sides, args.precision, path, device)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    step()
    with named_parts(tower), profile(activities=kinds, acc_events=True) as traced:
        seconds(step, device)
    spent = part_times(traced, "step", on_gpu)
    flops = tower_flops(config, WIDTHS, 1, sides[0].length_B.tolist(), sides[1].length_B.tolist())
    names = {"input": flops.input, "merge": flops.merge, "cross": flops.cross, "self": flops.self_layers,
             "head": flops.head}
    parts = [f"{name} {3 * count / (spent[name] * 1e-6) / peak:.0%}" for name, count in names.items()
             if spent.get(name)]
    return ", ".join([*parts, f"rest {spent[REST] / sum(spent.values()):.0%} of the time"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256], help="after the merge")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 10_000])
    parser.add_argument("--toy", action="store_true", help="sizes that a CPU runs in seconds")
    args = parser.parse_args()
    if args.toy:
        args.requests, args.candidates, args.queries, args.repeats = 4, 3, 8, 2
        args.widths, args.lengths = [32], [64]
    device = torch.device(args.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    peak = measure_peak(device, dtype)
    print(f"A training step of the tower, {args.precision}: {args.requests} requests of {args.candidates} candidates, "
          f"K = 4 with InnerTrans, k = {args.queries}, three layers. Of a measured peak of {peak / 1e12:.3g} TFLOP/s "
          f"({[gpu['name'] for gpu in gpus()] or numerics(device)['processor']}, torch {torch.__version__}).\n")
    columns = ["merged width", "L", "attention", "recomputed", "ms", "MFU", "events/s", "peak MiB", "MFU by part"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for merged_width, longest in itertools.product(args.widths, args.lengths):
        measure(args, merged_width, longest, peak)


if __name__ == "__main__":
    main()
