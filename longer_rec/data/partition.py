"""One sorted partition of the log as the arrays that counting and writing share."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from longer_rec.data.describe import LogConfig, SplitConfig
from longer_rec.data.order import I64
from longer_rec.errors import DataError

SPLITS = ("train", "validation", "test")
NEVER = np.iinfo(np.int64).max
_TIME_BINS = 1 << 22

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Partition:
    """N sorted rows of U whole users.

    ``user_start`` and ``group_start`` are first rows of users and of (user, time) groups; ``user_of_row`` and
    ``group_of_row`` lead back. ``is_event``: the row enters the history; ``is_candidate``: it is ranked.
    """

    frame: pl.DataFrame
    time: I64
    user_start: I64
    user_of_row: I64
    group_start: I64
    group_of_row: I64
    is_event: Mask
    is_candidate: Mask

    @property
    def request_groups(self) -> I64:
        """Groups with at least one candidate: the requests, in order."""
        return np.unique(self.group_of_row[self.is_candidate])


def view_partition(frame: pl.DataFrame, config: LogConfig) -> Partition:
    """The arrays of a sorted partition."""
    time = frame["time"].to_numpy()
    new_user = np.concatenate([[True], (frame["user"] != frame["user"].shift(1)).to_numpy()[1:].astype(bool)])
    new_group = new_user | np.concatenate([[True], np.diff(time) != 0])
    is_event = is_candidate = np.ones(len(frame), bool)
    if "label" in frame.columns:
        label = frame["label"].fill_null(float("nan")).to_numpy()
        is_event = {"all": is_event, "positives": label > 0, "unlabelled": np.isnan(label)}[config.history]
        is_candidate = ~np.isnan(label) if config.candidates.kind == "rows" else label > 0
    return Partition(frame, time, np.flatnonzero(new_user), np.cumsum(new_user) - 1, np.flatnonzero(new_group),
                     np.cumsum(new_group) - 1, is_event, is_candidate)


@dataclass(frozen=True)
class Cuts:
    """When validation and test begin: one pair of times for all, or each user's own."""

    split: SplitConfig
    validation: int = NEVER
    test: int = NEVER

    def split_of(self, part: Partition, row: I64) -> npt.NDArray[np.int64]:
        """0, 1, 2 for train, validation, test, by the time of each row."""
        if self.split.kind == "global_time":
            return (part.time[row] >= self.validation).astype(np.int64) + (part.time[row] >= self.test)
        validation, test = self._user_cuts(part)
        user, time = part.user_of_row[row], part.time[row]
        return (time >= validation[user]).astype(np.int64) + (time >= test[user])

    def _user_cuts(self, part: Partition) -> tuple[I64, I64]:
        first_row = part.group_start[part.request_groups]
        num_requests = np.bincount(part.user_of_row[first_row], minlength=len(part.user_start))
        first = np.cumsum(num_requests) - num_requests
        time = np.concatenate([part.time[first_row], [NEVER]])

        def cut(fraction: float) -> I64:
            rank = np.maximum(np.rint(num_requests * fraction), 1).astype(np.int64)
            return np.where(rank < num_requests, time[np.minimum(first + rank, len(first_row))], NEVER)

        train, validation, _ = self.split.fractions
        return cut(train), cut(train + validation)


class TimeHistogram:
    """Counts of request times in 2^22 bins: the shares of a split to the width of a bin (8 s for a year)."""

    def __init__(self, first_time: int, last_time: int) -> None:
        self._first = first_time
        self.width_s = (last_time - first_time) // _TIME_BINS + 1
        self._counts = np.zeros((last_time - first_time) // self.width_s + 1, np.int64)

    def add(self, part: Partition) -> None:
        bins = (part.time[part.group_start[part.request_groups]] - self._first) // self.width_s
        self._counts += np.bincount(bins, minlength=len(self._counts))

    def cuts(self, split: SplitConfig) -> Cuts:
        before = np.concatenate([[0], np.cumsum(self._counts)])
        if before[-1] == 0:
            raise DataError("the log has no request: no row is labelled or positive; check columns.label")

        def cut(fraction: float) -> int:
            if fraction > 1 - 1e-9:
                return int(NEVER)
            return self._first + int(np.abs(before - fraction * before[-1]).argmin()) * self.width_s

        train, validation, _ = split.fractions
        return Cuts(split, cut(train), cut(train + validation))
