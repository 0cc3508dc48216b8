"""The one attention primitive: queries are the last positions of each request's keys.

Keys and queries are packed over requests. With ``causal`` the mask is aligned bottom right: for a request of 4 keys
and 2 queries the queries see

    query 0: 1 1 1 0
    query 1: 1 1 1 1

Without it each query sees all keys of its request. Beside the output comes the log-sum-exp of the scores, with
which ``merge_own`` adds keys that belong to one query alone: a candidate attends to its request's keys, shared by
all candidates, and to its own tokens, in one exact softmax.
"""

import math
from typing import Any

import torch
from torch import Tensor


def attend(query_QHE: Tensor, key_SHE: Tensor, value_SHE: Tensor, query_length_B: Tensor, key_length_B: Tensor,
           causal: bool) -> tuple[Tensor, Tensor]:
    """Softmax attention of packed queries over their request's packed keys: output Q x H x E, log-sum-exp Q x H.

    A query without keys gives output 0 and log-sum-exp -inf.
    """
    if query_QHE.device.type == "cpu":
        return _LoopedAttention.apply(query_QHE, key_SHE, value_SHE, query_length_B, key_length_B, causal)
    return attend_padded(query_QHE, key_SHE, value_SHE, query_length_B, key_length_B, causal)


def attend_ref(query_QHE: Tensor, key_SHE: Tensor, value_SHE: Tensor, query_length_B: Tensor, key_length_B: Tensor,
               causal: bool) -> tuple[Tensor, Tensor]:
    """Twin of ``attend``: one request at a time, an explicit mask, no shortcut."""
    outputs, sums = [], []
    queries = query_QHE.split(query_length_B.tolist())
    lengths = key_length_B.tolist()
    for query_QHE_, key_, value_ in zip(queries, key_SHE.split(lengths), value_SHE.split(lengths), strict=True):
        num_queries, num_keys = query_QHE_.shape[0], key_.shape[0]
        score_HQS = torch.einsum("qhe,she->hqs", query_QHE_, key_) / math.sqrt(query_QHE_.shape[-1])
        seen_QS = torch.ones(num_queries, num_keys, dtype=torch.bool, device=score_HQS.device)
        if causal:
            seen_QS = seen_QS.tril(num_keys - num_queries)
        score_HQS = score_HQS.masked_fill(~seen_QS, -math.inf)
        weight_HQS = score_HQS.softmax(-1) if num_keys else score_HQS
        outputs.append(torch.einsum("hqs,she->qhe", weight_HQS, value_))
        sums.append(score_HQS.logsumexp(-1).T)
    return torch.cat(outputs), torch.cat(sums)


def attend_padded(query_QHE: Tensor, key_SHE: Tensor, value_SHE: Tensor, query_length_B: Tensor,
                  key_length_B: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """``attend`` by padding to the longest request: few large kernels, for devices where launches cost most."""
    if query_QHE.shape[0] == 0:
        return query_QHE, query_QHE.sum(-1)
    query_row = _padded_rows(query_length_B)
    key_row = _padded_rows(key_length_B)
    num_queries, num_keys = query_row.shape[1], key_row.shape[1]
    query_BHQE = query_QHE[query_row.clamp(min=0)].transpose(1, 2)
    key_BHSE = key_SHE[key_row.clamp(min=0)].transpose(1, 2)
    value_BHSE = value_SHE[key_row.clamp(min=0)].transpose(1, 2)
    seen_BQS = (key_row >= 0).unsqueeze(1).expand(-1, num_queries, -1)
    if causal:
        last_B = key_length_B - query_length_B
        query_at = torch.arange(num_queries, device=query_row.device).unsqueeze(1)
        key_at = torch.arange(num_keys, device=query_row.device)
        seen_BQS = seen_BQS & (key_at <= query_at + last_B.view(-1, 1, 1))
    score_BHQS = (query_BHQE @ key_BHSE.transpose(-1, -2)).to(_score_dtype(query_QHE.dtype))
    score_BHQS = score_BHQS / math.sqrt(query_QHE.shape[-1])
    # A finite mask keeps the gradient of rows without any key free of NaN; their weights are zeroed below.
    score_BHQS = score_BHQS.masked_fill(~seen_BQS.unsqueeze(1), torch.finfo(score_BHQS.dtype).min)
    weight_BHQS = score_BHQS.softmax(-1) * seen_BQS.any(-1)[:, None, :, None]
    output_BQHE = (weight_BHQS.to(value_SHE.dtype) @ value_BHSE).transpose(1, 2)
    sum_BQH = score_BHQS.logsumexp(-1).transpose(1, 2).masked_fill(~seen_BQS.any(-1).unsqueeze(-1), -math.inf)
    kept = query_row >= 0
    return output_BQHE[kept], sum_BQH[kept]


def _padded_rows(length_B: Tensor) -> Tensor:
    """B x longest: the packed row of each place, -1 where there is none."""
    place = torch.arange(max(int(length_B.max()), 1), device=length_B.device)
    row = (length_B.cumsum(0) - length_B).unsqueeze(1) + place
    return row.masked_fill(place >= length_B.unsqueeze(1), -1)


def merge_own(output_QHE: Tensor, sum_QH: Tensor, query_CGHE: Tensor, key_CGHE: Tensor, value_CGHE: Tensor) -> Tensor:
    """Attention over the shared keys (``output``, ``sum`` of ``attend``) and each candidate's own G tokens, causally.

    Q = C * G. Token g of a candidate sees its own tokens 0 .. g. Returns C x G x H x E.
    """
    C, G, H, E = query_CGHE.shape
    score = torch.einsum("cghe,cfhe->cghf", query_CGHE, key_CGHE).to(sum_QH.dtype) / math.sqrt(E)
    if G > 1:
        unseen = torch.ones(G, G, dtype=torch.bool, device=score.device).triu(1).unsqueeze(1)
        score = score.masked_fill(unseen, -math.inf)
    shared = sum_QH.view(C, G, H, 1)
    weight = torch.cat([shared, score], dim=-1).softmax(-1).to(value_CGHE.dtype)
    own_CGHE = torch.einsum("cghf,cfhe->cghe", weight[..., 1:], value_CGHE)
    return weight[..., :1] * output_QHE.view(C, G, H, E) + own_CGHE


class _LoopedAttention(torch.autograd.Function):
    """``attend`` request by request at exact sizes.

    Candidates per request and history lengths are skewed: padding to the batch's maximum multiplies the work, while
    an iteration costs some 20 us here because autograd sees one node instead of six per request.
    """

    @staticmethod
    def forward(ctx: Any, query_QHE: Tensor, key_SHE: Tensor, value_SHE: Tensor, query_length_B: Tensor,
                key_length_B: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        num_queries, H, E = query_QHE.shape
        dtype = _score_dtype(query_QHE.dtype)
        output_QHE = torch.zeros_like(query_QHE)
        sum_QH = query_QHE.new_full((num_queries, H), -math.inf, dtype=dtype)
        lengths = query_length_B.tolist(), key_length_B.tolist()
        scale = 1.0 / math.sqrt(E)
        weights = []
        with torch.autocast(query_QHE.device.type, enabled=False):
            scaled_QHE = query_QHE * scale
            rows = zip(_per_request(scaled_QHE, lengths[0]), _per_request(key_SHE, lengths[1]),
                       _per_request(value_SHE, lengths[1]), _per_request(output_QHE, lengths[0]),
                       sum_QH.split(lengths[0]), strict=True)
            for query_HQE, key_HSE, value_HSE, output_HQE, sum_ in rows:
                if query_HQE.shape[1] == 0 or key_HSE.shape[1] == 0:
                    continue
                score_HQS = torch.bmm(query_HQE, key_HSE.transpose(1, 2)).to(dtype)
                if causal:
                    _hide_later(score_HQS)
                weight_HQS = torch.softmax(score_HQS, -1)
                # exp(max score) / sum = max weight, so the log-sum-exp needs no second exponential.
                sum_.copy_((score_HQS.amax(-1) - weight_HQS.amax(-1).log_()).T)
                weight_HQS = weight_HQS.to(query_QHE.dtype)
                output_HQE.copy_(torch.bmm(weight_HQS, value_HSE))
                weights.append(weight_HQS)
        ctx.save_for_backward(scaled_QHE, key_SHE, value_SHE, output_QHE, *weights)
        ctx.lengths, ctx.scale = lengths, scale
        return output_QHE, sum_QH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_output_QHE, grad_sum_QH = grads
        scaled_QHE, key_SHE, value_SHE, output_QHE, *weights = ctx.saved_tensors
        query_lengths, key_lengths = ctx.lengths
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (scaled_QHE, key_SHE, value_SHE))
        with torch.autocast(scaled_QHE.device.type, enabled=False):
            # d score = weight * (d weight - delta), with the log-sum-exp's own gradient folded into delta.
            delta_QH = (grad_output_QHE * output_QHE).sum(-1).to(grad_sum_QH.dtype) - grad_sum_QH
            by_query = [_per_request(x, query_lengths) for x in (scaled_QHE, grad_output_QHE, grad_query)]
            by_key = [_per_request(x, key_lengths) for x in (key_SHE, value_SHE, grad_key, grad_value)]
            remaining = iter(weights)
            rows = zip(*by_query, *by_key, delta_QH.to(scaled_QHE.dtype).split(query_lengths), strict=True)
            for query_HQE, grad_output_HQE, grad_query_HQE, key_HSE, value_HSE, grad_key_HSE, grad_value_HSE, delta in \
                    rows:
                if query_HQE.shape[1] == 0 or key_HSE.shape[1] == 0:
                    continue
                weight_HQS = next(remaining)
                grad_value_HSE.copy_(torch.bmm(weight_HQS.transpose(1, 2), grad_output_HQE))
                grad_score_HQS = torch.bmm(grad_output_HQE, value_HSE.transpose(1, 2))
                grad_score_HQS.sub_(delta.T.unsqueeze(-1)).mul_(weight_HQS)
                grad_query_HQE.copy_(torch.bmm(grad_score_HQS, key_HSE))
                grad_key_HSE.copy_(torch.bmm(grad_score_HQS.transpose(1, 2), query_HQE))
            grad_query.mul_(ctx.scale)
        return grad_query, grad_key, grad_value, None, None, None


def _score_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores and their softmax are never computed below fp32."""
    return dtype if dtype == torch.float64 else torch.float32


def _per_request(rows: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """Views H x rows x E of packed rows x H x E, one per request."""
    return rows.transpose(0, 1).split(lengths, dim=1)


def _hide_later(score_HQS: Tensor) -> None:
    """Bottom-right causal mask in place: only the newest Q columns can be later than a query."""
    num_queries, num_keys = score_HQS.shape[1:]
    last = score_HQS.narrow(2, num_keys - num_queries, num_queries)
    last.masked_fill_(_later_mask(num_queries, score_HQS.device), -math.inf)


def _later_mask(num_queries: int, device: torch.device) -> Tensor:
    return torch.ones(num_queries, num_queries, dtype=torch.bool, device=device).triu_(1)
