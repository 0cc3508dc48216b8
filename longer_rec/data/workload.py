"""How long a job's histories are and how many candidates its requests have: what plans are weighed by."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from longer_rec.data.batches import request_sizes
from longer_rec.data.history import Dataset
from longer_rec.data.order import sample_positions, sample_rows
from longer_rec.schema import Schema

_SAMPLED_BATCHES = 32
_SAMPLED_TOKENS = 256  # requests whose instance tokens are counted

# History lengths and candidate counts of its requests.
Batch = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Workload:
    """Sampled batches, in the order in which training reads them, histories cut; ``user_ids``: mean number of ids of
    a user's features and instances."""

    batches: tuple[Batch, ...]
    user_ids: Mapping[str, float]

    def ids_per_request(self, schema: Schema) -> dict[str, float]:
        """Mean number of ids a request looks up, by key such as "history.item" and by table read row by row."""
        history, candidates = (float(np.mean([batch[part] for batch in self.batches])) for part in (0, 1))
        ids = {**{f"history.{feature.name}": history for feature in schema.history_features},
               **{f"candidates.{feature.name}": candidates for feature in schema.item_features}, **self.user_ids}
        return ids | {table: sum(ids[key] for key in keys) for table, keys in schema.row_keys.items()}


def sample_workload(dataset: Dataset, batch_requests: int, max_events: int, seed: int,
                    batches: range = range(_SAMPLED_BATCHES)) -> Workload:
    """Batches of the job's sample stream, counted over all workers; reads lengths alone."""
    train = dataset.split_rows("train")
    row = np.concatenate([sample_rows(sample_positions(step, batch_requests), len(train), seed)[0]
                          for step in batches]) + train.start
    length, count = request_sizes(dataset, row)
    user = dataset.requests.take("user", row).astype(np.int64)
    user_ids = {}
    for name, column in dataset.users.items():
        lengths = np.ones(1) if column.offsets is None else np.diff(column.offsets)[user]
        user_ids[f"users.{name}"] = float(lengths.mean())
    if dataset.instances is not None and dataset.schema.instance_features:
        some = row[:_SAMPLED_TOKENS]
        mean = float(dataset.instances.of_requests(dataset, some, count[:_SAMPLED_TOKENS])["length"].mean())
        user_ids |= {f"instances.{feature.name}": mean for feature in dataset.schema.instance_features}
    shape = (len(batches), batch_requests)
    return Workload(tuple(zip(np.minimum(length, max_events).reshape(shape).tolist(), count.reshape(shape).tolist(),
                              strict=True)), user_ids)
