"""Slow twins of attention and token merge: one request at a time, explicit masks, no shortcut."""

import math

import torch
from torch import Tensor

from longer_rec.model.merge import TokenMerge
from longer_rec.model.own_attention import OwnMask


def attend_ref(query_QHE: Tensor, key_SHE: Tensor, value_SHE: Tensor, query_length_B: Tensor, key_length_B: Tensor,
               causal: bool, position_Q: Tensor | None = None, first_Q: Tensor | None = None
               ) -> tuple[Tensor, Tensor]:
    """Twin of ``plan_attention`` and ``attend``: one request at a time, an explicit mask, no shortcut."""
    outputs, sums, first = [], [], 0
    queries = query_QHE.split(query_length_B.tolist())
    lengths = key_length_B.tolist()
    for query, key, value in zip(queries, key_SHE.split(lengths), value_SHE.split(lengths), strict=True):
        num_queries, num_keys = query.shape[0], key.shape[0]
        score_HQS = torch.einsum("qhe,she->hqs", query, key) / math.sqrt(query.shape[-1])
        seen_QS = torch.ones(num_queries, num_keys, dtype=torch.bool, device=score_HQS.device)
        if position_Q is not None:
            own = slice(first, first + num_queries)
            key_S, first = torch.arange(num_keys, device=seen_QS.device), own.stop
            seen_QS = key_S <= position_Q[own, None]
            if first_Q is not None:
                seen_QS &= key_S >= first_Q[own, None]
        elif causal:
            seen_QS = seen_QS.tril(num_keys - num_queries)
        score_HQS = score_HQS.masked_fill(~seen_QS, -math.inf)
        outputs.append(torch.einsum("hqs,she->qhe", score_HQS.softmax(-1), value))
        sums.append(score_HQS.logsumexp(-1).T)
    return torch.cat(outputs), torch.cat(sums)


def merge_own_ref(output_QHE: Tensor, log_sum_QH: Tensor, query_CGHE: Tensor, key_CGHE: Tensor, value_CGHE: Tensor,
                  mask: OwnMask) -> Tensor:
    """Twin of ``merge_own``."""
    C, G, H, E = query_CGHE.shape
    score = torch.einsum("cghe,cfhe->cghf", query_CGHE, key_CGHE) / math.sqrt(E)
    unseen = torch.tensor([[row not in rows for row in range(key_CGHE.shape[1])] for rows in mask.seen])
    score = score.masked_fill(unseen.unsqueeze(1).to(score.device), -math.inf)
    weight = torch.cat([log_sum_QH.view(C, G, H, 1), score], dim=-1).softmax(-1)
    own_CGHE = torch.einsum("cghf,cfhe->cghe", weight[..., 1:], value_CGHE)
    return weight[..., :1] * output_QHE.view(C, G, H, E) + own_CGHE


def merge_ref(merge: TokenMerge, event_TD: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of ``TokenMerge.forward``: loops over requests and groups; a group never sees its padding."""
    K, D = merge.merge_size, merge.width
    merged, lengths = [], []
    for event_LD in event_TD.split(length_B.tolist()):
        first = event_LD.shape[0] % K
        groups = ([event_LD[:first]] if first else []) + list(event_LD[first:].split(K))
        groups = [group for group in groups if group.shape[0]]
        for group in groups:
            if merge.inner is not None:
                every = torch.ones(1, group.shape[0], dtype=torch.bool)
                group = group + merge.inner(group.unsqueeze(0), every).squeeze(0)
            padding = group.new_zeros(K - group.shape[0], D)
            merged.append(torch.cat([padding, group]).flatten())
        lengths.append(len(groups))
    merged_MX = torch.stack(merged) if merged else event_TD.new_zeros(0, K * D)
    return merged_MX, torch.tensor(lengths)
