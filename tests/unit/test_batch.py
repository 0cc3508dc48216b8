"""A batch is checked before any lookup: each fault is named, and a valid batch passes however it came about."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from longer_rec.batch import RequestBatch, concat_batches, deduplicate, validate_batch
from longer_rec.errors import DataError
from tests.reference.batches import SCHEMA, random_batch

Change = Callable[[RequestBatch], RequestBatch]


def ids(side: str, name: str, values: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda batch: replace(batch, **{side: {**getattr(batch, side), name: values(getattr(batch, side)[name])}})


def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.cat([torch.full_like(tensor[:1], value), tensor[1:]])


@pytest.mark.parametrize(("change", "message"), [
    (ids("history", "item", first(61)), r"history feature 'item': id 61 is outside \[0, 61\) of table 'item'"),
    (ids("candidates", "category", first(-1)), r"candidate feature 'category': id -1 is outside \[0, 11\)"),
    (ids("users", "tags", first(31)), r"user feature 'tags': id 31 is outside \[0, 31\)"),
    (ids("history", "item", torch.Tensor.int), r"'item' has dtype torch.int32; ids are int64"),
    (ids("history", "action", lambda value: value[1:]), r"history feature 'action' has \d+ values, \d+ are needed"),
    (ids("users", "tags", lambda value: value[1:]), r"user 'tags': lengths add up to \d+, but \d+ values are given"),
    (lambda batch: replace(batch, candidates={"item": batch.candidates["item"]}),
     r"candidate feature 'category' is missing; given are \['item'\]"),
    (lambda batch: replace(batch, history_length_B=first(-2)(batch.history_length_B)),
     r"history: length -2 is negative; lengths are 0 or more"),
    (lambda batch: replace(batch, num_candidates_B=batch.num_candidates_B + 1), r"candidates: lengths add up to"),
    (lambda batch: replace(batch, users={**batch.users, "user": batch.users["user"][1:]},
                           user_length_B={**batch.user_length_B, "user": first(0)(batch.user_length_B["user"])}),
     r"user feature 'user' must have exactly one value"),
    (lambda batch: replace(batch, request_time_B=batch.history_time_T[-1].expand(8)),
     r"request \d: an event at time \d+ is not strictly before the request's time \d+; cut the history"),
    (lambda batch: replace(batch, history_time_T=batch.history_time_T.flip(0)), r"not sorted from oldest to newest"),
    (lambda batch: replace(batch, label_CY=first(torch.nan)(batch.label_CY)), r"labels hold NaN or infinity"),
    (lambda batch: replace(batch, user_dense_BF=torch.zeros(8, 1)), r"user features have shape \(8, 1\); \(8, 0\)"),
])
def test_each_fault_of_a_batch_is_named(change: Change, message: str) -> None:
    batch = random_batch(SCHEMA, num_requests=8, seed=1)
    validate_batch(batch, SCHEMA)
    with pytest.raises(DataError, match=message):
        validate_batch(change(batch), SCHEMA)


def test_joined_and_empty_batches_are_batches() -> None:
    parts = [random_batch(SCHEMA, num_requests=count, seed=count) for count in (3, 0, 5)]
    joined = concat_batches(parts)
    for batch in (*parts, joined):
        validate_batch(batch, SCHEMA)
    assert (joined.num_requests, joined.num_events, joined.num_candidates) == tuple(
        sum(getattr(part, name) for part in parts) for name in ("num_requests", "num_events", "num_candidates"))
    assert torch.equal(joined.history["item"][parts[0].num_events:], parts[2].history["item"])


def test_each_table_is_asked_for_an_id_once_and_each_feature_finds_its_own_again() -> None:
    batch = deduplicate(random_batch(SCHEMA, num_requests=8, seed=1), SCHEMA)
    assert batch.distinct.keys() == {"item", "category", "action", "user"}
    for ids in batch.distinct.values():
        assert torch.equal(ids, ids.unique())
    for table, keys in SCHEMA.row_keys.items():
        ids = torch.cat([batch.ids(key) for key in keys])
        assert torch.equal(batch.distinct[table][batch.place[table]], ids)
        assert batch.distinct[table].numel() < ids.numel()
        runs = batch.order[table].tensor_split(batch.start[table][1:].tolist())
        assert [run.tolist() for run in runs] == [(ids == value).nonzero().squeeze(1).tolist()
                                                  for value in batch.distinct[table]]
    large = replace(batch, history={name: ids + (1 << 62) for name, ids in batch.history.items()})
    assert torch.equal(deduplicate(large, SCHEMA).distinct["action"], batch.distinct["action"] + (1 << 62))
    empty = deduplicate(random_batch(SCHEMA, num_requests=0, seed=1), SCHEMA)
    assert [ids.numel() for ids in empty.distinct.values()] == [0] * 4
    assert concat_batches([batch, batch]).distinct == {}
