"""Small logs on disk, and their requests worked out row by row in plain Python."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import yaml

from longer_rec.data.history import Dataset, open_dataset
from longer_rec.data.prepare import prepare
from longer_rec.data.store import ColumnTable

DESCRIPTION = {
    "name": "small",
    "events": {"files": ["log.parquet"]},
    "columns": {"user": "who", "item": "what", "time": "when"},
    "items": {"features": [{"name": "kind"}]},
    "event_features": [{"name": "price", "type": "bucketed", "boundaries": [2, 4]},
                       {"name": "place", "type": "hashed", "num_buckets": 5}],
    "candidates": {"kind": "negatives", "per_positive": 2},
}
LABELLED = {**DESCRIPTION, "columns": {**DESCRIPTION["columns"], "label": {"column": "liked"}},
            "candidates": {"kind": "rows"}}


def random_log(num_rows: int = 600, num_users: int = 12, num_items: int = 40, seed: int = 0) -> pl.DataFrame:
    """Rows with many ties in time; items of the last tenth of the time are partly new."""
    random = np.random.default_rng(seed)
    when = random.integers(0, 150, num_rows)
    what = random.integers(0, num_items, num_rows) + np.where(when > 140, num_items // 2, 0)
    return pl.DataFrame({
        "who": [f"a visitor with number {one}" for one in random.integers(0, num_users, num_rows)],
        "what": what, "when": when + 1000, "kind": what % 7,
        "price": random.uniform(0, 6, num_rows), "place": [f"place {one}" for one in what % 9],
        "liked": random.integers(0, 2, num_rows)}).unique(["who", "what", "when"], maintain_order=True)


def write_log(directory: Path, log: pl.DataFrame, description: dict = DESCRIPTION) -> Path:
    """Write log.parquet and its YAML; returns the YAML's path."""
    directory.mkdir(parents=True, exist_ok=True)
    log.write_parquet(directory / "log.parquet")
    (directory / "log.yaml").write_text(yaml.safe_dump(description))
    return directory / "log.yaml"


def prepared(directory: Path, log: pl.DataFrame, description: dict = DESCRIPTION) -> Dataset:
    return open_dataset(prepare(str(write_log(directory, log, description)), directory / "out"))


def whole(table: ColumnTable, name: str) -> np.ndarray:
    """All values of a column."""
    return table.take(name, np.arange(table.num_rows))


@dataclass(frozen=True)
class NaiveRequest:
    user: str
    time: int
    history: list[tuple[int, int]]
    candidates: list[tuple[int, float]]


def naive_requests(log: pl.DataFrame, labelled: bool) -> dict[tuple[str, int], NaiveRequest]:
    """(user, time) -> the request: sorted (time, raw item) of its history, sorted (raw item, label) candidates."""
    requests = {}
    rows = log.to_dicts()
    for user, time in {(row["who"], row["when"]) for row in rows}:
        mine = [row for row in rows if row["who"] == user]
        here = {(row["what"], float(row["liked"]) if labelled else 1.0) for row in mine if row["when"] == time}
        history = sorted((row["when"], row["what"]) for row in mine if row["when"] < time)
        requests[user, time] = NaiveRequest(user, time, history, sorted(here))
    return requests
