"""Ranks that die, stop, fail or are told to stop: what the supervisor does, says and leaves behind. No training."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from longer_rec.errors import ConfigError, DataError, Preempted, RankLost
from longer_rec.runtime.preemption import StopSignal, await_turn
from longer_rec.runtime.supervisor import die_with_parent, supervise
from tests.reference.processes import Forked, fork, gone, until

pytestmark = pytest.mark.timeout(60)
Target = Callable[[], None]


def rank() -> int:
    return int(os.environ["RANK"])


def attempt() -> int:
    return int(os.environ["LONGER_REC_ATTEMPT"])


def strike(sent: signal.Signals, victim: int, last_attempt: int = 0) -> Target:
    """The victim sends itself a signal, then all go on for a moment."""
    def target() -> None:
        if rank() == victim and attempt() <= last_attempt:
            os.kill(os.getpid(), sent)
        time.sleep(0.3)

    return target


def start(folder: Path, target: Target, ranks: int = 2, max_restarts: int = 1) -> Forked:
    return fork(lambda: supervise(target, ranks, max_restarts, stopped_grace_s=0.3), folder)


def test_every_rank_knows_its_place_and_its_attempt(tmp_path: Path) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "LONGER_REC_ATTEMPT")

    def target() -> None:
        print(*(os.environ[name] for name in names), os.getsid(0) == os.getpid())
        if attempt() == 0 and rank() == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    with start(tmp_path, target, ranks=3) as process:
        assert process.wait() == 0
    lines = process.out.splitlines()
    assert {line for line in lines if line.endswith("1 True")} == {f"{i} 3 {i} 3 1 1 True" for i in range(3)}


def test_all_ranks_done_is_success_and_silence(tmp_path: Path) -> None:
    with start(tmp_path, lambda: None) as process:
        assert (process.wait(), process.out, process.err) == (0, "", "")


def test_a_killed_rank_is_named_and_all_start_again(tmp_path: Path) -> None:
    with start(tmp_path, strike(signal.SIGKILL, victim=1)) as process:
        assert process.wait() == 0
    assert process.err == "longer-rec: rank 1 of 2 was killed by SIGKILL; starting again (1 of 1)\n"


def test_a_stopped_rank_counts_as_lost(tmp_path: Path) -> None:
    with start(tmp_path, strike(signal.SIGSTOP, victim=0)) as process:
        assert process.wait() == 0
    assert process.err == ("longer-rec: rank 0 of 2 was stopped and did not continue within 0.3 s; "
                           "starting again (1 of 1)\n")


def test_a_rank_that_continues_in_time_is_not_lost(tmp_path: Path) -> None:
    def target() -> None:
        if rank() == 0:
            time.sleep(0.1)
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGCONT)
            time.sleep(0.8)
        else:
            (tmp_path / "pid").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
            print("continued")

    with start(tmp_path, target) as process:
        assert (process.wait(), process.out, process.err) == (0, "continued\n", "")


def test_restarts_end(tmp_path: Path) -> None:
    begun = time.monotonic()
    with start(tmp_path, strike(signal.SIGKILL, victim=0, last_attempt=9), max_restarts=2) as process:
        assert process.wait() == RankLost.exit_code == 1
    assert process.err.splitlines() == [
        *(f"longer-rec: rank 0 of 2 was killed by SIGKILL; starting again ({i} of 2)" for i in (1, 2)),
        "longer-rec: rank 0 of 2 was killed by SIGKILL, and no restart is left of 2; start again to continue from the "
        "last checkpoint"]
    assert time.monotonic() - begun < 10


def test_a_fault_that_all_ranks_have_is_one_line_and_ends_the_run(tmp_path: Path) -> None:
    def target() -> None:
        time.sleep(0.5 * rank())
        raise DataError("item 7 is unknown")

    with start(tmp_path, target) as process:
        assert (process.wait(), process.err) == (2, "longer-rec: item 7 is unknown\n")


def test_a_fault_of_one_rank_names_it_and_ends_the_others(tmp_path: Path) -> None:
    def target() -> None:
        if rank() == 1:
            raise DataError("item 7 is unknown")
        time.sleep(30)

    with start(tmp_path, target) as process:
        assert (process.wait(20), process.err) == (2, "longer-rec: rank 1: item 7 is unknown\n")


def test_a_bug_keeps_its_traceback_once_and_those_that_missed_the_rank_say_nothing(tmp_path: Path) -> None:
    def target() -> None:
        if rank() == 0:
            raise ZeroDivisionError("a bug")
        raise RankLost("rank 0 of 2 does not answer")

    with start(tmp_path, target, max_restarts=0) as process:
        assert process.wait() == 1
    assert process.err.count("Traceback") == process.err.count("ZeroDivisionError: a bug") == 1
    assert "does not answer" not in process.err
    assert re.search(r"(?m)^longer-rec: rank 0 of 2 ended with exit code 1, and no restart", process.err)


def test_a_rank_that_misses_another_says_which_when_nobody_else_does(tmp_path: Path) -> None:
    def target() -> None:
        if rank() == 0:
            raise RankLost("rank 1 of 2 does not answer")
        time.sleep(30)

    with start(tmp_path, target, max_restarts=0) as process:
        assert process.wait(20) == 1
    assert process.err.splitlines()[0] == "longer-rec: rank 0: rank 1 of 2 does not answer"


def until_told() -> None:
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: told.append(number))
    print("ready", flush=True)
    deadline = time.monotonic() + 20
    while not told and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(1.0 * rank())  # one saves longer than the other
    raise Preempted(f"saved after {told}")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_is_passed_on_once_and_all_may_save(tmp_path: Path, sent: signal.Signals) -> None:
    with start(tmp_path, until_told) as process:
        until(lambda: process.out.count("ready") == 2, 20, process)
        for _ in range(3):
            os.kill(process.pid, sent)
            time.sleep(0.1)
        assert process.wait() == Preempted.exit_code == 3
    assert process.err == f"longer-rec: saved after [{int(sent)}]\n"


def test_told_to_stop_before_there_is_anything_to_save(tmp_path: Path) -> None:
    def target() -> None:
        print("ready", flush=True)
        time.sleep(30)

    with start(tmp_path, target) as process:
        until(lambda: process.out.count("ready") == 2, 20, process)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == 3
    assert process.err.count("\n") == 1


def sleep_with_a_child() -> None:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print("ready", flush=True)
    time.sleep(60)


def test_ctrl_c_ends_every_process(tmp_path: Path) -> None:
    with start(tmp_path, sleep_with_a_child) as process:
        until(lambda: process.out.count("ready") == 2, 20, process)
        family = process.family()
        assert len(family) == 4
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(20) == 130
        until(lambda: gone(family), 5, process)


def test_what_a_lost_rank_has_started_ends_with_it(tmp_path: Path) -> None:
    def target() -> None:
        if attempt() == 0:
            sleep_with_a_child()

    with start(tmp_path, target) as process:
        until(lambda: process.out.count("ready") == 2, 20, process)
        family = process.family()
        next(one for one in family if one.ppid() == process.pid).kill()
        assert process.wait(20) == 0
        until(lambda: gone(family), 5, process)
    assert len(family) == 4


def test_ranks_of_a_killed_supervisor_are_told_to_stop(tmp_path: Path) -> None:
    with start(tmp_path, until_told) as process:
        until(lambda: process.out.count("ready") == 2, 20, process)
        family = process.family()
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: gone(family), 10, process)
    assert sorted(process.err.splitlines()) == [f"longer-rec: rank {i}: saved after [{int(signal.SIGTERM)}]"
                                                for i in range(2)]


def test_a_process_whose_parent_is_gone_already_ends(tmp_path: Path) -> None:
    def orphan() -> int:
        die_with_parent(parent=1 if os.getppid() != 1 else 2)
        return 0

    with fork(orphan, tmp_path) as process:
        assert process.wait() == -signal.SIGTERM


class Wish:
    """The number of ranks in a file; what is refused goes into another one."""

    def __init__(self, folder: Path) -> None:
        self._path, self._refused = folder / "wanted", folder / "refused"

    def wanted(self, num_ranks: int) -> int | None:
        size = int(self._path.read_text()) if self._path.exists() else num_ranks
        return size if size != num_ranks else None

    def refuse(self, num_ranks: int, why: str) -> None:
        self._refused.write_text(f"{num_ranks}: {why}")
        self._path.unlink()


def work(before_its_turn: Target = lambda: None) -> Target:
    """Start 0 goes on until it is told to stop, later ones are done at once; each says when it begins and ends."""
    def target() -> None:
        with StopSignal() as stop:
            if attempt():
                before_its_turn()
            await_turn(stop)
            print(f"{attempt()} begins", flush=True)
            while attempt() == 0 and not stop.received:
                time.sleep(0.01)
            print(f"{attempt()} ends", flush=True)
            if attempt() == 0:
                raise Preempted("saved")

    return target


def resizing(folder: Path, target: Target, ranks: int) -> Forked:
    process = fork(lambda: supervise(target, ranks, 0, stopped_grace_s=0.3, resizes=Wish(folder)), folder)
    until(lambda: process.out.count("0 begins") == ranks, 20, process)
    return process


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_another_number_of_ranks_takes_over_when_all_before_them_have_ended(tmp_path: Path, before: int,
                                                                            after: int) -> None:
    with resizing(tmp_path, work(), before) as process:
        (tmp_path / "wanted").write_text(str(after))
        assert (process.wait(20), process.err) == (0, "")
    ended, begun = process.out.splitlines().index("1 begins"), process.out.splitlines()[:before * 2]
    assert ended == before * 2
    assert begun.count("0 ends") == before
    assert process.out.count("1 ends") == after


@pytest.mark.parametrize("how", ["raises", "is killed", "is stopped"])
def test_ranks_that_fail_before_their_turn_are_refused_and_those_before_go_on(tmp_path: Path, how: str) -> None:
    def fail() -> None:
        if rank() == 1:
            if how == "raises":
                raise ConfigError("local rank 1 has no GPU")
            os.kill(os.getpid(), signal.SIGKILL if how == "is killed" else signal.SIGSTOP)

    with resizing(tmp_path, work(fail), 3) as process:
        family = process.family()
        (tmp_path / "wanted").write_text("2")
        until((tmp_path / "refused").exists, 20, process)
        until(lambda: all(each in family for each in process.family()), 20, process)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == 3
    assert (tmp_path / "refused").read_text() == {
        "raises": "2: local rank 1 has no GPU", "is killed": "2: rank 1 of 2 was killed by SIGKILL",
        "is stopped": "2: rank 1 of 2 was stopped and did not continue within 0.3 s"}[how]
    assert process.err == "longer-rec: saved\n"


def test_a_wish_that_changes_and_a_signal_to_stop_end_the_ranks_that_wait(tmp_path: Path) -> None:
    with resizing(tmp_path, work(lambda: time.sleep(60)), 1) as process:
        for size in (3, 2):
            (tmp_path / "wanted").write_text(str(size))
            until(lambda size=size: len(process.family()) == 1 + size, 20, process)  # type: ignore[misc]
        family = process.family()
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == 3
        until(lambda: gone(family), 5, process)
    assert process.err == "longer-rec: saved\n"


@pytest.mark.parametrize(("ranks", "restarts"), [(0, 3), (2, -1)])
def test_no_ranks_and_negative_restarts_are_refused(ranks: int, restarts: int) -> None:
    with pytest.raises(ConfigError, match="cannot be started"):
        supervise(lambda: None, ranks, restarts)
