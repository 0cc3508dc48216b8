"""A stable hash of raw values: the same in every version, process and byte order of columns."""

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from longer_rec.data.order import U64, hash_u64

_USER_SEED = 12


def hash_values(values: pl.Series, seed: int) -> U64:
    """64-bit hashes of integers or text; nulls hash like 0 or the empty text.

    polars' own hash may change with its version, and encoded data must outlive it.
    """
    if values.dtype.is_integer():
        return hash_u64(seed, values.fill_null(0).to_numpy())
    return _hash_text(values.fill_null("").cast(pl.String), seed)


def user_keys(raw: pl.Series) -> U64:
    """What users are known by in every data set and server: hashes of their raw ids as text, so that 7 is "7"."""
    return hash_values(raw.cast(pl.String), _USER_SEED)


def _hash_text(values: pl.Series, seed: int) -> U64:
    """Eight bytes at a time over all texts at once: as many rounds as the longest text has words."""
    array = values.to_arrow().cast(pa.large_string())
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if len(array) == 0:
        return np.zeros(0, np.uint64)
    _, offset_buffer, data_buffer = array.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[array.offset:array.offset + len(array) + 1]
    text = np.frombuffer(data_buffer, np.uint8) if data_buffer else np.zeros(0, np.uint8)
    padded = np.concatenate([text[offsets[0]:offsets[-1]], np.zeros(8, np.uint8)])
    start, length = offsets[:-1] - offsets[0], np.diff(offsets)
    hashed = hash_u64(seed, length)
    active = np.flatnonzero(length > 0)
    word = 0
    while len(active):
        hashed[active] = hash_u64(hashed[active], _words(padded, start[active] + 8 * word, length[active] - 8 * word))
        word += 1
        active = active[length[active] > 8 * word]
    return hashed


def _words(text: npt.NDArray[np.uint8], at: npt.NDArray[np.int64], left: npt.NDArray[np.int64]) -> U64:
    """The up to 8 bytes at each position as little-endian integers, with bytes beyond the text's end as 0."""
    words = np.zeros(len(at), np.uint64)
    for byte in range(8):
        value = text[at + np.minimum(byte, np.maximum(left - 1, 0))].astype(np.uint64)
        words |= np.where(left > byte, value, np.uint64(0)) << np.uint64(8 * byte)
    return words
