"""Being told to stop: SIGTERM or SIGUSR1 of a scheduler, a launcher or a person."""

import os
import signal
import threading
from types import FrameType
from typing import Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Between enter and exit a stop signal is noted instead of ending the process; whoever holds this looks.

    Schedulers and launchers often deliver the same signal twice, so a second one changes nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name


def leave_stopping_to_parent() -> None:
    """In a process that helps another one: a stop signal ends it only when that one sends it.

    Launchers and schedulers signal the ranks and their helpers alike, and a rank whose data process has gone cannot
    finish its step and save.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def wait() -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, name="stop signals", daemon=True).start()
