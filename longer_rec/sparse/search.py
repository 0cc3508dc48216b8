"""Sharding plans for machines that are not there: TorchRec's proposers and partitioners over our count of bytes.

The search is TorchRec's (``EmbeddingShardingPlanner.plan``) without the work whose outcome is known: a proposal that
cannot fit, or whose best possible rating is no better than the best plan's, is not partitioned, proposals are told
apart without hashing their shards, and equal shards are estimated once. Proposers that ignore feedback, all but dynamic
programming, give the same plan (``benchmarks/bench_planner.py`` compares).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner, MemoryBalancedPartitioner
from torchrec.distributed.planner.proposers import (
    DynamicProgrammingProposer,
    GreedyProposer,
    GridSearchProposer,
    UniformProposer,
)
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator
from torchrec.distributed.planner.types import PlannerError, ShardEstimator, ShardingOption, Storage
from torchrec.distributed.planner.utils import reset_shard_rank

from longer_rec.errors import ConfigError
from longer_rec.sparse.options import (
    Choice,
    Hardware,
    allowed_types,
    build_sharders,
    splittable,
    state_bytes,
    table_plan,
)
from longer_rec.sparse.placement import cache_bytes
from longer_rec.sparse.planfile import FLOAT_BYTES, Shard, SparsePlan, cache_params
from longer_rec.sparse.tables import KernelName, SparseConfig, check_names, find_collections, table_configs

PROPOSERS: Mapping[str, Callable[[], Any]] = {
    "greedy": GreedyProposer, "uniform": UniformProposer, "grid": GridSearchProposer,
    "dynamic": DynamicProgrammingProposer}
PARTITIONERS: Mapping[str, Callable[[], Any]] = {
    "perf": GreedyPerfPartitioner, "memory": MemoryBalancedPartitioner}
KERNELS: tuple[str, ...] = get_args(KernelName)
# FBGEMM's default share of a table's rows in the device cache.
CACHED_SHARE = 0.2
_ID_BYTES = 8
_MS = 1e-3


@dataclass(frozen=True)
class ShardBytes:
    """One shard: on its device, behind it in host memory, and by kind."""

    weights: int
    optimizer: int
    exchange: int
    host: int

    @property
    def device(self) -> int:
        return self.weights + self.optimizer + self.exchange


@dataclass(frozen=True)
class Placed:
    """One shard of a plan: the table it belongs to, its rank, its bytes and its share of a step in seconds."""

    table: str
    rank: int
    size: ShardBytes
    forward_s: float
    forward_exchange_s: float
    backward_s: float
    backward_exchange_s: float


@dataclass(frozen=True)
class Found:
    """The best plan of a search, or None, and what it took to find."""

    plan: SparsePlan | None
    placed: tuple[Placed, ...]
    seconds: float
    num_proposals: int
    num_partitioned: int


@dataclass(frozen=True)
class Space:
    """Every way to shard every table, estimated for one machine and one batch; ``sizes`` of shards by id of option."""

    module: nn.Module
    config: SparseConfig
    hardware: Hardware
    topology: Topology
    options: list[ShardingOption]
    sizes: Mapping[int, list[ShardBytes]]


def build_space(module: nn.Module, config: SparseConfig, hardware: Hardware, batch_requests: int,
                ids_per_request: Mapping[str, float], reserved_bytes: int, choices: Mapping[str, Choice],
                strict: bool = False) -> Space:
    """Enumerate and estimate; ``reserved_bytes`` of each device are for everything but tables and their exchange.

    ``ConfigError`` for a choice that names no table, or a type or kernel that this machine or optimizer rules out.
    """
    constraints = _constraints(module, config, hardware, ids_per_request, choices, strict)
    on_gpu = hardware.device == "cuda"
    free = max(1, hardware.device_bytes - reserved_bytes)  # TorchRec 1.6 takes 0 for "not given"
    topology = Topology(
        world_size=hardware.world_size, local_world_size=min(hardware.ranks_per_host, hardware.world_size),
        compute_device=hardware.device, hbm_cap=free if on_gpu else 0,
        ddr_cap=max(1, hardware.host_bytes_per_rank) if on_gpu else free, ssd_cap=hardware.ssd_bytes,
        hbm_mem_bw=hardware.device_bw * _MS, ddr_mem_bw=hardware.host_bw * _MS if on_gpu else hardware.device_bw * _MS,
        hbm_to_ddr_mem_bw=hardware.host_bw * _MS, intra_host_bw=hardware.intra_bw * _MS,
        inter_host_bw=hardware.inter_bw * _MS)
    enumerator = EmbeddingEnumerator(topology, batch_requests, constraints,
                                     OncePerSize(EmbeddingPerfEstimator(topology, constraints)))
    options = enumerator.enumerate(module, build_sharders(config))
    every: dict[int, list[ShardBytes]] = {}
    ids = {name: sum(constraint.pooling_factors) for name, constraint in constraints.items()}
    for option in options:
        sizes = [shard_bytes(option, shard.size, config, hardware, batch_requests, ids[option.name])
                 for shard in option.shards]
        every[id(option)] = sizes
        for shard, size in zip(option.shards, sizes, strict=True):
            shard.storage = Storage(size.device, size.host) if on_gpu else Storage(0, size.device + size.host)
    return Space(module, config, hardware, topology, options, every)


class OncePerSize(ShardEstimator):
    """Estimates each size of an option's shards once: 64 row blocks of one size cost what one costs."""

    def __init__(self, estimator: EmbeddingPerfEstimator) -> None:
        self._estimator = estimator

    def estimate(self, sharding_options: list[ShardingOption], *arguments: Any, **named: Any) -> None:
        every = [(option, option.shards) for option in sharding_options]
        for option in sharding_options:
            option.shards = list({tuple(shard.size): shard for shard in option.shards}.values())
        self._estimator.estimate(sharding_options, *arguments, **named)
        for option, shards in every:
            perf = {tuple(shard.size): shard.perf for shard in option.shards}
            for shard in shards:
                shard.perf = perf[tuple(shard.size)]
            option.shards = shards


def shard_bytes(option: ShardingOption, size: Sequence[int], config: SparseConfig, hardware: Hardware,
                batch_requests: int, ids: float) -> ShardBytes:
    """Weights, optimizer state, and what passes through a shard of ``size`` in a step: ids, embeddings, gradients."""
    rows, columns = size
    kernel = option.compute_kernel
    weights = rows * columns * FLOAT_BYTES
    state = rows * state_bytes(config.optimizer, columns)
    if option.sharding_type == "data_parallel":
        return ShardBytes(2 * weights, state, int(batch_requests * ids * (_ID_BYTES + columns * FLOAT_BYTES)), 0)
    parts = option.num_shards if option.sharding_type == "row_wise" else 1
    looked_up = hardware.world_size * batch_requests * ids / parts
    embeddings = hardware.world_size * batch_requests if option.is_pooled else looked_up
    exchange = int(looked_up * _ID_BYTES + 2 * embeddings * columns * FLOAT_BYTES)
    if kernel == "fused" or hardware.device == "cpu":
        return ShardBytes(weights, state, exchange, 0)
    cached = option.cache_load_factor or CACHED_SHARE if kernel == "fused_uvm_caching" else 0.0
    device = cache_bytes(rows, columns * FLOAT_BYTES, int(cached * rows))
    # FBGEMM keeps the state of row-wise Adagrad on the device, whatever the kernel.
    on_device = state if config.optimizer == "rowwise_adagrad" else 0
    return ShardBytes(device, on_device, exchange, weights + state - on_device)


def find_plan(space: Space, proposer: str = "greedy", partitioner: str = "perf") -> Found:
    """The best of all proposals that can be placed."""
    start = time.perf_counter()
    best, _, num_proposals, num_partitioned = search_proposals(
        space.options, space.topology, PROPOSERS[proposer](), PARTITIONERS[partitioner]())
    seconds = time.perf_counter() - start
    if best is None:
        return Found(None, (), seconds, num_proposals, num_partitioned)
    placed = tuple(
        Placed(option.name, rank, size, shard.perf.fwd_compute * _MS, shard.perf.fwd_comms * _MS,
               shard.perf.bwd_compute * _MS, shard.perf.bwd_comms * _MS)
        for option, ranks in best
        for shard, rank, size in zip(option.shards, ranks, space.sizes[id(option)], strict=True))
    return Found(_sparse_plan(space, best), placed, seconds, num_proposals, num_partitioned)


Assignment = list[tuple[ShardingOption, list[int]]]


def search_proposals(options: list[ShardingOption], topology: Topology, proposer: Any, partitioner: Any
                     ) -> tuple[Assignment | None, float, int, int]:
    """(option and ranks of each table, rating in ms, proposals, those that were partitioned) of the best plan."""
    bounds = {id(option): _bounds(option) for option in options}
    capacity = [device.storage for device in topology.devices]
    limit = Storage(max(one.hbm for one in capacity), max(one.ddr for one in capacity))
    total = Storage(sum(one.hbm for one in capacity), sum(one.ddr for one in capacity))
    best: Assignment | None = None
    best_rating = float("inf")
    seen: set[tuple[int, ...]] = set()
    num_proposals = num_partitioned = 0
    proposer.load(options)
    while proposal := proposer.propose():
        key = tuple(map(id, proposal))
        rating: float | None = None
        if key not in seen:
            seen.add(key)
            num_proposals += 1
            if _lowest_rating([bounds[one] for one in key], limit, total, len(capacity)) < best_rating:
                num_partitioned += 1
                rating = _partition(proposal, topology, partitioner)
            if rating is not None and rating < best_rating:
                best_rating = rating
                best = [(option, [cast(int, shard.rank) for shard in option.shards]) for option in proposal]
        proposer.feedback(rating is not None, proposal, rating, topology)
        reset_shard_rank(proposal)
    return best, best_rating, num_proposals, num_partitioned


@dataclass(frozen=True)
class _Bounds:
    slowest: float
    work: float
    largest: Storage
    total: Storage


def _bounds(option: ShardingOption) -> _Bounds:
    times = [shard.perf.total for shard in option.shards]
    sizes = [shard.storage for shard in option.shards]
    return _Bounds(max(times), sum(times), Storage(max(size.hbm for size in sizes), max(size.ddr for size in sizes)),
                   Storage(sum(size.hbm for size in sizes), sum(size.ddr for size in sizes)))


def _lowest_rating(bounds: Sequence[_Bounds], limit: Storage, total: Storage, num_ranks: int) -> float:
    """No placement of these options is faster: not than its slowest shard, nor than an even split; inf: none fits."""
    fits = (all(each.largest.hbm <= limit.hbm and each.largest.ddr <= limit.ddr for each in bounds)
            and sum(each.total.hbm for each in bounds) <= total.hbm
            and sum(each.total.ddr for each in bounds) <= total.ddr)
    # The margin: a sum in another order may round to less.
    even = sum(each.work for each in bounds) / num_ranks * (1 - 1e-9)
    return max(even, max(each.slowest for each in bounds)) if fits else float("inf")


def _partition(proposal: list[ShardingOption], topology: Topology, partitioner: Any) -> float | None:
    """Set the ranks of the proposal's shards; the slowest rank's time in ms, or None when it cannot be placed."""
    try:
        partitioner.partition(proposal, topology)
    except PlannerError:
        return None
    times = [0.0] * topology.world_size
    for option in proposal:
        for shard in option.shards:
            times[shard.rank] += shard.perf.total
    return max(times)


def _constraints(module: nn.Module, config: SparseConfig, hardware: Hardware, ids_per_request: Mapping[str, float],
                 choices: Mapping[str, Choice], strict: bool) -> dict[str, ParameterConstraints]:
    collections = find_collections(module)
    check_names(choices, [table.name for each in collections.values() for table in table_configs(each)], "--constrain")
    constraints = {}
    for collection in collections.values():
        pooled = isinstance(collection, EmbeddingBagCollection)
        reasons = allowed_types(pooled, config, torch.device(hardware.device), strict)
        for table in table_configs(collection):
            choice = choices.get(table.name, Choice())
            for name in choice.sharding_types:
                reason = reasons.get(name, f"known are {', '.join(reasons)}")
                if reason:
                    raise ConfigError(f"table {table.name!r} cannot be {name}: {reason}")
            known = KERNELS if hardware.device == "cuda" else KERNELS[:1]  # on a CPU all of them are plain memory
            for name in choice.kernels:
                if name not in known:
                    raise ConfigError(f"table {table.name!r} cannot use kernel {name!r} on {hardware.device}; use "
                                      f"{' or '.join(known)}")
            # Replicas are left to those who ask for them, as in training.
            types = list(choice.sharding_types or
                         (name for name, reason in reasons.items() if not reason and name != "data_parallel"))
            types = splittable(types, table.num_embeddings, hardware.world_size)
            if not types:
                raise ConfigError(f"table {table.name!r} of {table.num_embeddings} rows cannot be split row_wise over "
                                  f"{hardware.world_size} ranks; allow table_wise for it")
            kernels = list(choice.kernels or [config.kernel]) if hardware.device == "cuda" else ["fused"]
            if types == ["data_parallel"]:
                kernels = ["dense"]
            constraints[table.name] = ParameterConstraints(
                sharding_types=types, compute_kernels=kernels, min_partition=choice.min_columns,
                cache_params=cache_params(choice.cache_load_factor, config.cache_policy),
                pooling_factors=[ids_per_request.get(key, 1.0) for key in table.feature_names])
    return constraints


def _sparse_plan(space: Space, assignment: Assignment) -> SparsePlan:
    tables = []
    for option, ranks in assignment:
        config = next(table for table in table_configs(cast(Any, option.module[1])) if table.name == option.name)
        shards = [] if option.sharding_type == "data_parallel" else [
            Shard(rank=rank, offsets=(shard.offset[0], shard.offset[1]), sizes=(shard.size[0], shard.size[1]))
            for shard, rank in zip(option.shards, ranks, strict=True)]
        kernel = space.config.kernel if space.hardware.device == "cpu" else option.compute_kernel
        tables.append(table_plan(option.path, config, option.is_pooled, option.sharding_type, kernel, shards,
                                 space.config, space.hardware.world_size))
    return SparsePlan(world_size=space.hardware.world_size,
                      ranks_per_host=min(space.hardware.ranks_per_host, space.hardware.world_size),
                      device=space.hardware.device, tables=tuple(tables))
