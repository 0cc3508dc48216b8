"""Many runs at a time, each in a forked process of its own; which of them failed, and why."""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from longer_rec.config import dump_config
from longer_rec.errors import LongerRecError, Preempted
from longer_rec.job import Job
from longer_rec.runtime.preemption import STOP_SIGNALS, StopSignal, end_on_stop
from longer_rec.runtime.supervisor import die_with_parent
from longer_rec.train.run_dir import write_atomically

_POLL_S = 0.25


@dataclass(frozen=True)
class Task:
    """A job and what is done with it. Its files share ``path``: .yaml, .log, and ``result``, written when it is done.

    ``action`` may write the result itself, or return what is to be in it.
    """

    name: str
    job: Job
    path: Path
    result: Path
    action: Callable[[], dict[str, Any] | None]

    def file(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    @property
    def done(self) -> bool:
        return self.result.exists()


Show = Callable[[Sequence[Task], Sequence[Task], dict[str, str]], None]


def run_tasks(tasks: Sequence[Task], parallel: int, stop: StopSignal, show: Show) -> dict[str, str]:
    """Run those that are not done, ``parallel`` at a time, in their order; the reason by the name of each that failed.

    Forked and not started anew: a start costs five seconds of imports. ``show`` is given the waiting, the running and
    the failed, four times a second. ``Preempted`` when ``stop`` has received a signal: by then all have been told, and
    have saved and ended. So they have when anything else ends this function.
    """
    waiting = [task for task in tasks if not task.done]
    running: list[tuple[Task, BaseProcess]] = []
    failed: dict[str, str] = {}
    try:
        while (waiting or running) and not stop.received:
            while waiting and len(running) < parallel:
                running.append((waiting[0], _start(waiting.pop(0))))
            show(waiting, [task for task, _ in running], failed)
            wait([process.sentinel for _, process in running], _POLL_S)
            ended = [(task, process) for task, process in running if not process.is_alive()]
            running = [each for each in running if each not in ended]
            failed |= {task.name: _reason(task, process.exitcode or 0) for task, process in ended if not task.done}
        show(waiting, [], failed)
    finally:
        for _, process in running:
            process.terminate()
        for _, process in running:
            process.join()
    if stop.received:
        raise Preempted("told to stop; the runs under way are saved, start again to continue")
    return failed


def _start(task: Task) -> BaseProcess:
    task.path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(task.file(".yaml"), dump_config(task.job))
    process = multiprocessing.get_context("fork").Process(target=_run, args=(task, os.getpid()), name=task.name)
    # A signal to a process that still has its parent's handlers would be lost.
    with _blocked():
        process.start()
    return process


@contextmanager
def _blocked() -> Iterator[None]:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *STOP_SIGNALS})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _run(task: Task, parent: int) -> None:
    """In the forked process: what `longer-rec train` would do, with its output in the log."""
    os.setsid()  # Ctrl-C in a terminal reaches the study alone, which tells its runs to stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_on_stop()
    die_with_parent(parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, *STOP_SIGNALS})
    log = os.open(task.file(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    torch.set_num_threads(1)
    try:
        content = task.action()
        if content is not None:
            write_atomically(task.result, json.dumps(content, indent=2))
    except LongerRecError as error:
        print(f"longer-rec: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def _reason(task: Task, code: int) -> str:
    """Exit code or signal, the last line of the log, and where that is."""
    log = task.file(".log")
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing was said")
    return f"{how}: {last} (log: {log})"
