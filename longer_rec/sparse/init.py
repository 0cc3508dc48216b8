"""Initial values of the tables: a pure function of (seed, table, row, column).

No generator state, no order: each shard computes its own rows and columns, so that every plan and world size starts
from bitwise the same table. The whole path from the hash to the last rounding is integer arithmetic and one
multiplication, which gives the same bits on every device; erfinv or Box-Muller would follow the device's libm.
"""

import hashlib
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from longer_rec.runtime.hashing import GOLDEN, shift_right, signed, splitmix64
from longer_rec.sparse.open_ids import OpenIds
from longer_rec.sparse.tables import SparseConfig

# Half a MB of int64, so that temporaries stay in cache: 6 times faster than 4 M values (2 vCPU, November 2026).
_CHUNK_VALUES = 1 << 16
_WEIGHT = re.compile(r"(?:^|\.)(?:embeddings|embedding_bags)\.(?P<table>[^.]+)\.weight$")


def initial_values(seed: int, table: str, rows: range | Tensor, columns: range, std: float,
                   device: torch.device | str = "cpu") -> Tensor:
    """Values of a block of a table, or of rows by their int64 ids, float32, (rows x columns).

    The sum of four 16-bit uniforms of one hash: mean 0, spread ``std``, nearly normal, cut at 3.46 ``std``.
    """
    digest = hashlib.sha256(f"{seed}/{table}".encode()).digest()
    key = signed(int.from_bytes(digest[:8], "little"))
    row = torch.arange(rows.start, rows.stop, dtype=torch.int64, device=device) if isinstance(rows, range) else rows
    column = torch.arange(columns.start, columns.stop, dtype=torch.int64, device=device)
    row_key = splitmix64(key + (row + 1) * signed(GOLDEN))
    bits = splitmix64(row_key.unsqueeze(1) + (column + 1) * signed(GOLDEN))
    total = sum((shift_right(bits, shift) & 0xFFFF for shift in (16, 32, 48)), start=bits & 0xFFFF)
    # The four sum to 2 * 65535 on average, with variance 4 * (65536^2 - 1) / 12.
    scale = std / ((65536.0**2 - 1.0) / 3.0) ** 0.5
    return ((total - 2 * 65535).to(torch.float64) * scale).to(torch.float32)


def _fill(block: Tensor, seed: int, table: str, offsets: tuple[int, int], std: float) -> None:
    num_rows, num_columns = block.shape
    step = max(1, _CHUNK_VALUES // max(1, num_columns))
    columns = range(offsets[1], offsets[1] + num_columns)
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        rows = range(offsets[0] + start, offsets[0] + stop)
        block[start:stop].copy_(initial_values(seed, table, rows, columns, std, block.device))


def initial_std(table: str, config: SparseConfig) -> float:
    return config.init_std.get(table, config.default_init_std)


@torch.no_grad()
def initialize_tables(model: nn.Module, seed: int, config: SparseConfig) -> None:
    """Fill every table of a sharded or unsharded model, in place; touches nothing but tables."""
    for key, value in model.state_dict().items():
        found = _WEIGHT.search(key)
        if found is None:
            continue
        table = found["table"]
        std = initial_std(table, config)
        if isinstance(value, ShardedTensor):
            for shard in value.local_shards():
                rows_from, columns_from = shard.metadata.shard_offsets
                _fill(shard.tensor, seed, table, (rows_from, columns_from), std)
        else:
            _fill(value, seed, table, (0, 0), std)


def attach_open_rows(model: DistributedModelParallel, seed: int, config: SparseConfig) -> None:
    """Give each table of open ids its rows; an id's row begins as a function of (seed, table, id)."""
    tensors: dict[str, Any] = model.state_dict()
    states: Mapping[str, Mapping[str, Any]] = model.fused_optimizer.state_dict()["state"] if config.managed else {}
    for path, module in model.module.named_modules():
        if isinstance(module, OpenIds):
            table = path.rsplit(".", 1)[1]
            key = next(name for name in tensors if name.endswith(f".embeddings.{table}.weight"))
            weight_VE = _own(tensors[key])
            state = [_own(value) for name, values in states.items() if name.endswith(f".embeddings.{table}.weight")
                     for value in values.values()]
            start = partial(_rows_of_ids, seed=seed, table=table, std=initial_std(table, config),
                            num_columns=weight_VE.shape[1])
            module.attach(weight_VE, state, start)


def _rows_of_ids(ids: Tensor, seed: int, table: str, std: float, num_columns: int) -> Tensor:
    return initial_values(seed, table, ids, range(num_columns), std, ids.device)


def _own(value: Any) -> Tensor:
    """What this rank holds of a tensor."""
    shards = value.local_shards()
    found: Tensor = shards[0].tensor
    return found
