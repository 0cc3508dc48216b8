"""The directory of a run: what is in it, and whether it may be continued."""

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import longer_rec
from longer_rec.checkpoint.manifest import fsync_directory, write_durably
from longer_rec.config import dump_config, load_config
from longer_rec.data.history import Dataset
from longer_rec.errors import CheckpointError
from longer_rec.job import Job, changed_keys
from longer_rec.runtime.machine import installed_version, machine_facts
from longer_rec.runtime.preemption import is_supervised

_LOCK = "lock"
_locks: list[TextIO] = []
_RUN_KEYS = {"num_workers", "data", "config_sha256"}
_PACKAGES = ("torch", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchrec", "polars", "pyarrow")


def open_run_dir(job: Job, dataset: Dataset, num_workers: int) -> None:
    """Create the run directory, or check that the one there belongs to this job and this data; it is ours from then on.

    Writes ``config.yaml`` (resolved) and ``run.json`` (versions, machine, commit, data). Raises ``CheckpointError``
    for a directory that another process is training in, or that is of another configuration, data set or number of
    logical workers; nothing in it is touched then.
    """
    directory, is_new = job.run_dir, False
    if directory.exists() and not (directory / "config.yaml").exists():
        _check_empty(directory)
    try:
        if not directory.exists():
            directory.mkdir(parents=True)
            is_new = True
        with _locked(directory) as lock:
            if (directory / "config.yaml").exists():
                _check_same_run(job, dataset, num_workers)
            else:
                config = dump_config(job)
                run = {**_describe_run(dataset, num_workers), "config_sha256": _sha256(config.encode())}
                write_atomically(directory / "run.json", json.dumps(run, indent=2))
                write_atomically(directory / "config.yaml", config)
            lock.truncate(0)
            launch = f" (launch {os.getppid()})" if is_supervised() else ""
            lock.write(f"process {os.getpid()}{launch} on {socket.gethostname()} since {utc_now()}\n")
            lock.flush()
    except OSError as error:
        if is_new:
            shutil.rmtree(directory, ignore_errors=True)
        raise _cannot_write(directory, error) from None


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """A disk that is full, or lost, is a fault of the run directory and no bug."""
    try:
        yield
    except OSError as error:
        raise _cannot_write(directory, error) from None


def _cannot_write(directory: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot write run_dir={directory}: {error.strerror}; check space and permissions or choose "
                           "another run_dir")


def _check_empty(directory: Path) -> None:
    """Empty, or what a start that was killed here had come to."""
    begun = {_LOCK, "run.json", "run.json.tmp", "config.yaml.tmp"}
    if not directory.is_dir() or {path.name for path in directory.iterdir()} - begun:
        raise CheckpointError(f"{directory} exists, is not empty and is no run directory: it has no config.yaml; "
                              "restore that, or choose another run_dir")


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[TextIO]:
    """The lock file of a run directory, ours until this process ends however it ends, unless the body raises.

    A record lock, which belongs to the process alone: one of flock would live on in data-loading processes that
    survive a killed trainer. Closing any descriptor of the file would release it.
    """
    file = (directory / _LOCK).open("a+", encoding="utf-8")
    try:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise CheckpointError(f"{directory} is in use by {holder}; wait for it or choose another run_dir") from None
        yield file
    except BaseException:
        file.close()
        raise
    _locks.append(file)


def holder_of(directory: Path) -> str | None:
    """Who trains in a run directory, as `open_run_dir` writes it down; None when nobody does."""
    with (directory / _LOCK).open(encoding="utf-8") as file:
        # Asked for and not tried: a lock of ours, however short, would turn away who is about to train.
        asked = struct.pack("@hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, *_ = struct.unpack("@hhqqi0q", fcntl.fcntl(file, fcntl.F_GETLK, asked))
        return None if kind == fcntl.F_UNLCK else file.read().strip()


def _check_same_run(job: Job, dataset: Dataset, num_workers: int) -> None:
    directory = job.run_dir
    saved, run = load_job(directory), read_run(directory)
    changed = changed_keys(saved, job)
    if changed:
        raise CheckpointError(f"{directory} holds a run of another configuration (differs in {', '.join(changed)}); "
                              "choose another run_dir, or remove it to start anew")
    if run["data"]["fingerprint"] != dataset.fingerprint:
        raise CheckpointError(f"{directory} was trained on data {run['data']['fingerprint'][:12]}, "
                              f"{job.data.dir} holds {dataset.fingerprint[:12]}; choose another run_dir")
    if run["num_workers"] != num_workers:
        raise CheckpointError(f"{directory} was started with {run['num_workers']} logical workers, now there are "
                              f"{num_workers}; start {run['num_workers']} ranks or set elastic.num_workers")


def load_job(directory: Path) -> Job:
    """The job that a run directory was made for, wherever it lies now."""
    run, path = read_run(directory), directory / "config.yaml"
    if path.is_file() and _sha256(path.read_bytes()) != run["config_sha256"]:
        raise CheckpointError(f"{path} is not what the run was started with: damaged or edited; restore it, or give "
                              "what is to change to another run_dir")
    return load_config(Job, path, [f"run_dir={directory}"])


def setting_lines(first: Path, second: Path) -> list[str]:
    """What differs in the settings of two run directories, for reading; nothing when one of them is none."""
    if not all((run / "config.yaml").is_file() for run in (first, second)):
        return []
    changed = changed_keys(load_job(first), load_job(second))
    return [f"settings: {', '.join(changed)} differ"] if changed else []


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_run(directory: Path) -> dict[str, Any]:
    """The content of ``run.json``."""
    try:
        content: dict[str, Any] = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} is no readable run directory: run.json: {error}; give one that "
                              "`longer-rec train` wrote") from None
    if not isinstance(content, dict) or not content.keys() >= _RUN_KEYS:
        raise CheckpointError(f"{directory / 'run.json'} is not what this version of `longer-rec train` writes; use "
                              "the version that wrote it, or choose another run_dir")
    return content


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old content or the new, never half of it, also after a loss of power."""
    temporary = path.with_name(path.name + ".tmp")
    write_durably(temporary, text)
    temporary.replace(path)
    fsync_directory(path.parent)


def _describe_run(dataset: Dataset, num_workers: int) -> dict[str, Any]:
    return {
        "versions": {"longer_rec": longer_rec.__version__, **{name: installed_version(name) for name in _PACKAGES}},
        "machine": machine_facts(),
        "git_commit": _git_commit(),
        "started": utc_now(),
        "num_workers": num_workers,
        "data": {**dataset.summary, "fingerprint": dataset.fingerprint},
    }


def utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _git_commit() -> str | None:
    """The commit of the source this package runs from; None outside a checkout."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                                text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
