"""A running job on another number of processes: asked for in a file of its run directory, answered in another.

``RUN/resize`` holds the number that is wanted; whoever may write there may ask. ``RUN/events.jsonl`` is appended to:
``continued`` by each start that continues, after its first step, and ``refused`` by the supervisor.
"""

import json
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from longer_rec.errors import ConfigError
from longer_rec.job import Job
from longer_rec.train.log import EVENTS, append_event
from longer_rec.train.run_dir import holder_of, load_job, write_atomically

_REQUEST = "resize"
_POLL_S = 0.1
# Between two starts nobody holds the run directory for a moment.
_GONE_S = 10.0
Signature = tuple[int, int]


class ResizeRequests:
    """What ``RUN/resize`` asks the supervisor of a job for. A request from before this start is void."""

    def __init__(self, job: Job) -> None:
        self._job, self._path = job, job.run_dir / _REQUEST
        self._seen = self._void = _signature(self._path)

    def wanted(self, num_ranks: int) -> int | None:
        self._seen = _signature(self._path)
        if self._seen in (None, self._void):
            return None
        text = self._path.read_text(encoding="utf-8", errors="replace").strip()
        if not text:
            return None  # about to be written
        try:
            size = _check_size(self._job, text)
        except ConfigError as error:
            self.refuse(text[:20], str(error))
            return None
        return size if size != num_ranks else None

    def refuse(self, num_ranks: int | str, why: str) -> None:
        self._void = self._seen
        print(f"longer-rec: goes on as it is: {why}", file=sys.stderr, flush=True)
        append_event(self._job.run_dir, "refused", to=num_ranks, why=why)


def resize_run(run_dir: Path, num_ranks: int) -> str:
    """Ask a running job to go on with ``num_ranks`` processes, and wait until it does; what happened, in a line.

    ``ConfigError`` when it cannot, is not running, or was asked for something else meanwhile.
    """
    if (run_dir / "lock").exists() and not (run_dir / "run.json").exists() and (holder := holder_of(run_dir)):
        raise ConfigError(f"{run_dir} is just being started by {holder}; ask again in a moment")
    job = load_job(run_dir)
    _check_size(job, str(num_ranks))
    holder = holder_of(run_dir)
    if holder is None and (run_dir / "results.json").exists():
        raise ConfigError(f"{run_dir} has finished; there is nothing left to resize")
    if holder is None:
        raise ConfigError(f"{run_dir} is not running; start it with `longer-rec launch … --nproc {num_ranks}`")
    launcher = re.search(r"\(launch (\d+)\) on (\S+)", holder)
    if launcher is None:
        raise ConfigError(f"{run_dir} is trained by {holder}, and not by `longer-rec launch`, the one that can change "
                          "the number of its processes; under torchrun start or stop an agent, else stop it and start "
                          "it again")
    known = {path: path.stat().st_size for path in _event_files(run_dir)}
    request, begun = run_dir / _REQUEST, time.monotonic()
    write_atomically(request, f"{num_ranks}\n")
    own, seen = _signature(request), time.monotonic()
    if _num_ranks_now(run_dir) == num_ranks:
        return f"{run_dir} runs on {num_ranks} processes already"
    while True:
        for event in _events_since(run_dir, known):
            if event["to"] != num_ranks:
                continue
            if event["event"] == "refused":
                raise ConfigError(event["why"])
            if event["event"] == "continued":
                return (f"resized {event['from']} → {num_ranks} in {event['pause_s']:.1f} s at step {event['step']:,}, "
                        f"{time.monotonic() - begun:.1f} s after it was asked for")
        if _signature(request) != own:
            raise ConfigError(f"{request} was written again, for {request.read_text().strip()} processes: that is what "
                              f"{run_dir} follows now; ask again if {num_ranks} are still wanted")
        if holder_of(run_dir) is not None or _lives(int(launcher[1]), launcher[2]):
            seen = time.monotonic()
        elif time.monotonic() - seen > _GONE_S:
            raise ConfigError(f"{run_dir} ended before it had {num_ranks} processes; if it is not done, start it with "
                              f"`longer-rec launch … --nproc {num_ranks}`")
        time.sleep(_POLL_S)


def _check_size(job: Job, text: str) -> int:
    elastic = job.elastic
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{text!r} processes cannot train; use 1 or more")
    if elastic.num_workers is None:
        raise ConfigError(f"{job.run_dir} has one worker a process, for elastic.num_workers is not set: it keeps its "
                          "number of processes; set it in a new run")
    if int(text) > elastic.num_workers:
        raise ConfigError(f"{text} processes are more than elastic.num_workers={elastic.num_workers}, and one without "
                          f"a worker has nothing to do; use at most {elastic.num_workers}")
    if elastic.shares is not None:
        raise ConfigError(f"elastic.shares={list(elastic.shares)} is for {len(elastic.shares)} processes; stop the run "
                          "and start it with other shares, or with elastic.shares=null")
    return int(text)


def _signature(path: Path) -> Signature | None:
    """What changes when the file is written again, with the same content too; None without a file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino


def _num_ranks_now(run_dir: Path) -> int | None:
    path = run_dir / "plan.json"
    return int(json.loads(path.read_text(encoding="utf-8"))["world_size"]) if path.exists() else None


def _event_files(run_dir: Path) -> list[Path]:
    """Of the run, and of its baselines, which are trained by the same processes after it."""
    return [path for path in (run_dir / EVENTS, *run_dir.glob(f"baselines/*/{EVENTS}")) if path.exists()]


def _events_since(run_dir: Path, known: dict[Path, int]) -> Iterator[dict[str, Any]]:
    for path in _event_files(run_dir):
        content = path.read_bytes()[known.get(path, 0):]
        for line in content[:content.rfind(b"\n") + 1].splitlines():
            yield json.loads(line)


def _lives(pid: int, host: str) -> bool:
    """Whether a process is there; not, as far as is known here, when it is another host's."""
    return host == socket.gethostname() and psutil.pid_exists(pid)
