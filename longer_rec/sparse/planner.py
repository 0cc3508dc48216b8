"""Deciding where each table lives: by TorchRec's planner, by name, or as a file says."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ModuleSharder

from longer_rec.errors import ConfigError
from longer_rec.runtime.distributed import World
from longer_rec.runtime.machine import memory_bytes
from longer_rec.sparse.placement import Floats, Placement, apply_placement, place_equally
from longer_rec.sparse.planfile import FLOAT_BYTES, Shard, SparsePlan, TablePlan, cache_params, load_plan
from longer_rec.sparse.tables import (
    DIM_MULTIPLE,
    Collection,
    KernelName,
    ShardingName,
    SparseConfig,
    check_names,
    find_collections,
    table_configs,
)

_TYPES: tuple[str, ...] = get_args(ShardingName)


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
            cast(ModuleSharder[nn.Module], EmbeddingCollectionSharder(fused))]


def allowed_types(pooled: bool, config: SparseConfig, device: torch.device, strict: bool = False) -> dict[str, str]:
    """For each sharding type, "" when a table may have it, or why not.

    ``strict`` leaves those that give bitwise the same table on any number of ranks.
    """
    reasons = dict.fromkeys(_TYPES, "")
    if strict and pooled:
        reasons["row_wise"] = ("each rank pools its own rows first, so the order of additions depends on the number of "
                               "processes, which elastic.strict rules out; use table_wise, or elastic.strict=false")
        reasons["data_parallel"] = ("replicas are summed rank by rank, in an order that depends on the number of "
                                    "processes, which elastic.strict rules out; use table_wise, or "
                                    "elastic.strict=false")
    if config.optimizer == "rowwise_adagrad":
        reasons["column_wise"] = ("rowwise_adagrad keeps one step size for each row and column shard, so the result "
                                  "would depend on the number of shards; use adagrad, or table_wise or row_wise")
    if not pooled and device.type == "cpu":
        reasons["data_parallel"] = ("replicated sequence tables corrupt memory in TorchRec's CPU kernels; "
                                    "use table_wise")
    elif not pooled:
        reasons["data_parallel"] = ("sequence tables are looked up once for all logical workers and are not "
                                    "replicated; use table_wise")
    elif config.weight_decay:
        reasons["data_parallel"] = "sparse.weight_decay touches looked-up rows alone; use table_wise"
    return reasons


def build_plan(module: nn.Module, config: SparseConfig, world: World, batch_requests: int = 256,
               ids_per_request: Mapping[str, float] | None = None, strict: bool = False,
               fetches: Mapping[str, Floats] | None = None) -> SparsePlan:
    """Where each table of ``module`` goes; a pure function, so that rank 0 may decide for all.

    ``batch_requests`` (per rank) and ``ids_per_request`` (mean number of ids by key, such as "history.item") tell
    the planner how much is looked up; ``strict`` as in ``allowed_types``. ``fetches`` of each row, by table, decide
    the kernels with ``sparse.placement``. ``ConfigError`` when the tables cannot be split that way or do not fit.
    """
    if config.placement == "auto" and fetches is None:
        raise ConfigError("sparse.placement=auto goes by how often each row is looked up, which only prepared data "
                          "tells; give data.dir, or set sparse.kernel instead")
    collections = find_collections(module)
    if isinstance(config.plan, str) and config.plan == "auto":
        tables = _automatic(module, collections, config, world, strict, batch_requests, ids_per_request or {}, fetches)
    elif isinstance(config.plan, str) and config.plan not in _TYPES:
        plan = load_plan(Path(config.plan))
        check_plan(plan, module, config, world, strict)
        return plan
    else:
        tables = _explicit(collections, config, world, strict)
    if fetches is not None:
        tables = apply_placement(tables, fetches, config, world)
    plan = SparsePlan(world_size=world.size, ranks_per_host=world.local_size, device=world.device.type,
                      tables=tuple(tables))
    check_plan(plan, module, config, world, strict)
    return plan


def check_plan(plan: SparsePlan, module: nn.Module, config: SparseConfig, world: World, strict: bool) -> None:
    """``ConfigError`` unless the plan is for this machine and holds exactly the tables of ``module``."""
    if (plan.world_size, plan.device) != (world.size, world.device.type):
        raise ConfigError(f"the plan is for {plan.world_size} ranks on {plan.device}, this run has {world.size} on "
                          f"{world.device.type}; set sparse.plan=auto or plan for this machine")
    wanted = {(path, table.name): (table.num_embeddings, table.embedding_dim)
              for path, collection in find_collections(module).items() for table in table_configs(collection)}
    planned = {(table.module, table.table): table for table in plan.tables}
    for path, name in wanted.keys() - planned.keys():
        raise ConfigError(f"the plan has no table {name!r} of {path!r}; every table of the model must be in it")
    for path, name in planned.keys() - wanted.keys():
        raise ConfigError(f"the plan holds table {name!r} of {path!r}, which the model does not have; plan again")
    for key, table in planned.items():
        if (table.rows, table.dim) != wanted[key]:
            raise ConfigError(f"the plan has table {table.table!r} with {table.rows} rows of {table.dim}, the model "
                              f"{wanted[key][0]} rows of {wanted[key][1]}; plan again")
        reason = allowed_types(table.pooled, config, world.device, strict)[table.sharding_type]
        if reason:
            raise ConfigError(f"table {table.table!r} cannot be {table.sharding_type}: {reason}")
        kernels = ("dense",) if table.sharding_type == "data_parallel" else get_args(KernelName)
        if table.kernel not in kernels:
            raise ConfigError(f"the plan gives {table.sharding_type} table {table.table!r} kernel {table.kernel!r}; "
                              f"use {' or '.join(kernels)} (key_value, on SSD, needs CUDA and cannot be trained here)")
        if max(table.ranks) >= world.size:
            raise ConfigError(f"the plan puts table {table.table!r} on rank {max(table.ranks)}; "
                              f"the run has ranks 0 to {world.size - 1}")
        _check_cover(table)


def _check_cover(table: TablePlan) -> None:
    covered = sum(shard.sizes[0] * shard.sizes[1] for shard in table.shards)
    if table.sharding_type != "data_parallel" and covered != table.rows * table.dim:
        raise ConfigError(f"the shards of table {table.table!r} hold {covered} values, the table has "
                          f"{table.rows * table.dim}; plan again")


def _explicit(collections: Mapping[str, Collection], config: SparseConfig, world: World,
              strict: bool) -> list[TablePlan]:
    every = [(path, collection, table) for path, collection in collections.items()
             for table in table_configs(collection)]
    if isinstance(config.plan, str):
        types = {table.name: config.plan for _, _, table in every}
    else:
        types = dict(config.plan)
        check_names(types, [table.name for _, _, table in every], "sparse.plan")
        missing = [table.name for _, _, table in every if table.name not in types]
        if missing:
            raise ConfigError(f"sparse.plan has no sharding type for table {missing[0]!r}; name every table, or give "
                              "one type for all")
    load = [0] * world.size
    plans = {}
    # The largest table is placed first, always on the rank that holds least.
    for path, collection, table in sorted(every, key=lambda item: -item[2].num_embeddings * item[2].embedding_dim):
        pooled = isinstance(collection, EmbeddingBagCollection)
        reason = allowed_types(pooled, config, world.device, strict)[types[table.name]]
        if reason:
            raise ConfigError(f"sparse.plan: table {table.name!r} cannot be {types[table.name]}: {reason}")
        plans[path, table.name] = place_table(path, collection, table, types[table.name], config, load)
    return [plans[path, table.name] for path, _, table in every]


def place_table(path: str, collection: Collection, table: Any, sharding_type: str, config: SparseConfig,
                load: list[int]) -> TablePlan:
    """Place one table; ``load`` is the number of values that each rank holds already, and is added to."""
    shards = _shards(sharding_type, table.name, table.num_embeddings, table.embedding_dim, load)
    for shard in shards:
        load[shard.rank] += shard.sizes[0] * shard.sizes[1]
    pooled = isinstance(collection, EmbeddingBagCollection)
    return table_plan(path, table, pooled, sharding_type, config.kernel, shards, config, len(load))


def _shards(sharding_type: str, table: str, rows: int, dim: int, load: list[int]) -> list[Shard]:
    world_size = len(load)
    if sharding_type == "table_wise":
        return [Shard(rank=load.index(min(load)), offsets=(0, 0), sizes=(rows, dim))]
    if sharding_type == "row_wise":
        block = math.ceil(rows / world_size)
        if block * (world_size - 1) >= rows:
            raise ConfigError(f"table {table!r} of {rows} rows cannot be split row_wise over {world_size} ranks: "
                              f"blocks of {block} rows leave a rank empty; use table_wise for it")
        return [Shard(rank=rank, offsets=(rank * block, 0), sizes=(min(block, rows - rank * block), dim))
                for rank in range(world_size)]
    if sharding_type == "column_wise":
        if dim % (world_size * DIM_MULTIPLE):
            raise ConfigError(f"table {table!r} of width {dim} cannot be split column_wise over {world_size} ranks: "
                              f"each shard needs a multiple of {DIM_MULTIPLE} columns; use table_wise or row_wise, or "
                              f"a width that {world_size * DIM_MULTIPLE} divides")
        width = dim // world_size
        return [Shard(rank=rank, offsets=(0, rank * width), sizes=(rows, width)) for rank in range(world_size)]
    return []


def table_plan(path: str, table: Any, pooled: bool, sharding_type: str, kernel: str, shards: list[Shard],
                config: SparseConfig, world_size: int) -> TablePlan:
    rows, dim = table.num_embeddings, table.embedding_dim
    replicated = sharding_type == "data_parallel"
    states = {"sgd": 0, "adagrad": rows * dim, "rowwise_adagrad": rows}[config.optimizer]
    ranks = range(world_size) if replicated else (shard.rank for shard in shards)
    return TablePlan(module=path, table=table.name, rows=rows, dim=dim, pooled=pooled,
                     sharding_type=cast(ShardingName, sharding_type), kernel="dense" if replicated else kernel,
                     ranks=tuple(ranks), shards=tuple(shards), weight_bytes=rows * dim * FLOAT_BYTES,
                     optimizer_bytes=states * FLOAT_BYTES,
                     exact=not (replicated or (pooled and sharding_type == "row_wise")))


def _automatic(module: nn.Module, collections: Mapping[str, Collection], config: SparseConfig, world: World,
               strict: bool, batch_requests: int, ids_per_request: Mapping[str, float],
               fetches: Mapping[str, Floats] | None) -> list[TablePlan]:
    constraints = {}
    every = [table for collection in collections.values() for table in table_configs(collection)]
    places = place_equally(every, fetches, config, world) if fetches is not None else {
        table.name: Placement(config.kernel, None, 0.0) for table in every}
    for collection in collections.values():
        reasons = allowed_types(isinstance(collection, EmbeddingBagCollection), config, world.device, strict)
        # Replicas are left to those who ask for them: they cost an all-reduce, and exactness over world sizes.
        types = [name for name, reason in reasons.items() if not reason and name != "data_parallel"]
        for table in table_configs(collection):
            constraints[table.name] = ParameterConstraints(
                sharding_types=splittable(types, table.num_embeddings, world.size),
                # On a CPU every kernel is plain memory, and TorchRec's planner knows but one.
                compute_kernels=[places[table.name].kernel if world.device.type == "cuda" else "fused"],
                cache_params=cache_params(places[table.name].cache_load_factor, config.cache_policy),
                pooling_factors=[ids_per_request.get(key, 1.0) for key in table.feature_names])
    planner = EmbeddingShardingPlanner(topology=_topology(world), batch_size=batch_requests, constraints=constraints,
                                       debug=False)
    try:
        proposed = planner.plan(module, build_sharders(config))
    except PlannerError as error:
        raise ConfigError(f"no sharding plan fits {world.size} ranks: {' '.join(str(error).split())[:300]}; use more "
                          "ranks, smaller sparse.dims, or a sparse.plan of your own") from None
    return [_from_proposal(path, table, isinstance(collection, EmbeddingBagCollection),
                           cast(Any, proposed.plan[path])[table.name], places[table.name].kernel, config, world.size)
            for path, collection in collections.items() for table in table_configs(collection)]


def splittable(types: list[str], rows: int, world_size: int) -> list[str]:
    """Without row-wise when its blocks would leave a rank empty."""
    if math.ceil(rows / world_size) * (world_size - 1) < rows:
        return types
    return [name for name in types if name != "row_wise"]


def _from_proposal(path: str, table: Any, pooled: bool, sharding: Any, kernel: str, config: SparseConfig,
                   world_size: int) -> TablePlan:
    shards = [Shard(rank=shard.placement.rank(), offsets=tuple(shard.shard_offsets), sizes=tuple(shard.shard_sizes))
              for shard in (sharding.sharding_spec.shards if sharding.sharding_spec else ())]
    return table_plan(path, table, pooled, sharding.sharding_type, kernel, shards, config, world_size)


def _topology(world: World) -> Topology:
    host_bytes = memory_bytes() // world.local_size
    if world.device.type == "cuda":
        _, total_bytes = torch.cuda.mem_get_info(world.device)
        return Topology(world_size=world.size, local_world_size=world.local_size, compute_device="cuda",
                        hbm_cap=total_bytes, ddr_cap=host_bytes)
    return Topology(world_size=world.size, local_world_size=world.local_size, compute_device="cpu", ddr_cap=host_bytes)
