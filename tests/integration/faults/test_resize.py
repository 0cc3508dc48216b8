"""Runs that change their number of processes while they train, on request: bitwise the run that never did."""

import contextlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from longer_rec.checkpoint.inspect import diff_checkpoints, find_checkpoint
from longer_rec.config import load_config
from longer_rec.job import Job
from longer_rec.train.digests import digest_lines
from longer_rec.train.run import train
from longer_rec.train.trainer import Trainer
from tests.integration.conftest import CONFIG, TINY, metric_lines
from tests.integration.faults.faults import Faults, launch_run, wrap
from tests.reference.commands import CommandServer
from tests.reference.processes import Forked, fork, until

W = 4
SHORT = (f"elastic.num_workers={W}", "elastic.digest_every=1", "train.epochs=0.2", "train.log_every=1",
         "train.eval_every=4", "train.eval_requests=50", "train.checkpoint_every=100", "data.batch_requests=8",
         "data.max_events=100", "model.dropout=0.2", "train.timeout_s=60", "train.checkpoint_timeout_s=60")
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def whole(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    with launch_run(run_dir, synthetic, *SHORT, ranks=1) as run:
        assert (run.wait(100), run.err) == (0, "")
    assert len(metric_lines(run_dir)) > 8
    return run_dir


def assert_same_run(first: Path, second: Path) -> None:
    (line,) = digest_lines(first, second)
    assert line.startswith("digests: equal at all"), line
    assert metric_lines(first) == metric_lines(second)
    assert diff_checkpoints(find_checkpoint(first), find_checkpoint(second)).tensors == []


def events(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def moves(run_dir: Path) -> list[tuple[int, int, int]]:
    """(step, processes before, processes after) of each start that continued."""
    return [(each["step"], each["from"], each["to"]) for each in events(run_dir) if each["event"] == "continued"]


def hold(run_dir: Path, steps: Mapping[int, int], requests: Mapping[int, tuple[str, ...]] | None = None,
         overtaken: tuple[int, ...] = ()) -> Callable[[], None]:
    """In rank 0 of start n: before the step after ``steps[n]``, write ``requests[n]``, and wait until told to stop.

    Or until a request is refused. So the step at which a run is resized is known. Starts that are ``overtaken`` never
    get ready: the request that each is for is the first of its step's, and the next one is written when it is there.
    """
    def begin() -> None:
        start = int(os.environ["LONGER_REC_ATTEMPT"])
        if start in overtaken:
            (run_dir / f"forked-{start}").touch()
            signal.pause()  # until it is dropped

        def train_step(original: Callable[..., Any], self: Trainer, *rest: Any) -> Any:
            if os.environ["RANK"] == "0" and self.step == steps.get(start):
                (run_dir / f"held-{start}").touch()
                for number, text in enumerate((requests or {}).get(start, ())):
                    while number == 1 and start + 1 in overtaken and not (run_dir / f"forked-{start + 1}").exists():
                        time.sleep(0.01)
                    (run_dir / "resize.new").write_text(text)
                    (run_dir / "resize.new").rename(run_dir / "resize")
                while not self.stop.received and not any(each["event"] == "refused" for each in events(run_dir)):
                    time.sleep(0.01)
            return original(self, *rest)

        wrap(Trainer, "train_step", train_step)

    return begin


def test_a_run_resized_from_4_to_2_to_3_while_it_trains_is_the_uninterrupted_run(
        commands: CommandServer, synthetic: Path, tmp_path: Path, whole: Path) -> None:
    run_dir = tmp_path / "run"
    with launch_run(run_dir, synthetic, *SHORT, ranks=4, max_restarts=0, begin=hold(run_dir, {0: 2, 1: 5})) as run:
        for start, step, before, after in ((0, 3, 4, 2), (1, 6, 2, 3)):
            until((run_dir / f"held-{start}").exists, 60, run)
            outcome = commands.run("resize", run_dir, "--nproc", after)
            assert (outcome.code, outcome.err) == (0, ""), outcome
            told = re.fullmatch(rf"resized {before} → {after} in (\d+\.\d) s at step {step}, .*\n", outcome.out)
            assert told is not None, outcome.out
            assert 0 < float(told[1]) < 15
        assert (run.wait(100), run.err) == (0, "")
    assert moves(run_dir) == [(3, 4, 2), (6, 2, 3)]
    assert_same_run(whole, run_dir)
    assert "4 → 2" in (run_dir / "report.html").read_text()


def is_stopped(run: Forked) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(each.status() == psutil.STATUS_STOPPED for each in run.family())
    return False


def test_of_two_requests_in_a_row_and_while_a_checkpoint_is_written_the_last_one_counts(
        synthetic: Path, tmp_path: Path, whole: Path) -> None:
    """The processes of each request are start 1, 2, …, and those of one that is overtaken are dropped."""
    run_dir = tmp_path / "run"
    slow_save = Faults().stop(rank=1, step=2).during("save")  # goes on when it is told to below
    begin = hold(run_dir, {0: 2, 2: 4}, {0: ("4", " 3\n"), 2: ("1", "3", "2")}, overtaken=(1, 3))
    with launch_run(run_dir, synthetic, *SHORT, "train.checkpoint_every=2", faults=slow_save, begin=begin,
                    max_restarts=0, stopped_grace_s=60) as run:
        until(lambda: is_stopped(run), 60, run)
        until((run_dir / "held-0").exists, 60, run)
        time.sleep(1)
        for each in run.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                each.resume()
        assert (run.wait(100), run.err) == (0, "")
    assert moves(run_dir) == [(3, 2, 3), (5, 3, 2)]
    assert_same_run(whole, run_dir)


@pytest.mark.parametrize(("faults", "stderr", "expected"), [
    (Faults().kill(rank=1, step=3).during("save"), "rank 1 of 2 was killed by SIGKILL; starting again (1 of 3)", []),
    (Faults().kill(rank=2, step=3, attempt=1).during("update"),
     "rank 2 of 3 was killed by SIGKILL; starting again (1 of 3)", [(3, 2, 3)]),
], ids=["an old rank while it saves", "a new rank in its first step"])
def test_a_rank_killed_during_a_resize_costs_nothing_that_was_saved(
        faults: Faults, stderr: str, expected: list[tuple[int, int, int]], synthetic: Path, tmp_path: Path,
        whole: Path) -> None:
    run_dir = tmp_path / "run"
    with launch_run(run_dir, synthetic, *SHORT, faults=faults, begin=hold(run_dir, {0: 2}, {0: ("3",)})) as run:
        assert (run.wait(100), run.err) == (0, f"longer-rec: {stderr}\n")
    assert moves(run_dir) == expected
    assert json.loads((run_dir / "plan.json").read_text())["world_size"] == 3
    assert_same_run(whole, run_dir)


def test_a_supervisor_killed_during_a_resize_leaves_a_run_that_continues(synthetic: Path, tmp_path: Path,
                                                                         whole: Path) -> None:
    """And its request is void then: the new start says how many ranks there are."""
    run_dir = tmp_path / "run"
    with launch_run(run_dir, synthetic, *SHORT, begin=hold(run_dir, {0: 2}, {0: ("4",)})) as run:
        until(lambda: len([each for each in run.family() if each.ppid() == run.pid]) == 6, 60, run)
        family = run.family()
        os.kill(run.pid, signal.SIGKILL)
        psutil.wait_procs(family, 20)
    assert find_checkpoint(run_dir).name == "step-3"
    with launch_run(run_dir, synthetic, *SHORT, ranks=3) as run:
        assert (run.wait(100), run.err) == (0, "")
    assert moves(run_dir) == [(3, 2, 3)]
    assert_same_run(whole, run_dir)


def refused(commands: CommandServer, run_dir: Path, num_ranks: int) -> str:
    outcome = commands.run("resize", run_dir, "--nproc", num_ranks)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome
    return outcome.err.removeprefix("longer-rec: ")


def test_what_cannot_be_resized_is_refused_with_the_remedy(commands: CommandServer, synthetic: Path, tmp_path: Path,
                                                           whole: Path, trained_once: Path) -> None:
    assert re.match("nowhere is no readable run directory: .*; give one", refused(commands, Path("nowhere"), 2))
    assert re.match(".* has finished; there is nothing left to resize", refused(commands, whole, 2))
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    (stopped / "results.json").unlink()
    assert re.match(r".* is not running; start it with `longer-rec launch … --nproc 2`", refused(commands, stopped, 2))
    assert refused(commands, whole, 0).startswith("'0' processes cannot train; use 1 or more")
    assert re.match(rf"5 processes are more than elastic.num_workers={W}, .*use at most 4", refused(commands, whole, 5))
    runs = {}
    for name, overrides in {"plain": ["elastic={}"], "shares": ["elastic.num_workers=4", "elastic.shares=[4]"]}.items():
        runs[name] = tmp_path / name
        assert commands.run("train", CONFIG, f"run_dir={runs[name]}", f"data.dir={synthetic}", *TINY, *overrides,
                            "train.epochs=0").code == 0
    assert re.match(".* elastic.num_workers is not set: .*set it in a new run", refused(commands, runs["plain"], 1))
    assert re.match(r"elastic.shares=\[4\] is for 1 processes; stop the run", refused(commands, runs["shares"], 2))


def test_a_run_that_is_not_under_launch_is_refused(commands: CommandServer, synthetic: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with running_train(run_dir, synthetic) as run:
        until(lambda: (run_dir / "metrics.jsonl").exists(), 60, run)
        assert re.match(r".*/run is trained by process \d+ on \S+ since \S+, and not by `longer-rec launch`.*; under "
                        r"torchrun start or stop an agent", refused(commands, run_dir, 2))
    assert not (run_dir / "resize").exists()


def running_train(run_dir: Path, data: Path) -> Forked:
    job = load_config(Job, CONFIG, [f"run_dir={run_dir}", f"data.dir={data}", *SHORT, "train.epochs=50"])
    return fork(lambda: int(train(job) is None), run_dir.with_name("train"))


def test_a_bad_request_of_an_agent_is_refused_once_and_the_run_goes_on(synthetic: Path, tmp_path: Path,
                                                                       whole: Path) -> None:
    run_dir = tmp_path / "run"
    with launch_run(run_dir, synthetic, *SHORT, begin=hold(run_dir, {0: 2}, {0: ("many",)})) as run:
        assert run.wait(100) == 0
    assert run.err == "longer-rec: goes on as it is: 'many' processes cannot train; use 1 or more\n"
    assert [each["to"] for each in events(run_dir)] == ["many"]
    assert_same_run(whole, run_dir)
