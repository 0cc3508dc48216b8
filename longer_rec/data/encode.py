"""Raw values to rows of embedding tables: the one function that preparing a log and serving a request share.

Row 0 is what a table does not know: unseen in the training period, null, and for numbers NaN. A value of the wrong
type is a fault of the caller, not an unknown value.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from longer_rec.data.files import naming_file
from longer_rec.data.hashing import hash_values
from longer_rec.data.order import I64
from longer_rec.data.store import read_frame
from longer_rec.errors import DataError
from longer_rec.schema import OPEN_ID_BITS

F64 = npt.NDArray[np.float64]
_HASH_SEED = 11
_SPREAD = 8  # integers are looked up in a table of at most as many cells for each of them


@dataclass(frozen=True)
class Vocabulary:
    """The values of the training period, sorted; the i-th has row i + 1."""

    values: pl.Series

    @property
    def num_rows(self) -> int:
        return len(self.values) + 1

    @cached_property
    def integers(self) -> I64 | None:
        """The values where they are integers."""
        return self.values.to_numpy() if self.values.dtype == pl.Int64 and len(self.values) else None

    @cached_property
    def row_of(self) -> I64 | None:
        """Rows by value from the lowest on, where integers lie so close that it is small: 0.4 ms less a thousand."""
        if self.integers is None or int(self.integers[-1]) - int(self.integers[0]) > _SPREAD * len(self.integers):
            return None
        row_of = np.zeros(int(self.integers[-1]) - int(self.integers[0]) + 1, np.int64)
        row_of[self.integers - self.integers[0]] = np.arange(1, self.num_rows)
        return row_of

    def encode_integers(self, raw: I64) -> I64:
        """``encode`` of integers without nulls by ``integers``: a third of the time for a thousand of them."""
        assert self.integers is not None
        if self.row_of is not None:
            known = (raw >= self.integers[0]) & (raw <= self.integers[-1])
            return np.where(known, self.row_of[np.where(known, raw - self.integers[0], 0)], 0)
        at = np.minimum(np.searchsorted(self.integers, raw), len(self.integers) - 1)
        return np.where(self.integers[at] == raw, at + 1, 0)

    def encode(self, raw: pl.Series, what: str) -> I64:
        raw = as_ids(raw, what)
        if raw.dtype != self.values.dtype and raw.null_count() < len(raw):
            raise DataError(f"{what}: values are {raw.dtype}, the data was prepared with {self.values.dtype}; "
                            "convert them")
        if len(self.values) == 0 or raw.null_count() == len(raw):
            return np.zeros(len(raw), np.int64)
        has_nulls = raw.null_count() > 0
        filled = raw.fill_null(self.values[0]) if has_nulls else raw  # polars takes 0.1 ms for each such step
        if self.integers is not None:
            row = self.encode_integers(filled.to_numpy())
        else:
            at = np.minimum(self.values.search_sorted(filled).to_numpy().astype(np.int64), len(self.values) - 1)
            row = np.where((self.values.gather(pl.Series(at)) == filled).to_numpy(), at + 1, 0)
        return np.where(raw.is_not_null().to_numpy(), row, 0) if has_nulls else row


@dataclass(frozen=True)
class Hashed:
    """A stable hash into rows 1 ... num_buckets."""

    num_buckets: int

    @property
    def num_rows(self) -> int:
        return self.num_buckets + 1

    def encode(self, raw: pl.Series, what: str) -> I64:
        raw = as_ids(raw, what)
        bucket = (hash_values(raw, _HASH_SEED) % np.uint64(self.num_buckets)).astype(np.int64) + 1
        return np.where(raw.is_not_null().to_numpy(), bucket, 0)


@dataclass(frozen=True)
class Open(Hashed):
    """A hash of 40 bits, 0 for null: of a hundred million values one in 11,000 shares its hash with another."""

    num_buckets: int = (1 << OPEN_ID_BITS) - 1


@dataclass(frozen=True)
class Bucketed:
    """Intervals between rising boundaries: row 1 below the first, row n + 1 from the last on."""

    boundaries: tuple[float, ...]

    @property
    def num_rows(self) -> int:
        return len(self.boundaries) + 2

    def encode(self, raw: pl.Series, what: str) -> I64:
        return self.encode_numbers(as_numbers(raw, what))

    def encode_numbers(self, value: F64) -> I64:
        """``encode`` of numbers with NaN for null."""
        bucket = np.searchsorted(np.asarray(self.boundaries), value, "right") + 1
        return np.where(np.isnan(value), 0, bucket)


Encoder = Vocabulary | Hashed | Bucketed


def as_ids(raw: pl.Series, what: str) -> pl.Series:
    """Integers as Int64 or text as String; ``DataError`` for anything else."""
    if raw.dtype == pl.Null:
        return raw.cast(pl.Int64)
    if raw.dtype.is_integer():
        wide = raw.cast(pl.Int64, strict=False)
        if wide.null_count() > raw.null_count():
            raise DataError(f"{what}: {raw.max()!r} exceeds 2^63 - 1; use text for such ids")
        return wide
    if raw.dtype == pl.Boolean:
        return raw.cast(pl.Int64)
    if raw.dtype in (pl.String, pl.Categorical, pl.Enum):
        return raw.cast(pl.String)
    kind = "bytes that are not UTF-8 text" if raw.dtype == pl.Binary else raw.dtype
    raise DataError(f"{what}: ids are integers or text, these are {kind}; convert the column")


def as_numbers(raw: pl.Series, what: str) -> F64:
    """Float64 values with NaN for null; ``DataError`` for what is no number."""
    if not (raw.dtype.is_numeric() or raw.dtype in (pl.Boolean, pl.Null)):
        raise DataError(f"{what}: numbers are needed, these are {raw.dtype}; convert the column")
    return raw.cast(pl.Float64).to_numpy()


def as_lists(raw: pl.Series, separator: str, what: str) -> pl.Series:
    """A list of values per row: lists as they are, text split at the separator; null and "" are empty."""
    if raw.dtype == pl.Null:
        return pl.Series(raw.name, [[]] * len(raw), pl.List(pl.String))
    if raw.dtype in (pl.String, pl.Categorical, pl.Enum):
        split = raw.cast(pl.String).fill_null("").str.split(separator)
        return split.list.eval(pl.element().filter(pl.element() != ""))
    if isinstance(raw.dtype, pl.List):
        return raw.fill_null([]).list.drop_nulls()
    raise DataError(f"{what}: lists, or text split at {separator!r}, are needed, these are {raw.dtype}")


def encode_lists(encoder: Encoder, lists: pl.Series, what: str) -> tuple[I64, I64]:
    """(packed ids, number of them per row) of a series of lists."""
    return encoder.encode(flatten(lists), what), lists.list.len().cast(pl.Int64).to_numpy()


def flatten(lists: pl.Series) -> pl.Series:
    """All values of the lists, one after the other; empty lists have none."""
    filled = lists.filter(lists.list.len() > 0)
    return filled.explode() if len(filled) else pl.Series(lists.name, [], lists.dtype.inner)  # type: ignore[attr-defined]


def build_vocabulary(values: pl.Series) -> Vocabulary:
    """The vocabulary of the distinct values, nulls left out."""
    return Vocabulary(values.drop_nulls().unique().sort())


def save_encoders(encoders: dict[str, Encoder], directory: Path) -> None:
    """``encoders.json`` and one Arrow file per vocabulary."""
    described: dict[str, dict[str, Any]] = {}
    for name, encoder in encoders.items():
        if isinstance(encoder, Vocabulary):
            described[name] = {"type": "id", "file": f"vocabulary.{name}.arrow"}
            # Plain text, not polars' own views: their bytes depend on how the column came about.
            pl.DataFrame({"value": encoder.values}).write_ipc(directory / f"vocabulary.{name}.arrow",
                                                              compat_level=pl.CompatLevel.oldest())
        elif isinstance(encoder, Open):
            described[name] = {"type": "open"}
        elif isinstance(encoder, Hashed):
            described[name] = {"type": "hashed", "num_buckets": encoder.num_buckets}
        else:
            described[name] = {"type": "bucketed", "boundaries": list(encoder.boundaries)}
    (directory / "encoders.json").write_text(json.dumps(described, indent=1), encoding="utf-8")


def load_encoders(directory: Path) -> dict[str, Encoder]:
    """What ``save_encoders`` wrote; ``DataError`` when it is missing or damaged."""
    encoders: dict[str, Encoder] = {}
    with naming_file(directory / "encoders.json"):
        described = json.loads((directory / "encoders.json").read_text(encoding="utf-8"))
    for name, entry in described.items():
        if entry["type"] == "id":
            encoders[name] = Vocabulary(read_frame(directory / entry["file"])["value"])
        elif entry["type"] == "hashed":
            encoders[name] = Hashed(entry["num_buckets"])
        elif entry["type"] == "open":
            encoders[name] = Open()
        else:
            encoders[name] = Bucketed(tuple(entry["boundaries"]))
    return encoders


def encoder_digest(encoder: Encoder) -> str:
    """Equal for encoders that give every value the same row."""
    content = hash_values(encoder.values, 0).tobytes() if isinstance(encoder, Vocabulary) else repr(encoder).encode()
    return hashlib.sha256(content).hexdigest()


def encode_values(encoder: Encoder, raw: Sequence[Any] | np.ndarray[Any, Any], what: str) -> I64:
    """Rows of plain Python values or an array, as a request carries them; ``DataError`` for mixed or wrong types."""
    try:
        kinds = set(map(type, raw)) if isinstance(raw, list) else set()
        if kinds == {int} and isinstance(encoder, Vocabulary) and encoder.integers is not None:
            return encoder.encode_integers(np.array(raw, np.int64))
        if isinstance(encoder, Bucketed):  # 1 and 2.5 are both numbers, but no polars column of one type
            if kinds and kinds <= {int, float}:
                return encoder.encode_numbers(np.array(raw, np.float64))
            raw = [float(one) if isinstance(one, int) else one for one in raw]
        series = pl.Series(what, raw if isinstance(raw, np.ndarray) else list(raw), strict=True)
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{what}: values of one type are needed: {' '.join(str(error).split())[:120]}") from None
    return encoder.encode(series, what)
