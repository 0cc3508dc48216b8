"""A 64-bit digest of a tensor's bits that does not depend on how the tensor is cut into shards.

The digest is sum over (r, c) of R(r) * C(c) * bits(r, c) modulo 2^64, with pseudo-random odd R and C. Integer addition
has no order, so each rank adds up its own block at its own place and the ranks' sums are added. It guards against
accidents, not against an adversary.
"""

from typing import Any

import torch
from torch import Tensor

from longer_rec.runtime.hashing import GOLDEN, signed, splitmix64

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Temporaries of int64 stay in cache.
_CHUNK_VALUES = 1 << 16


def block_digest(block: Tensor, offsets: tuple[int, ...] = ()) -> Tensor:
    """Digest (int64 scalar) of the part of a tensor that begins at ``offsets``; the first axis is the row."""
    total = torch.zeros((), dtype=torch.int64, device=block.device)
    if block.numel() == 0:
        return total
    rows = block.detach().reshape(block.shape[0] if block.ndim else 1, -1)
    num_rows, num_columns = rows.shape
    first_row, first_column = (*offsets, 0, 0)[:2]
    column = _multipliers(first_column, num_columns, 1, block.device)
    step = max(1, _CHUNK_VALUES // num_columns)
    for start in range(0, num_rows, step):
        part = rows[start:start + step].contiguous()
        bits = part.view(_INTEGERS[part.element_size()]).to(torch.int64)
        total += ((bits * column).sum(1) * _multipliers(first_row + start, len(part), 2, block.device)).sum()
    return total


def local_digest(value: Any) -> Tensor:
    """Digest of what this rank holds of a tensor; those of a ShardedTensor's shards add up to the whole's."""
    if not hasattr(value, "local_shards"):
        return block_digest(value)
    parts = [block_digest(shard.tensor, tuple(shard.metadata.shard_offsets)) for shard in value.local_shards()]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.int64)


def _multipliers(start: int, count: int, axis: int, device: torch.device) -> Tensor:
    index = torch.arange(start, start + count, dtype=torch.int64, device=device)
    return splitmix64((index + 1) * signed(GOLDEN * axis)) | 1
