"""Where the instance tokens of a batch come from: a store, or the batch's own candidates; and what goes into a store.

An instance is a candidate of the log: one request and one item, with its label. Negatives that are drawn are none:
they were shown to nobody, are others in every epoch, and carry a label that says how they came about. Where candidates
are drawn, all instances are therefore positives, and what tells them apart is their vectors, times and features.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pydantic

from longer_rec.batch import RequestBatch
from longer_rec.config import Config
from longer_rec.data.encode import Encoder, encoder_digest
from longer_rec.data.hashing import user_keys
from longer_rec.data.history import Dataset
from longer_rec.data.instances import InstanceReader, StoreManifest, instance_ids
from longer_rec.data.order import I64, U64, ranges
from longer_rec.data.store import Array
from longer_rec.errors import ConfigError, DataError
from longer_rec.schema import Feature, InstanceSchema, Schema

_SAMPLED_USERS = 1000


class InstancesConfig(Config):
    """Which store a model reads and how much of it; ``features`` of an instance are looked up in its tables."""

    store: Path
    max_tokens: int = pydantic.Field(256, ge=1, description="newest instances of a user that a model sees")
    delay_s: int | None = pydantic.Field(None, ge=0, description="how long after an instance its labels are known; "
                                         "None: as long as the store says")
    features: tuple[str, ...] = pydantic.Field((), description="side features, such as item and category")


class StoredInstances:
    """Each user's newest instances in a store whose labels were known strictly before a request."""

    def __init__(self, config: InstancesConfig, schema: Schema, encoders: Mapping[str, Encoder],
                 user_keys: U64 | None = None) -> None:
        # Hashed by polars, whose threads a forked loading process would wait for in vain.
        self._user_keys = user_keys
        self.reader, self.config = InstanceReader(config.store), config
        manifest = self.reader.manifest
        self.fingerprint: str | None = manifest.fingerprint
        if config.delay_s is not None and config.delay_s < manifest.delay_s:
            raise ConfigError(f"data.instances.delay_s={config.delay_s} is less than the {manifest.delay_s} s after "
                              f"which {config.store} knows its labels; leave it out, or give as much")
        self._wait_s = 0 if config.delay_s is None else config.delay_s - manifest.delay_s
        known = {feature.name: feature for feature in schema.history_features}
        self.schema = InstanceSchema(width=manifest.width, num_labels=len(manifest.tasks), max_tokens=config.max_tokens,
                                     features=tuple(_feature(name, known, manifest, encoders, config.store)
                                                    for name in config.features))
        self._column = {name: list(manifest.features).index(name) for name in config.features}

    def of_requests(self, dataset: Dataset, row_B: I64, num_candidates_B: I64) -> dict[str, Array]:
        user_B, time_B = (dataset.requests.take(name, row_B) for name in ("user", "time"))
        assert self._user_keys is not None
        return self.fetch(self._user_keys[user_B].tolist(), time_B.tolist())

    def of_user(self, raw: str | int | None, time: int) -> dict[str, Array]:
        """``RequestBatch.instances`` of one request; none for a user without a name."""
        if raw is None:
            return self.fetch([], []) | {"length": np.zeros(1, np.int64)}
        return self.fetch(user_keys(pl.Series([str(raw)])).tolist(), [time])

    def fetch(self, user: list[int], time: list[int]) -> dict[str, Array]:
        """``RequestBatch.instances`` of users at times."""
        records, length_B = self.reader.fetch(user, [one - self._wait_s for one in time], self.config.max_tokens)
        return {"length": length_B, "time": records["time"].astype(np.int64),
                "vector": self.reader.manifest.unpack_vectors(records), "label": records["label"].astype(np.float32),
                **{name: records["feature"][:, column].astype(np.int64) for name, column in self._column.items()}}


def _feature(name: str, known: Mapping[str, Feature], manifest: StoreManifest, encoders: Mapping[str, Encoder],
             store: Path) -> Feature:
    if name not in known:
        raise ConfigError(f"data.instances.features names {name!r}; features of an event are {', '.join(known)}")
    if name not in manifest.features:
        raise ConfigError(f"data.instances.features names {name!r}, which {store} does not hold; it has "
                          f"{', '.join(manifest.features) or 'none'}")
    if manifest.features[name] != encoder_digest(encoders[known[name].table]):
        raise ConfigError(f"data.instances.features names {name!r}, whose ids in {store} come from data that numbers "
                          "its values otherwise; leave it out")
    return known[name]


class BatchInstances:
    """Each request's past within the batch: the log's candidates of its user's earlier requests there."""

    fingerprint: str | None = None

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens

    def of_requests(self, dataset: Dataset, row_B: I64, num_candidates_B: I64) -> dict[str, Array]:
        user_B, time_B, logged_B = (dataset.requests.take(name, row_B).astype(np.int64)
                                    for name in ("user", "time", "num_candidates"))
        start_B = np.cumsum(num_candidates_B) - num_candidates_B
        order = np.argsort(time_B, kind="stable")
        rows = [np.zeros(0, np.int64)]
        for user, time in zip(user_B, time_B, strict=True):
            past = order[(user_B[order] == user) & (time_B[order] < time)]
            rows.append(ranges(start_B[past], logged_B[past])[-self._max_tokens:])
        row_N = np.concatenate(rows)
        request_N = np.repeat(np.arange(len(row_B)), num_candidates_B)[row_N]
        return {"length": np.asarray([len(each) for each in rows[1:]], np.int64), "row": row_N,
                "time": time_B[request_N]}


def read_instances(dataset: Dataset, config: InstancesConfig) -> Dataset:
    """``dataset`` whose batches and schema hold the tokens of a store.

    ``DataError`` when there is no whole store or it knows none of the users, ``ConfigError`` for what it cannot give.
    """
    source = StoredInstances(config, dataset.schema, dataset.encoders, dataset.user_keys)
    users = dataset.user_keys[np.linspace(0, len(dataset.user_keys) - 1, _SAMPLED_USERS).astype(np.int64)]
    if not source.reader.knows_any(users.tolist()):
        raise DataError(f"{config.store} has no instance of any user of {dataset.path}; it was made from other users")
    return replace(dataset, instances=source, schema=dataset.schema.model_copy(update={"instances": source.schema}))


def side_features(dataset: Dataset, names: tuple[str, ...] | None) -> dict[str, str]:
    """Name and encoder of the side features to store; without ``names`` all of an event but those of open ids."""
    known = {feature.name: feature.table for feature in dataset.schema.history_features
             if feature.table not in dataset.schema.open_tables}
    for name in names or ():
        if name not in known:
            raise ConfigError(f"features names {name!r}; features of an event, open ids left out, are "
                              f"{', '.join(known)}")
    return {name: encoder_digest(dataset.encoders[known[name]]) for name in (known if names is None else names)}


def instance_records(dataset: Dataset, manifest: StoreManifest, batch: RequestBatch, vector_NI: Array
                     ) -> tuple[Array, Array]:
    """(user of each, records) of the candidates of a batch that holds none but the log's."""
    row_B, count_B = batch.request_row_B.numpy(), batch.num_candidates_B.numpy()
    user_B, time_B, first_B = (dataset.requests.take(name, row_B).astype(np.int64)
                               for name in ("user", "time", "candidate_start"))
    user, time = np.repeat(dataset.user_keys[user_B], count_B), np.repeat(time_B, count_B)
    place, item = ranges(np.zeros_like(count_B), count_B), dataset.candidates.take("item", ranges(first_B, count_B))
    features = {name: ids.numpy() for name, ids in batch.candidates.items()}
    actions = [feature.name for feature in dataset.schema.event_features if feature.name in manifest.features]
    if actions:
        event = _events_of(dataset, row_B, count_B, item.astype(np.int64))
        features |= {name: np.where(event >= 0, dataset.events.take(name, np.maximum(event, 0)), 0) for name in actions}
    columns = [features[name] for name in manifest.features]
    feature_NJ = np.stack(columns, axis=1) if columns else np.zeros((len(user), 0), np.int64)
    return user, manifest.pack(time, instance_ids(user, time, place, item.astype(np.int64)), batch.label_CY.numpy(),
                               feature_NJ, vector_NI)


def _events_of(dataset: Dataset, row_B: I64, count_B: I64, item_N: I64) -> I64:
    """The event that each instance became: the first of its item at the request's time, -1 without one.

    Its features are of the action, such as a quantity or a price: known afterwards, so part of the past alone.
    """
    user_B, time_B, start_B = (dataset.requests.take(name, row_B).astype(np.int64)
                               for name in ("user", "time", "event_end"))
    at = ranges(start_B, dataset.user_start.take("start", user_B + 1) - start_B)
    request = np.repeat(np.arange(len(row_B)), dataset.user_start.take("start", user_B + 1) - start_B)
    now = dataset.events.take("time", at) == time_B[request]
    at, request = at[now], request[now]
    num_items = len(dataset.item_count)
    key, first = np.unique(request * num_items + dataset.events.take("item", at), return_index=True)
    wanted = np.repeat(np.arange(len(row_B)), count_B) * num_items + item_N
    found = np.minimum(np.searchsorted(key, wanted), max(len(key) - 1, 0))
    if len(key) == 0:
        return np.full(len(item_N), -1)
    return np.where(key[found] == wanted, at[first[found]], -1)
