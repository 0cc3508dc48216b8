"""The last pass: encoded events, requests and candidates, written partition by partition."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longer_rec.data.describe import LogConfig
from longer_rec.data.order import I64
from longer_rec.data.partition import SPLITS, Cuts, Partition, view_partition
from longer_rec.data.sources import LogSource
from longer_rec.data.spill import Spill
from longer_rec.data.store import Array, ColumnTable, ColumnWriter
from longer_rec.data.tables import Tables
from longer_rec.errors import DataError

_REQUEST = {"user": np.int32, "time": np.int64, "event_end": np.int64, "candidate_start": np.int64,
            "num_candidates": np.int32}
_COPY_ROWS = 1 << 20


def _zeros() -> I64:
    return np.zeros(3, np.int64)


@dataclass
class StoreReport:
    """Counts by split (train, validation, test), and histograms by value."""

    requests: I64 = field(default_factory=_zeros)
    stored_candidates: I64 = field(default_factory=_zeros)
    candidates: I64 = field(default_factory=_zeros)
    label_sum: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    events: I64 = field(default_factory=_zeros)
    unseen_item_events: I64 = field(default_factory=_zeros)
    unseen_item_candidates: I64 = field(default_factory=_zeros)
    unseen_user_requests: I64 = field(default_factory=_zeros)
    requests_without_candidates: I64 = field(default_factory=_zeros)
    unseen_values: dict[str, I64] = field(default_factory=dict)
    events_per_user: I64 = field(default_factory=lambda: np.zeros(1, np.int64))
    history_length: I64 = field(default_factory=lambda: np.zeros(1, np.int64))
    num_users: int = 0
    log: dict[str, Any] = field(default_factory=dict)

    def by_split(self, values: Array) -> dict[str, Any]:
        return dict(zip(SPLITS, values.tolist(), strict=True))

    def as_dict(self) -> dict[str, Any]:
        rate = np.divide(self.label_sum, self.candidates, out=np.zeros(3), where=self.candidates > 0)
        scalars = ("requests", "stored_candidates", "candidates", "events", "unseen_item_events",
                   "unseen_item_candidates", "unseen_user_requests", "requests_without_candidates")
        return {**{name: self.by_split(getattr(self, name)) for name in scalars},
                "label_mean": self.by_split(rate.round(6)),
                "unseen_values": {name: self.by_split(values) for name, values in self.unseen_values.items()},
                "num_users": self.num_users, "events_per_user": percentiles(self.events_per_user),
                "history_length": percentiles(self.history_length),
                "history_length_histogram": power_of_two_histogram(self.history_length), **self.log}


def percentiles(histogram: I64) -> dict[str, float]:
    """Mean, median, 90th percentile and maximum of counts by value (0, 1, 2, ...)."""
    total = int(histogram.sum())
    if total == 0:
        return {}
    upto = np.cumsum(histogram)
    return {"mean": round(float((histogram * np.arange(len(histogram))).sum() / total), 2),
            "p50": int(np.searchsorted(upto, 0.5 * total)), "p90": int(np.searchsorted(upto, 0.9 * total)),
            "max": int(np.flatnonzero(histogram)[-1])}


def power_of_two_histogram(counts: I64) -> list[tuple[int, int, int]]:
    """(low, high, requests) for lengths 0, 1, 2 - 3, 4 - 7, ..."""
    bins, low = [], 0
    while low < len(counts):
        high = max(2 * low - 1, low)
        bins.append((low, high, int(counts[low:high + 1].sum())))
        low = high + 1
    return bins


def write_store(log: LogSource, spill: Spill, cuts: Cuts, tables: Tables, directory: Path) -> StoreReport:
    """Write events.arrow, candidates.arrow, requests.arrow and user_start.arrow; requests stand split by split."""
    report = StoreReport(log=spill.counts.as_dict())
    config = log.config
    of_events = {one.name: np.int64 if one.type == "open" else np.int32 for one in config.event_features}
    event_dtypes = {"item": np.int32, "time": np.int64, **of_events}
    candidate_dtypes: dict[str, npt.DTypeLike] = {"item": np.int32}
    if config.candidates.kind == "rows":
        candidate_dtypes["label"] = np.float32
    parts = [directory / f"requests.{split}.arrow" for split in SPLITS]
    with (ColumnWriter(directory / "events.arrow", event_dtypes) as events,
          ColumnWriter(directory / "candidates.arrow", candidate_dtypes) as candidates,
          ColumnWriter(directory / "user_start.arrow", {"start": np.int64}) as starts,
          ColumnWriter(parts[0], _REQUEST) as train, ColumnWriter(parts[1], _REQUEST) as validation,
          ColumnWriter(parts[2], _REQUEST) as test):
        for frame in spill.frames():
            part = view_partition(frame, config)
            item = tables.encoders[config.items.name].encode(frame["item"], "item")
            split = cuts.split_of(part, np.arange(len(frame)))
            first_event, first_user = events.num_rows, starts.num_rows
            starts.append({"start": _append_events(part, item, split, tables, config, events, report)})
            requests, request_split = _append_candidates(part, item, split, tables, config, candidates, report)
            requests = requests | {"event_end": requests["event_end"] + first_event}
            _count_requests(part, requests, request_split, first_event, tables.user_row[first_user:], report)
            requests["user"] = requests["user"] + first_user
            for index, writer in enumerate((train, validation, test)):
                writer.append({name: column[request_split == index] for name, column in requests.items()})
        starts.append({"start": np.asarray([events.num_rows])})
        report.num_users = starts.num_rows - 1
    _join_requests(parts, report.requests.tolist(), directory)
    _require_requests(config, report)
    return report


def _append_events(part: Partition, item: I64, split: I64, tables: Tables, config: LogConfig, events: ColumnWriter,
                   report: StoreReport) -> I64:
    """Write the rows that enter the history; returns the first event of each user."""
    keep = part.is_event
    columns: dict[str, Array] = {"item": item[keep], "time": part.time[keep]}
    for feature in config.event_features:
        raw = part.frame[f"e:{feature.name}"]
        ids = tables.encoders[feature.name].encode(raw, f"event feature {feature.name!r}")
        unseen = keep & (ids == 0) & raw.is_not_null().to_numpy()
        report.unseen_values.setdefault(feature.name, _zeros())[:] += np.bincount(split[unseen], minlength=3)
        columns[feature.name] = ids[keep]
    start = events.num_rows + _exclusive_sum(keep)[part.user_start]
    events.append(columns)
    report.events += np.bincount(split[keep], minlength=3)
    report.unseen_item_events += np.bincount(split[keep & (item == 0)], minlength=3)
    per_user = np.bincount(part.user_of_row[keep], minlength=len(part.user_start))
    report.events_per_user = _add_histogram(report.events_per_user, per_user)
    return start


def _append_candidates(part: Partition, item: I64, split: I64, tables: Tables, config: LogConfig,
                       candidates: ColumnWriter, report: StoreReport) -> tuple[dict[str, Array], I64]:
    """Write the candidates; returns the columns of their requests (users and events counted within the partition)
    and each request's split.

    Positives that training never saw are dropped (and counted): negatives are always known, so an unknown candidate
    would give its label away.
    """
    rows = np.flatnonzero(part.is_candidate)
    report.unseen_item_candidates += np.bincount(split[rows[item[rows] == 0]], minlength=3)
    if config.candidates.kind == "negatives":
        key = part.group_of_row[rows] * tables.encoders[config.items.name].num_rows + item[rows]
        rows = rows[np.unique(key, return_index=True)[1]]  # a product twice in a basket is one candidate
        rows = rows[item[rows] != 0]
    groups, num_candidates = np.unique(part.group_of_row[rows], return_counts=True)
    lost = np.setdiff1d(part.request_groups, groups)
    report.requests_without_candidates += np.bincount(split[part.group_start[lost]], minlength=3)
    first_row = part.group_start[groups]
    stored = np.bincount(split[rows], minlength=3)
    columns: dict[str, Array] = {"item": item[rows]}
    if config.candidates.kind == "rows":
        columns["label"] = part.frame["label"].to_numpy()[rows]
    report.stored_candidates += stored
    report.candidates += stored * (1 + (config.candidates.per_positive or 0))
    report.label_sum += np.bincount(split[rows], columns.get("label"), minlength=3)
    requests = {"user": part.user_of_row[first_row], "time": part.time[first_row],
                "event_end": _exclusive_sum(part.is_event)[first_row],
                "candidate_start": candidates.num_rows + np.cumsum(num_candidates) - num_candidates,
                "num_candidates": num_candidates}
    candidates.append(columns)
    return requests, split[first_row]


def _count_requests(part: Partition, requests: dict[str, Array], split: I64, first_event: int, user_row: I64,
                    report: StoreReport) -> None:
    report.requests += np.bincount(split, minlength=3)
    report.unseen_user_requests += np.bincount(split[user_row[requests["user"]] == 0], minlength=3)
    user_first = first_event + _exclusive_sum(part.is_event)[part.user_start]
    report.history_length = _add_histogram(report.history_length, requests["event_end"] - user_first[requests["user"]])


def _exclusive_sum(mask: npt.NDArray[np.bool_]) -> I64:
    return np.cumsum(mask) - mask


def _add_histogram(histogram: I64, values: I64) -> I64:
    counts = np.bincount(values, minlength=len(histogram))
    counts[:len(histogram)] += histogram
    return counts


def _join_requests(parts: list[Path], counts: list[int], directory: Path) -> None:
    """requests.arrow: train, validation, test, one after the other."""
    with ColumnWriter(directory / "requests.arrow", _REQUEST) as requests:
        for path, count in zip(parts, counts, strict=True):
            table = ColumnTable(path, count)
            for start in range(0, count, _COPY_ROWS):
                rows = np.arange(start, min(start + _COPY_ROWS, count))
                requests.append({name: table.take(name, rows) for name in _REQUEST})
            path.unlink()


def _require_requests(config: LogConfig, report: StoreReport) -> None:
    for split, fraction, count in zip(SPLITS, config.split.fractions, report.requests.tolist(), strict=True):
        if fraction and not count:
            raise DataError(f"the {split} split is empty: {report.requests.sum()} requests, split.fractions="
                            f"{config.split.fractions}; use a longer log, other fractions, or 0 for this split")
    positives, candidates = float(report.label_sum[0]), int(report.candidates[0])
    if config.candidates.kind == "rows" and positives in (0.0, float(candidates)):
        raise DataError(f"all {candidates} labels of the training period are {int(positives > 0)}: there is nothing to "
                        "learn; check columns.label (its column, at_least or positive)")
