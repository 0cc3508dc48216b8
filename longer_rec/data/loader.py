"""Batches in background processes: for training by logical worker, for evaluation in fixed blocks."""

import atexit
import contextlib
import functools
import multiprocessing
import multiprocessing.process
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import numpy as np
import pydantic
import torch.utils.data

from longer_rec.batch import RequestBatch, deduplicate, validate_batch
from longer_rec.config import Config
from longer_rec.data.batches import make_batch, request_sizes
from longer_rec.data.frequency import STORED_EVENTS
from longer_rec.data.history import Dataset
from longer_rec.data.instance_sources import InstancesConfig
from longer_rec.data.order import I64, deal_evenly, hash_u64, sample_positions, sample_rows
from longer_rec.data.transport import PackedBatches, pack_batches, unpack_batches
from longer_rec.errors import ConfigError, LongerRecError, RankLost
from longer_rec.runtime.preemption import leave_stopping_to_parent

ResultT = TypeVar("ResultT")


class DataConfig(Config):
    """Where the prepared data lies, and how batches are cut from it."""

    dir: Path
    max_events: int = pydantic.Field(STORED_EVENTS, ge=1, description="newest events of a history that a model sees")
    batch_requests: int = pydantic.Field(32, ge=1, description="per logical worker")
    eval_batch_requests: int = pydantic.Field(64, ge=1)
    balance: bool = pydantic.Field(True, description="deal the requests of a step so that all workers have equal work")
    candidate_cost: int = pydantic.Field(10, ge=0, description="work of a candidate, in events, for balance")
    fresh_negatives: bool = pydantic.Field(True, description="other negatives each epoch")
    loader_processes: int = pydantic.Field(1, ge=0, description="per rank; 0 makes batches in the trainer itself")
    prefetch_batches: int = pydantic.Field(4, ge=1, description="steps made ahead")
    timeout_s: float = pydantic.Field(120.0, gt=0, description="of waiting for a batch of a loading process")
    instances: InstancesConfig | None = None


class TrainLoader:
    """One ``list[RequestBatch]`` a step: a batch for each own logical worker, in their order.

    What a worker gets at a step is a function of (seed, step, worker, num_workers) and the dataset; neither the
    grouping of workers into processes nor a restart changes it. The whole state is the step. In ``user_order`` a
    batch is a stretch of the request index, whose neighbours are requests of one user in order of time. ``fork`` shares
    the mapped files with the background processes, so make the loader before threads that hold locks exist.
    """

    def __init__(self, dataset: Dataset, config: DataConfig, *, seed: int, num_workers: int, workers: range,
                 start_step: int, num_steps: int, user_order: bool = False, reverse_second_pass: bool = False) -> None:
        if not 0 <= workers.start <= workers.stop <= num_workers:
            raise ConfigError(f"workers {workers} are not within the {num_workers} logical workers")
        self._dataset, self._config, self._seed = dataset, config, seed
        self._num_workers, self._workers = num_workers, workers
        self._user_order, self._reverse = user_order, reverse_second_pass
        self._steps = range(start_step, start_step + num_steps)
        self._wait_s = 0.0

    def make_step(self, step: int) -> list[RequestBatch]:
        """The validated batches of a step, in this process."""
        train, config = self._dataset.split_rows("train"), self._config
        if self._user_order:
            stretches = (self._stretch(step * self._num_workers + worker) for worker in self._workers)
            return [_checked_batch(self._dataset, row + train.start, config, epoch if config.fresh_negatives else 0)
                    for row, epoch in stretches]
        position = sample_positions(step, self._num_workers * config.batch_requests)
        row, epoch = sample_rows(position, len(train), self._seed, self._reverse)
        # With one set of negatives for all epochs it is epoch 0's, not the evaluation's.
        return [_checked_batch(self._dataset, row[dealt] + train.start, config,
                               epoch[dealt] if config.fresh_negatives else 0)
                for dealt in self._deal(row + train.start)[self._workers.start:self._workers.stop]]

    def _stretch(self, number: int) -> tuple[I64, int]:
        """Rows of the batch at a position of the stream of batches, and its epoch.

        Each epoch cuts the index elsewhere, so that a request does not begin a batch, without a past, every time. The
        last stretch is cut short: every request comes once an epoch.
        """
        size, num_requests = self._config.batch_requests, len(self._dataset.split_rows("train"))
        at, (epoch,) = sample_rows(np.asarray([number]), -(-num_requests // size), self._seed, self._reverse)
        first, shift = int(at[0]) * size, int(hash_u64(self._seed, epoch)[0] % np.uint64(size))
        return (np.arange(first, min(first + size, num_requests)) + shift) % num_requests, int(epoch)

    def _deal(self, row: I64) -> Sequence[I64]:
        """Which of a step's requests each of all the workers gets."""
        config = self._config
        if not config.balance or self._num_workers == 1:
            return np.split(np.arange(len(row)), self._num_workers)
        length, num_candidates = request_sizes(self._dataset, row)
        cost = np.minimum(length, config.max_events) + config.candidate_cost * num_candidates
        return deal_evenly(cost, self._num_workers)

    def take_wait(self) -> float:
        """Seconds spent waiting for steps since the last call."""
        taken, self._wait_s = self._wait_s, 0.0
        return taken

    def __iter__(self) -> Iterator[list[RequestBatch]]:
        steps = iter(in_background(self.make_step, self._steps, self._config))
        while True:
            asked = time.perf_counter()
            batches = next(steps, None)
            self._wait_s += time.perf_counter() - asked
            if batches is None:
                return
            yield batches


class EvalLoader:
    """(block, batch) of each block of ``eval_batch_requests`` requests of a split that belongs to ``shard``.

    The blocks depend on the split alone, and are dealt to the shards in turn. With ``max_requests`` only as many
    blocks are read as that takes, spread evenly over the split: neighbours in it are requests of one user.
    """

    def __init__(self, dataset: Dataset, split: str, config: DataConfig, shard: int = 0, num_shards: int = 1,
                 max_requests: int | None = None) -> None:
        self._dataset, self._config = dataset, config
        self._rows = dataset.split_rows(split)
        num_blocks = -(-len(self._rows) // config.eval_batch_requests)
        kept = num_blocks if max_requests is None else min(num_blocks, -(-max_requests // config.eval_batch_requests))
        self._blocks = [index * num_blocks // kept for index in range(kept)][shard::num_shards]
        self.num_rounds = -(-kept // num_shards)

    def make_block(self, block: int) -> RequestBatch:
        """A validated block, in this process."""
        size = self._config.eval_batch_requests
        return _checked_batch(self._dataset, self._rows[block * size:(block + 1) * size], self._config)

    def __iter__(self) -> Iterator[tuple[int, RequestBatch]]:
        batches = in_background(lambda block: [self.make_block(block)], self._blocks, self._config)
        return ((block, batch) for block, (batch,) in zip(self._blocks, batches, strict=True))


def _checked_batch(dataset: Dataset, rows: I64 | range, config: DataConfig, epoch: I64 | int | None = None
                   ) -> RequestBatch:
    batch = make_batch(dataset, rows, max_events=config.max_events, epoch=epoch)
    validate_batch(batch, dataset.schema)
    return deduplicate(batch, dataset.schema)


class _Made(torch.utils.data.Dataset[PackedBatches | LongerRecError]):
    """A function as the map-style dataset that torch's DataLoader wants."""

    def __init__(self, make: Callable[[int], list[RequestBatch]]) -> None:
        self._make = make

    def __getitem__(self, index: int) -> PackedBatches | LongerRecError:
        try:
            return pack_batches(self._make(index))
        except LongerRecError as error:
            return error  # raised there, as it is: torch would wrap it into a traceback of many lines


def in_background(make: Callable[[int], list[RequestBatch]], indices: Sequence[int],
                config: DataConfig) -> Iterator[list[RequestBatch]]:
    """``make`` of each index, in order, ahead of time in ``loader_processes`` processes."""
    if config.loader_processes == 0 or len(indices) == 0:
        yield from map(make, indices)
        return
    loader = torch.utils.data.DataLoader(
        _Made(make), batch_size=None, sampler=indices, num_workers=config.loader_processes,
        multiprocessing_context="fork", prefetch_factor=max(config.prefetch_batches // config.loader_processes, 1),
        pin_memory=torch.cuda.is_available(), worker_init_fn=lambda _: leave_stopping_to_parent(),
        generator=torch.Generator())  # its own: the trainer's random state must not depend on how data is loaded
    others = multiprocessing.active_children()
    batches = iter(loader)
    # They take no SIGTERM, with which torch would end those that are left over, and Python waits for them at its end.
    end = functools.partial(_kill, [each for each in multiprocessing.active_children() if each not in others])
    atexit.register(end)
    coming = _call(functools.partial(next, batches, None))
    try:
        while True:
            try:
                packed = coming.result(config.timeout_s)
            except TimeoutError:
                end()
                raise RankLost(f"no batch came from its loading process within data.timeout_s={config.timeout_s:g}: "
                               f"the storage under {config.dir} does not answer, or the process is stopped; start "
                               "again to continue from the last checkpoint, or raise it") from None
            if packed is None:
                return
            if isinstance(packed, LongerRecError):
                raise packed
            # The next one arrives while the trainer computes: 2 ms less a step.
            coming = _call(functools.partial(next, batches, None))
            yield unpack_batches(packed)
    finally:
        if coming.done():
            atexit.unregister(end)
        del batches  # its processes end: an error that somebody keeps would keep them, too


def _call(function: Callable[[], ResultT]) -> Future[ResultT]:
    """What ``function`` will return or raise; a thread that it has stuck in is left behind.

    torch's own timeout ends where a batch begins to come. A process that is stopped in the middle of writing it, or
    before it has handed over the memory that is in it, would be waited for without end. A thread costs 0.05 ms.
    """
    result: Future[ResultT] = Future()

    def call() -> None:
        try:
            result.set_result(function())
        except BaseException as error:  # raised by result()
            result.set_exception(error)

    threading.Thread(target=call, name="receive_batch", daemon=True).start()
    return result


def _kill(processes: Sequence[multiprocessing.process.BaseProcess]) -> None:
    for process in processes:
        with contextlib.suppress(RuntimeError):  # torch, of the process that it misses then
            process.kill()
            process.join()
