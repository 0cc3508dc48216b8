"""The order of samples is a pure function, and a permutation of each epoch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longer_rec.data.order import deal_evenly, hash_u64, permute, sample_positions, sample_rows


@pytest.mark.parametrize("size", [*range(1, 70), 100, 127, 128, 129, 1000, 4096, 4097, 65_537, 100_003])
def test_permutation_is_a_bijection(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permutation_depends_on_the_key_and_mixes() -> None:
    first, second = (permute(np.arange(10_000), 10_000, key) for key in (1, 2))
    assert (first == second).mean() < 0.01
    assert abs(np.corrcoef(first, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.05


def test_one_position_is_permuted_as_among_all() -> None:
    whole = permute(np.arange(777), 777, 5)
    assert [int(permute(i, 777, 5)[0]) for i in range(0, 777, 31)] == whole[::31].tolist()


@settings(max_examples=60, deadline=None)
@given(num_requests=st.integers(1, 50), step_requests=st.integers(1, 35), seed=st.integers(0, 99))
def test_each_request_comes_once_an_epoch(num_requests: int, step_requests: int, seed: int) -> None:
    steps = 3 * num_requests // step_requests + 1
    positions = np.concatenate([sample_positions(step, step_requests) for step in range(steps)])
    row, epoch = sample_rows(positions, num_requests, seed)
    assert np.array_equal(positions, np.arange(len(positions)))
    whole = len(positions) // num_requests
    assert whole >= 3
    for one in range(whole):
        assert np.array_equal(np.sort(row[epoch == one]), np.arange(num_requests))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    positions = np.arange(2000)
    row, epoch = sample_rows(positions, 1000, seed=3)
    assert (row[epoch == 0] == row[epoch == 1]).mean() < 0.02
    assert (row == sample_rows(positions, 1000, seed=4)[0]).mean() < 0.02


def test_hash_is_the_same_for_ever() -> None:
    assert hash_u64(1, 2, 3).tolist() == [3273904389316788423]
    assert hash_u64(7, np.arange(3)).tolist() == [int(hash_u64(7, i)[0]) for i in range(3)]


def test_hash_spreads_evenly() -> None:
    counts = np.bincount((hash_u64(0, np.arange(100_000)) % np.uint64(100)).astype(int), minlength=100)
    assert counts.min() > 850
    assert counts.max() < 1150


@settings(max_examples=60, deadline=None)
@given(num_workers=st.integers(1, 9), share=st.integers(1, 8), seed=st.integers(0, 99))
def test_work_is_dealt_whole_in_equal_numbers_and_evenly(num_workers: int, share: int, seed: int) -> None:
    cost = np.random.default_rng(seed).integers(0, 1000, num_workers * share)
    dealt = deal_evenly(cost, num_workers)
    assert [len(indices) for indices in dealt] == [share] * num_workers
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(cost)))
    assert all((np.diff(indices) > 0).all() for indices in dealt)
    loads = [int(cost[indices].sum()) for indices in dealt]
    assert max(loads) - min(loads) <= cost.max()
