"""Being told to stop: SIGTERM or SIGUSR1 of a scheduler, a launcher or a person. And to wait for one's turn."""

import os
import signal
import time
from pathlib import Path
from typing import NoReturn, Self

from longer_rec.errors import Preempted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Files of a supervisor's folder: a rank is about to train; its ranks may.
READY, TURN = "ready-", "turn"


def end_on_stop() -> None:
    """Until a ``StopSignal`` is entered, end with ``Preempted``: a scheduler must not read a failure into it."""
    def end(*_: object) -> NoReturn:
        raise Preempted("told to stop before there was anything to save; start again")

    for number in STOP_SIGNALS:
        signal.signal(number, end)


class StopSignal:
    """Between enter and exit a stop signal is noted instead of ending the process; whoever holds this looks.

    Schedulers and launchers often deliver the same signal twice, so a second one changes nothing.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, *_: object) -> None:
        self.received = True


def leave_stopping_to_parent() -> None:
    """In a process that helps another one: a stop signal does not end it, its parent does.

    Launchers and schedulers signal the ranks and their helpers alike, and a rank whose data process has gone cannot
    finish its step and save. Ignored and not blocked: libraries start threads after a fork, with masks of their own.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def is_supervised() -> bool:
    """Whether the parent of this process is a supervisor, which can start others in its place."""
    return "LONGER_REC_FOLDER" in os.environ


def await_turn(stop: StopSignal) -> None:
    """In a rank that is started while those before it still run: return when these have ended.

    What it has done until here costs the run no time; from here on it may take devices, memory and the run directory.
    """
    if not is_supervised():
        return
    folder = Path(os.environ["LONGER_REC_FOLDER"])
    (folder / f"{READY}{os.environ['RANK']}").touch()
    while not (folder / TURN).exists():
        if stop.received:
            raise Preempted("told to stop before its turn; start again")
        time.sleep(0.005)
