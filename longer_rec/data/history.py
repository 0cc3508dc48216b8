"""A prepared dataset, opened: memory-mapped histories and requests, and the encoders they were made with."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from longer_rec.data.describe import LogConfig
from longer_rec.data.encode import Encoder, load_encoders
from longer_rec.data.files import naming_file
from longer_rec.data.hashing import user_keys
from longer_rec.data.manifest import read_manifest, verify_files
from longer_rec.data.order import I64, U64
from longer_rec.data.partition import SPLITS
from longer_rec.data.store import Array, ColumnTable, read_frame
from longer_rec.errors import ConfigError
from longer_rec.schema import Schema, load_schema


@dataclass(frozen=True)
class UserColumn:
    """A user feature: the ids of user u are ``ids[offsets[u]:offsets[u + 1]]``; no offsets: exactly one each."""

    ids: Array
    offsets: I64 | None


class InstanceSource(Protocol):
    """Where the tokens of past instances come from; ``fingerprint`` of their content, None if it is the batch's own."""

    fingerprint: str | None

    def of_requests(self, dataset: "Dataset", row_B: I64, num_candidates_B: I64) -> dict[str, Array]:
        """``RequestBatch.instances`` of the requests at ``row_B``, whose candidates have been chosen."""


@dataclass(frozen=True)
class Dataset:
    """Requests are numbered train first, then validation, then test; ``split_rows`` gives each split's range."""

    path: Path
    schema: Schema
    config: LogConfig
    manifest: dict[str, Any]
    events: ColumnTable
    user_start: ColumnTable
    requests: ColumnTable
    candidates: ColumnTable
    items: dict[str, Array]
    item_dense: npt.NDArray[np.float32]
    item_count: I64
    users: dict[str, UserColumn]
    instances: InstanceSource | None = None

    @property
    def fingerprint(self) -> str:
        """Changes with every byte and setting that a batch depends on."""
        return self.fingerprint_with(self.instances.fingerprint if self.instances is not None else None)

    def fingerprint_with(self, store: str | None) -> str:
        """The fingerprint of this data read beside a store of instances with another one."""
        own = str(self.manifest["fingerprint"])
        return hashlib.sha256(f"{own} {store}".encode()).hexdigest() if store else own

    @property
    def summary(self) -> dict[str, Any]:
        """Counts, rates and histograms for the report."""
        return {"name": self.manifest["name"], "description": self.manifest["description"], **self.manifest["summary"]}

    def num_requests(self, split: str) -> int:
        return len(self.split_rows(split))

    def split_rows(self, split: str) -> range:
        """Rows of the requests of "train", "validation" or "test"."""
        if split not in SPLITS:
            raise ConfigError(f"split {split!r} is unknown; known are {', '.join(SPLITS)}")
        counts = [int(self.manifest["summary"]["requests"][name]) for name in SPLITS]
        start = sum(counts[:SPLITS.index(split)])
        return range(start, start + counts[SPLITS.index(split)])

    @cached_property
    def item_count_cumulative(self) -> I64:
        """Running total of the items' counts in the training period: what negatives are drawn by."""
        return np.cumsum(self.item_count)

    @cached_property
    def encoders(self) -> dict[str, Encoder]:
        """Encoders by table: raw values of a request become rows through these, and no other way."""
        return load_encoders(self.path)

    @cached_property
    def user_keys(self) -> U64:
        """What a user is known by outside this data: a hash of the raw id as text."""
        return user_keys(self.raw_users)

    @cached_property
    def raw_users(self) -> pl.Series:
        """The raw user ids in the order of the store."""
        return read_frame(self.path / "users.arrow")["raw user"]


def open_dataset(path: Path, verify: bool = True) -> Dataset:
    """Open what ``prepare`` wrote; ``verify`` compares every file with its hash, and names a damaged one.

    Raises:
        DataError: no prepared dataset, a missing or damaged file.
    """
    manifest = read_manifest(path)
    if verify:
        verify_files(path, manifest["files"])
    return view_dataset(path, manifest)


def view_dataset(path: Path, manifest: dict[str, Any]) -> Dataset:
    """The files that a manifest tells of, unverified; its hashes are not needed."""
    summary = manifest["summary"]
    count = {name: sum(summary[name].values()) for name in ("events", "requests", "stored_candidates")}
    schema = load_schema(path / "schema.json")
    items, users = _read_columns(path / "items.arrow"), _read_columns(path / "users.arrow")
    return Dataset(
        path, schema, LogConfig.model_validate(manifest["config"]), manifest,
        events=ColumnTable(path / "events.arrow", count["events"]),
        user_start=ColumnTable(path / "user_start.arrow", summary["num_users"] + 1),
        requests=ColumnTable(path / "requests.arrow", count["requests"]),
        candidates=ColumnTable(path / "candidates.arrow", count["stored_candidates"]),
        items={feature.name: items[feature.name].ids for feature in schema.item_features},
        item_dense=np.stack([items[name].ids for name in schema.item_dense], axis=1, dtype=np.float32)
        if schema.item_dense else np.zeros((len(items["count"].ids), 0), np.float32),
        item_count=items["count"].ids,
        users={feature.name: users[feature.name] for feature in schema.user_features})


def _read_columns(path: Path) -> dict[str, UserColumn]:
    """The integer columns of a small table, on the mapped file."""
    with naming_file(path):
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all().combine_chunks()
    columns: dict[str, UserColumn] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        array = column.chunk(0)
        if pa.types.is_large_list(array.type):
            columns[name] = UserColumn(_numpy(array.values), _numpy(array.offsets))
        elif name != "raw user":
            columns[name] = UserColumn(_numpy(array), None)
    return columns


def _numpy(array: pa.Array) -> npt.NDArray[Any]:
    return np.asarray(array.to_numpy(zero_copy_only=True))
