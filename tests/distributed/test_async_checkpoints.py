"""Saving while training goes on: the copy is of the call, faults arrive, and a kill at any point costs one save."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longer_rec.checkpoint import manager as manager_module
from longer_rec.checkpoint.inspect import diff_checkpoints
from longer_rec.checkpoint.manager import CheckpointManager
from longer_rec.errors import CheckpointError
from tests.distributed.test_checkpoint_resharding import ROW_WISE, build, state, train
from tests.reference.ranks import RankFailure, run_ranks


def hold_writing() -> threading.Event:
    """Saving threads wait for the event before they write."""
    event, write = threading.Event(), manager_module.write_tensors

    def write_later(*arguments: Any) -> None:
        assert event.wait(timeout=30)
        write(*arguments)

    manager_module.write_tensors = write_later
    return event


def save_both_ways(rank: int, world_size: int, directory: Path, plan: object, optimizer_name: str) -> bool:
    model, optimizer = build(rank, world_size, plan, optimizer_name)
    background = CheckpointManager(directory / "background")
    background.prepare(state(model, optimizer))
    for steps in (range(2), range(2, 5)):  # the second time into the memory of the first
        train(model, optimizer, steps, rank)
        CheckpointManager(directory / "at_once").save(steps.stop, state(model, optimizer), {"step": steps.stop})
        writes = hold_writing()
        extra = {"step": steps.stop}
        background.save_async(steps.stop, state(model, optimizer), extra)
        extra["step"] = 99
        train(model, optimizer, range(5, 8), rank)
        under_way = background.latest() is None or background.latest().name != f"step-{steps.stop}"
        writes.set()
        background.wait()
    CheckpointManager(directory / "after").save(5, state(model, optimizer), {"step": 5})
    return under_way


@pytest.mark.parametrize(("plan", "optimizer"), [(ROW_WISE, "rowwise_adagrad"), ("table_wise", "adagrad")])
def test_background_save_is_bitwise_the_state_at_the_call(plan: object, optimizer: str, tmp_path: Path) -> None:
    assert run_ranks(save_both_ways, 2, tmp_path, plan, optimizer) == [True, True]
    for step in (2, 5):
        difference = diff_checkpoints(tmp_path / "background" / f"step-{step}", tmp_path / "at_once" / f"step-{step}")
        assert difference.tensors == []
        assert difference.extra == {}
    later = diff_checkpoints(tmp_path / "background" / "step-5", tmp_path / "after" / "step-5")
    assert {"model/sparse.ec.dim16.embeddings.item.weight", "model/tower.0.weight"} <= {
        entry.key for entry in later.tensors}


def one(value: float) -> dict[str, Tensor]:
    return {"table": torch.full((40, 4), value), "bias": torch.full((3,), -value)}


def holds(directory: Path) -> float:
    """The value that the newest whole checkpoint holds in every place."""
    found = one(0.0)
    assert CheckpointManager(directory).load_latest(found) is not None
    value = float(found["bias"][0])
    assert all(torch.equal(found[key], expected) for key, expected in one(-value).items())
    return -value


def test_one_process_saves_in_the_background_without_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_module, "write_tensors", manager_module.write_tensors)
    manager, writes, now = CheckpointManager(tmp_path), hold_writing(), one(1.0)
    manager.save_async(1, now, {})
    for value in now.values():
        value.zero_()
    assert manager.steps() == []
    writes.set()
    manager.wait()
    manager.wait()  # nothing is under way: no fault, no second save
    assert holds(tmp_path) == 1.0


def test_saves_queue_up_behind_each_other(tmp_path: Path) -> None:
    manager, now = CheckpointManager(tmp_path), one(0.0)
    for step in range(1, 6):
        now["table"].fill_(step)
        now["bias"].fill_(-step)
        manager.save_async(step, now, {})
        assert manager.steps() in ([*range(1, step)], [*range(1, step + 1)])
    manager.wait()
    for step in range(1, 6):
        found = one(0.0)
        manager.load(tmp_path / f"step-{step}", found)
        assert all(torch.equal(found[key], expected) for key, expected in one(step).items())


def fail(*arguments: object, **options: object) -> None:
    raise OSError(28, "No space left on device")


def fill_the_disk(rank: int, world_size: int, directory: Path) -> tuple[str, str, str]:
    manager = CheckpointManager(directory)
    manager.save(1, one(1.0), {})
    if rank == 1:
        torch.distributed.checkpoint.filesystem._write_item = fail
    # Sharded: replicated tensors alone would all be written by rank 0.
    model, optimizer = build(rank, world_size, "row_wise", "sgd")
    manager.save_async(2, state(model, optimizer), {})
    train(model, optimizer, range(2), rank)
    messages = []
    for call in (manager.wait, lambda: manager.save_async(3, state(model, optimizer), {}),
                 lambda: manager.save_async(4, state(model, optimizer), {})):
        try:
            call()
            messages.append("")
        except CheckpointError as error:
            messages.append(str(error))
    manager.wait()  # the fault of step 3 came before step 4 was begun: nothing is under way
    assert manager.steps() == [1]
    return tuple(messages)


def test_fault_of_a_background_save_is_raised_on_every_rank_by_the_next_call(tmp_path: Path) -> None:
    for messages in run_ranks(fill_the_disk, 2, tmp_path):
        assert "step-2.tmp: rank 1: OSError: [Errno 28] No space left on device" in messages[0]
        assert messages[1] == ""
        assert "step-3.tmp: rank 1: OSError: [Errno 28]" in messages[2]
    assert holds(tmp_path) == 1.0


def lose_a_peer(rank: int, world_size: int, directory: Path, how: str) -> None:
    manager = CheckpointManager(directory, timeout_s=2.0 if how == "silent" else 60.0)
    manager.save(1, one(1.0), {})
    if rank == 1:
        if how == "silent":
            time.sleep(5)  # never saves; the other rank has given up by then
            os._exit(0)
        writes = hold_writing()
        manager.save_async(2, one(2.0), {})
        os.kill(os.getpid(), signal.SIGKILL)
        writes.set()
    start = time.monotonic()
    manager.save_async(2, one(2.0), {})
    try:
        manager.wait()
    except RuntimeError as error:  # which CheckpointError is not
        (directory / "fault").write_text(f"{type(error).__name__} {time.monotonic() - start:.0f} {error}")
    os._exit(0)


@pytest.mark.parametrize("how", ["killed", "silent"])
def test_lost_peer_ends_the_wait_with_the_error_of_the_transport(how: str, tmp_path: Path) -> None:
    with pytest.raises(RankFailure):
        run_ranks(lose_a_peer, 2, tmp_path, how, timeout_s=12.0)
    kind, seconds, message = (tmp_path / "fault").read_text().split(" ", 2)
    assert kind == "RuntimeError"
    assert int(seconds) < 6
    assert "peer" in message or "imed out" in message
    assert holds(tmp_path) == 1.0


_LEAVES_EARLY = """
import sys, torch
from pathlib import Path
from longer_rec.checkpoint.manager import CheckpointManager
CheckpointManager(Path(sys.argv[1])).save_async(1, {"table": torch.full((20_000_000,), 5.0)}, {})
sys.exit(7)
"""


def test_process_that_ends_without_waiting_ends_with_its_own_exit_code(tmp_path: Path) -> None:
    """And not by an abort inside torch's writer; what was under way is committed."""
    ended = subprocess.run([sys.executable, "-c", _LEAVES_EARLY, tmp_path], check=False, timeout=60)
    assert ended.returncode == 7
    found = {"table": torch.zeros(20_000_000)}
    assert CheckpointManager(tmp_path).load_latest(found) is not None
    assert bool((found["table"] == 5.0).all())


class KilledAt:
    """Kills this process at the n-th file operation of a saving thread; counts them when n is None."""

    def __init__(self, n: int | None) -> None:
        self.n, self.count = n, 0
        fsync = os.fsync
        os.fsync = lambda descriptor: (self.hit("fsync"), fsync(descriptor))[1]
        sys.addaudithook(lambda event, _: self.hit(event))

    def hit(self, event: str) -> None:
        if event in _OPERATIONS and threading.current_thread().name.startswith("save-step-"):
            self.count += 1
            if self.count == self.n:
                os.kill(os.getpid(), signal.SIGKILL)


_OPERATIONS = {"open", "fsync", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"}


def in_fork(function: Callable[[], int]) -> int:
    """Exit code of a forked process, -9 where it was killed."""
    torch.set_num_threads(1)
    pid = os.fork()
    if pid == 0:
        os._exit(function())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("step", [2, 1], ids=["next_step", "same_step_again"])
def test_kill_at_any_file_operation_leaves_a_whole_checkpoint(step: int, tmp_path: Path) -> None:
    """With retention at its strictest, so that replacing and deleting are among the operations."""
    def save(directory: Path, n: int | None) -> int:
        killer = KilledAt(n)
        manager = CheckpointManager(directory, keep=1)
        manager.save_async(step, one(2.0), {})
        manager.wait()
        return killer.count

    outcomes = []
    total = in_fork(lambda: save(prepared(tmp_path / "whole"), None))
    assert total > 15
    for n in range(1, total + 1):
        directory = prepared(tmp_path / str(n))
        assert in_fork(lambda n=n, directory=directory: save(directory, n)) == -signal.SIGKILL
        outcomes.append(holds(directory))
        CheckpointManager(directory, keep=1).save(3, one(3.0), {})
        assert holds(directory) == 3.0
        assert {path.name for path in directory.iterdir()} == {"LATEST", "step-3"}
    assert sorted(outcomes) == outcomes  # first the old one, from some operation on the new one
    assert set(outcomes) == {1.0, 2.0}


def prepared(directory: Path) -> Path:
    CheckpointManager(directory).save(1, one(1.0), {})
    return directory


def save_until_killed(rank: int, world_size: int, directory: Path, killed: int, n: int) -> None:
    """One checkpoint after the other, their values their steps; the ``n``-th file operation of a rank is its last."""
    manager = CheckpointManager(directory, keep=2)
    if rank == killed:
        KilledAt(n)
    now = one(0.0)
    for step in range(1, 100):
        for key, value in one(step).items():
            now[key].copy_(value)
        torch.distributed.all_reduce(torch.ones(100))
        manager.save_async(step, now, {})


@pytest.mark.parametrize("seed", range(3))
def test_kill_of_one_rank_while_all_save_leaves_a_whole_checkpoint(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    killed, n = seed % 2, rng.randrange(100, 200)
    with pytest.raises(RankFailure, match="ended by signal 9"):
        run_ranks(save_until_killed, 2, tmp_path, killed, n if killed == 0 else n // 8)
    newest = CheckpointManager(tmp_path).steps()[-1]
    assert holds(tmp_path) == newest > 1
