"""The ranks of one host, forked, watched, started again when one of them is lost, and replaced by more or fewer.

Knows nothing of what the ranks do. The parent never touches a GPU and stays in the main thread, so that forking it is
safe and a restart costs no import.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Protocol, Self

from longer_rec.errors import ConfigError, LongerRecError, Preempted, RankLost
from longer_rec.runtime.preemption import READY, STOP_SIGNALS, TURN

_SIGNALS = (signal.SIGCHLD, signal.SIGINT, *STOP_SIGNALS)
_INTERRUPTED = 130
_POLL_S = 0.5
# After one rank has ended with a fault the others mostly have the same one to report.
_SETTLE_S = 3.0
_PR_SET_PDEATHSIG = 1


@dataclass
class _Rank:
    number: int
    pid: int
    code: int | None = None  # exit code, or minus the signal
    stopped_at: float | None = None


@dataclass(frozen=True)
class _Report:
    """What a rank says about its own end."""

    fault: str
    text: str


class Resizes(Protocol):
    """What the supervisor asks, twice a second, for the number of ranks that somebody wants."""

    def wanted(self, num_ranks: int) -> int | None:
        """Another number than ``num_ranks``, or None; the same answer until that many run, or it is withdrawn."""

    def refuse(self, num_ranks: int, why: str) -> None:
        """So many could not start; it is not wanted any more."""


def supervise(target: Callable[[], None], num_processes: int, max_restarts: int = 3, *,
              stopped_grace_s: float = 5.0, resizes: Resizes | None = None) -> int:
    """Run ``target`` in ``num_processes`` forked ranks until all are done; the exit code of the whole.

    A rank that dies, fails, or stays stopped (SIGSTOP) for ``stopped_grace_s`` is named on stderr; the others are
    killed and all are started again, at most ``max_restarts`` times. Not started again: bad input (2), and ranks that
    SIGTERM or SIGUSR1, which are passed on once, have told to stop (3). Faults that ranks raise are printed once.
    When ``resizes`` wants another number of ranks, so many are forked beside the running ones; once all of them wait
    in ``await_turn``, the running ones are told to stop, and the waiting ones go on in their place.
    Raises ``KeyboardInterrupt`` after Ctrl-C, when all ranks are gone.
    """
    if num_processes < 1 or max_restarts < 0:
        raise ConfigError(f"{num_processes} ranks with {max_restarts} restarts cannot be started; use 1 rank or more "
                          "and 0 restarts or more")
    starts = count()
    with _Signals() as signals:
        def start(size: int) -> _Attempt:
            return _Attempt(target, size, next(starts), stopped_grace_s, signals)

        attempt, num_restarts = start(num_processes), 0
        while True:
            attempt.give_turn()
            with attempt:
                code, loss = attempt.run(resizes, start)
                if code is not None:
                    return code
                if loss and num_restarts == max_restarts:
                    _say(f"{loss}, and no restart is left of {max_restarts}; start again to continue from the last "
                         "checkpoint")
                    return RankLost.exit_code
                if loss:
                    num_restarts += 1
                    _say(f"{loss}; starting again ({num_restarts} of {max_restarts})")
                attempt = attempt.take_follower() or start(attempt.size)


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel send SIGTERM to this process when its parent (``parent``, if known) dies or has died."""
    parent = os.getppid() if parent is None else parent
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


class _Signals:
    """Signals are noted instead of acted on, whichever thread of the process the kernel hands them to."""

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._reader)
        os.close(self._writer)

    def wait(self, timeout_s: float) -> set[int]:
        """The signals since the last call; returns at once when there are some."""
        select.select([self._reader], [], [], timeout_s)
        try:
            return set(os.read(self._reader, 4096))  # Python writes the number of each as a byte
        except BlockingIOError:
            return set()


class _Attempt:
    """One start of ``size`` ranks; ``folder`` is their rendezvous and takes their reports.

    The ranks may be ahead of their turn, which ``follower``'s are, those of the next start. Leaving the context ends
    whoever still runs.
    """

    def __init__(self, target: Callable[[], None], size: int, number: int, stopped_grace_s: float,
                 signals: _Signals) -> None:
        self.size = size
        self.follower: _Attempt | None = None
        self._stopped_grace_s, self._signals = stopped_grace_s, signals
        self._temporary = tempfile.TemporaryDirectory(prefix="longer_rec-")
        self._folder = Path(self._temporary.name)
        self._ranks = [_Rank(rank, _fork(target, rank, size, number, self._folder, signals)) for rank in range(size)]
        self._told: signal.Signals | None = None
        self._moving = False  # told to stop in favour of the follower
        self._loss: str | None = None
        self._seen = False  # the loss was seen from here: nobody else has to tell
        self._kill_at = float("inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._drop_follower()
        self._kill(self._running)
        self._temporary.cleanup()

    @property
    def _running(self) -> list[_Rank]:
        return [rank for rank in self._ranks if rank.code is None]

    def give_turn(self) -> None:
        (self._folder / TURN).touch()

    def take_follower(self) -> "_Attempt | None":
        follower, self.follower = self.follower, None
        return follower

    def run(self, resizes: Resizes | None, start: Callable[[int], "_Attempt"]) -> tuple[int | None, str]:
        """(exit code, ""), or (None, who was lost) when starting again may help; nobody was, after a resize."""
        while running := self._running:
            noted = self._signals.wait(_POLL_S)
            if signal.SIGINT in noted:
                raise KeyboardInterrupt
            if self._told is None and (stops := noted.intersection(STOP_SIGNALS)):
                self._told = signal.Signals(stops.pop())
                self._tell(self._told)
                self._drop_follower()
            for rank in running:
                self._follow(rank)
            if time.monotonic() >= self._kill_at:
                self._kill(self._running)
            elif resizes is not None and self._told is None and self._loss is None and not self._moving:
                self._resize(resizes, start)
        return self._conclude()

    def _tell(self, number: signal.Signals) -> None:
        for rank in self._running:
            os.kill(rank.pid, number)

    def _resize(self, resizes: Resizes, start: Callable[[int], "_Attempt"]) -> None:
        """Start, drop or make way for a follower of the size that is wanted now."""
        size = resizes.wanted(self.size)
        if self.follower is not None and self.follower.size != size:
            self._drop_follower()
        if self.follower is None:
            self.follower = None if size is None else start(size)
        elif (fault := self.follower.fault()) is not None:
            resizes.refuse(self.follower.size, fault)
            self._drop_follower()
        elif all((self.follower._folder / f"{READY}{rank}").exists() for rank in range(self.follower.size)):
            self._moving = True
            self._tell(signal.SIGUSR1)

    def _drop_follower(self) -> None:
        if (follower := self.take_follower()) is not None:
            follower.__exit__()

    def fault(self) -> str | None:
        """Why its ranks, which wait for their turn or are about to, will not go on; None while they will."""
        for rank in self._running:
            self._follow(rank)
        if len(self._running) == self.size and self._loss is None:
            return None
        reports = self._reports()
        return reports[min(reports)].text if reports else self._loss or "its ranks ended before their turn"

    def _follow(self, rank: _Rank) -> None:
        """Take note of what has happened to a rank, and decide whether the others go on."""
        flags = os.WNOHANG | os.WUNTRACED | os.WCONTINUED
        while rank.code is None and (status := os.waitpid(rank.pid, flags))[0]:
            if os.WIFSTOPPED(status[1]):
                rank.stopped_at = time.monotonic()
            elif os.WIFCONTINUED(status[1]):
                rank.stopped_at = None
            else:
                self._end(rank, os.waitstatus_to_exitcode(status[1]))
        if rank.stopped_at is not None and time.monotonic() - rank.stopped_at > self._stopped_grace_s:
            self._lose(f"rank {rank.number} of {self.size} was stopped and did not continue within "
                       f"{self._stopped_grace_s:g} s", seen=True)

    def _end(self, rank: _Rank, code: int) -> None:
        rank.code, rank.stopped_at = code, None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)  # what it has left behind, such as processes that load data
        if code < 0 and -code != self._told and not (self._moving and -code == signal.SIGUSR1):
            self._lose(f"rank {rank.number} of {self.size} was killed by {signal.Signals(-code).name}", seen=True)
        elif code > 0 and code != Preempted.exit_code:
            self._lose(self._failure(rank.number), seen=False)

    def _failure(self, number: int) -> str:
        return f"rank {number} of {self.size} ended with exit code {self._ranks[number].code}"

    def _lose(self, loss: str, seen: bool) -> None:
        """The others cannot go on without it; a checkpoint is whole or absent, so nothing speaks for a slow end."""
        if self._loss is None:
            self._loss, self._seen = loss, seen
            self._kill_at = time.monotonic() + (0.0 if seen else _SETTLE_S)

    def _kill(self, ranks: list[_Rank]) -> None:
        for rank in ranks:
            # With all that it has started, at once: a process that loads data for a dead rank ends with a traceback.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            os.kill(rank.pid, signal.SIGKILL)  # also when it has no group yet
        for rank in ranks:
            self._end(rank, os.waitstatus_to_exitcode(os.waitpid(rank.pid, 0)[1]))

    def _conclude(self) -> tuple[int | None, str]:
        codes = {rank.code for rank in self._ranks}
        reports = self._reports()
        moved = self._moving and self._told is None
        self._print({number: each for number, each in reports.items()
                     if not (moved and each.fault == Preempted.__name__)})
        if self._loss is not None and not self._seen and reports:
            self._loss = self._failure(min(reports))
        if _INTERRUPTED in codes:
            raise KeyboardInterrupt
        if LongerRecError.exit_code in codes:
            return LongerRecError.exit_code, ""
        if moved and self._loss is None and codes != {0}:
            return None, ""
        if Preempted.exit_code in codes and not moved:
            return Preempted.exit_code, ""
        if self._told is not None and -self._told in codes:
            _say(f"{self._told.name} came before there was anything to save; start again to continue")
            return Preempted.exit_code, ""
        if self._loss is None:
            return 0, ""
        if self._told is not None:
            _say(f"{self._loss} after {self._told.name}; start again to continue from the last checkpoint")
            return RankLost.exit_code, ""
        return None, self._loss

    def _reports(self) -> dict[int, _Report]:
        """By rank. Who only missed another rank has nothing to add when something is known about that one."""
        read = {rank.number: _read_report(self._folder, rank.number) for rank in self._ranks}
        reports = {number: report for number, report in read.items() if report is not None}
        first_hand = {number: report for number, report in reports.items() if report.fault != RankLost.__name__}
        return first_hand or ({} if self._seen else reports)

    def _print(self, reports: dict[int, _Report]) -> None:
        """Each distinct text once, with the ranks it is of unless all say the same."""
        ranks_of: dict[str, list[str]] = {}
        for number, report in reports.items():
            ranks_of.setdefault(report.text, []).append(str(number))
        for text, numbers in ranks_of.items():
            _say(text if len(numbers) == self.size else f"rank {', '.join(numbers)}: {text}")


def _fork(target: Callable[[], None], number: int, size: int, attempt: int, folder: Path, signals: _Signals) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    # A signal to a rank that still has the parent's handlers would be lost.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    if pid := os.fork():
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return pid
    code = 1
    try:
        signals.__exit__()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        # A session of its own: a signal to its group reaches what it has started, and none comes from a terminal.
        os.setsid()
        die_with_parent(parent)
        os.environ.update(
            RANK=str(number), WORLD_SIZE=str(size), LOCAL_RANK=str(number), LOCAL_WORLD_SIZE=str(size),
            LONGER_REC_FOLDER=str(folder), LONGER_REC_ATTEMPT=str(attempt))
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        code = _run(target, lambda report: _write_report(folder, number, report, parent))
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _run(target: Callable[[], None], report: Callable[[_Report], None]) -> int:
    """The exit code of ``target``, whose fault is reported."""
    try:
        target()
        return 0
    except LongerRecError as error:
        report(_Report(type(error).__name__, str(error)))
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BaseException as error:  # also torch's CheckpointException, which is no Exception
        report(_Report(type(error).__name__, traceback.format_exc()))
        return 1


def _write_report(folder: Path, number: int, report: _Report, parent: int) -> None:
    if os.getppid() != parent:
        _say(f"rank {number}: {report.text}")
        return
    path = folder / f"report-{number}"
    path.with_suffix(".tmp").write_text(json.dumps(vars(report)), encoding="utf-8")
    path.with_suffix(".tmp").rename(path)


def _read_report(folder: Path, number: int) -> _Report | None:
    path = folder / f"report-{number}"
    return _Report(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _say(line: str) -> None:
    print(f"longer-rec: {line}", file=sys.stderr, flush=True)
