"""Arrow files that are written in pieces and read, memory-mapped, as if in one piece."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from longer_rec.data.files import naming_file
from longer_rec.data.order import I64
from longer_rec.errors import DataError

_BATCH_BITS = 18
Array = npt.NDArray[Any]


def read_frame(path: Path) -> pl.DataFrame:
    """A whole Arrow file in memory, in one piece."""
    with naming_file(path), pa.OSFile(str(path)) as file:
        return pl.DataFrame(pa.ipc.open_file(file).read_all()).rechunk()


class ColumnWriter:
    """Appends rows of fixed-width columns to an uncompressed Arrow IPC file.

    Every record batch has 2^18 rows, the last one filled up with zeros (the manifest keeps the true count): batches
    of equal size lie at equal distances, which is what lets ``ColumnTable`` index the whole file without copying it
    together. A file of one batch is not filled up.
    """

    def __init__(self, path: Path, dtypes: Mapping[str, npt.DTypeLike]) -> None:
        self._dtypes = {name: np.dtype(dtype) for name, dtype in dtypes.items()}
        self._schema = pa.schema([(name, pa.from_numpy_dtype(dtype)) for name, dtype in self._dtypes.items()])
        self._writer = pa.ipc.new_file(str(path), self._schema)
        self._pending: dict[str, list[Array]] = {name: [] for name in dtypes}
        self._num_pending = 0
        self.num_rows = 0

    def append(self, columns: Mapping[str, Array]) -> None:
        count = len(next(iter(columns.values())))
        for name, dtype in self._dtypes.items():
            self._pending[name].append(columns[name].astype(dtype, copy=False))
        self._num_pending += count
        self.num_rows += count
        if self._num_pending >= 1 << _BATCH_BITS:
            self._write_whole_batches()

    def _write_whole_batches(self) -> None:
        batch_rows = 1 << _BATCH_BITS
        columns = {name: np.concatenate(parts) for name, parts in self._pending.items()}
        done = 0
        while self._num_pending - done >= batch_rows:
            self._write({name: column[done:done + batch_rows] for name, column in columns.items()})
            done += batch_rows
        self._num_pending -= done
        self._pending = {name: [column[done:].copy()] for name, column in columns.items()}

    def _write(self, columns: Mapping[str, Array]) -> None:
        arrays = [pa.array(column) for column in columns.values()]
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))

    def close(self) -> None:
        missing = -self.num_rows % (1 << _BATCH_BITS) if self.num_rows > 1 << _BATCH_BITS else 0
        if self._num_pending or self.num_rows == 0:
            self._write({name: np.concatenate([*parts, np.zeros(missing, self._dtypes[name])])
                         for name, parts in self._pending.items()})
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ColumnTable:
    """The columns of a ``ColumnWriter``'s file, memory-mapped; ``take`` gathers rows."""

    def __init__(self, path: Path, num_rows: int) -> None:
        self.num_rows = num_rows
        with naming_file(path):
            whole = np.memmap(path, np.uint8, "r")
            reader = pa.ipc.open_file(pa.py_buffer(whole))
            self._columns = {name: _view(path, whole, reader, index) for index, name in enumerate(reader.schema.names)}
            rows = sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))
        if rows < num_rows:
            raise DataError(f"{path} holds {rows} rows, its manifest says {num_rows}; prepare the data again")

    def take(self, name: str, row: I64) -> Array:
        """The column's values at ``row``, which must lie in [0, num_rows)."""
        chunks = self._columns[name]
        if chunks.shape[0] == 1:
            return chunks[0].take(row)
        return chunks[row >> _BATCH_BITS, row & ((1 << _BATCH_BITS) - 1)]


def _view(path: Path, whole: Array, reader: pa.RecordBatchFileReader, index: int) -> Array:
    """All batches' values of one column as [batches, rows of a batch] on the mapped file."""
    batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    first = batches[0].column(index)
    dtype = np.dtype(first.type.to_pandas_dtype())
    if len(first) == 0:
        return np.zeros((1, 0), dtype)
    base = whole.ctypes.data
    starts = np.asarray([batch.column(index).buffers()[1].address - base for batch in batches], np.int64)
    strides = np.unique(np.diff(starts))
    if len({batch.num_rows for batch in batches}) > 1 or len(strides) > 1:
        raise DataError(f"{path}: record batches are not of equal size; prepare the data again")
    stride = int(strides[0]) if len(strides) else len(first) * dtype.itemsize
    flat = whole[starts[0]:starts[-1] + len(first) * dtype.itemsize]
    return np.ndarray((len(batches), len(first)), dtype, flat.data, 0, (stride, dtype.itemsize))
