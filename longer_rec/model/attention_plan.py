"""How the attention of a batch is laid out: requests of similar size are padded to each other.

Candidates per request and history lengths are skewed, so padding to the batch's longest multiplies the work, while a
pass per request pays for a dozen small kernels each. Groups of similar requests lie between the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from longer_rec.errors import ConfigError
from longer_rec.model.attention_flex import RangePlan, plan_ranges

# What one more group costs (its dozen kernel calls, forward and backward), in elements of the score matrix. Between 10
# and 20 thousand is best for histories of 0 - 1000 events and 5 - 500 candidates: 31 ms for the four attentions of a
# two-layer tower and 32 requests, 56 ms at exact sizes (0), 50 ms at 80 thousand (one EPYC core, torch 2.13).
GROUP_COST = 12_000


@dataclass(frozen=True)
class Group:
    """Requests computed together; ``num_queries`` and ``num_keys`` are the longest ones, shorter stand at the end."""

    size: int
    num_queries: int
    num_keys: int
    # size x (1 or num_queries) x num_keys, True where there is no key, or none for this query; None: nowhere.
    hidden: Tensor | None


@dataclass(frozen=True)
class AttentionPlan:
    """Which requests are padded to which, and where their rows go.

    The padded layout is group after group, and in a group request, head, row. ``*_source`` gathers packed rows into
    it, ``*_place`` finds a packed row in it (both in rows of one head, E wide), ``query_padding`` lists the rows that
    hold no query. Requests without keys or queries are in no group, and their places point at a zero row.
    """

    groups: tuple[Group, ...]
    query_source: Tensor
    query_place: Tensor
    query_padding: Tensor
    key_source: Tensor
    key_place: Tensor
    num_heads: int
    causal: bool


AttentionPath = Literal["grouped", "flex"]
_PATH: list[AttentionPath] = ["grouped"]


def use_attention(path: AttentionPath, device: torch.device) -> None:
    """How this process computes attention from now on: in padded groups, or by ``attention_flex``, on a GPU.

    ``ConfigError`` where the device lacks it.
    """
    if path == "flex" and device.type != "cuda":
        raise ConfigError("train.attention=flex needs a GPU: on a CPU it has no backward pass; use grouped")
    _PATH[0] = path


def plan_attention(query_length_B: Tensor, key_length_B: Tensor, num_heads: int, causal: bool,
                   position_Q: Tensor | None = None, first_Q: Tensor | None = None) -> AttentionPlan | RangePlan:
    """Group requests so that padding costs less than the calls it saves.

    ``position_Q`` takes the place of ``causal``: a query sees the keys 0, or ``first_Q``, to its position, counted
    within its request.
    """
    if _PATH[0] == "flex":
        return plan_ranges(query_length_B, key_length_B, causal, position_Q, first_Q)
    query_lengths, key_lengths = query_length_B.tolist(), key_length_B.tolist()  # host sync on GPU
    device = query_length_B.device
    members = group_requests(query_lengths, key_lengths, num_heads)
    query_source, query_place, query_padding = (each.to(device) for each in _layout(query_lengths, members, num_heads))
    key_source, key_place, _ = (each.to(device) for each in _layout(key_lengths, members, num_heads))
    groups, row = [], 0
    for requests in members:
        lengths = [key_lengths[request] for request in requests]
        num_queries, longest = max(query_lengths[request] for request in requests), max(lengths)
        hidden = None
        if min(lengths) < longest or position_Q is not None:
            missing, key = longest - torch.tensor(lengths, device=device), torch.arange(longest, device=device)
        if min(lengths) < longest:
            hidden = (key < missing.unsqueeze(1)).unsqueeze(1)
        if position_Q is not None:
            rows = len(requests) * num_heads * num_queries
            source = query_source[row:row + rows].view(len(requests), num_heads, num_queries)[:, 0] // num_heads
            shift = missing.unsqueeze(1)
            hidden = key > (position_Q[source] + shift).unsqueeze(2)
            least = shift.expand_as(source) if first_Q is None else first_Q[source] + shift
            hidden |= key < least.unsqueeze(2)
            row += rows
        groups.append(Group(len(requests), num_queries, longest, hidden))
    return AttentionPlan(tuple(groups), query_source, query_place, query_padding, key_source, key_place, num_heads,
                         causal and position_Q is None)


def group_requests(query_lengths: Sequence[int], key_lengths: Sequence[int], num_heads: int) -> list[list[int]]:
    """Greedy over requests sorted by work: the next one joins while that wastes less than a group costs."""
    work = [queries * keys * num_heads for queries, keys in zip(query_lengths, key_lengths, strict=True)]
    order = sorted((request for request, size in enumerate(work) if size), key=lambda request: -work[request])
    members: list[list[int]] = []
    queries = keys = padded = 0
    for request in order:
        wider, longer = max(queries, query_lengths[request]), max(keys, key_lengths[request])
        together = (len(members[-1]) + 1) * wider * longer * num_heads if members else 0
        if members and together - padded - work[request] < GROUP_COST:
            members[-1].append(request)
            queries, keys, padded = wider, longer, together
        else:
            members.append([request])
            queries, keys, padded = query_lengths[request], key_lengths[request], work[request]
    return members


def _layout(lengths: Sequence[int], members: list[list[int]], num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """``source``, ``place`` and ``padding`` of ``AttentionPlan`` for rows of the given lengths.

    A cell is one head of one request. In numpy, a quarter of torch's time at a dozen requests.
    """
    length_B = np.array(lengths, np.int64)
    start_B = length_B.cumsum() - length_B
    order = np.array([request for requests in members for request in requests], np.int64)
    widest = [max(lengths[request] for request in requests) for requests in members for _ in requests]
    longest = np.array(widest, np.int64).repeat(num_heads)
    missing = longest - length_B[order].repeat(num_heads)
    first = longest.cumsum() - longest
    head = np.tile(np.arange(num_heads), len(order))
    row = np.arange(longest.sum())
    source = row * num_heads + ((start_B[order].repeat(num_heads) - missing - first) * num_heads + head).repeat(longest)
    is_held = row >= (first + missing).repeat(longest)
    held = np.flatnonzero(is_held)
    place = np.full(length_B.sum() * num_heads, row.size)
    place[source[held]] = held
    return (torch.from_numpy(np.where(is_held, source, 0)), torch.from_numpy(place),
            torch.from_numpy(np.flatnonzero(~is_held)))
