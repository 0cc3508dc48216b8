"""Metrics against naive quadratic references, torchmetrics and closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.classification import BinaryAUROC

from longer_rec.errors import DataError
from longer_rec.train.metrics import (
    auc,
    auc_by_group,
    calibration,
    evaluate_scores,
    gauc,
    logloss,
    normalised_entropy,
)


def auc_ref(label, score):
    """Every pair of a positive and a negative, one at a time."""
    positives = [s for y, s in zip(label, score, strict=True) if y]
    negatives = [s for y, s in zip(label, score, strict=True) if not y]
    if not positives or not negatives:
        return math.nan
    won = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    return won / (len(positives) * len(negatives))


def gauc_ref(label, score, group):
    weighted, weight, num_groups = 0.0, 0, 0
    for name in set(group):
        rows = [row for row, other in enumerate(group) if other == name]
        value = auc_ref([label[row] for row in rows], [score[row] for row in rows])
        if not math.isnan(value):
            weighted, weight, num_groups = weighted + value * len(rows), weight + len(rows), num_groups + 1
    return (weighted / weight if weight else math.nan), num_groups


# Few distinct scores, so that ties are the rule; infinities as a saturated model gives them.
scores = st.sampled_from([-math.inf, -2.0, -0.5, 0.0, 0.5, 1e-9, 3.0, math.inf])
candidates = st.lists(st.tuples(st.integers(0, 1), scores, st.integers(0, 3)), max_size=40)


@given(candidates)
def test_auc_and_gauc_equal_counting_all_pairs(rows):
    label, score, group = ([row[column] for row in rows] for column in range(3))
    np.testing.assert_allclose(auc(label, score), auc_ref(label, score), rtol=1e-12)
    value, num_groups = gauc(label, score, group)
    expected, expected_groups = gauc_ref(label, score, group)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert num_groups == expected_groups


@given(candidates, st.randoms(use_true_random=False))
def test_order_of_candidates_and_names_of_groups_change_nothing(rows, random):
    shuffled = random.sample(rows, len(rows))
    label, score, group = (np.array([row[column] for row in rows], dtype=float) for column in range(3))
    label_s, score_s, group_s = (np.array([row[column] for row in shuffled], dtype=float) for column in range(3))
    np.testing.assert_equal(auc(label_s, score_s), auc(label, score))
    np.testing.assert_allclose(gauc(label_s, score_s, 70_000 - 5 * group_s), gauc(label, score, group), rtol=1e-12)


@given(candidates.filter(lambda rows: 0 < sum(row[0] for row in rows) < len(rows)))
def test_auc_ranks_only_and_flipping_scores_flips_it(rows):
    label, score = (np.array([row[column] for row in rows], dtype=float) for column in range(2))
    assert auc(label, np.arctan(score)) == auc(label, score)
    np.testing.assert_allclose(auc(label, -score) + auc(label, score), 1.0, rtol=1e-12)


def test_auc_equals_torchmetrics_on_a_hundred_thousand_candidates_with_ties():
    random = np.random.default_rng(0)
    label = random.random(100_000) < 0.2
    logit = np.round(random.normal(size=100_000) + label, 2).astype(np.float32)
    assert len(np.unique(logit)) < 2_000
    expected = BinaryAUROC(thresholds=None)(torch.sigmoid(torch.from_numpy(logit).double()), torch.from_numpy(label))
    assert auc(label, logit) == pytest.approx(float(expected), abs=1e-7)  # torchmetrics 1.0 sums in float32


@pytest.mark.parametrize("constant", [0.0, -3.5, math.inf, -math.inf])
def test_constant_predictions_score_one_half_whatever_the_order_of_rows(constant):
    for label in ([1, 0, 0, 0], [0, 0, 0, 1]):
        assert auc(label, [constant] * 4) == 0.5
        assert gauc(label, [constant] * 4, [7] * 4) == (0.5, 1)


@pytest.mark.parametrize("label", [[], [1], [0], [1, 1, 1], [0, 0]])
def test_one_class_is_nan_and_counts_no_user(label):
    score = np.arange(len(label), dtype=float)
    metrics = evaluate_scores(label, score, np.zeros(len(label), dtype=np.int64))
    assert math.isnan(metrics["auc"])
    assert math.isnan(metrics["gauc"])
    assert math.isnan(metrics["ne"])
    assert metrics["num_gauc_users"] == 0
    assert metrics["num_candidates"] == len(label)


def test_gauc_weighs_users_by_candidates_and_skips_those_of_one_class():
    # user 3: right (2 candidates), user 5: wrong (3 candidates), user 9: positives only
    label, score, user = [1, 0, 1, 0, 0, 1, 1], [2.0, 1.0, 0.0, 1.0, 2.0, 5.0, 6.0], [3, 3, 5, 5, 5, 9, 9]
    np.testing.assert_array_equal(auc_by_group(label, score, user), [1.0, 0.0, np.nan])
    assert gauc(label, score, user) == (pytest.approx(2 / 5), 2)


def test_gauc_of_one_group_is_auc_and_ignores_shifts_between_groups():
    random = np.random.default_rng(1)
    label, score = random.integers(0, 2, 500), random.normal(size=500)
    user = random.integers(0, 20, 500)
    assert gauc(label, score, np.zeros(500, dtype=int))[0] == auc(label, score)
    np.testing.assert_allclose(gauc(label, score + 100 * user, user), gauc(label, score, user), rtol=1e-12)
    assert auc(label, score + 100 * user) != pytest.approx(auc(label, score), abs=1e-3)


def test_logloss_equals_torch_and_survives_logits_beyond_exp():
    random = np.random.default_rng(2)
    label, logit = random.integers(0, 2, 1000).astype(float), random.normal(size=1000) * 20
    expected = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(logit), torch.tensor(label))
    assert logloss(label, logit) == pytest.approx(float(expected), rel=1e-12)
    assert logloss([1, 0], [1e4, 1e4]) == 5e3
    assert logloss([1, 0], [math.inf, -math.inf]) == 0.0
    assert logloss([1, 0], [math.inf, math.inf]) == math.inf


@given(st.integers(1, 99))
def test_predicting_the_base_rate_has_entropy_one_and_calibration_one(num_positives):
    label = np.arange(100) < num_positives
    logit = np.full(100, math.log(num_positives / (100 - num_positives)))
    assert normalised_entropy(label, logit) == pytest.approx(1.0, rel=1e-12)
    assert calibration(label, logit) == pytest.approx(1.0, rel=1e-12)


def test_calibration_is_mean_prediction_over_mean_label():
    assert calibration([1, 0, 0, 0], [0.0] * 4) == pytest.approx(2.0)
    assert calibration([1, 1], [math.inf, -math.inf]) == 0.5
    assert math.isnan(calibration([0, 0], [0.0, 1.0]))


def test_evaluate_scores_holds_every_metric_of_the_same_candidates():
    random = np.random.default_rng(3)
    label, logit, user = random.integers(0, 2, 300), random.normal(size=300), random.integers(0, 30, 300)
    metrics = evaluate_scores(label, logit, user)
    assert set(metrics) == {"auc", "logloss", "ne", "calibration", "gauc", "base_rate", "num_candidates",
                            "num_gauc_users"}
    assert metrics["auc"] == auc(label, logit)
    assert (metrics["gauc"], metrics["num_gauc_users"]) == gauc(label, logit, user)
    assert metrics["base_rate"] == label.mean()
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    ("label", "logit", "user", "words"),
    [
        ([1, 0], [0.0], [1, 1], "one label and one score"),
        ([[1, 0]], [[0.0, 1.0]], [1, 1], "one label and one score"),
        ([1, 0.5], [0.0, 1.0], [1, 1], "label 0.5 of candidate 1"),
        ([1, math.nan], [0.0, 1.0], [1, 1], "label nan of candidate 1"),
        ([1, 0, 0], [0.0, 1.0, math.nan], [1, 1, 1], "score of candidate 2 is NaN"),
        ([1, 0], [0.0, 1.0], [1], "groups of shape"),
    ])
def test_what_has_no_rank_is_refused_by_name(label, logit, user, words):
    with pytest.raises(DataError, match=words):
        evaluate_scores(label, logit, user)
