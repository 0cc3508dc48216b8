"""What the scores of a split say beyond one figure: by history length, by activity, and how far probabilities hold.

Candidates of one user are not independent: every interval is of 95 % and takes users for the units that were drawn.
"""

import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from longer_rec.data.history import Dataset
from longer_rec.train.evaluate import Scores
from longer_rec.train.metrics import Floats, Ints, cross_entropy, sigmoid

NUM_BINS: Final = 20
_Z: Final = 1.959964
Section = dict[str, Any]


def analyse_scores(scores: Scores, dataset: Dataset) -> Section:
    """Whole split, buckets and calibration, ready for JSON: what has no value is None.

    A request's history length counts all events before it, also those beyond ``data.max_events``; a user's activity is
    the number of its requests among those scored.
    """
    label, logit = scores.label_C, scores.logit_C
    user = dataset.requests.take("user", scores.row_C).astype(np.int64)
    length = dataset.requests.take("event_end", scores.row_C) - dataset.user_start.take("start", user)
    requests = dataset.requests.take("user", np.unique(scores.row_C))
    activity = np.bincount(requests.astype(np.int64), minlength=int(user.max(initial=0)) + 1)[user]
    return {
        "whole": _figures(label, logit, user),
        **{name: [{"low": low, "high": high, **_figures(label[at], logit[at], user[at])}
                  for low, high, at in powers_of_two(value)]
           for name, value in (("history_length", length), ("user_activity", activity))},
        "calibration": calibration_bins(label, logit, user),
    }


def powers_of_two(value_C: Ints) -> Iterator[tuple[int, int, Ints]]:
    """Lowest value, highest value and rows of each bucket that is not empty: 0, 1, 2 to 3, 4 to 7, and on."""
    bucket = np.frexp(value_C.astype(np.float64))[1]
    for exponent in np.unique(bucket).tolist():
        yield 2 ** exponent // 2, 2 ** exponent - 1, np.flatnonzero(bucket == exponent)


def calibration_bins(label_C: Floats, logit_C: Floats, user_C: Ints, num_bins: int = NUM_BINS) -> Section:
    """Mean prediction and observed rate in bins of about equally many candidates, equal predictions in one bin.

    ``error`` is the mean of |observed - predicted| over bins, weighted by candidates (ECE with bins of equal mass:
    Nguyen and O'Connor 2015, section 4.3); chance alone makes it positive.
    """
    if not len(logit_C):
        return {"error": None, "bins": []}
    # Not interpolated: between infinite logits there is nothing.
    edge = np.unique(np.quantile(logit_C, np.arange(1, num_bins) / num_bins, method="higher"))
    bin_of = np.searchsorted(edge, logit_C, side="right")
    bins: list[Section] = []
    gap = 0.0
    for at in (np.flatnonzero(bin_of == number) for number in np.unique(bin_of)):
        bins.append({"candidates": len(at), "predicted": float(sigmoid(logit_C[at]).mean()),
                     "observed": interval_of_rate(*mean_with_error(label_C[at], user_C[at]))})
        gap += len(at) * abs(float(label_C[at].mean()) - bins[-1]["predicted"]) / len(logit_C)
    return {"error": gap, "bins": bins}


def auc_with_error(label_C: Floats, score_C: Floats, user_C: Ints) -> tuple[float, float]:
    """AUC and its standard error, from DeLong's placements summed within users (Obuchowski 1997, section 2).

    One finite-sample factor for all users, where the paper has one for each class. NaN where there is nothing to say:
    the AUC of one class, the error with one user.
    """
    _, tie = np.unique(score_C, return_inverse=True)
    positive = label_C > 0
    wins, losses = np.bincount(tie, positive), np.bincount(tie, ~positive)
    num_positives, num_negatives = wins.sum(), losses.sum()
    if not num_positives or not num_negatives:
        return math.nan, math.nan
    beaten = (np.cumsum(losses) - losses / 2)[tie] / num_negatives
    beating = (num_positives - np.cumsum(wins) + wins / 2)[tie] / num_positives
    value = float(beaten[positive].mean())
    share = np.where(positive, (beaten - value) / num_positives, (beating - value) / num_negatives)
    return value, _error(share, user_C)


def mean_with_error(value_C: Floats, user_C: Ints) -> tuple[float, float]:
    """Mean over candidates and its standard error with users as clusters (a ratio estimator, linearised)."""
    mean = float(value_C.mean()) if len(value_C) else math.nan
    if not math.isfinite(mean):
        return mean, math.nan
    return mean, _error((value_C - mean) / len(value_C), user_C)


def interval_of_rate(value: float, error: float) -> tuple[float | None, float | None, float | None]:
    """A value between 0 and 1 and its interval, symmetric in the logit, so that it stays between 0 and 1 too.

    At 0 and 1 themselves a sample says nothing about how far it is from them.
    """
    if not 0.0 < value < 1.0 or math.isnan(error):
        return _known(value), None, None
    odds, step = math.log(value / (1 - value)), _Z * error / (value * (1 - value))
    low, high = sigmoid(np.array([odds - step, odds + step])).tolist()
    return value, low, high


def _figures(label: Floats, logit: Floats, user: Ints) -> Section:
    loss, error = mean_with_error(cross_entropy(label, logit), user)
    return {"candidates": len(label), "positives": int(label.sum()), "users": len(np.unique(user)),
            "auc": interval_of_rate(*auc_with_error(label, logit, user)),
            "logloss": (_known(loss), _known(loss - _Z * error), _known(loss + _Z * error))}


def _error(share_C: Floats, user_C: Ints) -> float:
    """Standard error of a sum of centred shares, independent between users."""
    _, cluster = np.unique(user_C, return_inverse=True)
    by_user = np.bincount(cluster, share_C)
    count = len(by_user)
    return math.sqrt(count / (count - 1) * float((by_user ** 2).sum())) if count > 1 else math.nan


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
