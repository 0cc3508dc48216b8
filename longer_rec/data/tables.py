"""Encoders, schema, and the tables of items and users: all that follows from the training period's counts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from longer_rec.data.describe import FeatureConfig
from longer_rec.data.encode import Encoder, Vocabulary, encode_lists, save_encoders
from longer_rec.data.order import I64
from longer_rec.data.sources import LogSource
from longer_rec.data.statistics import TrainingCounts, count_contradictions, entity_encoder, entity_values
from longer_rec.schema import Feature, Schema, Table


@dataclass(frozen=True)
class Tables:
    """Encoders by table, the schema, and for each user of the store the row of its id (0: unseen in training)."""

    encoders: dict[str, Encoder]
    schema: Schema
    user_row: I64
    notes: dict[str, Any]


def write_tables(log: LogSource, counts: TrainingCounts, directory: Path) -> Tables:
    """Write items.arrow, users.arrow, schema.json and the encoders."""
    encoders: dict[str, Encoder] = {}
    notes: dict[str, Any] = {}
    item_features = _write_items(log, counts, directory, encoders, notes)
    for feature in log.config.event_features:
        encoders[feature.name] = counts.event_encoder(feature)
    user_features, user_row = _write_users(log, counts, directory, encoders, notes)
    schema = Schema(
        tables=tuple(Table(name=name, num_rows=encoder.num_rows) for name, encoder in encoders.items()),
        item_features=item_features, item_dense=tuple(f"{name}_count" for name in log.config.items.counts),
        event_features=tuple(Feature(name=one.name, table=one.name) for one in log.config.event_features),
        user_features=user_features, tasks=("label",))
    save_encoders(encoders, directory)
    (directory / "schema.json").write_text(schema.model_dump_json(indent=1), encoding="utf-8")
    return Tables(encoders, schema, user_row, notes)


def _write_items(log: LogSource, counts: TrainingCounts, directory: Path, encoders: dict[str, Encoder],
                 notes: dict[str, Any]) -> tuple[Feature, ...]:
    """items.arrow: one row per item id, row 0 the unseen item; its features and its count in the training period."""
    config, items = log.config.items, counts.items()
    source = log.entity_frame(config)
    encoders[config.name] = Vocabulary(items["key"])
    features = [Feature(name=config.name, table=config.name)]
    columns: dict[str, Any] = {config.name: np.arange(len(items) + 1)}
    notes["items_with_contradicting_features"] = count_contradictions(items, config.features)
    for one in config.features:
        values = entity_values(items, config, source, one, "item")
        encoder = encoders[one.name] = entity_encoder(one, values, "item")
        for name, ids in _item_columns(one, encoder, values, notes).items():
            columns[name] = np.concatenate([[0], ids])
            features.append(Feature(name=name, table=one.name))
    columns["count"] = np.concatenate([[0], items["count"].to_numpy()])
    for name in config.counts:
        columns[f"{name}_count"] = _log_counts(columns[name], columns["count"])
    _write_frame(columns, directory / "items.arrow")
    return tuple(features)


def _log_counts(ids: I64, count: I64) -> npt.NDArray[np.float32]:
    """log(1 + training events) of each item's value, scaled to mean 0 and spread 1 over those events."""
    per_value = np.log1p(np.bincount(ids, count))[ids]
    mean = np.average(per_value, weights=count)
    spread = np.sqrt(np.average((per_value - mean) ** 2, weights=count))
    return ((per_value - mean) / max(spread, 1e-6)).astype(np.float32)


def _item_columns(feature: FeatureConfig, encoder: Encoder, values: pl.Series, notes: dict[str, Any]) -> dict[str, I64]:
    """Ids of a single-valued feature, or of each slot of a multi-valued one (row 0 where there is no value)."""
    what = f"item feature {feature.name!r}"
    if feature.max_values is None:
        return {feature.name: encoder.encode(values, what)}
    notes[f"{feature.name}_values_beyond_max_values"] = int(
        (values.list.len().cast(pl.Int64) - feature.max_values).clip(0).sum())
    return {f"{feature.name}.{slot}": encoder.encode(values.list.get(slot, null_on_oob=True), what)
            for slot in range(feature.max_values)}


def _write_users(log: LogSource, counts: TrainingCounts, directory: Path, encoders: dict[str, Encoder],
                 notes: dict[str, Any]) -> tuple[tuple[Feature, ...], I64]:
    """users.arrow: one row per user of the store, in its order: the raw id and the encoded features."""
    config, trained = log.config.users, counts.users()
    order = counts.user_order()
    source = log.entity_frame(config)
    vocabulary = Vocabulary(trained["key"])
    user_row = vocabulary.encode(order, "user")
    features: list[Feature] = []
    columns: dict[str, Any] = {"raw user": order}
    if config.id_feature:
        encoders[config.name] = vocabulary
        features.append(Feature(name=config.name, table=config.name))
        columns[config.name] = user_row
    notes["users_with_contradicting_features"] = count_contradictions(trained, config.features)
    everyone = pl.DataFrame({"key": order}).join(trained, on="key", how="left", maintain_order="left")
    for one in config.features:
        known = entity_values(trained, config, source, one, "user")
        encoder = encoders[one.name] = entity_encoder(one, known, "user")
        values = entity_values(everyone, config, source, one, "user")
        features.append(Feature(name=one.name, table=one.name, multi_valued=one.multi_valued))
        if one.multi_valued:
            ids, length = encode_lists(encoder, values, f"user feature {one.name!r}")
            columns[one.name] = _as_list_series(ids, length)
        else:
            columns[one.name] = encoder.encode(values, f"user feature {one.name!r}")
    _write_frame(columns, directory / "users.arrow")
    return tuple(features), user_row


def _as_list_series(ids: I64, length: I64) -> pl.Series:
    offsets = np.concatenate([[0], np.cumsum(length)])
    return pl.Series(pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(ids.astype(np.int32))))


def _write_frame(columns: dict[str, Any], path: Path) -> None:
    """Arrays of ids as int32, where they fit; counts, dense features and raw values as they are."""
    narrow = {name: column.astype(np.int32) if isinstance(column, np.ndarray) and column.dtype.kind == "i"
              and name != "count" and column.max(initial=0) < 1 << 31 else column for name, column in columns.items()}
    pl.DataFrame(narrow).write_ipc(path, compression="uncompressed", compat_level=pl.CompatLevel.oldest())
