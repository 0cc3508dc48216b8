"""Where candidates look: the attention that their tokens pay to the history, by place and by age, layer by layer.

Nothing of a layer is computed twice here but the softmax: tokens and cached keys are recorded while the tower scores.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from longer_rec.model.inputs import CandidateSide, UserSide, keep_newest
from longer_rec.model.jagged import position_from_newest, rows_after, start_of
from longer_rec.model.layers import CausalLayer
from longer_rec.model.longer import LongerTower
from longer_rec.model.merge import merged_lengths
from longer_rec.model.own_attention import OwnMask, own_mask
from longer_rec.model.state import LayerCache


@torch.no_grad()
def attention_mass(tower: LongerTower, user: UserSide, candidates: CandidateSide, position_edge: Tensor,
                   age_edge: Tensor) -> tuple[Tensor, Tensor]:
    """Attention by position and by age: two of layers x (H + 1) x (buckets + 2), float64, summed over tokens.

    A merged token stands where its newest event does: so many events from the request's newest (0), so many seconds
    old. Bucket i holds [edge[i - 1], edge[i]). Behind the buckets come the keys that stand nowhere (user globals,
    learned queries, hidden copies) and the candidate's own tokens; behind the heads, at H, what they all would pay if
    every visible key were worth the same. Each of a candidate's tokens, of its copies the last, adds 1 to each head.
    """
    user = keep_newest(user, tower.max_events)
    K, length_B = tower.config.merge_size, user.length_B
    merged_length_B = merged_lengths(length_B, K)
    position_M = position_from_newest(merged_length_B, int(merged_length_B.sum())) * K
    newest_row_M = torch.repeat_interleave(start_of(length_B) + length_B - 1, merged_length_B) - position_M
    with (_recorded(tower.causal_layers, "encode") as encoded,
          _recorded(tower.causal_layers, "score", "score_and_count") as scored):
        tower.score(tower.encode(user), candidates)
    edges = [edge.to(length_B.device) for edge in (position_edge, age_edge)]
    buckets = [torch.bucketize(value_M, edge, right=True)
               for value_M, edge in zip((position_M, user.age_T[newest_row_M]), edges, strict=True)]
    # Which merged token each of a layer's tokens is; M: none of them.
    merged_row_M, _ = rows_after(merged_length_B, tower.globals.num_tokens)
    token_S = torch.full((encoded[0][0].shape[0],), len(position_M), device=length_B.device)
    token_S[merged_row_M] = torch.arange(len(position_M), device=length_B.device)
    mask = own_mask(tower.config.num_candidate_tokens, tower.config.copies, last_copy_alone=True)
    masses: tuple[list[Tensor], list[Tensor]] = [], []
    for layer, (_, _, queries), (token_CGX, cache, num_candidates_B, _) in zip(tower.causal_layers, encoded,
                                                                               scored, strict=True):
        for mass, bucket_M, edge in zip(masses, buckets, edges, strict=True):
            nowhere = len(edge) + 1
            bucket_S = torch.cat([bucket_M, bucket_M.new_tensor([nowhere])])[token_S[:len(cache.key_SHE)]]
            mass.append(_layer_mass(layer, token_CGX, cache, num_candidates_B, mask, bucket_S, nowhere + 2))
        token_S = token_S if queries.row_Q is None else token_S[queries.row_Q]
    return torch.stack(masses[0]), torch.stack(masses[1])


def _layer_mass(layer: CausalLayer, token_CGX: Tensor, cache: LayerCache, num_candidates_B: Tensor, mask: OwnMask,
                bucket_S: Tensor, num_columns: int) -> Tensor:
    query_CQHE, own_CGHE, _ = layer.own_heads(layer.attention_norm(token_CGX), len(mask.seen))
    G, H, E = own_CGHE.shape[1:]
    unseen_QG = torch.tensor([[row not in rows for row in range(G)] for rows in mask.seen], device=bucket_S.device)
    mass = torch.zeros(H + 1, num_columns, dtype=torch.float64, device=bucket_S.device)
    lengths, counts = cache.length_B.tolist(), num_candidates_B.tolist()
    windows = [cache.key_SHE[:0]] * len(counts)
    if cache.window is not None:
        windows = list(cache.window.key_SHE.split(cache.window.length_B.tolist()))
    for query, own, key, window, bucket in zip(query_CQHE.split(counts), own_CGHE.split(counts),
                                               cache.key_SHE.split(lengths), windows, bucket_S.split(lengths),
                                               strict=True):
        shared = torch.einsum("cqhe,she->hcqs", query, torch.cat([key, window]))
        bucket = torch.cat([bucket, bucket.new_full((len(window),), num_columns - 2)])
        score = torch.cat([shared, torch.einsum("cqhe,cghe->hcqg", query, own)], dim=-1).float() / math.sqrt(E)
        score = torch.cat([score, torch.zeros_like(score[:1])])
        score[..., -G:].masked_fill_(unseen_QG, -math.inf)
        paid = score.softmax(-1).sum((1, 2), dtype=torch.float64)
        mass.index_add_(1, torch.cat([bucket, bucket.new_full((G,), num_columns - 1)]), paid)
    return mass


@contextmanager
def _recorded(layers: Sequence[CausalLayer], *methods: str) -> Iterator[list[tuple[Any, ...]]]:
    """The arguments of each layer's ``methods``, in the order of the calls."""
    calls: list[tuple[Any, ...]] = []

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def record_and_call(*arguments: Any) -> Any:
            calls.append(arguments)
            return original(*arguments)
        return record_and_call

    replaced = [(layer, method, vars(layer).get(method)) for layer in layers for method in methods]
    for layer, method, _ in replaced:
        setattr(layer, method, recording(getattr(layer, method)))
    try:
        yield calls
    finally:
        for layer, method, own in replaced:
            delattr(layer, method)
            if own is not None:
                setattr(layer, method, own)  # recomputation's
