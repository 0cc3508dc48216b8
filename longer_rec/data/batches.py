"""Requests into batches: histories cut strictly before the request's time when the batch is made, never before."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longer_rec.batch import RequestBatch
from longer_rec.data.history import Dataset
from longer_rec.data.order import I64, hash_u64, ranges
from longer_rec.errors import DataError

_MAX_DRAWS = 256
_EVALUATION = -1  # in the place of the epoch


def make_batch(dataset: Dataset, rows: Any, *, max_events: int, epoch: Any = None, drawn: bool = True) -> RequestBatch:
    """The requests at ``rows`` (B), with the newest ``max_events`` events strictly before each.

    ``epoch`` (one, or one per row) makes the negatives fresh; None draws those that every evaluation sees. Without
    ``drawn`` the candidates are those of the log alone.
    A pure function of the dataset and its arguments. No Python loop over events or requests: 1.4 to 2.5 ms of CPU for
    32 requests of completejourney at 1,000 events, 12,400 events in all (busy 2-core x86-64 machine, November 2026).
    """
    row_B = np.asarray(rows, np.int64)
    request = {name: dataset.requests.take(name, row_B) for name in ("user", "time", "event_end")}
    first = dataset.user_start.take("start", request["user"])
    length = np.minimum(request["event_end"] - first, max_events)
    at = ranges(request["event_end"] - length, length)
    item = dataset.events.take("item", at)
    candidate_item, num_candidates, label = _candidates(dataset, row_B, epoch, drawn)
    instances = dataset.instances.of_requests(dataset, row_B, num_candidates) if dataset.instances is not None else {}
    history = _item_features(dataset, item)
    for feature in dataset.schema.event_features:
        history[feature.name] = _tensor(dataset.events.take(feature.name, at))
    users, user_length = _users(dataset, request["user"].astype(np.int64))
    return RequestBatch(
        history=history, history_time_T=_tensor(dataset.events.take("time", at)), history_length_B=_tensor(length),
        candidates=_item_features(dataset, candidate_item),
        candidate_dense_CF=torch.from_numpy(dataset.item_dense[candidate_item]),
        num_candidates_B=_tensor(num_candidates),
        label_CY=torch.from_numpy(label.astype(np.float32)).unsqueeze(1), users=users, user_length_B=user_length,
        user_dense_BF=torch.zeros(len(row_B), 0), request_time_B=_tensor(request["time"]), request_row_B=_tensor(row_B),
        instances={name: torch.from_numpy(values) for name, values in instances.items()})


def request_sizes(dataset: Dataset, row_B: I64) -> tuple[I64, I64]:
    """Of each request, the events before it (B) and its candidates, drawn negatives among them (B)."""
    user_B = dataset.requests.take("user", row_B)
    length_B = dataset.requests.take("event_end", row_B).astype(np.int64) - dataset.user_start.take("start", user_B)
    num_candidates_B = dataset.requests.take("num_candidates", row_B).astype(np.int64)
    return length_B, num_candidates_B * (1 + (dataset.config.candidates.per_positive or 0))


def _tensor(values: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _item_features(dataset: Dataset, item: npt.NDArray[Any]) -> dict[str, Tensor]:
    return {name: _tensor(ids.take(item)) for name, ids in dataset.items.items()}


def _users(dataset: Dataset, user: I64) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    ids: dict[str, Tensor] = {}
    lengths: dict[str, Tensor] = {}
    for name, column in dataset.users.items():
        at, length = user, np.ones(len(user), np.int64)
        if column.offsets is not None:
            length = column.offsets[user + 1] - column.offsets[user]
            at = ranges(column.offsets[user], length)
        ids[name], lengths[name] = _tensor(column.ids[at]), _tensor(length)
    return ids, lengths


def _candidates(dataset: Dataset, row_B: I64, epoch: Any, drawn: bool) -> tuple[I64, I64, npt.NDArray[Any]]:
    """Items, number per request, labels; with sampled negatives the positives of a request come first."""
    start, count = dataset.requests.take("candidate_start", row_B), dataset.requests.take("num_candidates", row_B)
    count = count.astype(np.int64)
    at = ranges(start, count)
    item = dataset.candidates.take("item", at).astype(np.int64)
    per_positive = dataset.config.candidates.per_positive
    if per_positive is None:
        return item, count, dataset.candidates.take("label", at)
    if not drawn:
        return item, count, np.ones(len(item), np.float32)
    epoch_B = np.broadcast_to(np.asarray(_EVALUATION if epoch is None else epoch, np.int64), row_B.shape)
    negative = _negatives(dataset, row_B, epoch_B, item, count, count * per_positive)
    total = count * (1 + per_positive)
    first = np.cumsum(total) - total
    merged = np.empty(int(total.sum()), np.int64)
    label = np.zeros(len(merged), np.float32)
    positive_at = ranges(first, count)
    merged[positive_at], label[positive_at] = item, 1
    merged[ranges(first + count, count * per_positive)] = negative
    return merged, total, label


def _negatives(dataset: Dataset, row_B: I64, epoch_B: I64, positive: I64, num_positives: I64, wanted: I64) -> I64:
    """Items drawn by their training count and not among the request's positives; with replacement.

    Each draw is a hash of (seed, epoch, request, slot, attempt): no state, so that every process, model and epoch
    order sees the same ones.
    """
    cumulative = dataset.item_count_cumulative
    num_items = len(cumulative)
    request = np.arange(len(row_B))
    taken = np.sort(np.repeat(request, num_positives) * num_items + positive)
    owner = np.repeat(request, wanted)
    slot = ranges(np.zeros(len(row_B), np.int64), wanted)
    key = hash_u64(dataset.config.negatives_seed, epoch_B[owner], row_B[owner], slot)
    drawn = np.empty(len(owner), np.int64)
    open_ = np.arange(len(owner))
    for attempt in range(_MAX_DRAWS):
        ticket = (hash_u64(key[open_], attempt) % np.uint64(cumulative[-1])).astype(np.int64)
        drawn[open_] = np.searchsorted(cumulative, ticket, "right")
        wish = owner[open_] * num_items + drawn[open_]
        open_ = open_[taken[np.minimum(np.searchsorted(taken, wish), len(taken) - 1)] == wish]
        if len(open_) == 0:
            return drawn
    row = int(row_B[owner[open_[0]]])
    raise DataError(f"request {row}: no negative in {_MAX_DRAWS} draws, its {num_positives[owner[open_[0]]]} positives "
                    f"are nearly all of the {num_items - 1} items; use candidates.kind=rows or fewer positives")
