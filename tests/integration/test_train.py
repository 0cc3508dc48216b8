"""Runs of the whole trainer: repeated, interrupted, on other numbers of processes, with and without long history."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from longer_rec.checkpoint.inspect import diff_checkpoints
from longer_rec.errors import CheckpointError
from longer_rec.train.log import RunLog
from tests.integration.conftest import CONFIG, metric_lines
from tests.reference.commands import CommandServer
from tests.reference.ranks import RankFailure

Run = Callable[..., Path]
SHORT = ("train.epochs=0.2", "train.log_every=1", "train.eval_every=10", "train.checkpoint_every=5",
         "train.eval_requests=50", "data.max_events=300")


def newest(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))


def test_two_runs_of_one_config_are_bitwise_equal(run: Run) -> None:
    first, second = run("first", *SHORT), run("second", *SHORT)
    assert len(metric_lines(first)) > 10
    assert metric_lines(first) == metric_lines(second)
    assert diff_checkpoints(newest(first), newest(second)).tensors == []


def test_another_seed_gives_another_run(run: Run) -> None:
    first, second = run("first", *SHORT), run("second", *SHORT, "seed=1")
    assert metric_lines(first) != metric_lines(second)
    assert diff_checkpoints(newest(first), newest(second)).tensors != []


@pytest.mark.parametrize("plan", ["table_wise", "row_wise"])
def test_two_logical_workers_on_one_and_on_two_processes_match_bitwise(run: Run, plan: str) -> None:
    overrides = (*SHORT, "elastic.num_workers=2", f"sparse.plan={plan}", "model.dropout=0.1")
    one, two = run("one", *overrides, ranks=1), run("two", *overrides, ranks=2)
    assert metric_lines(one) == metric_lines(two)
    assert diff_checkpoints(newest(one), newest(two)).tensors == []
    analysis = (one / "analysis.json").read_text()
    assert json.loads(analysis)["attention"]["requests"] > 0
    assert analysis == (two / "analysis.json").read_text()


def test_killed_and_resumed_equals_uninterrupted(run: Run, synthetic: Path, tmp_path: Path) -> None:
    whole = run("whole", *SHORT)
    broken = tmp_path / "broken"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    job = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "longer_rec",
         "train", str(CONFIG), f"run_dir={broken}", f"data.dir={synthetic}", *SHORT],
        env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not (broken / "checkpoints" / "LATEST").exists():
        assert time.monotonic() < deadline
        assert job.poll() is None
        time.sleep(0.01)
    # torchrun's ranks lead sessions of their own: a signal to its group would leave them training.
    for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
        process.kill()
    job.wait()
    assert newest(broken).name != newest(whole).name, "the run was over before it was killed"
    run("broken", *SHORT)
    assert metric_lines(broken) == metric_lines(whole)
    assert diff_checkpoints(newest(broken), newest(whole)).tensors == []


def test_a_signal_beyond_the_newest_200_events_is_seen_by_long_histories_alone(run: Run) -> None:
    auc = {}
    for max_events in (100, 1000):
        run_dir = run(f"L{max_events}", f"data.max_events={max_events}", "train.epochs=0.5")
        auc[max_events] = json.loads((run_dir / "results.json").read_text())[0]["auc"]
    assert auc[1000] >= 0.95
    assert auc[100] <= 0.55


def test_a_full_disk_under_the_log_is_named(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0) as log:
        log.write("train", 1, {"loss": 1.0})
        (tmp_path / "digests.jsonl").symlink_to("/dev/full")
        with pytest.raises(CheckpointError, match=r"cannot write run_dir=.*No space left on device; check space"):
            log.write_digests(1, {"tower.weight": "0" * 16})


def test_a_run_with_a_plan_for_two_ranks_is_evaluated_on_one(run: Run, commands: CommandServer, tmp_path: Path) -> None:
    plan = run("planned", *SHORT) / "plan.json"
    run_dir = run("run", *SHORT, f"sparse.plan={plan}")
    outcome = commands.run("eval", run_dir)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    expected = json.loads((run_dir / "results.json").read_text())[0]["auc"]
    assert f"{expected:.4f}" in outcome.out


def test_a_run_of_another_number_of_workers_is_refused_and_left_alone(run: Run) -> None:
    run_dir = run("run", *SHORT)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(RankFailure, match=r"(?s)CheckpointError.*logical workers"):
        run("run", *SHORT, ranks=1)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_baselines_stand_beside_the_model_in_the_results(run: Run) -> None:
    run_dir = run("run", *SHORT, "baselines={counts: ['model={kind: count}', train.epochs=0], "
                                 "no_sequence: ['model={kind: no_sequence}']}")
    rows = json.loads((run_dir / "results.json").read_text())
    assert [row["name"] for row in rows] == ["synthetic_debug", "counts", "no_sequence"]
    assert (run_dir / "baselines" / "counts" / "metrics.jsonl").exists()
    assert "no_sequence" in (run_dir / "report.html").read_text()


def test_rates_count_the_steps_they_were_measured_over(run: Run) -> None:
    """Cadences that do not divide each other: an evaluation or a save between two log lines must not shift them."""
    run_dir = run("run", "train.epochs=0.2", "train.log_every=4", "train.eval_every=3", "train.checkpoint_every=5",
                  "train.eval_requests=50", "data.max_events=100")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == [3, 4, 5, 6, 8, 9, 10]
    before, requests = {"step": 0, "elapsed_s": 0.0}, 2 * 16
    for line in lines:
        if line["split"] == "train":
            measured_s = requests * (line["step"] - before["step"]) / line["requests_per_s"]
            assert measured_s <= line["elapsed_s"] - before["elapsed_s"] + 1e-6
            before = line
