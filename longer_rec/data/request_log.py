"""Served requests as Parquet that `longer-rec prepare` reads back, page checksums on."""

import os
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet

from longer_rec.errors import ConfigError

_MAX_QUEUED = 10_000
_FILE_ROWS = 100_000
_FILE_S = 60.0


class RequestLog:
    """Appends to ``events-*.parquet`` (what users did) and ``candidates-*.parquet`` (what they were offered).

    A thread writes a file for every 100,000 rows or 60 s, under a temporary name until it is whole. When it does not
    keep up or cannot write, calls are counted in ``num_lost`` and not logged: serving never waits for the disk.
    """

    def __init__(self, directory: Path) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write log_dir={directory}: {error.strerror}; choose another") from None
        self.num_lost = 0
        self._directory = directory
        self._queue: queue.Queue[tuple[str, dict[str, Any]] | None] = queue.Queue(_MAX_QUEUED)
        self._files = 0
        self._thread = threading.Thread(target=self._write_all, name="request-log", daemon=True)
        self._thread.start()

    def add_candidates(self, body: Mapping[str, Any], user: str, logit_C: Any, version: str) -> None:
        """A request and its answer: a row per candidate, its label for the user of the log to join."""
        self._put("candidates", {"user": body.get("user", user), "item": body["candidates"], "time": body["time"],
                                 "logit": logit_C, "version": version})

    def add_events(self, columns: Mapping[str, Any], user: str | int) -> None:
        """Events that were appended to a user's history."""
        if columns:
            self._put("events", {"user": user, **columns})

    def close(self) -> None:
        """Write what is left."""
        self._queue.put(None)
        self._thread.join()

    def _put(self, kind: str, columns: dict[str, Any]) -> None:
        try:
            self._queue.put_nowait((kind, columns))
        except queue.Full:
            self.num_lost += 1

    def _write_all(self) -> None:
        held: dict[str, list[pl.DataFrame]] = {}
        last, is_open = time.monotonic(), True
        while is_open:
            try:
                entry = self._queue.get(timeout=1.0)
                is_open = entry is not None
                if entry is not None:
                    held.setdefault(entry[0], []).append(_frame(entry[1]))
            except queue.Empty:
                pass
            except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError):
                self.num_lost += 1  # values that no column holds; the request itself was answered
            for kind, frames in list(held.items()):
                if not is_open or sum(map(len, frames)) >= _FILE_ROWS or time.monotonic() - last >= _FILE_S:
                    self._write(kind, held.pop(kind))
            if not held:
                last = time.monotonic()

    def _write(self, kind: str, frames: Sequence[pl.DataFrame]) -> None:
        path = self._directory / f"{kind}-{time.time_ns()}-{os.getpid()}-{self._files}.parquet"
        self._files += 1
        temporary = path.with_suffix(".tmp")
        try:
            pyarrow.parquet.write_table(pl.concat(frames, how="vertical_relaxed").to_arrow(), temporary,
                                        compression="zstd", write_page_checksum=True)
            temporary.replace(path)
        except (OSError, pl.exceptions.PolarsError):
            self.num_lost += len(frames)
            temporary.unlink(missing_ok=True)


def _frame(columns: Mapping[str, Any]) -> pl.DataFrame:
    """One value for all rows where a column has no rows of its own."""
    arrays = {name: np.frombuffer(value, "<i8") if isinstance(value, bytes) else value
              for name, value in columns.items()}
    rows = max(len(value) for value in arrays.values() if isinstance(value, list | np.ndarray))
    return pl.DataFrame({name: value if isinstance(value, list | np.ndarray) else [value] * rows
                         for name, value in arrays.items()}, strict=False)
