"""Deciding where each table lives: by TorchRec's planner, by name, or as a file says."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.planner import constants

from longer_rec.errors import ConfigError
from longer_rec.runtime.distributed import World
from longer_rec.runtime.machine import memory_bytes
from longer_rec.sparse.options import SHARDING_TYPES, Choice, Hardware, allowed_types, check_open, table_plan
from longer_rec.sparse.placement import Floats, apply_placement, place_equally, tiers_of
from longer_rec.sparse.planfile import Shard, SparsePlan, TablePlan, load_plan
from longer_rec.sparse.search import build_space, find_plan
from longer_rec.sparse.tables import (
    DIM_MULTIPLE,
    NOT_TRAINED,
    TRAINED_KERNELS,
    Collection,
    SparseConfig,
    check_names,
    every_table,
)

# Of each device, for the tower, its activations and what is exchanged: TorchRec's own share.
_RESERVED = 0.15


def build_plan(module: nn.Module, config: SparseConfig, world: World, batch_requests: int = 256,
               ids_per_request: Mapping[str, float] | None = None, strict: bool = False,
               fetches: Mapping[str, Floats] | None = None) -> SparsePlan:
    """Where each table of ``module`` goes; a pure function, so that rank 0 may decide for all.

    ``batch_requests`` (per rank) and ``ids_per_request`` (mean number of ids by table and pooled key) tell the
    planner how much is looked up; ``strict`` as in ``allowed_types``. ``fetches`` of each row, by table, decide
    the kernels with ``sparse.placement``. ``ConfigError`` when the tables cannot be split that way or do not fit.
    """
    if config.placement == "auto" and fetches is None:
        raise ConfigError("sparse.placement=auto goes by how often each row is looked up, which only prepared data "
                          "tells; give data.dir, or set sparse.kernel instead")
    if config.kernel not in TRAINED_KERNELS:
        raise ConfigError(f"sparse.kernel={config.kernel}: {NOT_TRAINED}; use {' or '.join(TRAINED_KERNELS)}")
    tables: Sequence[TablePlan]
    if config.plan == "auto":
        tables = _automatic(module, config, world, strict, batch_requests, ids_per_request or {}, fetches)
    elif config.plan_path is not None:
        if not config.plan_path.is_file():
            raise ConfigError(f"sparse.plan={config.plan!r} is neither auto, nor one of {', '.join(SHARDING_TYPES)}, "
                              "nor a file; give one of these, or a type for each table")
        plan = load_plan(config.plan_path)
        check_plan(plan, module, config, world, strict)
        return plan
    else:
        tables = _explicit(module, config, world.size)
    if fetches is not None:
        tables = apply_placement(tables, fetches, config, world.size, tiers_of(_hardware(world), config))
    plan = SparsePlan(world_size=world.size, ranks_per_host=world.local_size, device=world.device.type,
                      tables=tuple(tables))
    check_plan(plan, module, config, world, strict)
    return plan


def check_plan(plan: SparsePlan, module: nn.Module, config: SparseConfig, world: World, strict: bool,
               kernels: Sequence[str] = TRAINED_KERNELS) -> None:
    """``ConfigError`` unless the plan is for this machine and has exactly the tables of ``module``, in ``kernels``."""
    if (plan.world_size, plan.device) != (world.size, world.device.type):
        raise ConfigError(f"the plan is for {plan.world_size} ranks on {plan.device}, this run has {world.size} on "
                          f"{world.device.type}; set sparse.plan=auto or plan for this machine")
    wanted = {table.name: (table.num_embeddings, table.embedding_dim, path) for path, _, table in every_table(module)}
    planned = {table.table: table for table in plan.tables}
    for name in sorted(wanted.keys() - planned.keys()):
        raise ConfigError(f"the plan has no table {name!r}; every table of the model must be in it: plan again")
    for name, table in planned.items():
        if name not in wanted:
            raise ConfigError(f"the plan holds table {name!r}, which the model does not have; plan again")
        rows, dim, path = wanted[name]
        if (table.rows, table.dim, table.module) != wanted[name]:
            raise ConfigError(f"the plan has table {name!r} with {table.rows} rows of {table.dim} in {table.module!r}, "
                              f"the model {rows} rows of {dim} in {path!r}; plan again, or set sparse.dims as planned")
        check_open(name, config, world.size, [table.kernel])
        reason = allowed_types(table.pooled, config, world.device, strict, name)[table.sharding_type]
        if reason:
            raise ConfigError(f"table {table.table!r} cannot be {table.sharding_type}: {reason}")
        of_type = ("dense",) if table.sharding_type == "data_parallel" else kernels
        if table.kernel not in of_type:
            why = f" ({NOT_TRAINED})" * (table.kernel == "key_value")
            raise ConfigError(f"the plan gives {table.sharding_type} table {table.table!r} kernel {table.kernel!r}{why}"
                              f"; use {' or '.join(of_type)}")
        if max(table.ranks) >= world.size:
            raise ConfigError(f"the plan puts table {table.table!r} on rank {max(table.ranks)}; "
                              f"the run has ranks 0 to {world.size - 1}")
        _check_cover(table)


def _check_cover(table: TablePlan) -> None:
    covered = sum(shard.sizes[0] * shard.sizes[1] for shard in table.shards)
    if table.sharding_type != "data_parallel" and covered != table.rows * table.dim:
        raise ConfigError(f"the shards of table {table.table!r} hold {covered} values, the table has "
                          f"{table.rows * table.dim}; plan again")


def named_types(module: nn.Module, config: SparseConfig) -> dict[str, str]:
    """The sharding type that ``sparse.plan`` gives each table; ``ConfigError`` unless it names all, and no other."""
    names = [table.name for _, _, table in every_table(module)]
    if isinstance(config.plan, str):
        return dict.fromkeys(names, config.plan)
    check_names(config.plan, names, "sparse.plan")
    if missing := [name for name in names if name not in config.plan]:
        raise ConfigError(f"sparse.plan has no sharding type for table {missing[0]!r}; name every table, or give one "
                          "type for all")
    return dict(config.plan)


def _explicit(module: nn.Module, config: SparseConfig, world_size: int) -> list[TablePlan]:
    every, types = every_table(module), named_types(module, config)
    load = [0] * world_size
    plans = {}
    # The largest table is placed first, always on the rank that holds least.
    for path, collection, table in sorted(every, key=lambda item: -item[2].num_embeddings * item[2].embedding_dim):
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


def _automatic(module: nn.Module, config: SparseConfig, world: World, strict: bool, batch_requests: int,
               ids_per_request: Mapping[str, float], fetches: Mapping[str, Floats] | None) -> Sequence[TablePlan]:
    """The search of ``longer-rec plan``, on the bandwidths that TorchRec assumes."""
    choices, hardware = {}, _hardware(world)
    if fetches is not None and world.device.type == "cuda":  # on a CPU every kernel is plain memory
        tables = [table for _, _, table in every_table(module)]
        choices = {name: Choice(kernels=(place.kernel,), cache_load_factor=place.cache_load_factor)
                   for name, place in place_equally(tables, fetches, config, world.size,
                                                    tiers_of(hardware, config)).items()}
    space = build_space(module, config, hardware, batch_requests, ids_per_request,
                        int(_RESERVED * hardware.device_bytes), choices, strict)
    plan = find_plan(space).plan
    if plan is None:
        raise ConfigError(f"no sharding plan fits {world.size} ranks of {hardware.device_bytes} bytes each, of which "
                          f"{_RESERVED:.0%} are kept for the rest; use more ranks, smaller sparse.dims, or see what "
                          "longer-rec plan says")
    return plan.tables


def _hardware(world: World) -> Hardware:
    on_gpu = world.device.type == "cuda"
    device_bytes = torch.cuda.mem_get_info(world.device)[1] if on_gpu else 0
    intra, inter, device, host = (1000.0 * rate for rate in (  # TorchRec counts bytes a millisecond
        constants.INTRA_NODE_BANDWIDTH, constants.CROSS_NODE_BANDWIDTH,
        constants.HBM_MEM_BW if on_gpu else constants.DDR_MEM_BW, constants.HBM_TO_DDR_MEM_BW))
    return Hardware("this run", world.size, world.local_size, "cuda" if on_gpu else "cpu", device_bytes, memory_bytes(),
                    intra, inter, device, host, {})
