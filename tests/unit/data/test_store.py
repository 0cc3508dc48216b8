"""Columns in many record batches read as one array."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from longer_rec.data import store
from longer_rec.data.store import ColumnTable, ColumnWriter, read_frame
from longer_rec.errors import DataError


@pytest.mark.parametrize("num_rows", [0, 1, 15, 16, 17, 31, 32, 33, 100, 160])
@pytest.mark.parametrize("piece", [1, 7, 16, 64])
def test_rows_come_back_from_any_number_of_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_rows: int,
                                                   piece: int) -> None:
    monkeypatch.setattr(store, "_BATCH_BITS", 4)
    columns = {"a": np.arange(num_rows, dtype=np.int32), "b": np.arange(num_rows) * 0.5}
    with ColumnWriter(tmp_path / "t.arrow", {"a": np.int32, "b": np.float64}) as writer:
        for start in range(0, num_rows, piece):
            writer.append({name: column[start:start + piece] for name, column in columns.items()})
    table = ColumnTable(tmp_path / "t.arrow", writer.num_rows)
    rows = np.random.default_rng(0).permutation(num_rows)
    for name, column in columns.items():
        assert np.array_equal(table.take(name, rows), column[rows])
        assert read_frame(tmp_path / "t.arrow")[name][:num_rows].to_list() == column.tolist()


def test_missing_rows_and_truncation_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.arrow"
    with ColumnWriter(path, {"a": np.int64}) as writer:
        writer.append({"a": np.arange(1000)})
    with pytest.raises(DataError, match=r"t\.arrow holds 1000 rows, its manifest says 1001"):
        ColumnTable(path, 1001)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"t\.arrow is damaged"):
        ColumnTable(path, 1000)


def test_other_arrow_files_are_refused(tmp_path: Path) -> None:
    batches = [pa.record_batch({"a": np.arange(size)}) for size in (3, 4)]
    with pa.ipc.new_file(tmp_path / "t.arrow", batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    with pytest.raises(DataError, match="not of equal size"):
        ColumnTable(tmp_path / "t.arrow", 7)
