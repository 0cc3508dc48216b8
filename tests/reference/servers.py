"""The real `longer-rec serve` in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from longer_rec.serve.client import Client


@dataclass(frozen=True)
class RunningServer:
    process: subprocess.Popen[str]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, token: str | None = None) -> Client:
        return Client(self.url, token, timeout_s=20)


@contextmanager
def running_server(bundle: Path, *settings: str, **environment: str) -> Iterator[RunningServer]:
    """A server on a free port, told to stop at the end; what it says goes to the test's own standard error."""
    command = [sys.executable, "-m", "longer_rec", "serve", str(bundle), "port=0", *settings]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("serving "), line
            yield RunningServer(process, int(line.rpartition(":")[2]))
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
