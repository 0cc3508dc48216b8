"""What the training period knows: items, values, users; and the encoders made from it."""

from dataclasses import dataclass, field

import numpy as np
import polars as pl

from longer_rec.data.describe import EntityConfig, FeatureConfig, LogConfig
from longer_rec.data.encode import (
    Bucketed,
    Encoder,
    Hashed,
    Open,
    as_ids,
    as_lists,
    as_numbers,
    build_vocabulary,
    flatten,
)
from longer_rec.data.hashing import hash_values
from longer_rec.data.order import hash_u64
from longer_rec.data.partition import Mask, Partition
from longer_rec.errors import DataError

_MERGE_ROWS = 1 << 20
_SAMPLE_ROWS = 1 << 19


@dataclass
class KeyedCounts:
    """Rows per key, with the smallest and largest value of each column beside it; partial results are merged."""

    columns: tuple[str, ...] = ()
    _parts: list[pl.DataFrame] = field(default_factory=list)

    def add(self, key: pl.Series, values: pl.DataFrame) -> None:
        aggregates = [op for name in self.columns
                      for op in (pl.col(name).min(), pl.col(name).max().alias(f"max {name}"))]
        frame = pl.DataFrame([key.alias("key"), *(values[name] for name in self.columns)])
        self._parts.append(frame.group_by("key").agg(pl.len().cast(pl.Int64).alias("count"), *aggregates))
        if sum(len(part) for part in self._parts) > _MERGE_ROWS:
            self._parts = [self.merged()]

    def merged(self) -> pl.DataFrame:
        """key, count, and each column's smallest and ``max``imum value; sorted by key."""
        aggregates = [op for name in self.columns for op in (pl.col(name).min(), pl.col(f"max {name}").max())]
        return pl.concat(self._parts).group_by("key").agg(pl.col("count").sum(), *aggregates).sort("key")


@dataclass
class ValueSample:
    """At most 2^19 values, those with the smallest hash of their row: a sample that no order of rows changes."""

    _hash: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    _value: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def add(self, row_hash: np.ndarray, value: np.ndarray) -> None:
        known = ~np.isnan(value)
        hashed = np.concatenate([self._hash, row_hash[known]])
        values = np.concatenate([self._value, value[known]])
        if len(hashed) > _SAMPLE_ROWS:
            keep = np.argpartition(hashed, _SAMPLE_ROWS)[:_SAMPLE_ROWS]
            hashed, values = hashed[keep], values[keep]
        self._hash, self._value = hashed, values

    def boundaries(self, quantiles: int) -> tuple[float, ...]:
        return quantile_boundaries(self._value, quantiles)


def quantile_boundaries(values: np.ndarray, quantiles: int) -> tuple[float, ...]:
    """The distinct inner boundaries of equally frequent intervals: fewer where values repeat."""
    if len(values) == 0:
        return ()
    inner = np.quantile(values, np.linspace(0, 1, quantiles + 1)[1:-1], method="higher")
    return tuple(float(value) for value in np.unique(inner))


class TrainingCounts:
    """Accumulates over partitions what encoders need."""

    def __init__(self, config: LogConfig) -> None:
        self._config = config
        self._item_columns = self._row_columns(config.items)
        self._user_columns = self._row_columns(config.users)
        self._items = KeyedCounts(self._item_columns)
        self._users = KeyedCounts(self._user_columns)
        self._values = {feature.name: KeyedCounts() for feature in config.event_features if feature.type == "id"}
        self._samples = {feature.name: ValueSample() for feature in config.event_features if feature.quantiles}
        self._user_order: list[pl.Series] = []

    @staticmethod
    def _row_columns(entity: EntityConfig) -> tuple[str, ...]:
        return () if entity.source else tuple(f"r:{feature.name}" for feature in entity.features)

    def add(self, part: Partition, in_training: Mask) -> None:
        self._user_order.append(part.frame["user"].gather(part.user_start))
        frame = part.frame.filter(pl.Series(in_training))
        self._items.add(frame["item"], frame)
        self._users.add(frame["user"], frame)
        for name, counts in self._values.items():
            counts.add(frame[f"e:{name}"], frame)
        for name, sample in self._samples.items():
            row_hash = hash_u64(frame["user_hash"].to_numpy(), frame["time"].to_numpy(), hash_values(frame["item"], 0))
            sample.add(row_hash, frame[f"e:{name}"].to_numpy())

    def items(self) -> pl.DataFrame:
        """Items of the training period that are frequent enough, sorted."""
        items = self._items.merged()
        return items.filter(pl.col("count") >= self._config.items.min_count)

    def users(self) -> pl.DataFrame:
        """Users of the training period, sorted."""
        return self._users.merged()

    def user_order(self) -> pl.Series:
        """All users, as the history store has them."""
        return pl.concat(self._user_order).alias("user")

    def event_encoder(self, feature: FeatureConfig) -> Encoder:
        if feature.name in self._values:
            merged = self._values[feature.name].merged()
            return build_vocabulary(merged.filter(pl.col("count") >= feature.min_count)["key"])
        if feature.name in self._samples and feature.quantiles:
            return Bucketed(self._samples[feature.name].boundaries(feature.quantiles))
        return fixed_encoder(feature)


def fixed_encoder(feature: FeatureConfig) -> Encoder:
    """The encoder of a feature whose settings alone decide it."""
    if feature.num_buckets is not None:
        return Hashed(feature.num_buckets)
    if feature.type == "open":
        return Open()
    return Bucketed(feature.boundaries)


def entity_values(known: pl.DataFrame, entity: EntityConfig, source: pl.DataFrame | None,
                  feature: FeatureConfig, what: str) -> pl.Series:
    """Raw values of a feature (lists when multi-valued) for each ``key`` of ``known``; null where it has none."""
    if source is None or entity.key is None:
        values = known[f"r:{feature.name}"]
    elif feature.columns:
        tokens = [pl.format(f"{column}={{}}", pl.col(column)) for column in feature.columns]
        values = _join(known, source, entity.key, pl.concat_list(tokens).list.drop_nulls(), what)
    else:
        values = _join(known, source, entity.key, pl.col(feature.source_columns[0]), what)
    return as_lists(values, feature.separator, f"{what} feature {feature.name!r}") if feature.multi_valued else values


def _join(known: pl.DataFrame, source: pl.DataFrame, key: str, value: pl.Expr, what: str) -> pl.Series:
    keys = as_ids(source[key], f"{what} key {key!r}")
    if keys.dtype != known["key"].dtype:
        raise DataError(f"{what} key {key!r} is {keys.dtype} in its file and {known['key'].dtype} in the log; "
                        "give both the same type")
    right = source.select(keys.alias("key"), value.alias("value"))
    return known.select("key").join(right, on="key", how="left", maintain_order="left")["value"]


def entity_encoder(feature: FeatureConfig, values: pl.Series, what: str) -> Encoder:
    """The encoder of an item or user feature from its values in the training period."""
    if feature.type == "id":
        flat = flatten(values) if feature.multi_valued else values
        counts = as_ids(flat.drop_nulls(), f"{what} feature {feature.name!r}").alias("v").value_counts(name="n")
        return build_vocabulary(counts.filter(pl.col("n") >= feature.min_count)["v"])
    if feature.quantiles:
        numbers = as_numbers(values, f"{what} feature {feature.name!r}")
        return Bucketed(quantile_boundaries(numbers[~np.isnan(numbers)], feature.quantiles))
    return fixed_encoder(feature)


def count_contradictions(frame: pl.DataFrame, features: tuple[FeatureConfig, ...]) -> int:
    """Keys whose log rows disagree on some feature."""
    columns = [f"r:{feature.name}" for feature in features if f"r:{feature.name}" in frame.columns]
    differs = [pl.col(column).ne_missing(pl.col(f"max {column}")) for column in columns]
    return len(frame.filter(pl.any_horizontal(differs))) if differs else 0
