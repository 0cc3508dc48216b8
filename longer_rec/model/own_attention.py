"""A candidate's own tokens, joined to what it sees of its request.

All candidates of a request share its keys, and none sees another. Attention over the shared keys and the own tokens
is one softmax: with the log-sum-exp of the shared part its output enters like a single key.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longer_rec.model.linear import batched

_SCORES = 1 << 20  # elements of the score matrix at a time without gradients: 4 MB; with 1 MB a third slower


@dataclass(frozen=True)
class OwnMask:
    """Which of its own tokens each query of a candidate sees.

    They stand as [originals ; copy 2 of each ; copy 3 of each ...] (``phd.py``), and the queries are the last ones, of
    them the last ``num_hidden`` hidden copies. ``seen``: rows of that list, for each query.
    """

    seen: tuple[tuple[int, ...], ...]
    num_hidden: int = 0


def own_mask(num_tokens: int, copies: int = 1, last_copy_alone: bool = False) -> OwnMask:
    """Originals are causal; a hidden copy sees the originals before it, and at its position the copies up to itself.

    Two tokens: ((0,), (0, 1)); with two copies also ((0, 2), (0, 1, 3)).
    """
    seen = [(*range(token), *(copy * num_tokens + token for copy in range(last + 1)))
            for last in range(copies) for token in range(num_tokens)]
    num_hidden = (copies - 1) * num_tokens
    if last_copy_alone:
        seen, num_hidden = seen[-num_tokens:], min(num_hidden, num_tokens)
    return OwnMask(tuple(seen), num_hidden)


def merge_own(output_QHE: Tensor, log_sum_QH: Tensor, query_CGHE: Tensor, key_CGHE: Tensor, value_CGHE: Tensor,
              mask: OwnMask) -> Tensor:
    """Attention over the shared keys (``attend``'s results) and each candidate's own tokens: C x G x H x E.

    Q = C * G for the G queries of a candidate; it has as many keys or more.
    """
    shared_CGHE = output_QHE.view(query_CGHE.shape)
    return _MergeOwn.apply(shared_CGHE, log_sum_QH.view(query_CGHE.shape[:3]), query_CGHE, key_CGHE, value_CGHE,
                           mask.seen)


def log_matches(query_CHE: Tensor, own_key_CHE: Tensor, log_sum_CH: Tensor) -> Tensor:
    """log(1 + n), C x H; n: how many times as much weight as a token's own key the request's keys have together.

    Of a head that matches, n is a count: softmax turns it into n / (n + 1), from which two matches and ten look alike.
    """
    own_CH = _dot(query_CHE, own_key_CHE).to(log_sum_CH.dtype) / math.sqrt(query_CHE.shape[-1])
    # -inf of a request without keys has no gradient to give.
    return torch.nn.functional.softplus(log_sum_CH.clamp(min=-1e4) - own_CH)


def attend_and_merge(query_CQHE: Tensor, key_SHE: Tensor, value_SHE: Tensor, own_key_CGHE: Tensor,
                     own_value_CGHE: Tensor, mask: OwnMask) -> tuple[Tensor, Tensor]:
    """``attend`` to all keys of one request and ``merge_own`` without gradients, as one softmax.

    C x Q x H x E, and the log-sum-exp of the request's keys, C x Q x H.

    Two thirds of the time of the two, though one was fused (64 candidates, 251 keys, 8 heads of 32: 0.30 against 0.44
    ms), and at 1,024 candidates a seventh more (a Xeon core with AVX-512, torch 2.13, December 2026).
    """
    _, Q, H, _ = query_CQHE.shape
    at_once = max(1, _SCORES // (Q * H * max(1, key_SHE.shape[0])))
    pieces = zip(query_CQHE.split(at_once), own_key_CGHE.split(at_once), own_value_CGHE.split(at_once), strict=True)
    mixed, log_sums = zip(*(_one_softmax(query, key_SHE, value_SHE, own_key, own_value, mask)
                            for query, own_key, own_value in pieces), strict=True)
    return cat_or_one(mixed), cat_or_one(log_sums)


def cat_or_one(parts: Iterable[Tensor]) -> Tensor:
    """``torch.cat``, which copies even where there is nothing to join."""
    first, *others = parts
    return torch.cat([first, *others]) if others else first


def _one_softmax(query_CQHE: Tensor, key_SHE: Tensor, value_SHE: Tensor, own_key_CGHE: Tensor, own_value_CGHE: Tensor,
                 mask: OwnMask) -> tuple[Tensor, Tensor]:
    C, Q, _, E = query_CQHE.shape
    G = own_key_CGHE.shape[1]
    query_CQHE = query_CQHE / math.sqrt(E)
    own_HQG = (query_CQHE.unsqueeze(2) * own_key_CGHE.unsqueeze(1)).sum(-1).flatten(0, 1).permute(2, 0, 1)
    if any(len(rows) < G for rows in mask.seen):
        unseen_QG = torch.tensor([[row not in rows for row in range(G)] for rows in mask.seen])
        own_HQG = own_HQG.masked_fill(unseen_QG.repeat(C, 1), -math.inf)
    score_HQS = batched(query_CQHE.flatten(0, 1).transpose(0, 1), key_SHE.permute(1, 2, 0))
    top = own_HQG.amax(-1, keepdim=True)
    if score_HQS.shape[2]:
        top = torch.maximum(top, score_HQS.amax(-1, keepdim=True))
    score_HQS.sub_(top).exp_()
    own_HQG = (own_HQG - top).exp_()
    shared = score_HQS.sum(-1, keepdim=True)
    total = shared + own_HQG.sum(-1, keepdim=True)
    mixed_HQE = batched(score_HQS, value_SHE.transpose(0, 1)).div_(total)
    share_CQHG = (own_HQG / total).permute(1, 0, 2).unflatten(0, (C, Q))
    output_CQHE = mixed_HQE.transpose(0, 1).unflatten(0, (C, Q))
    for row in range(G):
        output_CQHE = torch.addcmul(output_CQHE, share_CQHG[..., row, None], own_value_CGHE[:, None, row])
    return output_CQHE, (shared.log() + top).squeeze(-1).transpose(0, 1).unflatten(0, (C, Q))


class _MergeOwn(torch.autograd.Function):
    """``merge_own`` in elementwise products: as batched matmuls of G x G it took four times as long (C = 2000)."""

    @staticmethod
    def forward(ctx: Any, shared_CGHE: Tensor, log_sum_CGH: Tensor, query_CGHE: Tensor, key_CGHE: Tensor,
                value_CGHE: Tensor, seen: tuple[tuple[int, ...], ...]) -> Tensor:
        scale = 1.0 / math.sqrt(query_CGHE.shape[-1])
        output_CGHE = torch.empty_like(shared_CGHE)
        weights = []
        with torch.autocast(query_CGHE.device.type, enabled=False):
            for g, rows in enumerate(seen):
                scores = [log_sum_CGH[:, g]]
                scores += [_dot(query_CGHE[:, g], key_CGHE[:, f]).to(log_sum_CGH.dtype) * scale for f in rows]
                weight = torch.softmax(torch.stack(scores), 0).to(query_CGHE.dtype)
                mixed = torch.mul(shared_CGHE[:, g], weight[0].unsqueeze(-1), out=output_CGHE[:, g])
                for f, share in zip(rows, weight[1:], strict=True):
                    mixed.addcmul_(value_CGHE[:, f], share.unsqueeze(-1))
                weights.append(weight)
        ctx.save_for_backward(shared_CGHE, query_CGHE, key_CGHE, value_CGHE, *weights)
        ctx.scale, ctx.sum_dtype, ctx.seen = scale, log_sum_CGH.dtype, seen
        return output_CGHE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_CGHE, = grads
        shared_CGHE, query_CGHE, key_CGHE, value_CGHE, *weights = ctx.saved_tensors
        grad_shared, grad_query = torch.empty_like(shared_CGHE), torch.zeros_like(query_CGHE)
        grad_key, grad_value = torch.zeros_like(key_CGHE), torch.zeros_like(value_CGHE)
        grad_sums = []
        with torch.autocast(query_CGHE.device.type, enabled=False):
            for g, (rows, weight) in enumerate(zip(ctx.seen, weights, strict=True)):
                grad = grad_CGHE[:, g]
                mixed = [shared_CGHE[:, g], *(value_CGHE[:, f] for f in rows)]
                grad_weight = torch.stack([_dot(grad, each) for each in mixed])
                grad_score = weight * (grad_weight - (weight * grad_weight).sum(0))
                torch.mul(grad, weight[0].unsqueeze(-1), out=grad_shared[:, g])
                grad_sums.append(grad_score[0])
                scaled = (grad_score * ctx.scale).unsqueeze(-1)
                for i, f in enumerate(rows, start=1):
                    grad_value[:, f].addcmul_(grad, weight[i].unsqueeze(-1))
                    grad_query[:, g].addcmul_(key_CGHE[:, f], scaled[i])
                    grad_key[:, f].addcmul_(query_CGHE[:, g], scaled[i])
        return grad_shared, torch.stack(grad_sums, dim=1).to(ctx.sum_dtype), grad_query, grad_key, grad_value, None


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(-1)
