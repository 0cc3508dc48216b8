"""A candidate's own tokens, joined to what it sees of its request.

All candidates of a request share its keys, and none sees another. Attention over the shared keys and the own tokens
is one softmax: with the log-sum-exp of the shared part its output enters like a single key.
"""

import math
from typing import Any

import torch
from torch import Tensor


def merge_own(output_QHE: Tensor, log_sum_QH: Tensor, query_CGHE: Tensor, key_CGHE: Tensor, value_CGHE: Tensor
              ) -> Tensor:
    """Attention over the shared keys (``attend``'s results) and each candidate's own G tokens, causally.

    Q = C * G. Token g of a candidate sees its own tokens 0 .. g. Returns C x G x H x E.
    """
    shared_CGHE = output_QHE.view(query_CGHE.shape)
    return _MergeOwn.apply(shared_CGHE, log_sum_QH.view(query_CGHE.shape[:3]), query_CGHE, key_CGHE, value_CGHE)


def merge_own_ref(output_QHE: Tensor, log_sum_QH: Tensor, query_CGHE: Tensor, key_CGHE: Tensor, value_CGHE: Tensor
                  ) -> Tensor:
    """Twin of ``merge_own``."""
    C, G, H, E = query_CGHE.shape
    score = torch.einsum("cghe,cfhe->cghf", query_CGHE, key_CGHE) / math.sqrt(E)
    unseen = torch.ones(G, G, dtype=torch.bool, device=score.device).triu(1).unsqueeze(1)
    score = score.masked_fill(unseen, -math.inf)
    weight = torch.cat([log_sum_QH.view(C, G, H, 1), score], dim=-1).softmax(-1)
    own_CGHE = torch.einsum("cghf,cfhe->cghe", weight[..., 1:], value_CGHE)
    return weight[..., :1] * output_QHE.view(C, G, H, E) + own_CGHE


class _MergeOwn(torch.autograd.Function):
    """``merge_own`` in elementwise products: as batched matmuls of G x G it took four times as long (C = 2000)."""

    @staticmethod
    def forward(ctx: Any, shared_CGHE: Tensor, log_sum_CGH: Tensor, query_CGHE: Tensor, key_CGHE: Tensor,
                value_CGHE: Tensor) -> Tensor:
        G, E = query_CGHE.shape[1], query_CGHE.shape[-1]
        scale = 1.0 / math.sqrt(E)
        output_CGHE = torch.empty_like(shared_CGHE)
        weights = []
        with torch.autocast(query_CGHE.device.type, enabled=False):
            for g in range(G):
                scores = [log_sum_CGH[:, g]]
                scores += [_dot(query_CGHE[:, g], key_CGHE[:, f]).to(log_sum_CGH.dtype) * scale for f in range(g + 1)]
                weight = torch.softmax(torch.stack(scores), 0).to(query_CGHE.dtype)
                mixed = torch.mul(shared_CGHE[:, g], weight[0].unsqueeze(-1), out=output_CGHE[:, g])
                for f in range(g + 1):
                    mixed.addcmul_(value_CGHE[:, f], weight[f + 1].unsqueeze(-1))
                weights.append(weight)
        ctx.save_for_backward(shared_CGHE, query_CGHE, key_CGHE, value_CGHE, *weights)
        ctx.scale, ctx.sum_dtype = scale, log_sum_CGH.dtype
        return output_CGHE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        grad_CGHE, = grads
        shared_CGHE, query_CGHE, key_CGHE, value_CGHE, *weights = ctx.saved_tensors
        grad_shared, grad_query = torch.empty_like(shared_CGHE), torch.zeros_like(query_CGHE)
        grad_key, grad_value = torch.zeros_like(key_CGHE), torch.zeros_like(value_CGHE)
        grad_sums = []
        with torch.autocast(query_CGHE.device.type, enabled=False):
            for g, weight in enumerate(weights):
                grad = grad_CGHE[:, g]
                seen = [shared_CGHE[:, g], *(value_CGHE[:, f] for f in range(g + 1))]
                grad_weight = torch.stack([_dot(grad, each) for each in seen])
                grad_score = weight * (grad_weight - (weight * grad_weight).sum(0))
                torch.mul(grad, weight[0].unsqueeze(-1), out=grad_shared[:, g])
                grad_sums.append(grad_score[0])
                scaled = (grad_score * ctx.scale).unsqueeze(-1)
                for f in range(g + 1):
                    grad_value[:, f].addcmul_(grad, weight[f + 1].unsqueeze(-1))
                    grad_query[:, g].addcmul_(key_CGHE[:, f], scaled[f + 1])
                    grad_key[:, f].addcmul_(query_CGHE[:, g], scaled[f + 1])
        return grad_shared, torch.stack(grad_sums, dim=1).to(ctx.sum_dtype), grad_query, grad_key, grad_value


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(-1)
