"""Run a function on several ranks, as a training run would, without ports, launchers or new imports."""

import datetime
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# After one rank has failed the others only wait for it.
_GRACE_S = 3.0


class RankFailure(AssertionError):
    """A rank raised, crashed or hung; the message is the first failing rank's traceback."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """``fn(rank, world_size, *args)`` on each of ``world_size`` forked ranks joined by gloo; results by rank.

    ``fn`` is a module-level function. Forking shares the imports, which take seconds; it needs a parent with one
    thread. Results travel pickled between processes of one test.
    """
    torch.set_num_threads(1)
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        pids = [_fork(rank, world_size, fn, args, folder, timeout_s) for rank in range(world_size)]
        status = _wait(pids, timeout_s)
        outcomes = [_outcome(folder, rank, status[rank], timeout_s) for rank in range(world_size)]
    failures = sorted((when, rank, text) for rank, (when, text, _) in enumerate(outcomes) if text)
    if failures:
        _, rank, text = failures[0]
        raise RankFailure(f"rank {rank} of {world_size} failed:\n{text}")
    return [value for _, _, value in outcomes]


def _fork(rank: int, world_size: int, fn: Callable[..., Any], args: tuple[Any, ...], folder: Path,
          timeout_s: float) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank),
                      LOCAL_WORLD_SIZE=str(world_size))
    log = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size,
                                timeout=datetime.timedelta(seconds=timeout_s))
        outcome = (0.0, "", fn(rank, world_size, *args))
        dist.barrier()
    except BaseException:  # also CheckpointException, which is no Exception
        outcome = (time.time(), traceback.format_exc(), None)
    (folder / f"result-{rank}").write_bytes(pickle.dumps(outcome))
    os._exit(0)


def _wait(pids: list[int], timeout_s: float) -> dict[int, int | None]:
    """Wait status by rank; None for a rank that had to be killed."""
    deadline = time.monotonic() + timeout_s
    status: dict[int, int | None] = {}
    while len(status) < len(pids) and time.monotonic() < deadline:
        for rank, pid in enumerate(pids):
            done, code = os.waitpid(pid, os.WNOHANG) if rank not in status else (0, 0)
            if done:
                status[rank] = code
                if code:
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        time.sleep(0.005)
    for rank, pid in enumerate(pids):
        if rank not in status:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            status[rank] = None
    return status


def _outcome(folder: Path, rank: int, status: int | None, timeout_s: float) -> tuple[float, str, Any]:
    """(time of failure, traceback or "", result)."""
    result = folder / f"result-{rank}"
    if result.exists() and status == 0:
        outcome: tuple[float, str, Any] = pickle.loads(result.read_bytes())
        return outcome
    log = (folder / f"log-{rank}").read_text(errors="replace")[-2000:]
    if status is None:
        # Others may have failed and left this rank waiting: it is not the first to blame.
        return time.time() + 1e6, f"still running after {timeout_s} s\n{log}", None
    return 0.0, f"ended by signal {os.WTERMSIG(status)}, exit code {os.waitstatus_to_exitcode(status)}\n{log}", None
