"""How deep, and at which learning rate, each norm placement still trains: loss and gradient norm on real requests.

    longer-rec prepare completejourney --out data/completejourney
    python -m benchmarks.bench_norms data/completejourney runs/norms

Runs stay in their folder, and finished ones are not run again. Writes ``benchmarks/results/norms.png`` and prints the
table of ``benchmarks/results/norms.md``. Every run sees the same requests in the same order.
"""

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import get_args

import matplotlib.pyplot as plt
import numpy as np

from longer_rec.checkpoint.manager import CheckpointManager
from longer_rec.config import build_config
from longer_rec.data.history import Dataset, open_dataset
from longer_rec.errors import DataError
from longer_rec.job import Job
from longer_rec.model.norms import NormPlace
from longer_rec.runtime.distributed import World, joined_world
from longer_rec.train.log import RunLog
from longer_rec.train.parallelize import parallelize
from longer_rec.train.run import prepare_process
from longer_rec.train.trainer import Trainer

PLACES = get_args(NormPlace)
Curves = dict[str, list[float]]
_BATCH_REQUESTS = 16
_LAST = 50  # steps over which the loss at the end is averaged


def build_job(args: argparse.Namespace, dataset: Dataset, norm: str, depth: int, lr: float) -> Job:
    return build_config(Job, {
        "name": norm, "run_dir": args.runs / f"{norm}-{depth}-{lr:g}",
        "data": {"dir": args.data, "max_events": 100, "batch_requests": _BATCH_REQUESTS, "loader_processes": 0},
        "model": {"kind": "longer", "norm": norm, "width": 16, "merge_size": 2, "num_queries": 20,
                  "num_self_layers": depth - 1, "ffn_multiple": 2},
        "sparse": {"dims": {"item": 16}, "default_dim": 8, "init_std": {"item": 1.0}, "lr": 0.01},
        "dense": {"lr": lr},
        "train": {"epochs": args.steps * _BATCH_REQUESTS / dataset.num_requests("train"), "log_every": 1,
                  "eval_every": 10**6, "checkpoint_every": 10**6}}, norm)


def run(job: Job, dataset: Dataset, world: World) -> None:
    """Train from the start; a run that is given up for want of finite steps leaves a shorter log."""
    job.run_dir.mkdir(parents=True, exist_ok=True)
    (job.run_dir / "metrics.jsonl").unlink(missing_ok=True)
    trainer = Trainer(job, dataset, world, parallelize(job, dataset, world), num_workers=1)
    with RunLog(job.run_dir, 0) as log:
        try:
            trainer.fit(CheckpointManager(job.run_dir / "checkpoints"), log)
        except DataError as error:
            print(f"{job.run_dir}: {error}")


def read_curves(job: Job) -> Curves:
    """Loss and gradient norm of every step that was logged; what was not finite is infinite."""
    path = job.run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return {name: [math.inf if line[name] is None else line[name] for line in lines] for name in ("loss", "grad_norm")}


def constant_loss(dataset: Dataset) -> float:
    """Entropy of the labels' mean."""
    rate = dataset.summary["label_mean"]["train"]
    return -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)


def verdict(curves: Curves, num_steps: int, constant: float) -> str:
    """In the last steps, beside a model that has learned nothing but how many labels are positive."""
    share = statistics.mean(curves["loss"][-_LAST:]) / constant
    if len(curves["loss"]) < num_steps or share > 1.02:
        return "diverged"
    return "learned" if share < 0.98 else "no better than a constant"


def draw(results: dict[tuple[int, float, str], Curves], constant: float, path: Path) -> None:
    """Depths downwards; loss and gradient norm at each learning rate sideways, as medians over 10 steps."""
    depths, rates = (sorted({key[index] for key in results}) for index in (0, 1))
    figure, axes = plt.subplots(len(depths), 2 * len(rates), figsize=(7 * len(rates), 2.7 * len(depths)), sharex=True,
                                sharey="col", squeeze=False)
    for row, depth in enumerate(depths):
        for axis, (name, lr) in zip(axes[row], itertools.product(("loss", "grad_norm"), rates), strict=True):
            for place in PLACES:
                values = np.array(results[int(depth), lr, place][name])
                starts = np.arange(0, len(values), 10)
                axis.plot(starts + 5, [np.median(values[at:at + 10]) for at in starts], label=place, linewidth=1.4)
            axis.set_title(f"{depth} layers, lr {lr:g}: {name.replace('_', ' ')}", fontsize=9)
            axis.grid(alpha=0.3)
            if name == "grad_norm":
                axis.set_yscale("log")
            else:
                axis.axhline(constant, color="grey", linestyle=":", linewidth=1)
                axis.set_ylim(0.43, 0.51)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 8, 16])
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 6e-3])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--picture", type=Path, default=Path("benchmarks/results/norms.png"))
    args = parser.parse_args()
    prepare_process()
    dataset = open_dataset(args.data, verify=False)
    constant, results = constant_loss(dataset), {}
    rows = ["| layers | lr | norm | loss at the end | gradient norm: median | largest | |", 7 * "|---" + "|"]
    with joined_world() as world:
        for depth, lr, place in itertools.product(args.depths, args.rates, PLACES):
            job = build_job(args, dataset, place, depth, lr)
            if len(read_curves(job)["loss"]) < args.steps:
                run(job, dataset, world)
            curves = results[depth, lr, place] = read_curves(job)
            loss, norms = statistics.mean(curves["loss"][-_LAST:]), curves["grad_norm"]
            rows.append(f"| {depth} | {lr:g} | `{place}` | {loss:.4f} | {statistics.median(norms):.3g} | "
                        f"{max(norms):.3g} | {verdict(curves, args.steps, constant)} |")
            print(rows[-1], flush=True)
    print(f"\nloss of a constant {constant:.4f}\n", *rows, sep="\n")
    draw(results, constant, args.picture)


if __name__ == "__main__":
    main()
