"""Each fault of a description or a log ends in one line that says what, where and the remedy."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from longer_rec.data.describe import FilesConfig
from longer_rec.data.files import read_frames
from longer_rec.data.history import open_dataset
from longer_rec.data.prepare import prepare
from longer_rec.errors import ConfigError, DataError
from tests.unit.data.logs import DESCRIPTION, LABELLED, random_log, write_log

COLUMNS = DESCRIPTION["columns"]


def _with(column: str, value: object, dtype: object = None) -> Callable[[pl.DataFrame], pl.DataFrame]:
    def change(log: pl.DataFrame) -> pl.DataFrame:
        values = log[column].to_list()
        values[17] = value
        return log.with_columns(pl.Series(column, values, dtype=dtype, strict=dtype is None))
    return change


def _same(log: pl.DataFrame) -> pl.DataFrame:
    return log


@pytest.mark.parametrize(("change", "description", "message"), [
    (lambda log: log.drop("what"), DESCRIPTION, r"log\.parquet has no column 'what'; (did you mean|it has)"),
    (lambda log: log.rename({"when": "whenn"}), DESCRIPTION, r"has no column 'when'; did you mean 'whenn'\?"),
    (_with("who", None), DESCRIPTION, r"log\.parquet, row 17: 'who' is null"),
    (_with("what", None), DESCRIPTION, r"log\.parquet, row 17: 'what' is null"),
    (_with("when", -5), DESCRIPTION, r"row 17: 'when' is null, NaN, negative or out of range .*bad_rows: drop"),
    (_with("when", float("nan"), pl.Float64), DESCRIPTION, r"row 17: 'when' is null, NaN"),
    (_with("when", float("inf"), pl.Float64), DESCRIPTION, r"row 17: 'when' is null, NaN"),
    (_with("when", 10**15), DESCRIPTION, r"row 17: 'when' is .*out of range"),
    (lambda log: log.cast({"when": pl.String}), DESCRIPTION, r"column 'when' is String; times are numbers"),
    (lambda log: log.cast({"what": pl.Float64}), DESCRIPTION, r"column 'what': ids are integers or text"),
    (lambda log: log.cast({"price": pl.String}), DESCRIPTION, r"column 'price': numbers are needed"),
    (_with("liked", 3), LABELLED, r"column 'liked': label 3.0 is outside \[0, 1\]; use at_least"),
    (_with("liked", -0.1, pl.Float64), LABELLED, r"label -0.1 is outside"),
    (lambda log: pl.concat([log, log[5:6]]), {**DESCRIPTION, "duplicates": "refuse"}, r"has two rows .*keep or drop"),
    (_same, {**DESCRIPTION, "require_sorted": True}, r"time goes back from \d+ to \d+; sort the log"),
    (lambda log: log.with_columns(liked=pl.lit(None, pl.Float64)), LABELLED, r"no request: no row is labelled"),
    (lambda log: log.with_columns(when=5), DESCRIPTION, r"the (train|validation|test) split is empty"),
    (lambda log: log[:0], DESCRIPTION, r"the log 'small' has no valid rows"),
    (_same, {**DESCRIPTION, "columns": {"user": "who", "item": "what"}}, r"'columns.time' is missing; add it"),
    (_same, {**DESCRIPTION, "columms": {}}, r"unknown key 'columms'; did you mean 'columns'\?"),
    (_same, {**DESCRIPTION, "candidates": {"kind": "rows"}}, r"candidates.kind=rows needs columns.label"),
    (_same, {**DESCRIPTION, "candidates": {"kind": "negatives"}}, r"per_positive belongs to kind negatives"),
    (_same, {**DESCRIPTION, "split": {"fractions": [0.5, 0.1, 0.1]}}, r"must add up to 1"),
    (_same, {**DESCRIPTION, "event_features": [{"name": "price", "type": "hashed"}]}, r"num_buckets belongs to type"),
    (_same, {**DESCRIPTION, "event_features": [{"name": "kind"}]}, r"feature 'kind' is described twice"),
    (_same, {**DESCRIPTION, "events": {"files": ["lag*.parquet"]}}, r"no file matches 'lag\*\.parquet' in .*correct"),
    (_same, {**DESCRIPTION, "events": {"files": ["log.parquet"], "sha256": {"log.parquet": "0" * 64}}},
     r"log\.parquet has SHA-256 .*, expected is 0000"),
])
def test_faults_are_named(tmp_path: Path, change: Callable[[pl.DataFrame], pl.DataFrame], description: dict,
                          message: str) -> None:
    path = write_log(tmp_path, change(random_log()), description)
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        prepare(str(path), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["log.parquet", "log.yaml"]


@pytest.mark.parametrize(("source", "overrides", "message"), [
    ("completejourny", [], "source 'completejourny' is unknown; use completejourney, movielens"),
    ("nowhere.yaml", [], "cannot read nowhere.yaml"),
    ("movielens", [], "movielens needs path=FOLDER"),
    ("movielens", ["path=/nowhere"], "/nowhere holds none of ratings.csv"),
    ("synthetic", ["num_user=5"], r"unknown key 'num_user'; did you mean 'num_users'\?"),
    ("synthetic", ["plant_oldest=100"], "plant_newest=200 must be below plant_oldest=100"),
    ("synthetic", ["num_items=200"], "has not enough items for request"),
])
def test_unknown_sources_and_settings_are_named(tmp_path: Path, source: str, overrides: list[str],
                                                message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        prepare(source, tmp_path / "out", overrides=overrides)
    assert not list(tmp_path.iterdir())


def test_items_with_two_rows_are_refused(tmp_path: Path) -> None:
    log = random_log()
    items = pl.DataFrame({"id": [1, 2, 2], "kind": [1, 2, 3]})
    items.write_parquet(tmp_path / "items.parquet")
    path = write_log(tmp_path, log.drop("kind"), {**DESCRIPTION, "items": {
        "source": {"files": ["items.parquet"]}, "key": "id", "features": [{"name": "kind"}]}})
    with pytest.raises(DataError, match=r"items\.parquet: id=2 has 2 rows; keep one row per id"):
        prepare(str(path), tmp_path / "out")
    items.unique("id").cast({"id": pl.String}).write_parquet(tmp_path / "items.parquet")
    with pytest.raises(DataError, match="key 'id' is String in its file and Int64 in the log"):
        prepare(str(path), tmp_path / "out")


def _checked_log(path: Path, rows: int = 20_000) -> bytes:
    random = np.random.default_rng(0)
    frame = pl.DataFrame({"who": random.integers(0, 99, rows), "what": random.integers(0, 999, rows),
                          "when": np.arange(rows), "price": random.uniform(0, 9, rows)})
    pq.write_table(frame.to_arrow(), path, write_page_checksum=True, compression="zstd", row_group_size=5000)
    return path.read_bytes()


def test_two_hundred_flipped_bits_in_parquet_pages_are_two_hundred_named_errors(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    content = _checked_log(path)
    metadata = pq.read_metadata(path)
    chunks = [metadata.row_group(g).column(c) for g in range(metadata.num_row_groups) for c in range(4)]
    random = np.random.default_rng(1)
    for _ in range(200):
        chunk = chunks[random.integers(len(chunks))]
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        damaged = bytearray(content)
        # Its first 64 bytes hold a page's header, which has no checksum: integration/faults/test_damaged_inputs.py.
        damaged[start + random.integers(64, chunk.total_compressed_size)] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"log\.parquet is damaged"):
            list(read_frames(FilesConfig(files=("log.parquet",)), tmp_path, ["who", "what", "when", "price"]))


@pytest.mark.parametrize("keep", [0, 3, 100, 0.3, 0.9, 0.999])
def test_truncated_parquet_is_named(tmp_path: Path, keep: float) -> None:
    path = write_log(tmp_path, random_log())
    content = (tmp_path / "log.parquet").read_bytes()
    (tmp_path / "log.parquet").write_bytes(content[:int(keep * len(content)) if keep < 1 else int(keep)])
    with pytest.raises(DataError, match=r"log\.parquet is damaged"):
        prepare(str(path), tmp_path / "out")


CSV = {**DESCRIPTION, "events": {"files": ["log.csv"], "dtypes": {"what": "int"}}}


def test_csv_gives_what_parquet_gives(tmp_path: Path) -> None:
    log = random_log()
    log.write_csv(tmp_path / "log.csv")
    files = []
    for name, description in (("csv", CSV), ("parquet", DESCRIPTION)):
        path = write_log(tmp_path, log, description)
        files.append(open_dataset(prepare(str(path), tmp_path / name)).manifest["files"])
    assert files[0] == files[1]


@pytest.mark.parametrize(("line", "message"), [
    ("user 1,5", r"log\.csv is damaged.*Expected 7 columns"),
    ("user 1,five,1010,1,1.0,place 1,1", r"log\.csv is damaged.*'five'"),
    ("user 1,5,1010,1,1.0,pl\xe4ce,1".encode("latin1"), r"log\.csv, column 'place'.*not UTF-8"),
])
def test_damaged_csv_is_named(tmp_path: Path, line: str | bytes, message: str) -> None:
    path = write_log(tmp_path, random_log(), CSV)
    random_log().write_csv(tmp_path / "log.csv")
    with (tmp_path / "log.csv").open("ab") as file:
        file.write(line if isinstance(line, bytes) else line.encode())
    with pytest.raises(DataError, match=message):
        prepare(str(path), tmp_path / "out")


def test_files_of_different_types_are_refused(tmp_path: Path) -> None:
    path = write_log(tmp_path, random_log(), {**DESCRIPTION, "events": {"files": ["log*.parquet"]}})
    random_log().cast({"what": pl.String}).write_parquet(tmp_path / "log2.parquet")
    with pytest.raises(DataError, match=r"log2\.parquet: item is String here and Int64 before"):
        prepare(str(path), tmp_path / "out")
