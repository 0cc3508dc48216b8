"""Faults that strike a rank at a chosen point of a chosen step, and runs under supervision that they strike.

``Faults().kill(rank=1, step=3).during("backward")`` reads as what happens. It is real: the process sends itself the
signal where the package's own functions have come to that point; the package has no hooks for it.
"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import longer_rec.checkpoint.manager as manager
import longer_rec.train.trainer as trainer
from longer_rec.config import load_config
from longer_rec.data.loader import TrainLoader
from longer_rec.job import Job
from longer_rec.runtime.supervisor import supervise
from longer_rec.train.resize import ResizeRequests
from longer_rec.train.run import train
from tests.integration.conftest import CONFIG
from tests.reference.processes import Forked, fork

# In the order of a step. At the last three, `step` is the step that is being saved; rank 0 does the last two.
POINTS = ("input", "forward", "backward", "update", "save", "rename", "latest")


@dataclass(frozen=True)
class Fault:
    """``sent`` reaches ``rank`` at ``point`` of ``step``, in the first start of a run or a later ``attempt``.

    With ``upwards`` it reaches the rank's supervisor instead.
    """

    sent: signal.Signals
    rank: int
    step: int
    point: str
    attempt: int = 0
    upwards: bool = False


@dataclass(frozen=True)
class _When:
    faults: "Faults"
    fault: Fault

    def during(self, point: str) -> "Faults":
        assert point in POINTS, point
        return Faults((*self.faults.planned, replace(self.fault, point=point)))


class Faults:
    """What is to happen; ``install`` makes it so in the rank that calls it."""

    def __init__(self, planned: tuple[Fault, ...] = ()) -> None:
        self.planned = planned
        self._step: int | None = None

    def kill(self, rank: int, step: int, attempt: int = 0) -> _When:
        return self.send(signal.SIGKILL, rank, step, attempt)

    def stop(self, rank: int, step: int, attempt: int = 0) -> _When:
        return self.send(signal.SIGSTOP, rank, step, attempt)

    def send(self, sent: signal.Signals, rank: int, step: int, attempt: int = 0) -> _When:
        return _When(self, Fault(sent, rank, step, "", attempt))

    def send_supervisor(self, sent: signal.Signals, step: int) -> _When:
        return _When(self, Fault(sent, 0, step, "", upwards=True))

    def install(self, clock: Path) -> None:
        """Patch the functions that this process will call; ``clock`` takes the times of strikes and restores."""
        self._clock, self._pid, self._supervisor = clock, os.getpid(), os.getppid()
        rank, attempt = int(os.environ["RANK"]), int(os.environ["LONGER_REC_ATTEMPT"])
        self._due = [fault for fault in self.planned if (fault.rank, fault.attempt) == (rank, attempt)]
        wrap(trainer.Trainer, "restore", self._restore)
        wrap(trainer.Trainer, "train_step", self._train_step)
        wrap(TrainLoader, "make_step", self._make_step)
        wrap(trainer, "binary_cross_entropy_with_logits", self._loss)
        wrap(trainer, "backward_through_lookup", self._update_tables)
        wrap(manager, "write_tensors", self._write_tensors)
        wrap(manager, "write_manifest", self._write_manifest)
        wrap(manager, "fsync_directory", self._fsync_directory)

    def _strike(self, point: str, step: int | None) -> None:
        for fault in self._due:
            if (fault.point, fault.step) == (point, step):
                self._due.remove(fault)
                self._tick("struck")
                # Its own number was taken before: the process that makes its batches may be the one that comes here.
                os.kill(self._supervisor if fault.upwards else self._pid, fault.sent)
                return

    def _tick(self, what: str) -> None:
        with self._clock.open("a") as file:
            file.write(f"{time.time()} {what} {os.environ['RANK']} {os.environ['LONGER_REC_ATTEMPT']}\n")

    def _restore(self, restore: Callable[..., Any], *rest: Any) -> Any:
        result = restore(*rest)
        self._tick("restored")
        return result

    def _train_step(self, train_step: Callable[..., Any], self_: trainer.Trainer, *rest: Any) -> Any:
        self._step = self_.step  # in an evaluation the same functions strike nobody
        try:
            return train_step(self_, *rest)
        finally:
            self._step = None

    def _make_step(self, make_step: Callable[..., Any], self_: TrainLoader, step: int) -> Any:
        self._strike("input", step)
        return make_step(self_, step)

    def _loss(self, loss: Callable[..., Any], *rest: Any) -> Any:
        self._strike("forward", self._step)
        value, step = loss(*rest), self._step
        if value.requires_grad:
            value.register_hook(lambda gradient: self._strike("backward", step))
        return value

    def _update_tables(self, update: Callable[..., Any], *rest: Any) -> Any:
        result = update(*rest)
        self._strike("update", self._step)
        return result

    def _write_tensors(self, write: Callable[..., Any], temporary: Path, *rest: Any) -> Any:
        step = int(temporary.stem.partition("-")[2])
        fsync = os.fsync

        def struck_fsync(descriptor: int) -> None:
            self._strike("save", step)
            fsync(descriptor)

        os.fsync = struck_fsync
        try:
            return write(temporary, *rest)
        finally:
            os.fsync = fsync

    def _write_manifest(self, write: Callable[..., Any], temporary: Path, *rest: Any) -> Any:
        result = write(temporary, *rest)
        self._strike("rename", int(temporary.stem.partition("-")[2]))
        return result

    def _fsync_directory(self, fsync: Callable[..., Any], directory: Path) -> Any:
        for fault in [fault for fault in self._due if fault.point == "latest"]:
            if (directory / f"step-{fault.step}").exists():
                pointer = directory / "LATEST"
                assert not pointer.exists() or pointer.read_text() != f"step-{fault.step}\n"
                self._strike("latest", fault.step)
        return fsync(directory)


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """``owner.name(...)`` becomes ``around(what it was, ...)``."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *rest, **named: around(original, *rest, **named))


def launch_run(run_dir: Path, data: Path, *overrides: str, faults: Faults | None = None, ranks: int = 2,
               max_restarts: int = 3, stopped_grace_s: float = 1.0, begin: Callable[[], None] | None = None) -> Forked:
    """What `longer-rec launch` does with ``configs/synthetic_debug.yaml``, with faults planned in its ranks.

    Each rank calls ``begin`` first.
    """
    job = load_config(Job, CONFIG, [f"run_dir={run_dir}", f"data.dir={data}", *overrides])
    folder = run_dir.with_name(f"{run_dir.name}.launched")

    def rank() -> None:
        (faults or Faults()).install(folder / "clock")
        if begin is not None:
            begin()
        train(job)

    return fork(lambda: supervise(rank, ranks, max_restarts, stopped_grace_s=stopped_grace_s,
                                  resizes=ResizeRequests(job)), folder)
