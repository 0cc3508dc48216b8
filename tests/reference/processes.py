"""A function in a process of its own, whose output, exit code and children a test can see."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil


@dataclass
class Forked:
    """A function that runs in a process of its own, whose output goes into files."""

    pid: int
    folder: Path
    code: int | None = field(default=None, init=False)

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    def poll(self) -> int | None:
        """The exit code, minus the signal, or None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, timeout_s: float = 60) -> int:
        """The exit code; what still runs after ``timeout_s`` is killed with all that it has started."""
        until(lambda: self.poll() is not None, timeout_s, self)
        assert self.code is not None
        return self.code

    def family(self) -> list[psutil.Process]:
        """All that it has started and not yet buried."""
        return psutil.Process(self.pid).children(recursive=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.poll() is None:
            for process in [*self.family(), psutil.Process(self.pid)]:
                process.kill()
            os.waitpid(self.pid, 0)


def fork(function: Callable[[], int], folder: Path) -> Forked:
    """Run ``function`` in a forked process without input; it ends with the code that is returned or exited with."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("out", "err"):
        (folder / name).write_text("")
    pid = os.fork()
    if pid:
        return Forked(pid, folder)
    code = 1
    try:
        for descriptor, path in ((0, Path(os.devnull)), (1, folder / "out"), (2, folder / "err")):
            os.dup2(os.open(path, os.O_RDWR), descriptor)
        # pytest captures by replacing these objects, too.
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        code = function()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = 130
    except BaseException:  # what Python itself would print
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def until(true: Callable[[], bool], timeout_s: float, process: Forked) -> None:
    """Wait for something to come true; show what the process wrote when it does not."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"still waiting after {timeout_s} s:\n{process.out}\n{process.err}"
        time.sleep(0.01)


def gone(family: list[psutil.Process]) -> bool:
    """Whether all of them have ended."""
    return not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family)
