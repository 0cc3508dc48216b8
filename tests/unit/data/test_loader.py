"""The loader delivers a function of (seed, step, worker), whoever asks and from wherever."""

import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import fields
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from longer_rec.batch import RequestBatch
from longer_rec.data import loader as loader_module
from longer_rec.data.batches import make_batch
from longer_rec.data.history import Dataset
from longer_rec.data.loader import DataConfig, EvalLoader, TrainLoader
from longer_rec.data.transport import pack_batches, unpack_batches
from longer_rec.errors import ConfigError, DataError, RankLost
from tests.unit.data.logs import prepared, random_log


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepared(tmp_path_factory.mktemp("log"), random_log(900))


def config(dataset: Dataset, **changes: object) -> DataConfig:
    return DataConfig(dir=dataset.path, **{"max_events": 9, "batch_requests": 7, "loader_processes": 0, **changes})


def assert_same_steps(first: Sequence[Sequence[RequestBatch]], second: Sequence[Sequence[RequestBatch]]) -> None:
    for mine, others in zip(first, second, strict=True):
        for one, other in zip(mine, others, strict=True):
            assert_same(one, other)


def assert_same(first: RequestBatch, second: RequestBatch) -> None:
    for field in fields(RequestBatch):
        one, other = getattr(first, field.name), getattr(second, field.name)
        pairs = [(one[key], other[key]) for key in one | other] if isinstance(one, dict) else [(one, other)]
        for a, b in pairs:
            assert a.dtype == b.dtype
            assert torch.equal(a, b), field.name


def train(dataset: Dataset, workers: range, start: int = 0, steps: int = 6,
          **changes: object) -> list[list[RequestBatch]]:
    return list(TrainLoader(dataset, config(dataset, **changes), seed=5, num_workers=4, workers=workers,
                            start_step=start, num_steps=steps))


def test_any_grouping_of_workers_gets_the_same_batches(dataset: Dataset) -> None:
    whole = train(dataset, range(4))
    assert [len(step) for step in whole] == [4] * 6
    for cuts in ([0, 2, 4], [0, 1, 2, 3, 4], [0, 3, 4]):
        grouping = [range(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False)]
        parts = [train(dataset, workers) for workers in grouping]
        assert_same_steps(whole, [[batch for part in parts for batch in part[step]] for step in range(6)])


def test_a_restart_continues_the_stream(dataset: Dataset) -> None:
    assert_same_steps(train(dataset, range(4))[2:], train(dataset, range(4), start=2, steps=4))


@pytest.mark.parametrize("processes", [1, 2])
def test_background_processes_change_nothing(dataset: Dataset, processes: int) -> None:
    here, there = train(dataset, range(1, 3)), train(dataset, range(1, 3), loader_processes=processes)
    assert len(here) == 6
    assert_same_steps(here, there)


def test_loading_leaves_the_random_state_alone(dataset: Dataset) -> None:
    state = torch.random.get_rng_state()
    train(dataset, range(4), loader_processes=1, steps=2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_balance_deals_the_requests_of_a_step_by_their_work(dataset: Dataset) -> None:
    spread: list[float] = []
    for settings in ({"balance": False}, {"candidate_cost": 3}):
        steps = train(dataset, range(4), **settings)
        work = np.array([[batch.num_events + 3 * batch.num_candidates for batch in step] for step in steps])
        spread.append(float((work.max(1) / work.mean(1)).mean()))
    assert spread[1] < 1.03 < 1.06 < spread[0]
    for first, second in zip(train(dataset, range(4), balance=False), steps, strict=True):
        rows = [sorted(torch.cat([batch.request_row_B for batch in step]).tolist()) for step in (first, second)]
        assert rows[0] == rows[1]
        assert [batch.num_requests for batch in second] == [7] * 4


def test_the_second_epoch_has_fresh_negatives_only_if_asked(dataset: Dataset) -> None:
    for fresh in (True, False):
        steps = train(dataset, range(4), steps=2 * dataset.num_requests("train") // 28, fresh_negatives=fresh)
        seen: dict[int, list[list[int]]] = {}
        for batch in (batch for step in steps for batch in step):
            parts = batch.candidates["item"].split(batch.num_candidates_B.tolist())
            for row, item in zip(batch.request_row_B.tolist(), parts, strict=True):
                seen.setdefault(row, []).append(item.tolist())
        twice = [items for items in seen.values() if len(items) == 2]
        assert len(twice) > 100
        same = np.mean([first == second for first, second in twice])
        assert same < 0.2 if fresh else same == 1


def test_evaluation_blocks_are_dealt_out_and_cover_the_split(dataset: Dataset) -> None:
    test = dataset.split_rows("test")
    settings = config(dataset, eval_batch_requests=5, loader_processes=1)
    whole = dict(EvalLoader(dataset, "test", settings))
    assert torch.cat([whole[block].request_row_B for block in range(len(whole))]).tolist() == list(test)
    shards = [dict(EvalLoader(dataset, "test", settings, shard, 3)) for shard in range(3)]
    assert sorted(block for shard in shards for block in shard) == list(range(len(whole)))
    for shard in shards:
        for block, batch in shard.items():
            assert_same(batch, whole[block])
    assert len(test) % 5 != 0


def test_an_error_in_a_background_process_arrives_as_one_line(dataset: Dataset,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> RequestBatch:
        raise DataError("request 3: spoiled; fetch it again")

    monkeypatch.setattr(loader_module, "make_batch", fail)
    with pytest.raises(DataError, match=r"^request 3: spoiled; fetch it again$") as kept:
        train(dataset, range(4), loader_processes=1)
    assert kept.tb is not None
    assert multiprocessing.active_children() == []


def test_a_stop_signal_to_all_processes_leaves_the_step_under_way_its_batches(dataset: Dataset) -> None:
    """As a launcher and Slurm send it. Only the trainer's own ends a loading process."""
    expected = train(dataset, range(2))
    steps = iter(TrainLoader(dataset, config(dataset, loader_processes=2, prefetch_batches=2), seed=5, num_workers=4,
                             workers=range(2), start_step=0, num_steps=6))
    received = [next(steps), next(steps)]  # one of each process: both have begun
    helpers = multiprocessing.active_children()
    assert len(helpers) == 2
    for number in (signal.SIGTERM, signal.SIGUSR1):
        subprocess.run(["kill", f"-{number.value}", *(str(helper.pid) for helper in helpers)], check=True)
    received += steps
    assert_same_steps(received, expected)


def test_a_loading_process_ends_with_its_loader(dataset: Dataset) -> None:
    steps = iter(TrainLoader(dataset, config(dataset, loader_processes=1), seed=5, num_workers=4, workers=range(2),
                             start_step=0, num_steps=600))
    next(steps)
    helper, = multiprocessing.active_children()
    del steps
    helper.join(60)
    assert helper.exitcode == 0


@pytest.mark.parametrize("written", [0.5, 1.0])
def test_a_loading_process_that_does_not_answer_ends_the_wait(dataset: Dataset, monkeypatch: pytest.MonkeyPatch,
                                                              written: float) -> None:
    """As on storage that hangs: no other rank would ever miss this one when all wait alike.

    Stopped in the middle of writing a batch, and behind it, when its memory is still to be fetched.
    """
    trainer, send, sent = os.getpid(), Connection._send_bytes, []  # type: ignore[attr-defined]

    def stop_at_the_second(connection: Connection, buffer: memoryview) -> None:
        if os.getpid() == trainer or threading.current_thread().name != "QueueFeederThread":
            return send(connection, buffer)  # as where memory is handed over
        sent.append(buffer)
        if len(sent) != 2:
            return send(connection, buffer)
        message, maker = struct.pack("!i", len(buffer)) + bytes(buffer), os.getpid()
        if os.fork() == 0:  # what is written arrives when its maker stands still: it could hand memory over until then
            while Path(f"/proc/{maker}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                time.sleep(0.001)
            os.write(connection.fileno(), message[:int(written * len(message))])
            os._exit(0)
        os.kill(maker, signal.SIGSTOP)

    monkeypatch.setattr(Connection, "_send_bytes", stop_at_the_second)
    steps = iter(TrainLoader(dataset, config(dataset, loader_processes=1, prefetch_batches=1, timeout_s=4), seed=5,
                             num_workers=4, workers=range(2), start_step=0, num_steps=600))
    next(steps)
    with pytest.raises(RankLost, match=r"no batch came .* within data.timeout_s=4: .*start again"):
        next(steps)
    assert multiprocessing.active_children() == []


def test_a_process_ends_although_a_loader_is_left_whose_processes_work_or_are_stopped(dataset: Dataset) -> None:
    script = f"""if True:
        import multiprocessing, os, signal, sys
        from longer_rec.data.history import open_dataset
        from longer_rec.data.loader import DataConfig, TrainLoader
        config = DataConfig(dir={str(dataset.path)!r}, batch_requests=7, loader_processes=2)
        dataset = open_dataset(config.dir)
        steps = iter(TrainLoader(dataset, config, seed=0, num_workers=1, workers=range(1), start_step=0, num_steps=99))
        next(steps)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGSTOP)
        print("left", flush=True)
        """
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=150)
    assert (ended.returncode, ended.stdout) == (0, "left\n"), ended.stderr


def test_workers_outside_the_logical_ones_are_refused(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="not within the 4 logical workers"):
        train(dataset, range(3, 5))


def test_packing_keeps_every_tensor(dataset: Dataset) -> None:
    batches = [make_batch(dataset, rows, max_events=9) for rows in ([0, 5, 9], [2], [])]
    assert_same_steps([batches], [unpack_batches(pack_batches(batches))])
    assert batches[2].num_requests == 0


def test_the_trainer_can_read_how_long_it_waited(dataset: Dataset) -> None:
    loader = TrainLoader(dataset, config(dataset), seed=1, num_workers=1, workers=range(1), start_step=3, num_steps=2)
    waits = [loader.take_wait() for _ in loader]
    assert len(waits) == 2
    assert min(waits) > 0
    assert loader.take_wait() < min(waits)


def test_the_epoch_stays_whole_when_batches_cross_its_end(tmp_path: Path) -> None:
    small = prepared(tmp_path, random_log(60, num_users=2))
    steps = train(small, range(4), steps=9, balance=False)
    rows = torch.cat([batch.request_row_B for step in steps for batch in step]).numpy()
    total = small.num_requests("train")
    assert total % 7 != 0
    epochs = rows[:len(rows) // total * total].reshape(-1, total)
    assert len(epochs) >= 3
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(total), (len(epochs), 1)))
