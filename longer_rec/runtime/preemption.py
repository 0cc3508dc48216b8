"""Being told to stop: SIGTERM or SIGUSR1 of a scheduler, a launcher or a person."""

import signal
from types import FrameType
from typing import Self

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Between enter and exit a stop signal is noted instead of ending the process; whoever holds this looks.

    Schedulers and launchers often deliver the same signal twice, so a second one changes nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name
