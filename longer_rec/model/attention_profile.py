"""Where candidates look: the attention that their tokens pay to the history, by place and by age, layer by layer.

Nothing of a layer is computed twice here but the softmax: tokens and cached keys are recorded while the tower scores.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from longer_rec.model.inputs import CandidateSide, UserSide, keep_newest
from longer_rec.model.jagged import newest_rows, position_from_newest, rows_after, start_of
from longer_rec.model.layers import CausalLayer
from longer_rec.model.longer import LongerTower
from longer_rec.model.merge import merged_lengths
from longer_rec.model.state import LayerCache

_Call = tuple[CausalLayer, Tensor, LayerCache, Tensor]


@torch.no_grad()
def attention_mass(tower: LongerTower, user: UserSide, candidates: CandidateSide, position_edge: Tensor,
                   age_edge: Tensor) -> tuple[Tensor, Tensor]:
    """Attention by position and by age: two of layers x (H + 1) x (buckets + 2), float64, summed over tokens.

    A merged token stands where its newest event does: so many events from the request's newest (0), so many seconds
    old. Bucket i holds [edge[i - 1], edge[i]). Behind the buckets come the user globals and the candidate's own tokens;
    behind the heads, at H, what they all would pay if every visible key were worth the same. Each of a candidate's
    tokens adds 1 to each head.
    """
    user = keep_newest(user, tower.max_events)
    K, length_B = tower.config.merge_size, user.length_B
    merged_length_B = merged_lengths(length_B, K)
    position_M = position_from_newest(merged_length_B, int(merged_length_B.sum())) * K
    newest_row_M = torch.repeat_interleave(start_of(length_B) + length_B - 1, merged_length_B) - position_M
    with _recorded(tower) as calls:
        tower.score(tower.encode(user), candidates)
    totals = []
    for edge, value_M in ((position_edge, position_M), (age_edge, user.age_T[newest_row_M])):
        bucket_M = torch.bucketize(value_M, edge.to(value_M.device), right=True)
        num_globals = tower.globals.num_tokens
        totals.append(torch.stack([_layer_mass(call, bucket_M, merged_length_B, num_globals, len(edge) + 1)
                                   for call in calls]))
    return totals[0], totals[1]


def _layer_mass(call: _Call, bucket_M: Tensor, merged_length_B: Tensor, num_globals: int, num_buckets: int) -> Tensor:
    layer, token_CGX, cache, num_candidates_B = call
    query_CGHE, own_CGHE, _ = layer.own_heads(layer.attention_norm(token_CGX))
    # A layer holds keys of the newest merged tokens of each request: all of them, or those the layer before kept.
    kept_B = cache.length_B - num_globals
    merged_row, _ = rows_after(kept_B, num_globals)
    kept = newest_rows(merged_length_B, kept_B, len(merged_row))
    bucket_S = bucket_M.new_full((len(cache.key_SHE),), num_buckets).index_copy(0, merged_row, bucket_M[kept])
    _, G, H, E = query_CGHE.shape
    unseen_GG = torch.ones(G, G, dtype=torch.bool, device=bucket_S.device).triu(1)
    mass = torch.zeros(H + 1, num_buckets + 2, dtype=torch.float64, device=bucket_S.device)
    lengths, counts = cache.length_B.tolist(), num_candidates_B.tolist()
    for query, own, key, bucket in zip(query_CGHE.split(counts), own_CGHE.split(counts), cache.key_SHE.split(lengths),
                                       bucket_S.split(lengths), strict=True):
        shared = torch.einsum("cghe,she->hcgs", query, key)
        score = torch.cat([shared, torch.einsum("cghe,cfhe->hcgf", query, own)], dim=-1).float() / math.sqrt(E)
        score = torch.cat([score, torch.zeros_like(score[:1])])
        score[..., -G:].masked_fill_(unseen_GG, -math.inf)
        paid = score.softmax(-1).sum((1, 2), dtype=torch.float64)
        mass.index_add_(1, torch.cat([bucket, bucket.new_full((G,), num_buckets + 1)]), paid)
    return mass


@contextmanager
def _recorded(tower: LongerTower) -> Iterator[list[_Call]]:
    """What each layer is given to score, in the order of the layers."""
    calls: list[_Call] = []
    kept = [vars(layer).get("score") for layer in tower.causal_layers]
    for layer in tower.causal_layers:
        _record(layer, calls)
    try:
        yield calls
    finally:
        for layer, score in zip(tower.causal_layers, kept, strict=True):
            if score is None:
                del layer.score
            else:
                setattr(layer, "score", score)  # noqa: B010 - recomputation had put it there


def _record(layer: CausalLayer, calls: list[_Call]) -> None:
    score = layer.score

    def recording(token_CGX: Tensor, cache: LayerCache, num_candidates_B: Tensor, *rest: Any) -> Tensor:
        calls.append((layer, token_CGX, cache, num_candidates_B))
        return score(token_CGX, cache, num_candidates_B, *rest)

    setattr(layer, "score", recording)  # noqa: B010 - of this instance alone, for as long as it is recorded
