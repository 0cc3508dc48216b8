"""Exact ranking metrics over packed candidates; pure NumPy, float64, no binning and no sampling.

Every function takes arrays of C candidates: ``label_C`` in {0, 1}, ``logit_C`` (or any score that ranks, infinities
included, for AUC) and, where candidates are grouped, ``group_C``: one integer per candidate, equal within a group.
Sorting dominates: O(C log C) time, about 50 bytes a candidate of scratch memory.

A metric without a meaning on the given labels is NaN, never a guess: AUC with one class only, calibration and NE
without a positive (NE also without a negative), everything on zero candidates.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longer_rec.errors import DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def auc(label_C: ArrayLike, score_C: ArrayLike) -> float:
    """Probability that a positive scores above a negative, ties counting one half (Mann-Whitney, mid-ranks)."""
    label, score = _check(label_C, score_C)
    return float(auc_by_group(label, score, np.zeros(len(label), dtype=np.int64))[0]) if len(label) else float("nan")


def auc_by_group(label_C: ArrayLike, score_C: ArrayLike, group_C: ArrayLike) -> Floats:
    """AUC of each group, in ascending order of the group's number; NaN for a group of one class.

    One sort for all groups: within a group, Σ mid-ranks of positives − n₊(n₊ + 1)/2 counts the won pairs.
    """
    label, score = _check(label_C, score_C)
    _, group = np.unique(_check_groups(group_C, len(label)), return_inverse=True)
    order = np.lexsort((score, group))
    label, score, group = label[order], score[order], group[order]
    num_candidates = np.bincount(group)
    first = np.cumsum(num_candidates) - num_candidates
    rank = _mid_ranks(score, group) - first[group]
    num_positives = np.bincount(group, weights=label)
    num_pairs = num_positives * (num_candidates - num_positives)
    won_pairs = np.bincount(group, weights=rank * label) - num_positives * (num_positives + 1) / 2
    return np.divide(won_pairs, num_pairs, out=np.full(len(num_pairs), np.nan), where=num_pairs > 0)


def gauc(label_C: ArrayLike, score_C: ArrayLike, group_C: ArrayLike) -> tuple[float, int]:
    """AUC within each group averaged with the group's number of candidates as its weight, and the groups counted.

    Groups are users for the usual figure, requests for the stricter one. Groups of one class say nothing about
    order and are left out; (NaN, 0) when none is left. Zhou et al. 2018 (DIN), section 6.2, weighted by impressions.
    """
    auc_by = auc_by_group(label_C, score_C, group_C)
    _, num_candidates = np.unique(np.asarray(group_C), return_counts=True)
    told = ~np.isnan(auc_by)
    if not told.any():
        return float("nan"), 0
    return float(np.average(auc_by[told], weights=num_candidates[told])), int(told.sum())


def logloss(label_C: ArrayLike, logit_C: ArrayLike) -> float:
    """Mean binary cross-entropy in nats, from logits: max(z, 0) − z·y + log(1 + e^−|z|) overflows nowhere.

    An infinite logit on the right side costs 0, on the wrong side infinity.
    """
    label, logit = _check(label_C, logit_C)
    return float(np.mean(cross_entropy(label, logit))) if len(label) else float("nan")


def cross_entropy(label_C: Floats, logit_C: Floats) -> Floats:
    """Each candidate's own part of the LogLoss."""
    against = np.where(label_C > 0, -logit_C, logit_C)
    return np.maximum(against, 0.0) + np.log1p(np.exp(-np.abs(against)))


def normalised_entropy(label_C: ArrayLike, logit_C: ArrayLike) -> float:
    """LogLoss over that of always predicting the base rate: 1 for knowing nothing else (He et al. 2014, section 3)."""
    label, _ = _check(label_C, logit_C)
    rate = label.mean() if len(label) else 0.0
    if not 0.0 < rate < 1.0:
        return float("nan")
    return logloss(label_C, logit_C) / float(-rate * np.log(rate) - (1.0 - rate) * np.log1p(-rate))


def calibration(label_C: ArrayLike, logit_C: ArrayLike) -> float:
    """Mean predicted probability over mean label: above 1 the model promises too much."""
    label, logit = _check(label_C, logit_C)
    if not label.any():
        return float("nan")
    return float(sigmoid(logit).mean() / label.mean())


def evaluate_scores(label_C: ArrayLike, logit_C: ArrayLike, user_C: ArrayLike) -> dict[str, float]:
    """All metrics of one task over candidates of any number of users, GAUC being per user.

    ``num_gauc_users`` counts the users with both classes.
    """
    label, logit = _check(label_C, logit_C)
    gauc_user, num_gauc_users = gauc(label, logit, user_C)
    return {
        "auc": auc(label, logit),
        "logloss": logloss(label, logit),
        "ne": normalised_entropy(label, logit),
        "calibration": calibration(label, logit),
        "gauc": gauc_user,
        "base_rate": float(label.mean()) if len(label) else float("nan"),
        "num_candidates": len(label),
        "num_gauc_users": num_gauc_users,
    }


def _mid_ranks(score_C: Floats, group_C: Ints) -> Floats:
    """1-based positions, the members of a tie sharing their mean; input sorted by group, then score."""
    starts = np.empty(len(score_C), dtype=bool)
    starts[:1] = True
    # != on purpose: inf − inf is NaN, so differences would tear ties of infinities apart.
    starts[1:] = (score_C[1:] != score_C[:-1]) | (group_C[1:] != group_C[:-1])
    tie = np.cumsum(starts) - 1
    first = np.flatnonzero(starts)
    last = np.append(first[1:], len(score_C)) - 1
    return ((first + last) / 2.0 + 1.0)[tie]


def sigmoid(logit_C: Floats) -> Floats:
    """Probability of each logit, infinite ones included."""
    small = np.exp(-np.abs(logit_C))
    return np.where(logit_C >= 0, 1.0, small) / (1.0 + small)


def _check(label_C: ArrayLike, score_C: ArrayLike) -> tuple[Floats, Floats]:
    label, score = np.asarray(label_C, dtype=np.float64), np.asarray(score_C, dtype=np.float64)
    if label.ndim != 1 or label.shape != score.shape:
        raise DataError(f"labels of shape {label.shape} and scores of shape {score.shape}: "
                        "one label and one score for each candidate are needed")
    strange = (label != 0) & (label != 1)
    if strange.any():
        raise DataError(f"label {label[strange][0]:g} of candidate {int(strange.argmax())} is neither 0 nor 1; "
                        "ranking metrics need binary labels")
    if np.isnan(score).any():
        raise DataError(f"the score of candidate {int(np.isnan(score).argmax())} is NaN and has no rank; "
                        "the model diverged: lower the learning rate or clip gradients")
    return label, score


def _check_groups(group_C: ArrayLike, num_candidates: int) -> NDArray[Any]:
    group = np.asarray(group_C)
    if group.shape != (num_candidates,):
        raise DataError(f"groups of shape {group.shape} for {num_candidates} candidates: one for each is needed")
    return group
