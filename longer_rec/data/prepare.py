"""From a described log to a prepared dataset: history store, request index, encoders, schema and manifest.

Four passes, of which the first alone sees the log: spill it in partitions of users; sort each partition; count the
training period; encode and write. Lookups are counted of what was written. Memory holds one partition and the
vocabularies, never the log.
"""

import fcntl
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from longer_rec.data.datasets import load_source
from longer_rec.data.frequency import LOOKUPS, write_lookups
from longer_rec.data.history import view_dataset
from longer_rec.data.manifest import MANIFEST, make_manifest, read_manifest, settings_hash, write_manifest
from longer_rec.data.partition import SPLITS, Cuts, TimeHistogram, view_partition
from longer_rec.data.sources import LogSource
from longer_rec.data.spill import Spill, spill_log
from longer_rec.data.statistics import TrainingCounts
from longer_rec.data.tables import write_tables
from longer_rec.data.writer import write_store
from longer_rec.errors import ConfigError, DataError

_PARTITION_ROWS = 1 << 18
_SKEW_ROWS = 100
_MAX_PARTITIONS = 512  # each is an open file while the log is spilled


def prepare(source: str, out: Path, *, overrides: Sequence[str] = ()) -> Path:
    """Prepare a built-in log or the one that a YAML file describes; returns ``out``.

    An ``out`` made from the same settings and files is left as it is. ``ConfigError`` or ``DataError`` otherwise,
    and for every fault of the description or the log; nothing half-written stays behind.
    """
    log = load_source(source, overrides)
    inputs = log.input_hashes()
    key = settings_hash(log, inputs)
    if _is_prepared(out, key):
        return out
    with _building(out) as directory:
        spill_directory = directory / "spill"
        spill_directory.mkdir()
        spill = spill_log(log, spill_directory, _num_partitions(log))
        cuts = _sort_and_cut(spill, log)
        counts = _count_training(spill, log, cuts)
        tables = write_tables(log, counts, directory)
        report = write_store(log, spill, cuts, tables, directory)
        shutil.rmtree(spill_directory)
        manifest = make_manifest(log, key, inputs, tables, report)
        manifest["summary"]["lookups"] = write_lookups(view_dataset(directory, manifest), directory / LOOKUPS)
        write_manifest(directory, manifest)
    return out


def summary_lines(out: Path, detail: bool = False) -> list[str]:
    """A prepared dataset for reading: what is in it, what was dropped, what training never saw, and how unequally
    rows are looked up: of tables of 100 rows or more, with ``detail`` of all."""
    summary = read_manifest(out)["summary"]
    total = {name: sum(summary[name].values()) for name in ("events", "candidates", "requests_without_candidates")}
    requests = ", ".join(f"{split} {summary['requests'][split]:,}" for split in SPLITS)
    positive = ", ".join(f"{split} {summary['label_mean'][split]:.1%}" for split in SPLITS)
    unseen = ", ".join(f"{split} {summary['unseen_item_candidates'][split]:,}" for split in SPLITS[1:])
    return [f"{summary['num_users']:,} users, {total['events']:,} events, {total['candidates']:,} candidates",
            f"requests: {requests}; positive candidates: {positive}",
            f"dropped: {summary['bad_rows_dropped']:,} bad rows, {total['requests_without_candidates']:,} requests of "
            f"items that training never saw; duplicate rows: {summary['duplicate_rows']:,}",
            f"candidates unseen in training: {unseen}", *_skew_lines(summary, detail)]


def _skew_lines(summary: dict[str, Any], detail: bool) -> list[str]:
    found = summary.get("lookups")
    if found is None:
        return ["lookups of rows: not counted by the version that prepared this; `longer-rec prepare` into another "
                "folder counts them"]
    lines = [f"lookups of rows in an epoch, data.max_events={found['max_events']}:"]
    for table, one in sorted(found["tables"].items(), key=lambda item: -summary["tables"][item[0]]):
        if detail or summary["tables"][table] >= _SKEW_ROWS:
            shares = ", ".join(f"{part} have {share:.1%}" for part, share in zip(("1%", "10%", "50%"), one["hottest"],
                                                                           strict=True))
            lines.append(f"  {table}: {one['lookups']:,.0f}; of its {summary['tables'][table]:,} rows the hottest "
                         f"{shares}")
    return lines


def _is_prepared(out: Path, key: str) -> bool:
    if not out.exists():
        return False
    if out.is_dir() and not any(out.iterdir()):
        return False
    if not (out / MANIFEST).is_file():
        raise ConfigError(f"{out} exists and is no prepared dataset; choose another --out or remove it")
    if read_manifest(out)["settings_hash"] != key:
        raise ConfigError(f"{out} was prepared from other settings or files; choose another --out or remove it")
    return True


@contextmanager
def _building(out: Path) -> Iterator[Path]:
    """``out.tmp``, which becomes ``out`` at the end and goes away on any error, an interrupt included."""
    directory = out.with_name(out.name + ".tmp")
    try:
        with _claimed(directory):
            try:
                yield directory
                if out.exists():
                    out.rmdir()
                directory.rename(out)
            finally:
                shutil.rmtree(directory, ignore_errors=True)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}; check space and permissions or choose another "
                        "--out") from None


@contextmanager
def _claimed(directory: Path) -> Iterator[None]:
    """``directory``, empty, for this process alone: what a killed process left is cleared, a living one is refused."""
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{directory} is being written by another process; wait for it") from None
        if not directory.exists() or os.fstat(handle).st_ino != directory.stat().st_ino:
            raise ConfigError(f"{directory} has just been finished by another process; run again to use its result")
        for child in directory.iterdir():
            shutil.rmtree(child) if child.is_dir() else child.unlink()
        yield
    finally:
        os.close(handle)


def _num_partitions(log: LogSource) -> int:
    """A power of two that leaves about 2^18 rows in a partition."""
    rows = log.estimated_rows()
    return min(1 << max(math.ceil(math.log2(max(rows, 1) / _PARTITION_ROWS)), 0), _MAX_PARTITIONS)


def _sort_and_cut(spill: Spill, log: LogSource) -> Cuts:
    histogram = TimeHistogram(spill.counts.first_time, spill.counts.last_time)
    for frame in spill.sort(log.config):
        histogram.add(view_partition(frame, log.config))
    cuts = histogram.cuts(log.config.split)
    return cuts if log.config.split.kind == "global_time" else Cuts(log.config.split)


def _count_training(spill: Spill, log: LogSource, cuts: Cuts) -> TrainingCounts:
    counts = TrainingCounts(log.config)
    for frame in spill.frames():
        part = view_partition(frame, log.config)
        counts.add(part, cuts.split_of(part, np.arange(len(frame))) == SPLITS.index("train"))
    return counts
