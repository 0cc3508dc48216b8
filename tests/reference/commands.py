"""The real command many times for the price of one import: each call is a process of its own.

A server imports the package once (five seconds), forks for each call, and runs ``longer_rec.cli.main`` there with
standard output and error of its own. Nothing of pytest is in it: what reaches the terminal is what a user would see.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.reference.processes import fork


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


class CommandServer:
    """``run("train", "x.yaml")`` is ``longer-rec train x.yaml``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, *arguments: object) -> Outcome:
        """Give the command and wait for its end; a death by signal N is code -N."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))


@contextmanager
def command_server() -> Iterator[CommandServer]:
    """A running server; its commands run in the directory that is current now."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-m", "tests.reference.commands"], env=environment, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield CommandServer(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:  # a process that a test has left behind holds the pipe, too
                process.kill()
                raise


def _serve() -> None:
    import longer_rec.checkpoint.inspect
    import longer_rec.data.prepare
    import longer_rec.train.run  # noqa: F401 - what the commands would each import

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            arguments = json.loads(line)
            command = fork(lambda arguments=arguments: _command(arguments), Path(folder))
            _, status = os.waitpid(command.pid, 0)
            answer = {"code": os.waitstatus_to_exitcode(status), "out": command.out, "err": command.err}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _command(arguments: list[str]) -> int:
    from longer_rec.cli import main

    sys.argv = ["longer-rec", *arguments]
    main()
    return 0


if __name__ == "__main__":
    _serve()
