"""Who is still there: asked by a rank whose collective operation failed, answered by a thread of every other."""

import contextlib
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

_POLL_S = 0.5
_ANSWER_S = 5.0
_PACKAGE = Path(__file__).parents[1]


class RollCall:
    """Answers for this rank while it lives, also while it waits or computes; not when it is dead or stopped.

    The error of the operation itself names nobody: a rank sees the connection that broke, which in a group of three
    or more may be that to another one that has noticed earlier.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        # Connections of their own: a call that waits for a dead server holds up every other on its connection.
        self._answers, self._questions = (dist.PrefixStore("roll_call", store.clone())  # type: ignore[attr-defined]
                                           for _ in range(2))
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._answer, name="roll_call", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Answer no longer."""
        self._left.set()
        self._thread.join(2 * _POLL_S)

    def ask(self) -> dict[int, str] | None:
        """Where each rank is that answers within seconds, "" for one that asks too; None when the store is gone."""
        self.leave()
        heard: dict[int, str] | None = None

        def listen() -> None:
            nonlocal heard
            with contextlib.suppress(RuntimeError):  # the server of the store is gone
                self._questions.set(f"here/{self._rank}", "")
                self._questions.set("asked", "")
                deadline, answers = time.monotonic() + _ANSWER_S, dict[int, str]()
                while len(answers) < self._size and time.monotonic() < deadline:
                    for rank in range(self._size):
                        if rank not in answers and self._questions.check([f"here/{rank}"]):
                            answers[rank] = self._questions.get(f"here/{rank}").decode()
                    time.sleep(0.05)
                heard = answers

        # In a thread: a call to a stopped server never returns.
        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        listener.join(_ANSWER_S + _POLL_S)
        return heard

    def _answer(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, and nobody can ask any more
            while not self._left.wait(_POLL_S):
                if self._answers.check(["asked"]):
                    self._answers.set(f"here/{self._rank}", _position())
                    return


def _position() -> str:
    """The innermost line of this package that the main thread is in."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and _PACKAGE not in Path(frame.f_code.co_filename).parents:
        frame = frame.f_back
    if frame is None:
        return "code of its caller"
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).relative_to(_PACKAGE)}:{frame.f_lineno})"
