"""Ranks, supervisors and agents killed, stopped or told to stop: who is named, what is left, what continues."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from longer_rec.checkpoint.inspect import diff_checkpoints, find_checkpoint
from longer_rec.cli import main
from longer_rec.errors import RankLost
from longer_rec.runtime.distributed import joined_world
from longer_rec.runtime.supervisor import supervise
from tests.integration.conftest import CONFIG, metric_lines
from tests.integration.faults.faults import Faults, launch_run
from tests.reference.commands import CommandServer
from tests.reference.processes import Forked, fork, gone, until

SHORT = ("train.epochs=0.2", "train.checkpoint_every=100", "train.log_every=1", "train.eval_requests=50",
         "data.max_events=200", "train.timeout_s=30")
pytestmark = pytest.mark.timeout(120)


def steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture(scope="module")
def whole(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    with launch_run(run_dir, synthetic, *SHORT) as run:
        assert (run.wait(), run.err) == (0, "")
    return run_dir


def assert_continues(run_dir: Path, synthetic: Path, whole: Path) -> None:
    """Start it again: it continues where it was, and ends as if nothing had happened."""
    with launch_run(run_dir, synthetic, *SHORT) as run:
        assert (run.wait(), run.err) == (0, "")
        assert "continues from step" in run.out
    assert metric_lines(run_dir) == metric_lines(whole)
    assert diff_checkpoints(find_checkpoint(run_dir), find_checkpoint(whole)).tensors == []


def watched(run: Forked) -> list[psutil.Process]:
    """Wait for its end; all processes that it has ever had."""
    family: set[psutil.Process] = set()

    def ended() -> bool:
        family.update(run.family())
        return run.poll() is not None

    until(ended, 60, run)
    return list(family)


TOLD = {
    "a rank is told": (Faults().send(signal.SIGUSR1, rank=1, step=4).during("forward"), 3),
    "the supervisor is told": (Faults().send_supervisor(signal.SIGTERM, step=4).during("backward"), 3),
    "the supervisor is killed": (Faults().send_supervisor(signal.SIGKILL, step=4).during("backward"), -9),
}


@pytest.mark.parametrize("what", TOLD)
def test_a_run_that_is_told_to_stop_saves_and_continues(what: str, synthetic: Path, tmp_path: Path,
                                                        whole: Path) -> None:
    """Also by the kernel, which tells ranks whose supervisor is gone."""
    faults, code = TOLD[what]
    with launch_run(tmp_path / "run", synthetic, *SHORT, faults=faults) as run:
        family = watched(run)
        assert run.code == code, run.err
        assert len(family) >= 4, "two ranks and what makes their batches"
        until(lambda: gone(family), 10, run)
    lines = run.err.splitlines()
    assert 1 <= len(lines) <= (1 if what == "the supervisor is told" else 2)
    for line in lines:
        assert re.fullmatch(r"longer-rec: .*told to stop; step [5-7] of 10 is saved, start again to continue", line)
    assert_continues(tmp_path / "run", synthetic, whole)


def test_a_stopped_rank_is_named_and_the_run_goes_on_without_help(synthetic: Path, tmp_path: Path, whole: Path) -> None:
    faults = Faults().stop(rank=0, step=3).during("backward")
    with launch_run(tmp_path / "run", synthetic, *SHORT, faults=faults) as run:
        assert run.wait() == 0
    assert run.err == ("longer-rec: rank 0 of 2 was stopped and did not continue within 1 s; starting again (1 of 3)\n")
    assert metric_lines(tmp_path / "run") == metric_lines(whole)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_without_restarts_a_lost_rank_ends_the_run_and_is_named(sent: signal.Signals, synthetic: Path,
                                                                tmp_path: Path) -> None:
    faults = Faults().send(sent, rank=1, step=2).during("update")
    with launch_run(tmp_path / "run", synthetic, *SHORT, faults=faults, max_restarts=0) as run:
        family = watched(run)
        assert run.code == 1
        until(lambda: gone(family), 5, run)
    how = "killed by SIGKILL" if sent == signal.SIGKILL else "stopped and did not continue within 1 s"
    assert run.err.startswith(f"longer-rec: rank 1 of 2 was {how}, and no restart is left"), run.err
    assert run.err.count("\n") == 1


@contextmanager
def torchrun(folder: Path, *overrides: str) -> Iterator[Forked]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    folder.mkdir()
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        agent = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                                  "-m", "longer_rec", "train", str(CONFIG), *overrides], stdout=out, stderr=err,
                                 env=environment, start_new_session=True)
        with Forked(agent.pid, folder) as process:
            yield process
        agent.returncode = 0  # it was waited for as a Forked


def test_ranks_of_a_killed_torchrun_agent_save_and_end(synthetic: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with torchrun(tmp_path / "agent", *SHORT, "train.epochs=2", f"run_dir={run_dir}", f"data.dir={synthetic}") as agent:
        until(lambda: steps(run_dir) >= 2, 60, agent)
        family = agent.family()
        assert sum(one.ppid() == agent.pid for one in family) == 2
        os.kill(agent.pid, signal.SIGKILL)
        agent.wait(5)
        until(lambda: gone(family), 10, agent)
    assert len(re.findall(r"(?m)^longer-rec: (?:rank 1: )?told to stop; .* is saved", agent.err)) == 2
    assert find_checkpoint(run_dir).name == f"step-{steps(run_dir)}"


def test_a_rank_that_is_stopped_under_torchrun_is_named_by_the_others(synthetic: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with torchrun(tmp_path / "agent", *SHORT, "train.epochs=2", "train.timeout_s=5", f"run_dir={run_dir}",
                  f"data.dir={synthetic}") as agent:
        until(lambda: steps(run_dir) >= 2, 60, agent)
        ranks = [one for one in agent.family() if one.ppid() == agent.pid]
        stopped = next(one for one in ranks if one.environ()["RANK"] == "1")
        stopped.suspend()
        until(lambda: "does not answer" in agent.err, 30, agent)
    assert re.search(r"(?m)^longer-rec: rank 1 of 2 does not answer: .*; start again to continue", agent.err)


def ring(victim: int) -> None:
    """Each rank waits for the one before it: one alone has to do with the victim."""
    with joined_world(timeout_s=3) as world:
        box = torch.zeros(1)
        dist.all_reduce(box)
        if world.rank == victim:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.recv(box, (world.rank - 1) % world.size)


def test_of_four_ranks_only_the_stopped_one_is_named(tmp_path: Path) -> None:
    """Although two of them wait for ranks that are alive."""
    with fork(lambda: supervise(lambda: ring(victim=2), 4, 0, stopped_grace_s=60), tmp_path) as run:
        assert run.wait(40) == RankLost.exit_code
    assert set(re.findall(r"(?:ranks?) ([\d, ]+) of 4 (?:does|do) not answer", run.err)) == {"2"}, run.err


def test_a_rank_that_answers_but_does_not_come_is_told_from_a_lost_one(tmp_path: Path) -> None:
    def target() -> None:
        with joined_world(timeout_s=2) as world:
            if world.rank == 1:
                signal.pause()
            dist.barrier()

    with fork(lambda: supervise(target, 2, 0), tmp_path) as run:
        assert run.wait(30) == 1
    assert re.search(r"rank 0: all 2 ranks answer, but not all came to an operation: rank 1 is in .*; raise "
                     r"train\.timeout_s=2 ", run.err), run.err


@pytest.mark.parametrize(("arguments", "message"), [
    (("data.dir=nowhere",), r"nowhere is no prepared dataset.*"),
    (("data.dirs=x",), r".*unknown key 'data.dirs'.*"),
    (("--nproc", "0"), r"0 ranks .*"),
    (("elastic.num_workers=1",), r"elastic\.num_workers=1 .*"),
])
def test_bad_input_is_one_line_whatever_the_number_of_ranks(commands: CommandServer, synthetic: Path, tmp_path: Path,
                                                            arguments: tuple[str, ...], message: str) -> None:
    outcome = commands.run("launch", CONFIG, f"run_dir={tmp_path / 'run'}", f"data.dir={synthetic}", *arguments)
    assert outcome.code == 2
    assert re.fullmatch(f"longer-rec: {message}\n", outcome.err), outcome.err
    assert not (tmp_path / "run").exists()


def test_a_damaged_log_is_one_fault_of_all_ranks(commands: CommandServer, synthetic: Path, tmp_path: Path,
                                                 whole: Path) -> None:
    run_dir = Path(shutil.copytree(whole, tmp_path / "run"))
    (run_dir / "metrics.jsonl").write_text("{\n")
    outcome = commands.run("launch", CONFIG, f"run_dir={run_dir}", f"data.dir={synthetic}", *SHORT)
    assert outcome.code == 2
    assert outcome.err == f"longer-rec: {run_dir}/metrics.jsonl line 1 is damaged; remove that line to resume\n"


def test_launch_trains_prints_its_results_and_leaves_what_train_leaves(commands: CommandServer, synthetic: Path,
                                                                       tmp_path: Path, whole: Path) -> None:
    outcome = commands.run("launch", CONFIG, f"run_dir={tmp_path / 'run'}", f"data.dir={synthetic}", *SHORT)
    assert (outcome.code, outcome.err) == (0, "")
    assert f"report: {tmp_path / 'run' / 'report.html'}" in outcome.out
    assert metric_lines(tmp_path / "run") == metric_lines(whole)


def test_two_trainings_in_one_directory_are_refused_until_the_first_is_dead(
        commands: CommandServer, synthetic: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = (CONFIG, f"run_dir={run_dir}", f"data.dir={synthetic}", *SHORT)
    with launch_run(run_dir, synthetic, *SHORT, "train.timeout_s=60", stopped_grace_s=60,
                    faults=Faults().stop(rank=0, step=3).during("forward")) as first:
        until(lambda: any(one.status() == psutil.STATUS_STOPPED for one in first.family()), 30, first)
        before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
        outcome = commands.run("launch", *arguments)
        assert outcome.code == 2
        assert re.fullmatch(rf"longer-rec: {run_dir} is in use by process \d+ \(launch \d+\) on \S+ since \S+; wait "
                            "for it or choose another run_dir\n", outcome.err), outcome.err
        assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
        assert commands.run("eval", run_dir).err.startswith("longer-rec: "), "it has no checkpoint, and needs no lock"
        for one in first.family():
            one.kill()
    outcome = commands.run("launch", *arguments)
    assert (outcome.code, outcome.err) == (0, "")


def test_ctrl_c_ends_a_launched_run_with_one_line(synthetic: Path, tmp_path: Path) -> None:
    def command() -> int:
        sys.argv = ["longer-rec", "launch", str(CONFIG), f"run_dir={tmp_path / 'run'}", f"data.dir={synthetic}"]
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    with fork(command, tmp_path / "command") as run:
        until(lambda: steps(tmp_path / "run") >= 1, 60, run)
        family = run.family()
        os.kill(run.pid, signal.SIGINT)
        assert run.wait(20) == 130
        until(lambda: gone(family), 5, run)
    assert run.err == "longer-rec: interrupted; a run continues from its last checkpoint when started again\n"
