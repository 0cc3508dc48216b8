"""What a training step of the tower costs, side by side: encoders, length, precision, padding, and its own matmuls.

    longer-rec prepare completejourney --out data/completejourney    # likewise movielens, synthetic
    OMP_NUM_THREADS=1 python -m benchmarks.bench_tower data

One thread, random embeddings, real lengths where a configuration is named. Alternatives take turns within a round, each
after a step that is not timed and brings its memory back, and figures are medians over rounds. Prints the tables of
``benchmarks/results/tower.md``.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from longer_rec.config import load_config
from longer_rec.data.history import open_dataset
from longer_rec.data.loader import TrainLoader
from longer_rec.job import Job, input_widths
from longer_rec.model.baselines.hstu import HstuConfig
from longer_rec.model.baselines.transformer import TransformerConfig
from longer_rec.model.flops import tower_flops
from longer_rec.model.inputs import CandidateSide, InputWidths, UserSide
from longer_rec.model.longer import TowerConfig
from longer_rec.model.merge import InnerTransConfig
from longer_rec.model.tower import AnyTower, AnyTowerConfig, build_tower
from longer_rec.runtime.memory import keep_freed_memory
from tests.reference.provenance import provenance

WIDTHS = InputWidths(item={"item": 32, "category": 8, "brand": 8}, event={"quantity": 8}, user={"user": 8}, num_dense=2,
                     num_item_dense=3)
# L = 2000, d = 32, K = 8, InnerTrans, k = 100: the paper's, 256 wide after the merge.
PAPER = TowerConfig(width=32, merge_size=8, inner_trans=InnerTransConfig(), num_queries=100)
_CONFIGS = ("first", "completejourney", "movielens", "synthetic_debug")
_LENGTHS = (1024, 2048, 4096, 8192)
_WARM = 16
Batch = tuple[UserSide, CandidateSide]

@dataclass(frozen=True)
class Shape:
    """A tower and what it is given; L is ``max_events``."""

    config: TowerConfig
    max_events: int
    batches: list[Batch]
    widths: InputWidths = WIDTHS

    def build(self) -> AnyTower:
        return build_tower(self.config, self.widths, 1, self.max_events)


Shapes = dict[str, Shape]


def make_batch(history: Sequence[int], candidates: Sequence[int], seed: int = 0, widths: InputWidths = WIDTHS) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    B, T, C = len(history), sum(history), sum(candidates)

    def embed(width: Mapping[str, int], rows: int) -> dict[str, Tensor]:
        return {name: torch.randn(rows, each, generator=generator).requires_grad_() for name, each in width.items()}

    def ids(names: Sequence[str], rows: int) -> dict[str, Tensor]:
        return {name: torch.randint(0, 500, (rows,), generator=generator) for name in names}

    ages = [torch.randint(1, 10**7, (length,), generator=generator).sort(descending=True).values for length in history]
    event = {**widths.item, **widths.event}
    return (UserSide(embed(event, T), ids([*event], T), torch.cat(ages), torch.tensor(history), embed(widths.user, B),
                     torch.randn(B, widths.num_dense)),
            CandidateSide(embed(widths.item, C), ids([*widths.item], C), torch.randn(C, widths.num_item_dense),
                          torch.tensor(candidates)))


def logits(tower: AnyTower, batch: Batch) -> Tensor:
    return tower.score(tower.encode(batch[0]), batch[1])


def train_step(tower: AnyTower, batch: Batch, bf16: bool = False) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logit_CY = logits(tower, batch)
    logit_CY.float().square().mean().backward()


def _step(tower: AnyTower, batch: Batch, _: int, bf16: bool = False) -> None:
    train_step(tower, batch, bf16)


def _step_of(tower: AnyTower, batches: Sequence[Batch], bf16: bool, number: int) -> None:
    train_step(tower, batches[number], bf16)


def interleaved_ms(steps: Mapping[str, Callable[[int], None]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each step, given a number that is new each time."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name, step in steps.items():
            step(2 * number)
            start = time.perf_counter()
            step(2 * number + 1)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in times.items()}


def encoders(rounds: int, length: int = 2048, requests: int = 4, candidates: int = 16) -> None:
    """LONGER beside encoders of its width after the merge, of the same depth."""
    heads = {"num_heads": 4}
    configs: dict[str, AnyTowerConfig] = {
        "LONGER, K = 4, k = 100": TowerConfig(width=32, merge_size=4, num_queries=100),
        "Transformer, this package's": TransformerConfig(width=128, **heads),
        "HSTU": HstuConfig(width=128, **heads)}
    batch = make_batch([length] * requests, [candidates] * requests)
    forwards: dict[str, Callable[[], Tensor]] = {
        name: partial(logits, build_tower(config, WIDTHS, 1, length), batch) for name, config in configs.items()}
    layer = nn.TransformerEncoderLayer(128, 4, 512, 0.0, F.silu, batch_first=True, norm_first=True)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    token_BLX = torch.randn(requests, length, 128, requires_grad=True)
    mask = nn.Transformer.generate_square_subsequent_mask(length)
    forwards["Transformer, torch.nn's, its layers alone"] = lambda: plain(token_BLX, mask, is_causal=True)
    times = interleaved_ms({name: partial(_learn, forward) for name, forward in forwards.items()}, rounds)
    gflop = {name: 3e-9 * _forward_flops(forward) for name, forward in forwards.items()}
    first = "LONGER, K = 4, k = 100"
    print(f"\n## Encoders of width 128, two layers, L = {length}, {requests} requests, {candidates} candidates each\n")
    print("| encoder | ms | times LONGER | GFLOP | times LONGER | GFLOP/s |\n|---|---|---|---|---|---|")
    for name, ms in times.items():
        print(f"| {name} | {ms:.0f} | {ms / times[first]:.1f} | {gflop[name]:.2f} | {gflop[name] / gflop[first]:.1f} | "
              f"{1e3 * gflop[name] / ms:.0f} |")


def _learn(forward: Callable[[], Tensor], _: int) -> None:
    forward().square().mean().backward()


def _forward_flops(forward: Callable[[], Tensor]) -> int:
    """Of the matmuls that run: attention under a causal mask counts whole."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


def peak_mb(length: int) -> float:
    """Resident memory that a step at L = ``length`` adds at its peak; to be called in a process of its own."""
    torch.set_num_threads(1)
    tower, batch = _of_length(length)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of the step
    before, _ = _resident_mb()
    train_step(tower, batch)
    return _resident_mb()[1] - before


def _resident_mb() -> tuple[float, float]:
    """Now, and at most since it was reset."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    now, most = (int(line.split()[1]) / 1024 for key in ("VmRSS", "VmHWM") for line in status.splitlines()
                 if line.startswith(key))
    return now, most


def _of_length(length: int) -> tuple[AnyTower, Batch]:
    config = TowerConfig(width=32, merge_size=4, num_queries=100)
    return build_tower(config, WIDTHS, 1, length), make_batch([length] * 4, [16] * 4)


def lengths(rounds: int) -> None:
    """Time and memory against L, with k fixed."""
    print("\n## Length, K = 4, k = 100, 4 requests, 16 candidates each\n")
    print("| L | ms | times that of 1024 | peak MB added | times that of 1024 |\n|---|---|---|---|---|")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = dict(zip(_LENGTHS, pool.map(peak_mb, _LENGTHS, chunksize=1), strict=True))
    towers = {L: _of_length(L) for L in _LENGTHS}
    times = interleaved_ms({str(L): partial(_step, *towers[L]) for L in _LENGTHS}, rounds)
    for L in _LENGTHS:
        print(f"| {L:,} | {times[str(L)]:.0f} | {times[str(L)] / times['1024']:.2f} | {peaks[L]:.0f} | "
              f"{peaks[L] / peaks[1024]:.2f} |")


class _Matmuls(TorchDispatchMode):
    """Every matmul that runs, with the shapes and strides of its operands."""

    kinds = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default,
             torch.ops.aten.bmm.out}

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[Tensor]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self.kinds:
            kind = torch.ops.aten.bmm.default if function is torch.ops.aten.bmm.out else function
            self.calls.append((kind, [torch.empty_strided(each.shape, each.stride(), dtype=each.dtype)
                                      for each in args if isinstance(each, Tensor)]))
        return function(*args, **(kwargs or {}))

    def replay(self) -> Callable[[int], None]:
        for _, operands in self.calls:
            for each in operands:
                each.normal_()
        return self._run

    def _run(self, _: int) -> None:
        for kind, operands in self.calls:
            kind(*operands)


def roofline(rounds: int, shapes: Shapes) -> None:
    print("\n## A step beside its own matmuls, back to back\n")
    print("| shape | precision | step ms | its matmuls ms | share |\n|---|---|---|---|---|")
    for name, shape in shapes.items():
        tower, batch = shape.build(), shape.batches[0]
        for bf16 in (False, True):
            with _Matmuls() as matmuls:
                train_step(tower, batch, bf16)
            step = partial(_step, tower, batch, bf16=bf16)
            times = interleaved_ms({"step": step, "matmuls": matmuls.replay()}, rounds)
            print(f"| {name} | {'bf16' if bf16 else 'fp32'} | {times['step']:.1f} | {times['matmuls']:.1f} | "
                  f"{times['matmuls'] / times['step']:.0%} |")


def precision(rounds: int, shapes: Shapes) -> None:
    """On batches that were not seen before, whose shapes are new."""
    print("\n## bf16 against fp32, new lengths in every step\n")
    print("| shape | fp32 ms | bf16 ms | times as fast |\n|---|---|---|---|")
    for name, shape in shapes.items():
        tower, batches = shape.build(), shape.batches
        for batch in batches[:_WARM]:  # most kernels of the grid are compiled in the first steps of a run
            train_step(tower, batch, bf16=True)
        times = interleaved_ms({kind: partial(_step_of, tower, batches[_WARM:], kind == "bf16")
                                for kind in ("fp32", "bf16")}, rounds)
        print(f"| {name} | {times['fp32']:.1f} | {times['bf16']:.1f} | {times['fp32'] / times['bf16']:.2f} |")


def padding(shapes: Shapes) -> None:
    """Useful over executed FLOPs of the forward pass, counted."""
    print("\n## Useful share of the executed FLOPs\n")
    print("| shape | fp32 | bf16, rows rounded up |\n|---|---|---|")
    for name, shape in shapes.items():
        tower, useful, executed = shape.build(), 0, [0, 0]
        for user, candidates in shape.batches[:12]:
            useful += tower_flops(shape.config, shape.widths, 1, user.length_B.tolist(),
                                  candidates.length_B.tolist()).total
            for bf16 in (False, True):
                with (torch.no_grad(), FlopCounterMode(display=False) as counter,
                      torch.autocast("cpu", torch.bfloat16, enabled=bf16)):
                    tower.score(tower.encode(user), candidates)
                executed[bf16] += counter.get_total_flops()
        print(f"| {name} | {useful / executed[0]:.3f} | {useful / executed[1]:.3f} |")


def shape_of(name: str, data: Path, count: int) -> Shape:
    """A shipped configuration: random embeddings on the lengths of its training batches."""
    job = load_config(Job, Path(f"configs/{name}.yaml"))
    dataset = open_dataset(data / job.data.dir.name, verify=False)
    widths = input_widths(dataset.schema, job)
    loader = TrainLoader(dataset, job.data, seed=0, num_workers=1, workers=range(1), start_step=0, num_steps=1)
    steps = (loader.make_step(step)[0] for step in range(count))
    assert isinstance(job.model, TowerConfig)
    return Shape(job.model, job.data.max_events, [
        make_batch(batch.history_length_B.tolist(), batch.num_candidates_B.tolist(), seed, widths)
        for seed, batch in enumerate(steps)], widths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the prepared data sets")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", default=["encoders", "lengths", "roofline", "precision", "padding"])
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    jagged = [make_batch(torch.randint(700, 2001, (8,), generator=generator).tolist(), [16] * 8, seed)
              for seed in range(2 * args.rounds + _WARM)]
    shipped = {f"configs/{name}.yaml": shape_of(name, args.data, len(jagged)) for name in _CONFIGS}
    jagged_shapes: Shapes = {"the paper's, 8 requests": Shape(PAPER, 2000, jagged), **shipped}
    fixed: Shapes = {"the paper's, 8 requests": Shape(PAPER, 2000, [make_batch([2000] * 8, [16] * 8)]),
                     "K = 4, L = 2048, 8 requests": Shape(TowerConfig(width=32, merge_size=4, num_queries=100), 2048,
                                                          [make_batch([2048] * 8, [16] * 8)]), **shipped}
    runs: dict[str, Callable[[], None]] = {
        "encoders": lambda: encoders(min(args.rounds, 3)), "lengths": lambda: lengths(args.rounds),
        "roofline": lambda: roofline(args.rounds, fixed), "precision": lambda: precision(args.rounds, jagged_shapes),
        "padding": lambda: padding(jagged_shapes)}
    for name in args.only:
        runs[name]()
    print("\n" + provenance(f"python -m benchmarks.bench_tower {args.data}", "torch"))


if __name__ == "__main__":
    main()
