"""A machine, and what its tables may be: sharding types, kernels, and what a table comes to."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.mc_embedding import ManagedCollisionEmbeddingCollectionSharder
from torchrec.distributed.types import ModuleSharder

from longer_rec.errors import ConfigError
from longer_rec.sparse.open_ids import BUCKETS
from longer_rec.sparse.planfile import FLOAT_BYTES, Shard, TablePlan
from longer_rec.sparse.tables import ShardingName, SparseConfig, SparseOptimizerName, TableConfig

SHARDING_TYPES: tuple[str, ...] = get_args(ShardingName)


@dataclass(frozen=True)
class Hardware:
    """A cluster. ``ranks_per_host`` at most; ``memory_bytes`` of one device (0: a rank has its part of the host's),
    ``host_bytes`` of one host; rates are bytes a second of one device in one direction, ``flops`` operations a second
    by precision, ``cores`` what the ranks of a host share (0: each rank has its own processor). ``ssd_bytes`` of one
    host for tables, ``ssd_bw`` of 4 KiB blocks read at random."""

    name: str
    world_size: int
    ranks_per_host: int
    device: Literal["cpu", "cuda"]
    memory_bytes: int
    host_bytes: int
    intra_bw: float
    inter_bw: float
    device_bw: float
    host_bw: float
    flops: Mapping[str, float]
    cores: int = 0
    ssd_bytes: int = 0
    ssd_bw: float = 0.0

    @property
    def local_size(self) -> int:
        return min(self.world_size, self.ranks_per_host)

    @property
    def host_bytes_per_rank(self) -> int:
        return self.host_bytes // self.local_size

    @property
    def ssd_bytes_per_rank(self) -> int:
        return self.ssd_bytes // self.local_size

    @property
    def device_bytes(self) -> int:
        return self.memory_bytes or self.host_bytes_per_rank

    @property
    def network_bw(self) -> float:
        """What an exchange between all ranks is bound by."""
        return self.intra_bw if self.world_size <= self.ranks_per_host else min(self.intra_bw, self.inter_bw)


@dataclass(frozen=True)
class Choice:
    """What a table may be; empty means whatever is allowed, and the configured kernel.

    ``coverage``: the share of its fetches that a cache of ``cache_load_factor`` serves, where it is known.
    """

    sharding_types: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    min_columns: int | None = None
    cache_load_factor: float | None = None
    coverage: float | None = None


class BagSharder(EmbeddingBagCollectionSharder):
    """Offers row-wise sharding on CPUs too, where it works but TorchRec's own sharder hides it."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types: list[str] = super().sharding_types(compute_device_type)
        return types if "row_wise" in types else [*types, "row_wise"]


def build_sharders(config: SparseConfig) -> list[ModuleSharder[nn.Module]]:
    """The sharders for every collection of this package."""
    # Without a mode FBGEMM takes a weight decay and ignores it.
    fused = {"weight_decay_mode": WeightDecayMode.DECOUPLE} if config.weight_decay else None
    return [cast(ModuleSharder[nn.Module], BagSharder(fused)),
            cast(ModuleSharder[nn.Module], EmbeddingCollectionSharder(fused)),
            cast(ModuleSharder[nn.Module], ManagedCollisionEmbeddingCollectionSharder(fused_params=fused))]


def allowed_types(pooled: bool, config: SparseConfig, device: torch.device, strict: bool = False,
                  table: str = "") -> dict[str, str]:
    """For each sharding type, "" when ``table`` may have it, or why not.

    ``strict`` leaves those that give bitwise the same table on any number of ranks.
    """
    reasons = dict.fromkeys(SHARDING_TYPES, "")
    if table in config.managed:
        return {name: "" if name == "row_wise" else "the rows of open ids are given away by the rank that has their "
                "bucket; use row_wise" for name in SHARDING_TYPES}
    if strict and pooled:
        refused = ("depends on the number of processes, which elastic.strict rules out; use table_wise, or "
                   "elastic.strict=false")
        reasons["row_wise"] = f"each rank pools its own rows first, so the order of additions {refused}"
        reasons["data_parallel"] = f"replicas are summed rank by rank, in an order that {refused}"
    if config.optimizer == "rowwise_adagrad":
        reasons["column_wise"] = ("rowwise_adagrad keeps one step size for each row and column shard, so the result "
                                  "would depend on the number of shards; use adagrad, or table_wise or row_wise")
    if not pooled:
        fault = ("replicated sequence tables corrupt memory in TorchRec's CPU kernels" if device.type == "cpu" else
                 "sequence tables are looked up once for all logical workers and are not replicated")
        reasons["data_parallel"] = f"{fault}; use table_wise"
    elif config.weight_decay:
        reasons["data_parallel"] = "sparse.weight_decay touches looked-up rows alone; use table_wise"
    return reasons


def check_open(table: str, config: SparseConfig, world_size: int, kernels: Iterable[str]) -> None:
    """``ConfigError`` where the ranks cannot share a table of open ids, or would hold it anywhere but on the device."""
    if table not in config.managed:
        return
    if other := [kernel for kernel in kernels if kernel != "fused"]:
        raise ConfigError(f"table {table!r} of open ids cannot use kernel {other[0]!r}: its rows are rewritten on the "
                          "device; use fused")
    if BUCKETS % world_size:
        fit = [ranks for ranks in range(1, BUCKETS + 1) if BUCKETS % ranks == 0]
        raise ConfigError(f"table {table!r} of open ids is divided into {BUCKETS} parts, which {world_size} ranks "
                          f"cannot share equally; use {', '.join(map(str, fit[:-1]))} or {fit[-1]} ranks")


def splittable(types: Iterable[str], rows: int, world_size: int) -> tuple[str, ...]:
    """Without row-wise when its blocks would leave a rank empty; on one rank, which holds all of it, table-wise.

    TorchRec's estimate takes them for equal there, yet row-wise sorts ids by rank and rows back: lookup and update took
    1.7 and 1.5 times a bare table-batched embedding (configs/first.yaml, Intel Xeon, December 2026).
    """
    types = tuple(types)
    if world_size == 1 and "table_wise" in types:
        return ("table_wise",)
    fits = math.ceil(rows / world_size) * (world_size - 1) < rows
    return tuple(name for name in types if fits or name != "row_wise")


def state_bytes(optimizer: SparseOptimizerName, columns: int) -> int:
    """Optimizer state of one row."""
    return {"sgd": 0, "adagrad": columns, "rowwise_adagrad": 1}[optimizer] * FLOAT_BYTES


def table_plan(path: str, table: TableConfig, pooled: bool, sharding_type: str, kernel: str, shards: list[Shard],
               config: SparseConfig, world_size: int) -> TablePlan:
    """The plan of one table: what follows from its type and its shards."""
    rows, dim = table.num_embeddings, table.embedding_dim
    replicated = sharding_type == "data_parallel"
    ranks = range(world_size) if replicated else (shard.rank for shard in shards)
    return TablePlan(module=path, table=table.name, rows=rows, dim=dim, pooled=pooled,
                     sharding_type=cast(ShardingName, sharding_type), kernel="dense" if replicated else kernel,
                     ranks=tuple(ranks), shards=tuple(shards), weight_bytes=rows * dim * FLOAT_BYTES,
                     optimizer_bytes=rows * state_bytes(config.optimizer, dim),
                     exact=not (replicated or (pooled and sharding_type == "row_wise")))
