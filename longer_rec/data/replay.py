"""Which rows training looks up, step by step: what caches are simulated on."""

from collections.abc import Iterator

import numpy as np

from longer_rec.batch import RequestBatch
from longer_rec.data.history import Dataset
from longer_rec.data.loader import DataConfig, TrainLoader
from longer_rec.data.order import I64


def replay_lookups(dataset: Dataset, config: DataConfig, seed: int, num_workers: int,
                   num_steps: int) -> Iterator[dict[str, tuple[I64, I64]]]:
    """(distinct rows, times each is looked up) by table, of the first ``num_steps`` steps of training.

    The very batches of the run, of all its logical workers.
    """
    loader = TrainLoader(dataset, config, seed=seed, num_workers=num_workers, workers=range(num_workers), start_step=0,
                         num_steps=num_steps)
    for step in range(num_steps):
        batches = loader.make_step(step)
        ids: dict[str, list[I64]] = {}
        for table, looked_up in (found for batch in batches for found in _looked_up(dataset, batch)):
            ids.setdefault(table, []).append(looked_up)
        yield {table: np.unique(np.concatenate(parts), return_counts=True) for table, parts in ids.items()}


def _looked_up(dataset: Dataset, batch: RequestBatch) -> Iterator[tuple[str, I64]]:
    schema = dataset.schema
    for features, values in ((schema.history_features, batch.history), (schema.item_features, batch.candidates),
                             (schema.user_features, batch.users), (schema.instance_features, batch.instances)):
        yield from ((feature.table, values[feature.name].numpy()) for feature in features)
