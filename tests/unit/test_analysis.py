"""Buckets, intervals and calibration of a split's scores against naive counting, bootstrap and closed forms."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longer_rec.train.analysis import (
    analyse_scores,
    auc_with_error,
    calibration_bins,
    interval_of_rate,
    mean_with_error,
    powers_of_two,
)
from longer_rec.train.evaluate import Scores
from longer_rec.train.metrics import auc, logloss, sigmoid

scores = st.sampled_from([-math.inf, -2.0, -0.5, 0.0, 0.5, 3.0, math.inf])
candidates = st.lists(st.tuples(st.integers(0, 1), scores, st.integers(0, 3)), min_size=1, max_size=40)


def columns(rows):
    label, score, user = (np.array([row[column] for row in rows]) for column in range(3))
    return label.astype(float), score.astype(float), user


def auc_error_ref(label, score, user):
    """The sums of Obuchowski 1997 term by term, a pair at a time, with one finite-sample factor."""
    def won(p, n):
        return (p > n) + 0.5 * (p == n)

    positives = [(s, u) for y, s, u in zip(label, score, user, strict=True) if y]
    negatives = [(s, u) for y, s, u in zip(label, score, user, strict=True) if not y]
    P, N, names = len(positives), len(negatives), sorted(set(user.tolist()))
    value = sum(won(p, n) for p, _ in positives for n, _ in negatives) / (P * N)
    ten = {name: sum(sum(won(p, n) for n, _ in negatives) / N - value for p, u in positives if u == name)
           for name in names}
    one = {name: sum(sum(won(p, n) for p, _ in positives) / P - value for n, u in negatives if u == name)
           for name in names}
    factor = len(names) / (len(names) - 1)
    return math.sqrt(factor * (sum(ten[name] ** 2 for name in names) / P ** 2
                               + sum(one[name] ** 2 for name in names) / N ** 2
                               + 2 * sum(ten[name] * one[name] for name in names) / (P * N)))


@given(candidates.filter(lambda rows: len({row[0] for row in rows}) == 2 and len({row[2] for row in rows}) > 1))
def test_auc_and_its_error_equal_counting_all_pairs(rows):
    label, score, user = columns(rows)
    value, error = auc_with_error(label, score, user)
    assert value == pytest.approx(auc(label, score), rel=1e-12, abs=1e-12)
    assert error == pytest.approx(auc_error_ref(label, score, user), rel=1e-9, abs=1e-9)


def clustered(seed, num_users=300):
    """Users with a base rate and a signal of their own, 1 to 40 candidates each."""
    random = np.random.default_rng(seed)
    user = np.repeat(np.arange(num_users), random.integers(1, 40, num_users))
    bias, signal = random.normal(size=num_users)[user], random.normal(1, 1, num_users)[user]
    latent = random.normal(size=len(user))
    label = (random.random(len(user)) < sigmoid(bias + signal * latent)).astype(float)
    return label, latent + 0.5 * bias, user


def test_errors_are_those_of_a_bootstrap_over_users():
    """600 replicates tell a standard error to 3 %; taking candidates for independent would miss by far more."""
    label, score, user = clustered(0)
    random = np.random.default_rng(1)
    rows_of = np.split(np.arange(len(user)), np.flatnonzero(np.diff(user)) + 1)
    drawn = [np.concatenate([rows_of[u] for u in random.integers(0, len(rows_of), len(rows_of))]) for _ in range(600)]
    assert auc_with_error(label, score, user)[1] == pytest.approx(np.std([auc(label[at], score[at]) for at in drawn]),
                                                                  rel=0.12)
    error = mean_with_error(label, user)[1]
    assert error == pytest.approx(np.std([label[at].mean() for at in drawn]), rel=0.12)
    assert error > 1.5 * label.std() / math.sqrt(len(label))


def test_no_error_is_claimed_where_none_can_be_known():
    one_class, one_user = (np.ones(5), np.arange(5.0), np.arange(5)), (np.eye(5)[0], np.arange(5.0), np.zeros(5))
    assert all(map(math.isnan, auc_with_error(*one_class)))
    assert auc_with_error(*one_user)[0] == 0.0
    assert math.isnan(auc_with_error(*one_user)[1])
    assert interval_of_rate(1.0, 0.0) == (1.0, None, None)
    assert interval_of_rate(math.nan, math.nan) == (None, None, None)
    assert mean_with_error(np.array([1.0, math.inf]), np.arange(2))[0] == math.inf


@pytest.mark.parametrize("value", [1e-6, 0.3, 0.999])
def test_the_interval_of_a_rate_stays_between_0_and_1_and_is_the_usual_one_for_small_errors(value):
    assert all(0 <= bound <= 1 for bound in interval_of_rate(value, 0.2))
    _, low, high = interval_of_rate(value, 1e-4 * value * (1 - value))
    np.testing.assert_allclose([low - value, high - value],
                               np.array([-1.96e-4, 1.96e-4]) * value * (1 - value), rtol=1e-3)


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=30))
def test_every_value_lies_in_one_bucket_and_no_bucket_is_empty(values):
    array = np.array(values)
    buckets = list(powers_of_two(array))
    assert sorted(np.concatenate([at for _, _, at in buckets])) == list(range(len(values)))
    for low, high, at in buckets:
        assert len(at)
        assert all(low <= value <= high for value in array[at])
        assert (low, high) == (0, 0) or (high == 2 * low - 1 and low & (low - 1) == 0)


@given(candidates, st.integers(1, 6))
def test_calibration_equals_counting_bin_by_bin(rows, num_bins):
    label, logit, user = columns(rows)
    result = calibration_bins(label, logit, user, num_bins)
    bins = result["bins"]
    assert sum(entry["candidates"] for entry in bins) == len(rows)
    assert len(bins) <= num_bins
    order, start, gap = np.argsort(logit, kind="stable"), 0, 0.0
    for entry in bins:  # ascending predictions: bins are stretches of the sorted candidates
        at = order[start:start + entry["candidates"]]
        start += len(at)
        assert start == len(rows) or logit[order[start]] > logit[at].max(), "equal predictions in two bins"
        assert entry["predicted"] == pytest.approx(sum(sigmoid(logit[at])) / len(at), abs=1e-12)
        assert entry["observed"][0] == pytest.approx(label[at].sum() / len(at), abs=1e-12)
        gap += len(at) / len(rows) * abs(entry["observed"][0] - entry["predicted"])
    assert result["error"] == pytest.approx(gap, abs=1e-12)


def test_bins_of_distinct_predictions_hold_equally_many_and_a_perfect_model_has_no_error_but_chance():
    random = np.random.default_rng(0)
    logit = random.normal(-2, 1.5, 100_000)
    label = (random.random(len(logit)) < sigmoid(logit)).astype(float)
    result = calibration_bins(label, logit, np.arange(len(logit)))
    assert [entry["candidates"] for entry in result["bins"]] == [5000] * 20
    assert result["error"] < 0.005
    inside = [entry["observed"][1] < entry["predicted"] < entry["observed"][2] for entry in result["bins"]]
    assert sum(inside) >= 17
    assert calibration_bins(label, logit + 1, np.arange(len(logit)))["error"] > 0.05


def dataset_of(user_of_request, event_end):
    """The two columns of an index that are read, and where each user's events start."""
    tables = {"user": np.array(user_of_request, np.uint32), "event_end": np.array(event_end),
              "start": np.array([0, 10, 20, 30])}
    table = SimpleNamespace(take=lambda name, row: tables[name].take(row))
    return SimpleNamespace(requests=table, user_start=table)


def test_buckets_hold_the_metrics_of_the_candidates_they_name():
    dataset = dataset_of([9, 0, 0, 1, 2], [9, 3, 7, 10, 27])  # histories of requests 1 to 4: 3, 7, 0, 7
    row = np.repeat([1, 2, 3, 4], [2, 3, 4, 5])
    random = np.random.default_rng(0)
    label, logit = (random.random(14) < 0.5).astype(float), random.normal(size=14)
    analysis = json.loads(json.dumps(analyse_scores(Scores(label, logit, row), dataset), allow_nan=False))
    lengths = analysis["history_length"]
    assert [(entry["low"], entry["high"], entry["candidates"], entry["users"]) for entry in lengths] == \
        [(0, 0, 4, 1), (2, 3, 2, 1), (4, 7, 8, 2)]
    assert [(entry["low"], entry["high"], entry["candidates"], entry["users"])
            for entry in analysis["user_activity"]] == [(1, 1, 9, 2), (2, 3, 5, 1)]
    at = np.isin(row, [2, 4])
    assert lengths[-1]["auc"][0] == pytest.approx(auc(label[at], logit[at]))
    assert lengths[-1]["logloss"][0] == pytest.approx(logloss(label[at], logit[at]))
    assert lengths[-1]["positives"] == label[at].sum()
    assert analysis["whole"]["auc"][0] == pytest.approx(auc(label, logit))


def test_nothing_that_is_not_finite_reaches_the_file():
    dataset = dataset_of([0, 1], [3, 15])
    analysis = analyse_scores(Scores(np.array([1.0, 1.0]), np.array([-math.inf, math.inf]), np.array([0, 1])), dataset)
    assert json.loads(json.dumps(analysis, allow_nan=False))["whole"]["auc"] == [None, None, None]
