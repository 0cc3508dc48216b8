"""The one attention primitive: queries are positions among the keys of their request, mostly the last ones.

Keys and queries are packed over requests. With ``causal`` the mask is aligned bottom right: for a request of 4 keys
and 2 queries the queries see

    query 0: 1 1 1 0
    query 1: 1 1 1 1

With positions p a query sees keys 0 .. p, or a window that ends there, and without either all keys of its request.
Beside the output comes the log-sum-exp of the scores, with which ``join`` adds another set of keys, and
``own_attention.merge_own`` those that belong to one candidate alone.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longer_rec.model.attention_flex import RangePlan, attend_ranges
from longer_rec.model.attention_plan import AttentionPlan, Group, plan_attention


def attend(query_QHE: Tensor, key_SHE: Tensor, value_SHE: Tensor, plan: AttentionPlan | RangePlan
           ) -> tuple[Tensor, Tensor]:
    """Softmax attention of packed queries over their request's packed keys: output Q x H x E, log-sum-exp Q x H.

    A query without keys gives output 0 and log-sum-exp -inf.
    """
    if isinstance(plan, RangePlan):
        return attend_ranges(query_QHE, key_SHE, value_SHE, plan)
    return _Attention.apply(query_QHE, key_SHE, value_SHE, plan)


def attend_all(query_QHE: Tensor, key_SHE: Tensor, value_SHE: Tensor, query_length_B: Tensor, key_length_B: Tensor
               ) -> tuple[Tensor, Tensor]:
    """``attend`` without a mask: each query sees all keys of its request."""
    return attend(query_QHE, key_SHE, value_SHE,
                  plan_attention(query_length_B, key_length_B, query_QHE.shape[1], causal=False))


def join(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, each as ``attend`` gave it, as one softmax."""
    log_sums = torch.stack([left[1], right[1]])
    # Finite: where neither has a key both are -inf, and their outputs 0.
    log_sums = log_sums.clamp(min=torch.finfo(log_sums.dtype).min / 2)
    weight = log_sums.softmax(0).to(left[0].dtype).unsqueeze(-1)
    return weight[0] * left[0] + weight[1] * right[0], log_sums.logsumexp(0)


class _Attention(torch.autograd.Function):
    """``attend`` group by group in the padded layout; one autograd node whatever the number of groups."""

    @staticmethod
    def forward(ctx: Any, query_QHE: Tensor, key_SHE: Tensor, value_SHE: Tensor, plan: AttentionPlan
                ) -> tuple[Tensor, Tensor]:
        num_queries, H, E = query_QHE.shape
        scale = 1.0 / math.sqrt(E)
        with torch.autocast(query_QHE.device.type, enabled=False):
            query = _gather(query_QHE, plan.query_source).mul_(scale)
            key, value = _gather(key_SHE, plan.key_source), _gather(value_SHE, plan.key_source)
            # The row behind the last stays 0 and -inf: the answer for queries without keys.
            output = query.new_zeros(query.shape[0] + 1, E)
            top = query.new_full((query.shape[0] + 1,), -math.inf, dtype=_score_dtype(query.dtype))
            share = torch.ones_like(top)
            weights = []
            for group, at, q, k in _walk(plan, query, key):
                score = torch.bmm(q, k.transpose(1, 2)).to(top.dtype)
                _hide(score, group, plan)
                weight = torch.softmax(score, -1)
                # exp(top score) / sum = the top weight: the log-sum-exp needs no exponential of its own.
                torch.amax(score, -1, out=top[at.queries].view(weight.shape[:2]))
                torch.amax(weight, -1, out=share[at.queries].view(weight.shape[:2]))
                weight = weight.to(query.dtype)
                torch.bmm(weight, value[at.keys].view(k.shape), out=output[at.queries].view(q.shape))
                weights.append(weight)
            packed = output.index_select(0, plan.query_place).view(num_queries, H, E)
            log_sum = top.sub_(share.log_()).index_select(0, plan.query_place).view(num_queries, H)
        ctx.save_for_backward(query, key, value, packed, *weights)
        ctx.plan, ctx.scale, ctx.shapes = plan, scale, (query_QHE.shape, key_SHE.shape)
        return packed, log_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_packed, grad_log_sum = grads
        query, key, value, packed, *weights = ctx.saved_tensors
        plan: AttentionPlan = ctx.plan
        with torch.autocast(query.device.type, enabled=False):
            # d score = weight * (d weight - delta), with the log-sum-exp's own gradient folded into delta.
            delta_QH = (grad_packed * packed).sum(-1).to(grad_log_sum.dtype) - grad_log_sum
            delta = delta_QH.to(query.dtype).flatten().index_select(0, plan.query_source)
            grad_output = _gather(grad_packed.to(query.dtype), plan.query_source)
            if plan.query_padding.numel():
                delta.index_fill_(0, plan.query_padding, 0.0)
                grad_output.index_fill_(0, plan.query_padding, 0.0)
            grad_query, grad_key, grad_value = (_with_zero_row(each) for each in (query, key, value))
            for (_, at, q, k), weight in zip(_walk(plan, query, key), weights, strict=True):
                grad_o = grad_output[at.queries].view(q.shape)
                torch.bmm(weight.transpose(1, 2), grad_o, out=grad_value[at.keys].view(k.shape))
                grad_score = torch.bmm(grad_o, value[at.keys].view(k.shape).transpose(1, 2))
                grad_score.sub_(delta[at.queries].view(q.shape[:2]).unsqueeze(-1)).mul_(weight)
                torch.bmm(grad_score, k, out=grad_query[at.queries].view(q.shape))
                torch.bmm(grad_score.transpose(1, 2), q, out=grad_key[at.keys].view(k.shape))
            query_shape, key_shape = ctx.shapes
            return (grad_query.index_select(0, plan.query_place).mul_(ctx.scale).view(query_shape),
                    grad_key.index_select(0, plan.key_place).view(key_shape),
                    grad_value.index_select(0, plan.key_place).view(key_shape), None)


@dataclass(frozen=True)
class _Span:
    """Rows of one group in the padded layout."""

    queries: slice
    keys: slice


def _walk(plan: AttentionPlan, query: Tensor, key: Tensor) -> list[tuple[Group, _Span, Tensor, Tensor]]:
    """Each group with its rows and its queries and keys, (requests x heads) x rows x E."""
    walk, query_at, key_at = [], 0, 0
    for group in plan.groups:
        batch = group.size * plan.num_heads
        span = _Span(slice(query_at, query_at + batch * group.num_queries),
                     slice(key_at, key_at + batch * group.num_keys))
        walk.append((group, span, query[span.queries].view(batch, group.num_queries, -1),
                     key[span.keys].view(batch, group.num_keys, -1)))
        query_at, key_at = span.queries.stop, span.keys.stop
    return walk


def _gather(rows: Tensor, source: Tensor) -> Tensor:
    return rows.reshape(-1, rows.shape[-1]).index_select(0, source)


def _with_zero_row(rows: Tensor) -> Tensor:
    """An uninitialised buffer like ``rows`` with a row of zeros behind it, for packed rows that are in no group."""
    buffer = rows.new_empty(rows.shape[0] + 1, rows.shape[1])
    buffer[-1] = 0.0
    return buffer


def _hide(score: Tensor, group: Group, plan: AttentionPlan) -> None:
    """Mask in place. Rows stand at the end of the padded layout, so one triangle serves the whole group."""
    if plan.causal and group.num_queries > 1:
        later = torch.ones(group.num_queries, group.num_queries, dtype=torch.bool, device=score.device).triu_(1)
        score[..., -group.num_queries:].masked_fill_(later, -math.inf)
    if group.hidden is not None:
        by_request = score.view(group.size, plan.num_heads, group.num_queries, group.num_keys)
        # Finite: a padded query above the first key would otherwise see nothing and give NaN.
        by_request.masked_fill_(group.hidden.unsqueeze(1), torch.finfo(score.dtype).min)


def _score_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores and their softmax are never computed below fp32."""
    return dtype if dtype == torch.float64 else torch.float32
