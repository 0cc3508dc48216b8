"""Being told to stop: SIGTERM or SIGUSR1 of a scheduler, a launcher or a person."""

import signal
from typing import NoReturn, Self

from longer_rec.errors import Preempted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


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
