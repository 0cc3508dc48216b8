"""The log, brought into canonical columns and cut into partitions of users that fit into memory one at a time.

Partitions are ranges of the user's hash, so that the order (hash of user, user, time, tie) of all partitions one
after the other does not depend on their number.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from longer_rec.data.describe import ColumnsConfig, FeatureConfig, LabelConfig, LogConfig
from longer_rec.data.encode import as_ids, as_numbers
from longer_rec.data.hashing import hash_values
from longer_rec.data.order import hash_u64
from longer_rec.data.sources import LogSource
from longer_rec.data.store import read_frame
from longer_rec.errors import DataError

_USER_SEED, _ITEM_SEED = 21, 22
_TO_SECONDS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_MAX_TIME = 1 << 40  # seconds: year 36,000; beyond it the unit is wrong


@dataclass
class LogCounts:
    """What was read, dropped and seen on the way."""

    rows: int = 0
    bad_rows: int = 0
    duplicate_rows: int = 0
    first_time: int = _MAX_TIME
    last_time: int = -1
    bad_example: str = ""

    def as_dict(self) -> dict[str, int]:
        """What the manifest keeps of them."""
        return {"rows": self.rows, "bad_rows_dropped": self.bad_rows, "duplicate_rows": self.duplicate_rows,
                "first_time": self.first_time, "last_time": self.last_time}


def log_columns(config: LogConfig) -> list[str]:
    """The raw columns of the log that the description uses."""
    columns = [config.columns.user, config.columns.item, config.columns.time]
    columns += [config.columns.label.column] if config.columns.label else []
    for feature in (*config.event_features, *_row_features(config)):
        columns += feature.source_columns
    return list(dict.fromkeys(columns))


def _row_features(config: LogConfig) -> list[FeatureConfig]:
    """Item and user features that live in columns of the log."""
    return [feature for entity in (config.items, config.users) if entity.source is None for feature in entity.features]


@dataclass
class Spill:
    """Partition files below ``directory``; rows are written as they come and read back sorted."""

    directory: Path
    num_partitions: int
    counts: LogCounts = field(default_factory=LogCounts)
    _writers: dict[int, pa.RecordBatchFileWriter] = field(default_factory=dict)

    def path(self, partition: int) -> Path:
        return self.directory / f"{partition:05d}.arrow"

    def add(self, frame: pl.DataFrame) -> None:
        user_hash = hash_values(frame["user"], _USER_SEED)
        bits = np.uint64(64 - (self.num_partitions - 1).bit_length())
        partition = (user_hash >> bits).astype(np.int64) if self.num_partitions > 1 else np.zeros(len(frame), np.int64)
        order = np.argsort(partition, kind="stable")
        ends = np.cumsum(np.bincount(partition, minlength=self.num_partitions))
        table = frame.with_columns(user_hash=pl.Series(user_hash))[order].to_arrow(compat_level=pl.CompatLevel.oldest())
        for index in np.unique(partition).tolist():
            start = int(ends[index - 1]) if index else 0
            self._write(index, table.slice(start, int(ends[index]) - start))

    def _write(self, index: int, table: pa.Table) -> None:
        if index not in self._writers:
            options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
            self._writers[index] = pa.ipc.new_file(str(self.path(index)), table.schema, options=options)
        self._writers[index].write_table(table)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def sort(self, config: LogConfig) -> Iterator[pl.DataFrame]:
        """Each partition into (user's hash, user, time, tie) order, in place; duplicates are dealt with."""
        for index in range(self.num_partitions):
            path = self.path(index)
            if path.exists():
                frame = _sort_frame(read_frame(path), config, self.counts)
                frame.write_ipc(path.with_suffix(".sorted"), compression="lz4", compat_level=pl.CompatLevel.oldest())
                path.with_suffix(".sorted").replace(path)
                yield frame

    def frames(self) -> Iterator[pl.DataFrame]:
        """The partitions, one after the other."""
        for index in range(self.num_partitions):
            if self.path(index).exists():
                yield read_frame(self.path(index))


def spill_log(source: LogSource, directory: Path, num_partitions: int) -> Spill:
    """Read the log once, check each row, and write it in partitions; ``DataError`` names the file and the row."""
    spill = Spill(directory, num_partitions)
    config, counts = source.config, spill.counts
    last_time: dict[Path, int] = {}
    rows_of_file: dict[Path, int] = {}
    id_types: dict[str, pl.DataType] = {}
    try:
        for path, raw in source.event_frames(log_columns(config)):
            first_row = rows_of_file.get(path, 0)
            rows_of_file[path] = first_row + len(raw)
            frame = canonical_frame(raw, config, str(path))
            frame = _unify_id_types(frame, id_types, path)
            frame = _drop_bad(frame, config, counts, path, first_row)
            if config.require_sorted and len(frame):
                _check_sorted(frame, path, last_time)
            if len(frame):
                counts.rows += len(frame)
                counts.first_time = min(counts.first_time, int(frame["time"].min()))  # type: ignore[arg-type]
                counts.last_time = max(counts.last_time, int(frame["time"].max()))  # type: ignore[arg-type]
                spill.add(frame)
    finally:
        spill.close()
    if counts.rows == 0:
        raise DataError(f"the log {config.name!r} has no valid rows; check the files and columns")
    if counts.bad_rows > config.max_bad_fraction * (counts.rows + counts.bad_rows):
        raise DataError(f"{counts.bad_rows} of {counts.rows + counts.bad_rows} rows are bad, more than "
                        f"max_bad_fraction={config.max_bad_fraction} (the first: {counts.bad_example}); mend the log")
    return spill


def canonical_frame(raw: pl.DataFrame, config: LogConfig, where: str) -> pl.DataFrame:
    """user, item, time (int64 seconds, null where invalid), label, and features as ``e:name`` and ``r:name``."""
    columns: ColumnsConfig = config.columns
    series = [as_ids(raw[columns.user], f"{where}, column {columns.user!r}").alias("user"),
              as_ids(raw[columns.item], f"{where}, column {columns.item!r}").alias("item"),
              _to_seconds(raw[columns.time], columns, where).alias("time")]
    if columns.label:
        series.append(_to_label(raw, columns.label, where).alias("label"))
    for prefix, features in (("e", config.event_features), ("r", _row_features(config))):
        for feature in features:
            series.append(_raw_feature(raw, feature, where).alias(f"{prefix}:{feature.name}"))
    return pl.DataFrame(series)


def _raw_feature(raw: pl.DataFrame, feature: FeatureConfig, where: str) -> pl.Series:
    values, what = raw[feature.source_columns[0]], f"{where}, column {feature.source_columns[0]!r}"
    if feature.type == "bucketed":
        return pl.Series(as_numbers(values, what))
    return as_ids(values, what)


def _to_seconds(values: pl.Series, columns: ColumnsConfig, where: str) -> pl.Series:
    if isinstance(values.dtype, pl.Datetime) or values.dtype == pl.Date:
        seconds = values.cast(pl.Datetime("us")).dt.epoch("s")
    elif values.dtype.is_numeric():
        numbers = values.cast(pl.Float64).fill_nan(None) if values.dtype.is_float() else values
        seconds = (numbers // _TO_SECONDS[columns.time_unit]).cast(pl.Int64, strict=False)
    else:
        raise DataError(f"{where}: column {columns.time!r} is {values.dtype}; times are numbers (columns.time_unit) "
                        "or dates: convert it")
    return seconds.set((seconds < 0) | (seconds > _MAX_TIME), None)


def _to_label(raw: pl.DataFrame, label: LabelConfig, where: str) -> pl.Series:
    """Float32 in [0, 1]; null where the column is null: such a row is no candidate."""
    values, what = raw[label.column], f"{where}, column {label.column!r}"
    if label.positive:
        return as_ids(values, what).cast(pl.String).is_in(list(label.positive)).cast(pl.Float32)
    numbers = pl.Series(as_numbers(values, what)).fill_nan(None)
    if label.at_least is not None:
        return (numbers >= label.at_least).cast(pl.Float32)
    outside = numbers.filter((numbers < 0) | (numbers > 1))
    if len(outside):
        raise DataError(f"{what}: label {outside[0]} is outside [0, 1]; use at_least or positive to make it one")
    return numbers.cast(pl.Float32)


def _unify_id_types(frame: pl.DataFrame, known: dict[str, pl.DataType], path: Path) -> pl.DataFrame:
    """One type for the whole log: 7 and "7" must not be two users. A stretch of nulls takes the type known so far."""
    for name in ("user", "item", *(column for column in frame.columns if column[1:2] == ":")):
        dtype = known.setdefault(name, frame.schema[name])
        if dtype == frame.schema[name]:
            continue
        if frame[name].null_count() < len(frame):
            raise DataError(f"{path}: {name} is {frame.schema[name]} here and {dtype} before; "
                            "give all files the same type (for CSV: `dtypes`)")
        frame = frame.with_columns(pl.col(name).cast(dtype))
    return frame


def _drop_bad(frame: pl.DataFrame, config: LogConfig, counts: LogCounts, path: Path, first_row: int) -> pl.DataFrame:
    bad = frame.select(pl.any_horizontal(pl.col("user", "item", "time").is_null())).to_series()
    if not bad.any():
        return frame
    row = int(bad.arg_true()[0])
    missing = next(name for name in ("user", "item", "time") if frame[name][row] is None)
    column = getattr(config.columns, missing)
    what = f"{path}, row {first_row + row}: {column!r} is " + (
        "null, NaN, negative or out of range" if missing == "time" else "null")
    if config.bad_rows == "refuse":
        raise DataError(f"{what} ({int(bad.sum())} such rows near it); mend the log or set bad_rows: drop")
    counts.bad_rows += int(bad.sum())
    counts.bad_example = counts.bad_example or what
    return frame.filter(~bad)


def _check_sorted(frame: pl.DataFrame, path: Path, last_time: dict[Path, int]) -> None:
    times = np.concatenate([[last_time.get(path, 0)], frame["time"].to_numpy()])
    back = np.flatnonzero(np.diff(times) < 0)
    if len(back):
        raise DataError(f"{path}: time goes back from {times[back[0]]} to {times[back[0] + 1]}; sort the log or "
                        "drop require_sorted (rows are sorted while preparing)")
    last_time[path] = int(times[-1])


def _sort_frame(frame: pl.DataFrame, config: LogConfig, counts: LogCounts) -> pl.DataFrame:
    """Ties in time are ordered by a hash of what the rows say: neither the file's order nor the item's id leaks."""
    tie = hash_u64(config.tie_seed, frame["user_hash"].to_numpy(), frame["time"].to_numpy(),
                   hash_values(frame["item"], _ITEM_SEED))
    rest = [name for name in frame.columns if name not in ("user_hash", "user", "time")]
    frame = frame.with_columns(tie=pl.Series(tie)).sort("user_hash", "user", "time", "tie", *rest, nulls_last=True)
    frame = frame.drop("tie")
    same = [pl.col(name) == pl.col(name).shift(1) for name in ("user", "item", "time")]  # equal rows are neighbours
    repeated = frame.select(pl.all_horizontal(same).fill_null(False)).to_series()
    found = int(repeated.sum())
    counts.duplicate_rows += found
    if found and config.duplicates == "refuse":
        row = frame.filter(repeated).row(0, named=True)
        raise DataError(f"user {row['user']!r}, item {row['item']!r}, time {row['time']} has two rows (and {found - 1} "
                        "more such rows near it); clean the log or set duplicates: keep or drop")
    return frame.filter(~repeated) if found and config.duplicates == "drop" else frame
