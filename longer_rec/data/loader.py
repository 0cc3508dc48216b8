"""Batches in background processes: for training by logical worker, for evaluation in fixed blocks."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import torch.utils.data

from longer_rec.batch import RequestBatch, validate_batch
from longer_rec.config import Config
from longer_rec.data.batches import make_batch
from longer_rec.data.dataset import Dataset
from longer_rec.data.order import sample_positions, sample_rows
from longer_rec.errors import ConfigError

_T = TypeVar("_T")


class DataConfig(Config):
    """Where the prepared data lies, and how batches are cut from it."""

    dir: Path
    max_events: int = pydantic.Field(1000, ge=1, description="newest events of a history that a model sees")
    batch_requests: int = pydantic.Field(32, ge=1, description="per logical worker")
    eval_batch_requests: int = pydantic.Field(64, ge=1)
    fresh_negatives: bool = pydantic.Field(True, description="other negatives each epoch")
    loader_processes: int = pydantic.Field(1, ge=0, description="per rank; 0 makes batches in the trainer itself")
    prefetch_batches: int = pydantic.Field(4, ge=1, description="steps made ahead")


class TrainLoader:
    """One ``list[RequestBatch]`` a step: a batch for each own logical worker, in their order.

    What a worker gets at a step is a function of (seed, step, worker, num_workers) and the dataset; neither the
    grouping of workers into processes nor a restart changes it. The whole state is ``samples_consumed``. After each
    step ``wait_s`` holds the seconds the trainer waited for it. ``fork`` shares the mapped files with the background
    processes, so make the loader before threads that hold locks exist.
    """

    def __init__(self, dataset: Dataset, config: DataConfig, *, seed: int, num_workers: int, workers: range,
                 start_step: int, num_steps: int) -> None:
        if not 0 <= workers.start <= workers.stop <= num_workers:
            raise ConfigError(f"workers {workers} are not within the {num_workers} logical workers")
        self._dataset, self._config, self._seed = dataset, config, seed
        self._num_workers, self._workers = num_workers, workers
        self._steps = range(start_step, start_step + num_steps)
        self.wait_s = 0.0

    def samples_consumed(self, num_steps_done: int) -> int:
        """Requests that all workers together have taken after that many steps from the beginning of the run."""
        return num_steps_done * self._num_workers * self._config.batch_requests

    def make_step(self, step: int) -> list[RequestBatch]:
        """The validated batches of a step, in this process."""
        return [self._make_worker(step, worker) for worker in self._workers]

    def _make_worker(self, step: int, worker: int) -> RequestBatch:
        train = self._dataset.split_rows("train")
        position = sample_positions(step, worker, self._num_workers, self._config.batch_requests)
        row, epoch = sample_rows(position, len(train), self._seed)
        # With one set of negatives for all epochs it is epoch 0's, not the evaluation's.
        batch = make_batch(self._dataset, row + train.start, max_events=self._config.max_events,
                           epoch=epoch if self._config.fresh_negatives else 0)
        validate_batch(batch, self._dataset.schema)
        return batch

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[RequestBatch]]:
        batches = iter(_background(self.make_step, self._steps, self._config))
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.wait_s = time.perf_counter() - asked
            if batch is None:
                return
            yield batch


class EvalLoader:
    """(block, batch) of each block of ``eval_batch_requests`` requests of a split that belongs to ``shard``.

    Block j belongs to shard j modulo ``num_shards``; the blocks themselves depend on neither.
    """

    def __init__(self, dataset: Dataset, split: str, config: DataConfig, shard: int = 0, num_shards: int = 1) -> None:
        self._dataset, self._config = dataset, config
        self._rows = dataset.split_rows(split)
        self.num_blocks = -(-len(self._rows) // config.eval_batch_requests)
        self._blocks = range(shard, self.num_blocks, num_shards)

    def make_block(self, block: int) -> tuple[int, RequestBatch]:
        """A validated block, in this process."""
        size = self._config.eval_batch_requests
        batch = make_batch(self._dataset, self._rows[block * size:(block + 1) * size], max_events=self._config.max_events)
        validate_batch(batch, self._dataset.schema)
        return block, batch

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[tuple[int, RequestBatch]]:
        return iter(_background(self.make_block, self._blocks, self._config))


class _Made(torch.utils.data.Dataset[Any]):
    """A function as the map-style dataset that torch's DataLoader wants."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make

    def __getitem__(self, index: int) -> Any:
        return self._make(index)


def _background(make: Callable[[int], _T], indices: Sequence[int], config: DataConfig) -> Any:
    """``make`` of each index, in order, ahead of time in ``loader_processes`` processes."""
    processes = config.loader_processes if len(indices) else 0
    background: dict[str, Any] = {} if processes == 0 else {
        "multiprocessing_context": "fork",
        "prefetch_factor": max(config.prefetch_batches // processes, 1)}
    return torch.utils.data.DataLoader(_Made(make), batch_size=None, sampler=indices, num_workers=processes, **background)
