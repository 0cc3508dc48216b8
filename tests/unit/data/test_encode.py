"""Raw values become the same rows while preparing and while serving."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longer_rec.data.encode import (
    Bucketed,
    Hashed,
    Vocabulary,
    as_lists,
    build_vocabulary,
    encode_lists,
    encode_values,
    load_encoders,
    save_encoders,
)
from longer_rec.data.hashing import hash_values
from longer_rec.errors import DataError

WORDS = build_vocabulary(pl.Series(["pear", "apple", None, "apple", "fig"]))
WORD_HASHES = [5501763550726354210, 7276677106013593776, 11663433693091678240, 15401958874293755151,
               12872422053805337194, 7326452888785220581]
NUMBERS = build_vocabulary(pl.Series([30, 10, 20]))


def test_known_values_have_rows_and_unseen_or_null_ones_row_0() -> None:
    assert encode_values(WORDS, ["apple", "zebra", "pear", None, "", "fig"], "fruit").tolist() == [1, 0, 3, 0, 0, 2]
    assert encode_values(NUMBERS, [10, 11, None, 30, -(2**63), 2**63 - 1], "item").tolist() == [1, 0, 0, 3, 0, 0]
    assert encode_values(NUMBERS, [], "item").tolist() == []
    assert encode_values(NUMBERS, [None, None], "item").tolist() == [0, 0]
    assert encode_values(build_vocabulary(pl.Series([], dtype=pl.Int64)), [4], "item").tolist() == [0]


@pytest.mark.parametrize("step", [1, 4, 10**6, 2**55], ids=["table", "sparse table", "search", "search of far ones"])
def test_integers_close_together_or_not_have_the_same_rows(step: int) -> None:
    known = np.sort(np.random.default_rng(0).choice(100, 50, replace=False)) * step - 2**62
    vocabulary = build_vocabulary(pl.Series(known))
    assert (vocabulary.row_of is None) == (step > 4)
    asked = np.concatenate([known[::-1], known + 1, [-(2**63), 2**63 - 1, 0, known[0] - 1, known[-1] + 1]])
    row = {value: place + 1 for place, value in enumerate(known.tolist())}
    assert encode_values(vocabulary, asked.tolist(), "x").tolist() == [row.get(value, 0) for value in asked.tolist()]


@pytest.mark.parametrize(("encoder", "values"), [
    (WORDS, [3]), (NUMBERS, ["10"]), (NUMBERS, [10.0]), (NUMBERS, [float("nan")]), (NUMBERS, [10, "10"]),
    (NUMBERS, [2**64]), (NUMBERS, [2**63]), (NUMBERS, [[10]]), (NUMBERS, [b"10"]), (Hashed(5), [1.5]),
    (Bucketed((1.0,)), ["1"]), (Bucketed((1.0,)), [[1.0]]), (WORDS, [{"a": 1}])])
def test_a_value_of_the_wrong_type_is_an_error_and_not_unknown(encoder: Vocabulary, values: list) -> None:
    with pytest.raises(DataError, match="field"):
        encode_values(encoder, values, "field")


def test_buckets_lie_between_boundaries_and_missing_is_row_0() -> None:
    encoder = Bucketed((0.0, 1.5))
    values = [-1.0, 0.0, 1.4, 1.5, float("inf"), -float("inf"), float("nan"), None]
    assert encode_values(encoder, values, "x").tolist() == [1, 2, 2, 3, 3, 1, 0, 0]
    assert encoder.num_rows == 4


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.none(), st.text(max_size=40)), max_size=30))
def test_hashing_text_does_not_depend_on_its_neighbours(texts: list[str | None]) -> None:
    together = encode_values(Hashed(1000), texts, "x") if any(texts) else np.zeros(len(texts), np.int64)
    for text, row in zip(texts, together.tolist(), strict=True):
        assert (row == 0) == (text is None) or not any(texts)
        if text and any(texts):
            assert encode_values(Hashed(1000), [text], "x").tolist() == [row]


def test_hash_of_values_is_the_same_for_ever() -> None:
    words = pl.Series(["", "a", "abcdefgh", "abcdefghi", "Zürich", "a" * 100])
    assert hash_values(words, 1).tolist() == WORD_HASHES
    assert hash_values(words[2:4], 1).tolist() == WORD_HASHES[2:4]
    assert len({*hash_values(pl.Series([f"w{i}" for i in range(50_000)]), 0).tolist()}) == 50_000


def test_lists_come_from_text_and_from_lists() -> None:
    split = as_lists(pl.Series(["fig|pear", "", None, "fig||apple"]), "|", "x")
    assert [part.tolist() for part in encode_lists(WORDS, split, "x")] == [[2, 3, 2, 1], [2, 0, 0, 2]]
    lists = as_lists(pl.Series([["fig", None], [], None, ["kiwi"]]), "|", "x")
    assert [part.tolist() for part in encode_lists(WORDS, lists, "x")] == [[2, 0], [1, 0, 0, 1]]
    with pytest.raises(DataError, match="lists, or text"):
        as_lists(pl.Series([1, 2]), "|", "x")


def test_saved_encoders_encode_alike(tmp_path: Path) -> None:
    encoders = {"word": WORDS, "number": NUMBERS, "hashed": Hashed(9), "bucket": Bucketed((0.5, 2.0))}
    save_encoders(encoders, tmp_path)
    loaded = load_encoders(tmp_path)
    assert loaded.keys() == encoders.keys()
    for name, values in (("word", ["fig", "x"]), ("number", [20, 5]), ("hashed", ["q", None]), ("bucket", [1.0, None])):
        assert np.array_equal(encode_values(loaded[name], values, "x"), encode_values(encoders[name], values, "x"))
        assert loaded[name].num_rows == encoders[name].num_rows
