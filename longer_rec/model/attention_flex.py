"""The attention primitive over packed rows as they are, without padding: ``flex_attention``, for GPUs.

Whatever the mask, a query sees one range of the packed keys, within its request's. Blocks of 128 x 128 that hold no
such pair are skipped, those that hold nothing else are not masked. On a CPU it computes forward alone, and slowly: for
tests.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from longer_rec.model.jagged import request_of, start_of

_BLOCK = 128


@dataclass(frozen=True)
class RangePlan:
    """Query i sees the packed keys ``first_Q[i]`` to ``end_Q[i]`` - 1."""

    first_Q: Tensor
    end_Q: Tensor
    blocks: BlockMask


def plan_ranges(query_length_B: Tensor, key_length_B: Tensor, causal: bool, position_Q: Tensor | None = None,
                first_Q: Tensor | None = None) -> RangePlan:
    """The ranges of ``plan_attention``'s masks."""
    num_queries, num_keys = (int(length_B.sum()) for length_B in (query_length_B, key_length_B))  # host sync on GPU
    request_Q = request_of(query_length_B, num_queries)
    start_Q, length_Q = start_of(key_length_B)[request_Q], key_length_B[request_Q]
    seen_Q = length_Q
    if position_Q is not None:
        seen_Q = torch.minimum(position_Q + 1, length_Q)
    elif causal:
        from_newest_Q = query_length_B.cumsum(0)[request_Q] - 1 - torch.arange(num_queries, device=request_Q.device)
        seen_Q = (length_Q - from_newest_Q).clamp(min=0)
    begin_Q = start_Q if first_Q is None or position_Q is None else start_Q + first_Q
    end_Q = torch.maximum(start_Q + seen_Q, begin_Q)
    return RangePlan(begin_Q, end_Q, _blocks(begin_Q, end_Q, num_keys))


def _blocks(first_Q: Tensor, end_Q: Tensor, num_keys: int) -> BlockMask:
    num_rows, num_columns = -(-first_Q.numel() // _BLOCK), -(-num_keys // _BLOCK)
    missing = num_rows * _BLOCK - first_Q.numel()
    column = torch.arange(num_columns, device=first_Q.device) * _BLOCK

    def by_block(value_Q: Tensor, filler: int) -> Tensor:
        return torch.nn.functional.pad(value_Q, (0, missing), value=filler).view(num_rows, _BLOCK)

    sees = by_block(end_Q - first_Q, 0) > 0
    lowest = by_block(first_Q, num_keys).masked_fill(~sees, num_keys).amin(1, keepdim=True)
    highest = by_block(end_Q, 0).masked_fill(~sees, 0).amax(1, keepdim=True)
    some = (lowest < column + _BLOCK) & (highest > column)
    # A block that reaches beyond the last key or the last query is masked.
    whole = some & (by_block(first_Q, num_keys).amax(1, keepdim=True) <= column)
    whole &= by_block(end_Q, 0).amin(1, keepdim=True) >= column + _BLOCK

    def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first_Q[query]) & (key < end_Q[query])

    (count, index), (whole_count, whole_index) = (_listed(chosen) for chosen in (some & ~whole, whole))
    return BlockMask.from_kv_blocks(count, index, whole_count, whole_index, _BLOCK, seen,
                                    seq_lengths=(first_Q.numel(), num_keys))


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Number and columns of the chosen blocks of each row, as ``BlockMask`` wants them."""
    index = chosen.int().argsort(dim=1, descending=True, stable=True).int()
    return chosen.sum(1, dtype=torch.int32)[None, None], index[None, None]


def attend_ranges(query_QHE: Tensor, key_SHE: Tensor, value_SHE: Tensor, plan: RangePlan) -> tuple[Tensor, Tensor]:
    """``attend`` without padding."""
    if 0 in (query_QHE.shape[0], key_SHE.shape[0]):
        return torch.zeros_like(query_QHE), query_QHE.new_full(query_QHE.shape[:2], -torch.inf, dtype=torch.float32)
    heads_first = [each.transpose(0, 1).unsqueeze(0) for each in (query_QHE, key_SHE, value_SHE)]
    with torch.autocast(query_QHE.device.type, enabled=False):
        output, beside = _flex(query_QHE.is_cuda)(*heads_first, block_mask=plan.blocks, return_aux=AuxRequest(lse=True))
    return output.squeeze(0).transpose(0, 1), beside.lse.squeeze(0).transpose(0, 1)


@cache
def _flex(compiled: bool) -> Any:
    """Without compilation it computes all scores."""
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
