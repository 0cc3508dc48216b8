"""A 64-bit digest of a tensor's bits that does not depend on how the tensor is cut into shards.

The digest is sum over (r, c) of R(r) * C(c) * bits(r, c) modulo 2^64, with pseudo-random odd R and C. Integer addition
has no order, so each rank adds up its own block at its own place and the ranks' sums are added. It guards against
accidents, not against an adversary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from longer_rec.errors import RankLost
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
        bits = as_integers(rows[start:start + step].contiguous()).to(torch.int64)
        total += ((bits * column).sum(1) * _multipliers(first_row + start, len(bits), 2, block.device)).sum()
    return total


def as_integers(value: Tensor) -> Tensor:
    """The same bits as integers of their size, so that NaN equals itself and 0.0 is not -0.0."""
    return value.view(_INTEGERS[value.element_size()])


def local_digests(state: Mapping[str, Any]) -> dict[str, tuple[int, bool]]:
    """Of each tensor, the digest of what this rank holds, and whether that is shards of it or a replica."""
    digests = [_local_digest(value).cpu() for value in state.values()]
    values = torch.stack(digests).tolist() if digests else []
    return {name: (digest, hasattr(state[name], "local_shards")) for name, digest in zip(state, values, strict=True)}


def join_digests(ranks: Sequence[Mapping[str, tuple[int, bool]]]) -> dict[str, str]:
    """The digests of whole tensors, 16 hexadecimal digits, from those of all ranks.

    Shards add up. Replicas must agree: ``RankLost`` names the rank whose copy differs from the first one, which only
    broken hardware or a bug brings about.
    """
    joined: dict[str, int] = {}
    for rank, own in enumerate(ranks):
        for name, (digest, is_sharded) in own.items():
            if is_sharded:
                joined[name] = joined.get(name, 0) + digest
            elif joined.setdefault(name, digest) != digest:
                raise RankLost(f"rank {rank} holds other values of the replicated {name!r} than the ranks before it: "
                               "its memory or processor is at fault; start again without that machine")
    return {name: f"{joined[name] % (1 << 64):016x}" for name in sorted(joined)}


def combined_digest(digests: Mapping[str, str]) -> str:
    """Those of many tensors as one."""
    return f"{sum(int(digest, 16) * (2 * i + 1) for i, digest in enumerate(digests.values())) % (1 << 64):016x}"


def _local_digest(value: Any) -> Tensor:
    if not hasattr(value, "local_shards"):
        return block_digest(value)
    parts = [block_digest(shard.tensor, tuple(shard.metadata.shard_offsets)) for shard in value.local_shards()]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.int64)


def _multipliers(start: int, count: int, axis: int, device: torch.device) -> Tensor:
    index = torch.arange(start, start + count, dtype=torch.int64, device=device)
    return splitmix64((index + 1) * signed(GOLDEN * axis)) | 1
