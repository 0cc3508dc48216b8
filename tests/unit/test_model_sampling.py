"""Which merged tokens become queries, against the list of positions written down by hand and by formula."""

import pytest
import torch

from longer_rec.model.sampling import Sampling, sample
from tests.reference.longer import positions_ref

LENGTHS = [0, 1, 7, 2, 40, 4, 0, 23]


@pytest.mark.parametrize(("sampling", "wanted"), [
    ("recent", [3, 4, 5, 6]), ("uniform", [1, 3, 5, 6]), ("recent_uniform", [2, 4, 5, 6]), ("all", [*range(7)]),
    ("learnable", [6, 6, 6, 6])])
def test_positions_are_those_of_the_drawing(sampling: Sampling, wanted: list[int]) -> None:
    assert positions_ref(sampling, 7, 4) == wanted


@pytest.mark.parametrize("sampling", ["recent", "uniform", "recent_uniform", "all", "learnable"])
@pytest.mark.parametrize("num_queries", [2, 4, 22, 40, 60])
@pytest.mark.parametrize("num_globals", [0, 1, 3])
def test_sampled_rows_and_positions_equal_reference(sampling: Sampling, num_queries: int, num_globals: int) -> None:
    length_B = torch.tensor(LENGTHS) + num_globals
    total = int(length_B.sum())
    queries = sample(sampling, length_B, num_globals, num_queries)
    rows, positions, counts, start = [], [], [], 0
    for length in LENGTHS:
        sampled = positions_ref(sampling, length, num_queries)
        own = [*range(length, length + num_globals)]
        learned = [total + i for i in range(len(sampled))]
        rows += learned if sampling == "learnable" else [start + position for position in sampled]
        rows += [start + position for position in own]
        positions += sampled + own
        counts.append(len(sampled) + num_globals)
        start += length + num_globals
    assert queries.length_B.tolist() == counts
    assert (list(range(total)) if queries.row_Q is None else queries.row_Q.tolist()) == rows
    assert queries.num_keys == (total if sampling == "learnable" else None)
    if queries.position_Q is not None:
        assert queries.position_Q.tolist() == positions
    else:
        # Bottom right: the queries are the last tokens of their request.
        assert rows == [row for end, count in zip(length_B.cumsum(0).tolist(), counts, strict=True)
                        for row in range(end - count, end)]


@pytest.mark.parametrize("num_merged", [5, 12, 100, 1001])
def test_uniform_positions_are_distinct_evenly_spread_and_hold_the_newest(num_merged: int) -> None:
    for num_queries in (1, 2, 5):
        positions = positions_ref("uniform", num_merged, num_queries)
        gaps = {right - left for left, right in zip(positions[:-1], positions[1:], strict=True)}
        assert len(set(positions)) == num_queries
        assert positions[-1] == num_merged - 1
        assert gaps <= {num_merged // num_queries, -(-num_merged // num_queries)}
        assert positions[0] <= -(-num_merged // num_queries)
