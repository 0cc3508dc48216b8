"""Launching as on a cluster, with real ranks: torchx, the script of a pod, the doctor of a cluster."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.integration.conftest import CONFIG, TINY
from tests.reference.commands import CommandServer

ROOT = Path(__file__).parents[2]
RUN = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore",
       "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH on which `longer-rec`, torchrun and torchx are those of this interpreter."""
    command = tmp_path / "bin" / "longer-rec"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m longer_rec "$@"\n')
    command.chmod(0o755)
    return f"{command.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"


def last_step(run_dir: Path) -> int:
    """The newest in the log, 0 before there is one."""
    with contextlib.suppress(FileNotFoundError):
        text = (run_dir / "metrics.jsonl").read_text()
        return max((json.loads(line)["step"] for line in text.splitlines() if line.endswith("}")), default=0)
    return 0


def test_torchx_trains_on_two_ranks_of_this_machine(synthetic: Path, tmp_path: Path, path: str) -> None:
    if shutil.which("torchx", path=path) is None:
        pytest.skip("torchx is not installed: pip install -e .[launch]")
    run_dir = tmp_path / "run"
    done = subprocess.run(
        ["torchx", "run", "-s", "local_cwd", "--wait", "launch/components.py:train", "--config", str(CONFIG), "--nproc",
         "2", "--run_dir", str(run_dir), "--", f"data.dir={synthetic}", *TINY[:-1]],
        cwd=ROOT, env={**os.environ, **RUN, "PATH": path}, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir / "run.json").read_text())["num_workers"] == 2
    assert (run_dir / "results.json").exists()


def test_a_pod_that_is_evicted_has_all_pods_save_and_they_continue(synthetic: Path, tmp_path: Path, path: str) -> None:
    """Two pods of one rank each, as the manifest starts them, under the exit code that makes them anew."""
    documents = list(yaml.safe_load_all((ROOT / "launch" / "kubernetes" / "train.yaml").read_text()))
    pod, = (document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
            for document in documents if document["kind"] == "JobSet")
    command = pod["containers"][0]["command"]
    run_dir = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])

    pods: list[subprocess.Popen[str]] = []

    def start() -> None:
        pods[:] = [subprocess.Popen(
            [*command, "train", str(CONFIG), f"run_dir={run_dir}", f"data.dir={synthetic}", "data.max_events=20",
             "model.num_queries=10", "train.log_every=1", "train.epochs=20"], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **RUN, "PATH": path, "HOSTS": "2", "RANKS": "1", "JOB_COMPLETION_INDEX": str(index),
                 "MASTER_ADDR": "localhost", "MASTER_PORT": port}, start_new_session=True) for index in range(2)]

    def wait_for_step(number: int) -> None:
        deadline = time.monotonic() + 150
        while last_step(run_dir) < number:
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in pods)
            time.sleep(0.05)

    try:
        start()
        wait_for_step(1)
        pods[1].send_signal(signal.SIGTERM)
        told = [process.communicate(timeout=60)[0] for process in pods]
        assert [process.returncode for process in pods] == [3, 3], told
        assert all("is saved, start again to continue" in text for text in told)
        saved = last_step(run_dir)
        assert 0 < saved < 1000
        start()
        wait_for_step(saved + 1)
    finally:
        for process in pods:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=10)


def test_the_doctor_of_a_cluster_prints_once_and_fails_when_a_rank_differs(synthetic: Path, path: str) -> None:
    rank = ("[ $RANK = 1 ] && export OMP_NUM_THREADS=2; "
            f"longer-rec doctor --distributed --data {synthetic}; echo code $? of $RANK")
    done = subprocess.run(
        ["torchrun", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--no-python",
         "bash", "-c", rank],
        env={**os.environ, **RUN, "PATH": path}, capture_output=True, text=True, timeout=120, check=False)
    lines = done.stdout.splitlines()
    assert {line for line in lines if line.startswith("code")} == {"code 1 of 0", "code 1 of 1"}, done
    threads, = (line for line in lines if line.split()[:1] == ["threads"])
    assert re.match(r" *threads +fail +rank 1 on \S+ has 2; the others 1", threads)
    assert sum("all-to-all 64 MiB" in line for line in lines) == 1


@pytest.mark.parametrize(("arguments", "told"), [
    (["--distributed"], "this is the only one; start it with torchrun or srun"),
    (["--data", "data/synthetic"], "add --distributed")])
def test_a_doctor_that_is_asked_the_wrong_way_says_how(commands: CommandServer, arguments: list[str],
                                                             told: str) -> None:
    outcome = commands.run("doctor", *arguments)
    assert outcome.code == 2
    assert told in outcome.err
    assert outcome.err.count("\n") == 1
