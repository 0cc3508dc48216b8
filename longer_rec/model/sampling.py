"""Which tokens are the queries of a layer: the paper's sampling strategies, and the mask that goes with them.

Merged tokens of a request are numbered 0 .. M - 1, oldest to newest, its user globals come behind. A query at position
p sees keys 0 .. p: itself and what is older. Positions depend on M and k alone. Seven merged tokens and k = 4 give

    recent          . . . 3 4 5 6
    uniform         . 1 . 3 . 5 6
    recent_uniform  . . 2 . 4 5 6      k / 2 newest, the others evenly over the rest
    all             0 1 2 3 4 5 6

With at most k tokens all of them are queries. ``learnable`` has k learned vectors instead, which see every event and
are nobody's keys in the cross layer; a history without events has none of them.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from longer_rec.errors import ConfigError
from longer_rec.model.jagged import newest_rows, position_from_newest, request_of, start_of

Sampling = Literal["recent", "uniform", "recent_uniform", "learnable", "all"]
DEFAULT_QUERIES = 50


@dataclass(frozen=True)
class Queries:
    """The queries of a layer, ``length_B`` of each request, in chronological order, its user globals last.

    ``row_Q``: rows of the layer's tokens; None: all of them. ``position_Q``: the last key that each sees, counted
    within its request; None: the queries are the newest keys. Tokens from row ``num_keys`` on are no keys (None: all
    are keys).
    """

    length_B: Tensor
    row_Q: Tensor | None = None
    position_Q: Tensor | None = None
    num_keys: int | None = None


def newest(length_B: Tensor, kept_length_B: Tensor) -> Queries:
    """The last ``kept_length_B`` tokens of each request."""
    num_kept, num_tokens = torch.stack([kept_length_B.sum(), length_B.sum()]).tolist()  # host sync on GPU
    return Queries(kept_length_B, newest_rows(length_B, kept_length_B, num_kept) if num_kept < num_tokens else None)


def sample(sampling: Sampling, length_B: Tensor, num_globals: int, num_queries: int) -> Queries:
    """Queries of the cross layer; ``length_B`` counts merged tokens and the ``num_globals`` user globals, all kept.

    Learned vectors are expected behind the last token of the batch.
    """
    if sampling == "all":
        return Queries(length_B)
    merged_B = length_B - num_globals
    kept_B = (merged_B > 0) * num_queries if sampling == "learnable" else merged_B.clamp(max=num_queries)
    query_length_B = kept_B + num_globals
    if sampling == "recent":
        return newest(length_B, query_length_B)
    total, num_tokens = torch.stack([query_length_B.sum(), length_B.sum()]).tolist()  # host sync on GPU
    request_Q = request_of(query_length_B, total)
    start_Q, merged_Q, kept_Q = torch.stack([start_of(length_B), merged_B, kept_B])[:, request_Q]
    # 0 for the newest query, counting up towards the oldest; below 0 for user globals.
    rank_Q = position_from_newest(query_length_B, total) - num_globals
    if sampling == "learnable":
        position_Q = merged_Q - 1 - rank_Q.clamp(max=0)
        row_Q = torch.where(rank_Q < 0, start_Q + position_Q, num_tokens + num_queries - 1 - rank_Q)
        return Queries(query_length_B, row_Q, position_Q, num_tokens)
    recent_Q = kept_Q.clamp(max=num_queries // 2 if sampling == "recent_uniform" else 0)
    older_Q = (rank_Q - recent_Q).clamp(min=0)
    spread_Q = older_Q * (merged_Q - recent_Q) // (kept_Q - recent_Q).clamp(min=1)
    position_Q = merged_Q - 1 - (rank_Q + spread_Q - older_Q)
    return Queries(query_length_B, start_Q + position_Q, position_Q)


def check_sampling(sampling: Sampling, num_queries: int, num_self_layers: int, reads_sequence: bool, merge_size: int,
                   max_events: int) -> None:
    """Refuse more queries than there can be tokens, and settings that would go unused."""
    if sampling == "all":
        if num_queries != DEFAULT_QUERIES:
            raise ConfigError(f"model.num_queries={num_queries} has no meaning with model.sampling=all, whose queries "
                              "are all merged tokens; leave num_queries out, or choose another sampling")
        return
    largest, fewest = -(-max_events // merge_size), fewest_events(sampling, num_queries, merge_size)
    if max_events < fewest:
        raise ConfigError(
            f"model.num_queries={num_queries} but max_events={max_events} and merge_size={merge_size} give at most "
            f"{largest} merged tokens; lower model.num_queries to {largest} or less, or raise data.max_events to "
            f"{fewest} or more (model.sampling=all takes every token)")
    if sampling == "recent":
        return
    if num_queries == 0:
        raise ConfigError(f"model.num_queries=0 leaves model.sampling={sampling} nothing to choose; use at least 1, or "
                          "sampling=recent for a tower without sequence queries")
    if sampling == "recent_uniform" and num_queries % 2:
        raise ConfigError(f"model.num_queries={num_queries} is odd, and model.sampling=recent_uniform takes half of it "
                          "from the newest tokens; use an even number from 2")
    if num_self_layers == 0 and not reads_sequence:
        raise ConfigError(f"model.sampling={sampling} chooses queries that nothing reads: with num_self_layers=0 that "
                          "takes pooling=globals+mean; set that, or num_self_layers to 1 or more")


def fewest_events(sampling: Sampling, num_queries: int, merge_size: int) -> int:
    """The least ``max_events`` of a tower with these queries: as many as give ``num_queries`` merged tokens."""
    return 1 if sampling in ("all", "learnable") else max(1, (num_queries - 1) * merge_size + 1)
