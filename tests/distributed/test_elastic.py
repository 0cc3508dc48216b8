"""Eight logical workers on any number of processes, through stops and restarts on other numbers: bitwise one run."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

from longer_rec.checkpoint.inspect import diff_checkpoints, find_checkpoint
from longer_rec.config import load_config
from longer_rec.data.history import open_dataset
from longer_rec.data.loader import TrainLoader
from longer_rec.data.prepare import prepare
from longer_rec.errors import Preempted
from longer_rec.job import Job
from longer_rec.train.digests import digest_lines
from longer_rec.train.run import evaluate_run, train
from longer_rec.train.trainer import StepResult, Trainer
from tests.integration.conftest import CONFIG, metric_lines
from tests.reference.ranks import RankFailure, run_ranks

W, EVENTS = 8, 300
# The smallest clip norm that acts in every step; everything that draws random numbers or drops precision is on.
COMMON = (f"elastic.num_workers={W}", "elastic.digest_every=1", "data.batch_requests=6", f"data.max_events={EVENTS}",
          "data.loader_processes=0", "train.epochs=0.012", "train.log_every=1", "train.eval_every=3",
          "train.eval_requests=20", "train.checkpoint_every=100", "train.clip_norm=0.05", "model.dropout=0.2",
          "model.head.dropout=0.1", "schedule.warmup_steps=3")
PLANS = {
    "table_wise": ("sparse.plan=table_wise",),
    "row_wise_bf16_recomputed": (
        "sparse.plan={item: row_wise, user: row_wise, kind: table_wise, interests: table_wise}", "train.precision=bf16",
        "train.recompute=[input, merge, cross, self, head, interaction]", "sparse.optimizer=adagrad"),
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log with a pooled user feature, an item in four fifths of all events, and items seen once."""
    folder = tmp_path_factory.mktemp("shop")
    random = np.random.default_rng(0)
    users, events = 60, 380
    item = np.where(random.random(users * events) < 0.8, 0, random.zipf(1.3, users * events) % 3000)
    pl.DataFrame({"user": np.repeat(np.arange(users), events), "item": item,
                  "time": np.tile(np.arange(events) * 60, users) + 10**9,
                  "kind": item % 11}).write_parquet(folder / "log.parquet")
    pl.DataFrame({"user": np.arange(users), "interests": [
        ",".join(f"i{one}" for one in random.integers(0, 9, user % 5)) for user in range(users)]}
    ).write_csv(folder / "users.csv")
    (folder / "shop.yaml").write_text(yaml.safe_dump({
        "name": "shop", "events": {"files": ["log.parquet"]},
        "columns": {"user": "user", "item": "item", "time": "time"}, "items": {"features": [{"name": "kind"}]},
        "users": {"source": {"files": ["users.csv"]}, "key": "user",
                  "features": [{"name": "interests", "multi_valued": True, "separator": ","}]},
        "candidates": {"kind": "negatives", "per_positive": 3},
        "split": {"kind": "global_time", "fractions": [0.95, 0.02, 0.03]}}))
    return prepare(str(folder / "shop.yaml"), folder / "out")


def train_rank(rank: int, world_size: int, run_dir: Path, data: Path, overrides: tuple[str, ...],
               stop_after: int | None = None) -> bool:
    """Whether the run was told to stop, by a signal to its last rank after ``stop_after`` steps."""
    job = load_config(Job, CONFIG, [f"run_dir={run_dir}", f"data.dir={data}", *overrides])
    original = Trainer.train_step

    def stopping(self: Trainer, *batches: Any) -> StepResult:
        if self.step + 1 == stop_after and rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *batches)

    Trainer.train_step = stopping  # type: ignore[method-assign]
    try:
        train(job)
    except Preempted:
        return True
    return False


def evaluate_rank(rank: int, world_size: int, run_dir: Path) -> dict[str, Any]:
    return evaluate_run(run_dir, "validation")


def assert_same_run(first: Path, second: Path) -> None:
    (line,) = digest_lines(first, second)
    assert line.startswith("digests: equal at all"), line
    assert metric_lines(first) == metric_lines(second)
    assert diff_checkpoints(find_checkpoint(first), find_checkpoint(second)).tensors == []


def logged_steps(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "digests.jsonl").read_text().splitlines()]


def test_steps_hit_rows_once_and_dozens_and_thousands_of_times(shop: Path) -> None:
    """What the other tests rest on."""
    job = load_config(Job, CONFIG, ["run_dir=unused", f"data.dir={shop}", *COMMON])
    dataset = open_dataset(shop)
    loader = TrainLoader(dataset, job.data, seed=0, num_workers=W, workers=range(W), start_step=0, num_steps=6)
    hits: set[int] = set()
    for step in range(6):
        hits |= set(np.unique(np.concatenate([batch.history["item"] for batch in loader.make_step(step)]),
                              return_counts=True)[1].tolist())
    assert {1, 40} <= hits
    assert max(hits) >= 5000
    assert any(feature.multi_valued for feature in dataset.schema.user_features)


@pytest.mark.parametrize("plan", PLANS)
def test_eight_workers_on_any_number_of_processes_match_bitwise_at_every_step(shop: Path, plan: str,
                                                                              tmp_path: Path) -> None:
    overrides = (*COMMON, *PLANS[plan])
    for processes in (1, 2, 3, 4, 8):
        run_ranks(train_rank, processes, tmp_path / f"{processes}", shop, overrides, timeout_s=120)
        assert_same_run(tmp_path / "1", tmp_path / f"{processes}")
    steps = logged_steps(tmp_path / "1")
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 5
    clipped = [line["grad_norm"] > 0.05 for line in metric_lines(tmp_path / "1") if line["split"] == "train"]
    assert clipped == [True] * len(steps)


@pytest.mark.parametrize("plan", PLANS)
def test_a_run_that_moves_from_4_to_2_to_1_to_4_processes_is_the_uninterrupted_run(shop: Path, plan: str,
                                                                                  tmp_path: Path) -> None:
    overrides = (*COMMON, *PLANS[plan])
    run_ranks(train_rank, 3, tmp_path / "whole", shop, overrides, timeout_s=120)
    for processes, stop_after in ((4, 1), (2, 3), (1, 4)):
        stopped = run_ranks(train_rank, processes, tmp_path / "moved", shop, overrides, stop_after, timeout_s=120)
        assert stopped == [True] * processes
        assert find_checkpoint(tmp_path / "moved").name == f"step-{stop_after}"
    assert run_ranks(train_rank, 4, tmp_path / "moved", shop, overrides, timeout_s=120) == [False] * 4
    assert_same_run(tmp_path / "whole", tmp_path / "moved")


def test_shares_of_the_workers_change_no_bit_and_may_change_at_a_restart(shop: Path, tmp_path: Path) -> None:
    overrides = (*COMMON, *PLANS["row_wise_bf16_recomputed"])
    run_ranks(train_rank, 1, tmp_path / "one", shop, overrides, timeout_s=120)
    for shares in ([5, 3], [6, 1, 1]):
        run_dir = tmp_path / f"{len(shares)}"
        run_ranks(train_rank, len(shares), run_dir, shop, (*overrides, f"elastic.shares={shares}"), timeout_s=120)
        assert_same_run(tmp_path / "one", run_dir)
    moved = [((1, 2, 5), 2), ((7, 1), None)]
    for shares, stop_after in moved:
        run_ranks(train_rank, len(shares), tmp_path / "moved", shop,
                  (*overrides, f"elastic.shares={list(shares)}"), stop_after, timeout_s=120)
    assert_same_run(tmp_path / "one", tmp_path / "moved")
    # Those who read it have no shares to keep.
    assert len(run_ranks(evaluate_rank, 2, tmp_path / "moved")) == 2


def test_shares_for_other_processes_are_refused_before_anything_is_written(shop: Path, tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match=r"ConfigError.*elastic\.shares=\[5, 3\] is for 2 processes, there are 3"):
        run_ranks(train_rank, 3, tmp_path / "run", shop, (*COMMON, "elastic.shares=[5, 3]"))
    assert not (tmp_path / "run").exists()


def test_recomputation_changes_no_bit(shop: Path, tmp_path: Path) -> None:
    overrides = (*COMMON, "sparse.plan=table_wise")
    parts = "[input, merge, cross, self, head, interaction]"
    run_ranks(train_rank, 2, tmp_path / "kept", shop, overrides, timeout_s=120)
    run_ranks(train_rank, 2, tmp_path / "again", shop, (*overrides, f"train.recompute={parts}"), timeout_s=120)
    assert_same_run(tmp_path / "kept", tmp_path / "again")


def test_a_plan_may_change_at_a_restart(shop: Path, tmp_path: Path) -> None:
    run_ranks(train_rank, 2, tmp_path / "whole", shop, (*COMMON, "sparse.plan=table_wise"), timeout_s=120)
    run_ranks(train_rank, 2, tmp_path / "moved", shop, (*COMMON, "sparse.plan=table_wise"), 2, timeout_s=120)
    run_ranks(train_rank, 4, tmp_path / "moved", shop,
              (*COMMON, "sparse.plan={item: row_wise, user: row_wise, kind: row_wise, interests: table_wise}"),
              timeout_s=120)
    assert_same_run(tmp_path / "whole", tmp_path / "moved")


@pytest.mark.parametrize("sharding", ["row_wise", "data_parallel"])
def test_strict_refuses_pooled_tables_whose_sums_depend_on_the_processes(shop: Path, sharding: str,
                                                                        tmp_path: Path) -> None:
    plan = f"sparse.plan={{item: table_wise, user: table_wise, kind: table_wise, interests: {sharding}}}"
    with pytest.raises(RankFailure, match=rf"ConfigError.*'interests' cannot be {sharding}.*use table_wise, or"):
        run_ranks(train_rank, 1, tmp_path / "strict", shop, (*COMMON, plan))
    assert not (tmp_path / "strict").exists()


def test_what_strict_refuses_really_differs(shop: Path, tmp_path: Path) -> None:
    """Row-wise pooling adds each rank's partial sum: a user's interests on two ranks are added in another order."""
    overrides = (*COMMON, "elastic.strict=false", "sparse.pooling=sum",
                 "sparse.plan={item: table_wise, user: table_wise, kind: table_wise, interests: row_wise}")
    for processes in (1, 2):
        run_ranks(train_rank, processes, tmp_path / f"{processes}", shop, overrides, timeout_s=120)
    (line,) = digest_lines(tmp_path / "1", tmp_path / "2")
    assert re.match("digests: first different at step [12], in ", line), line


def test_a_strict_run_is_not_continued_with_other_threads_or_kernels(shop: Path, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(train_rank, 1, tmp_path / "run", shop, COMMON, 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with pytest.raises(RankFailure, match=r"CheckpointError: elastic\.strict promises.*threads was 1, is 2.*or set"):
        run_ranks(train_rank, 1, tmp_path / "run", shop, COMMON)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    with pytest.raises(RankFailure, match=r"kernels was default, is MKL_CBWR=COMPATIBLE: continue as the run"):
        run_ranks(train_rank, 1, tmp_path / "run", shop, COMMON)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    # To read it is not to continue it.
    assert run_ranks(evaluate_rank, 2, tmp_path / "run")[0]["step"] == 1
    run_ranks(train_rank, 1, tmp_path / "run", shop, (*COMMON, "elastic.strict=false"), 2)
    with pytest.raises(RankFailure, match=r"CheckpointError: elastic\.strict promises.*earlier steps .* without it"):
        run_ranks(train_rank, 1, tmp_path / "run", shop, COMMON)


def test_learning_rates_follow_the_step_and_not_the_processes(shop: Path, tmp_path: Path) -> None:
    for processes in (1, 4):
        run_ranks(train_rank, processes, tmp_path / f"{processes}", shop, COMMON, 3, timeout_s=120)
    rates = [[(line["sparse_lr"], line["dense_lr"]) for line in metric_lines(tmp_path / f"{processes}")
              if line["split"] == "train"] for processes in (1, 4)]
    assert rates[0] == rates[1]
    assert rates[0][0] < rates[0][1] < rates[0][2]
