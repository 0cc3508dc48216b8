"""Reading users' files in pieces: Parquet and CSV, checked as far as the formats allow."""

import difflib
import glob
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from longer_rec.data.describe import FilesConfig
from longer_rec.errors import ConfigError, DataError

CHUNK_ROWS = 1 << 18
_CSV_ROW_BYTES = 16
_ARROW_TYPES = {"int": pa.int64(), "float": pa.float64(), "string": pa.string()}
_UNSPLIT = "\x1f"  # a delimiter that no text holds: the whole line is one column


def resolve_files(config: FilesConfig, root: Path) -> list[Path]:
    """The files that the patterns name, sorted within each; ``ConfigError`` for a pattern that matches none."""
    found: list[Path] = []
    for pattern in config.files:
        matches = sorted(glob.glob(str(root / pattern)))
        if not matches:
            raise ConfigError(f"no file matches {pattern!r} in {root}; correct the path")
        found += [Path(match) for match in matches]
    return found


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes; ``DataError`` when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; correct the path or its permissions") from None


def hash_inputs(config: FilesConfig, root: Path) -> dict[str, str]:
    """SHA-256 of each input file by its name; ``DataError`` when one is not the file the description expects."""
    hashes: dict[str, str] = {}
    for path in resolve_files(config, root):
        hashes[str(path.relative_to(root) if path.is_relative_to(root) else path.name)] = digest = hash_file(path)
        expected = config.sha256.get(path.name, digest)
        if digest != expected:
            raise DataError(f"{path} has SHA-256 {digest[:16]}..., expected is {expected[:16]}...; "
                            "it is damaged or another version: fetch it again")
    return hashes


def count_rows(config: FilesConfig, path: Path) -> int:
    """Rows of a Parquet file; of a CSV file an estimate on the high side."""
    if _kind(config, path) == "csv":
        return path.stat().st_size // _CSV_ROW_BYTES
    with naming_file(path):
        return int(pa.parquet.read_metadata(path).num_rows)


def _kind(config: FilesConfig, path: Path) -> str:
    return config.format or ("parquet" if path.suffix in (".parquet", ".pq") else "csv")


def read_frames(config: FilesConfig, root: Path, columns: Sequence[str]) -> Iterator[tuple[Path, pl.DataFrame]]:
    """The named columns of all files, about ``CHUNK_ROWS`` rows at a time; errors name the file."""
    for path in resolve_files(config, root):
        batches = _read_parquet(path, columns) if _kind(config, path) == "parquet" else _read_csv(path, config, columns)
        for batch in batches:
            frame = pl.DataFrame(pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch)
            yield path, frame.select(columns).with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String))


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Turns what Arrow says about a damaged file into one line that names it."""
    try:
        yield
    except (pa.ArrowException, pl.exceptions.PolarsError, OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is damaged or not what its name says: {' '.join(str(error).split())[:200]}; "
                        "fetch or write it again") from None


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with naming_file(path):
        # Buffered and not memory-mapped: pages stream through, a row group of 20 M rows is never held whole.
        file = pa.parquet.ParquetFile(path, page_checksum_verification=True, buffer_size=1 << 20, pre_buffer=False)
        _require_columns(path, file.schema_arrow.names, columns)
        yield from file.iter_batches(batch_size=CHUNK_ROWS, columns=list(columns), use_threads=False)


def _read_csv(path: Path, config: FilesConfig, columns: Sequence[str]) -> Iterator[pa.RecordBatch | pl.DataFrame]:
    wide = len(config.separator) > 1
    if wide and not config.header:
        raise ConfigError(f"separator {config.separator!r} has more than one character, which needs `header`; add it")
    with naming_file(path):
        reader = pa.csv.open_csv(
            path,
            pa.csv.ReadOptions(use_threads=False, block_size=1 << 23, encoding="latin1" if wide else "utf8",
                               column_names=["line"] if wide else list(config.header) or None),
            pa.csv.ParseOptions(delimiter=_UNSPLIT if wide else config.separator, quote_char=False if wide else '"'),
            pa.csv.ConvertOptions(column_types={} if wide else {k: _ARROW_TYPES[v] for k, v in config.dtypes.items()},
                                  strings_can_be_null=True))
        names = list(config.header) or reader.schema.names
        _require_columns(path, names, columns)
        for batch in reader:
            if not batch.num_rows:
                continue
            yield _split_lines(path, batch, config) if wide else batch.select(list(columns))


def _split_lines(path: Path, batch: pa.RecordBatch, config: FilesConfig) -> pl.DataFrame:
    """Columns of lines like ``1::1193::5::978300760``, numbers where ``dtypes`` says so."""
    parts = pl.DataFrame(pa.Table.from_batches([batch]))["line"].cast(pl.String).str.split(config.separator)
    wrong = (parts.list.len() != len(config.header)).arg_true()
    if len(wrong):
        raise DataError(f"{path}: a line has {parts.list.len()[wrong[0]]} values, {len(config.header)} are needed "
                        f"({batch['line'][wrong[0]].as_py()[:80]!r}); the file is truncated or damaged: fetch it again")
    types = {"int": pl.Int64, "float": pl.Float64, "string": pl.String}
    series = [parts.list.get(index).alias(name) for index, name in enumerate(config.header)]
    try:
        return pl.DataFrame([one.cast(types[config.dtypes.get(one.name, "string")]) for one in series])
    except pl.exceptions.InvalidOperationError as error:
        raise DataError(f"{path}: {str(error).splitlines()[0]}; correct the file or `dtypes`") from None


def _require_columns(path: Path, known: Sequence[str], needed: Sequence[str]) -> None:
    for column in needed:
        if column not in known:
            near = difflib.get_close_matches(column, known, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise DataError(f"{path} has no column {column!r}; {remedy}")
