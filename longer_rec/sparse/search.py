"""Sharding plans for machines that are not there: TorchRec's proposers and partitioners over our count of bytes.

The search is TorchRec's (``EmbeddingShardingPlanner.plan``) without the work whose outcome is known: a proposal that
cannot fit, or whose best possible rating is no better than the best plan's, is not partitioned, proposals are told
apart without hashing their shards, and equal shards are estimated once. It gives the same plan
(``benchmarks/bench_planner.py`` compares).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner, MemoryBalancedPartitioner
from torchrec.distributed.planner.proposers import GreedyProposer, UniformProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator
from torchrec.distributed.planner.types import Perf, PlannerError, ShardEstimator, ShardingOption, Storage
from torchrec.distributed.planner.utils import reset_shard_rank

from longer_rec.errors import ConfigError
from longer_rec.sparse.options import (
    Choice,
    Hardware,
    allowed_types,
    build_sharders,
    check_open,
    splittable,
    state_bytes,
    table_plan,
)
from longer_rec.sparse.placement import Floats, cache_bytes
from longer_rec.sparse.planfile import FLOAT_BYTES, Shard, SparsePlan, cache_params
from longer_rec.sparse.tables import CACHED_KERNELS, KernelName, SparseConfig, TableConfig, check_names, every_table

PROPOSERS: Mapping[str, Callable[[], Any]] = {"greedy": GreedyProposer, "uniform": UniformProposer}
PARTITIONERS: Mapping[str, Callable[[], Any]] = {"perf": GreedyPerfPartitioner, "memory": MemoryBalancedPartitioner}
KERNELS: tuple[str, ...] = get_args(KernelName)
# FBGEMM's default share of a table's rows in the device cache.
CACHED_SHARE = 0.2
# SSDs read blocks of this size.
_PAGE_BYTES = 4096
# What the seconds of a shard go to, as TorchRec names it.
TIMES: Mapping[str, str] = {"forward": "fwd_compute", "forward_exchange": "fwd_comms", "backward": "bwd_compute",
                            "backward_exchange": "bwd_comms"}
_ID_BYTES = 8
_MS = 1e-3


@dataclass(frozen=True)
class ShardBytes:
    """One shard: on its device, behind it in host memory or on SSD, and by kind."""

    weights: int
    optimizer: int
    exchange: int
    host: int
    ssd: int = 0

    @property
    def device(self) -> int:
        return self.weights + self.optimizer + self.exchange


@dataclass(frozen=True)
class Placed:
    """One shard of a plan: the table it belongs to, its rank, its bytes, and seconds of a step by what they go to."""

    table: str
    rank: int
    size: ShardBytes
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Found:
    """The best plan of a search, or None, and what it took: proposals, and those of them that were partitioned."""

    plan: SparsePlan | None
    placed: tuple[Placed, ...]
    seconds: float
    num_proposals: int
    num_partitioned: int


@dataclass(frozen=True)
class Space:
    """Every way to shard every table, estimated for one machine and one batch; ``sizes`` of shards by id of option,
    ``choices``: what each table may be."""

    module: nn.Module
    config: SparseConfig
    hardware: Hardware
    topology: Topology
    options: list[ShardingOption]
    sizes: Mapping[int, list[ShardBytes]]
    choices: Mapping[str, Choice]


def build_space(module: nn.Module, config: SparseConfig, hardware: Hardware, batch_requests: int,
                ids_per_request: Mapping[str, float], reserved_bytes: int, choices: Mapping[str, Choice],
                strict: bool = False) -> Space:
    """Enumerate and estimate; ``reserved_bytes`` of each device are for everything but tables and their exchange.

    ``ConfigError`` as ``check_choices`` has it.
    """
    choices = check_choices(module, config, hardware, choices, strict)
    on_gpu = hardware.device == "cuda"
    constraints = {
        table.name: ParameterConstraints(
            sharding_types=list(choice.sharding_types),
            # To TorchRec a CPU has one kernel; to FBGEMM all are plain memory there.
            compute_kernels=list(choice.kernels) if on_gpu or choice.kernels == ("dense",) else ["fused"],
            min_partition=choice.min_columns, cache_params=cache_params(choice.cache_load_factor, config.cache_policy),
            pooling_factors=[ids_per_request.get(key, 1.0) for key in table.feature_names])
        for _, _, table in every_table(module) for choice in [choices[table.name]]}
    free = max(1, hardware.device_bytes - reserved_bytes)  # TorchRec 1.6 takes 0 for "not given"
    topology = Topology(
        world_size=hardware.world_size, local_world_size=hardware.local_size,
        compute_device=hardware.device, hbm_cap=free if on_gpu else 0,
        ddr_cap=max(1, hardware.host_bytes_per_rank) if on_gpu else free, ssd_cap=max(1, hardware.ssd_bytes_per_rank),
        hbm_mem_bw=hardware.device_bw * _MS, ddr_mem_bw=hardware.host_bw * _MS if on_gpu else hardware.device_bw * _MS,
        hbm_to_ddr_mem_bw=hardware.host_bw * _MS, ssd_mem_bw=(hardware.ssd_bw or 1.0) * _MS,
        intra_host_bw=hardware.intra_bw * _MS, inter_host_bw=hardware.inter_bw * _MS)
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
            shard.storage = Storage(size.device, size.host, size.ssd) if on_gpu else Storage(0, size.device + size.host)
            if option.compute_kernel == "key_value":
                shard.perf = _ssd_seconds(shard.perf, shard.size[1] * FLOAT_BYTES, choices[option.name], hardware)
    return Space(module, config, hardware, topology, options, every, choices)


def _ssd_seconds(perf: Perf, row_bytes: int, choice: Choice, hardware: Hardware) -> Perf:
    """TorchRec's estimate, which reads all rows from SSD, with a cache: a miss reads the whole blocks that a row is in,
    and writes a row, evicted for it, behind others. ``coverage``, or the cached share of the rows, are hits."""
    hit = choice.coverage if choice.coverage is not None else choice.cache_load_factor or CACHED_SHARE
    slower = hardware.ssd_bw / hardware.device_bw
    blocks = math.ceil(row_bytes / _PAGE_BYTES) * _PAGE_BYTES / row_bytes
    return replace(perf, fwd_compute=perf.fwd_compute * (hit * slower + (1 - hit) * blocks),
                   bwd_compute=perf.bwd_compute * (slower + (1 - hit)))


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
    cached = option.cache_load_factor or CACHED_SHARE if kernel in CACHED_KERNELS else 0.0
    device = cache_bytes(rows, columns * FLOAT_BYTES, int(cached * rows))
    # FBGEMM keeps the state of row-wise Adagrad on the device, whatever the kernel.
    on_device = state if config.optimizer == "rowwise_adagrad" else 0
    behind = weights + state - on_device
    return ShardBytes(device, on_device, exchange, *((0, behind) if kernel == "key_value" else (behind, 0)))


def find_plan(space: Space, proposer: str = "greedy", partitioner: str = "perf") -> Found:
    """The best of all proposals that can be placed."""
    start = time.perf_counter()
    best, _, num_proposals, num_partitioned = search_proposals(
        space.options, space.topology, PROPOSERS[proposer](), PARTITIONERS[partitioner]())
    seconds = time.perf_counter() - start
    if best is None:
        return Found(None, (), seconds, num_proposals, num_partitioned)
    placed = tuple(
        Placed(option.name, rank, size, {name: getattr(shard.perf, field) * _MS for name, field in TIMES.items()})
        for option, ranks in best
        for shard, rank, size in zip(option.shards, ranks, space.sizes[id(option)], strict=True))
    return Found(_sparse_plan(space, best), placed, seconds, num_proposals, num_partitioned)


Assignment = list[tuple[ShardingOption, list[int]]]


def search_proposals(options: list[ShardingOption], topology: Topology, proposer: Any, partitioner: Any
                     ) -> tuple[Assignment | None, float, int, int]:
    """(option and ranks of each table, rating in ms, proposals, those that were partitioned) of the best plan."""
    bounds = {id(option): _bounds(option) for option in options}
    free = np.array([_held(device.storage) for device in topology.devices], dtype=np.float64)
    best: Assignment | None = None
    best_rating = float("inf")
    seen: set[tuple[int, ...]] = set()
    num_partitioned = 0
    proposer.load(options)
    while proposal := proposer.propose():
        key = tuple(map(id, proposal))
        if key not in seen:
            seen.add(key)
            if _lowest_rating(np.stack([bounds[one] for one in key]), free) < best_rating:
                num_partitioned += 1
                rating = _partition(proposal, topology, partitioner)
                if rating < best_rating:
                    best_rating = rating
                    best = [(option, [cast(int, shard.rank) for shard in option.shards]) for option in proposal]
                reset_shard_rank(proposal)
        proposer.feedback(True, proposal)
    return best, best_rating, len(seen), num_partitioned


def _bounds(option: ShardingOption) -> Floats:
    """Time, device, host and SSD bytes: of the largest shard, and of all of them."""
    shards = np.array([(shard.perf.total, *_held(shard.storage)) for shard in option.shards])
    return np.concatenate([shards.max(0), shards.sum(0)])


def _held(storage: Storage) -> tuple[int, int, int]:
    return storage.hbm, storage.ddr, storage.ssd


def _lowest_rating(bounds: Floats, free: Floats) -> float:
    """No placement of these options is faster: not than its slowest shard, nor than an even split; inf: none fits."""
    largest, total = bounds[:, :4].max(0), bounds[:, 4:].sum(0)
    if (largest[1:] > free.max(0)).any() or (total[1:] > free.sum(0)).any():
        return float("inf")
    # The margin: a sum in another order may round to less.
    return float(max(largest[0], total[0] / len(free) * (1 - 1e-9)))


def _partition(proposal: list[ShardingOption], topology: Topology, partitioner: Any) -> float:
    """Set the ranks of the proposal's shards; the slowest rank's time in ms, inf when it cannot be placed."""
    try:
        partitioner.partition(proposal, topology)
    except PlannerError:
        return float("inf")
    times = [0.0] * topology.world_size
    for option in proposal:
        for shard in option.shards:
            times[shard.rank] += shard.perf.total
    return max(times)


def check_choices(module: nn.Module, config: SparseConfig, hardware: Hardware, choices: Mapping[str, Choice],
                  strict: bool = False) -> dict[str, Choice]:
    """Every table with the sharding types and kernels that it may have; of ``choices``, what they leave.

    ``ConfigError`` for a choice that names no table, or a type or kernel that this machine or optimizer rules out.
    """
    check_names(choices, [table.name for _, _, table in every_table(module)], "--constrain")
    return {table.name: _checked(table, isinstance(collection, EmbeddingBagCollection), config, hardware,
                                 choices.get(table.name, Choice()), strict)
            for _, collection, table in every_table(module)}


def _checked(table: TableConfig, pooled: bool, config: SparseConfig, hardware: Hardware, choice: Choice,
             strict: bool) -> Choice:
    where, columns = f"table {table.name!r}", choice.min_columns
    check_open(table.name, config, hardware.world_size, choice.kernels)
    reasons = allowed_types(pooled, config, torch.device(hardware.device), strict, table.name)
    for name in choice.sharding_types:
        if reason := reasons.get(name, f"known are {', '.join(reasons)}"):
            raise ConfigError(f"{where} cannot be {name}: {reason}")
    for name in choice.kernels:
        if name not in KERNELS:
            raise ConfigError(f"{where} cannot use kernel {name!r}; use {' or '.join(KERNELS)}")
    if "key_value" in (choice.kernels or (config.kernel,)):
        _check_ssd(where, config, hardware)
    if columns and ("column_wise" not in choice.sharding_types or columns > table.embedding_dim):
        raise ConfigError(f"{where} of {table.embedding_dim} columns cannot be cut into columns:{columns}; add "
                          f"column_wise, and give {table.embedding_dim} or fewer")
    # Replicas are left to those who ask for them, as in training.
    types = choice.sharding_types or [
        name for name, reason in reasons.items() if not reason and name != "data_parallel"]
    types = splittable(types, table.num_embeddings, hardware.world_size)
    if not types:
        raise ConfigError(f"{where} of {table.num_embeddings} rows cannot be split row_wise over "
                          f"{hardware.world_size} ranks; allow table_wise for it")
    kernels = ("dense",) if types == ("data_parallel",) else choice.kernels or (config.kernel,)
    return replace(choice, sharding_types=types, kernels=kernels)


def _check_ssd(where: str, config: SparseConfig, hardware: Hardware) -> None:
    if hardware.device == "cpu":
        raise ConfigError(f"{where} cannot use kernel 'key_value': FBGEMM keeps tables on SSD for GPUs alone; use "
                          "another kernel, or plan for GPUs")
    if not hardware.ssd_bytes:
        raise ConfigError(f"{where} cannot use kernel 'key_value': there is no SSD on the hosts of these "
                          f"{hardware.world_size} ranks; add what each has to their topology, such as 8xH100:ssd=3TB")
    if config.optimizer != "rowwise_adagrad":
        raise ConfigError(f"{where} cannot use kernel 'key_value': of the rules that there are here FBGEMM updates "
                          f"rows on SSD by rowwise_adagrad alone, not {config.optimizer}; use it, or another kernel")


def _sparse_plan(space: Space, assignment: Assignment) -> SparsePlan:
    tables = []
    described = {table.name: table for _, _, table in every_table(space.module)}
    for option, ranks in assignment:
        shards = [] if option.sharding_type == "data_parallel" else [
            Shard(rank=rank, offsets=(shard.offset[0], shard.offset[1]), sizes=(shard.size[0], shard.size[1]))
            for shard, rank in zip(option.shards, ranks, strict=True)]
        choice = space.choices[option.name]
        kernel = choice.kernels[0] if space.hardware.device == "cpu" else option.compute_kernel
        table = table_plan(option.path, described[option.name], option.is_pooled, option.sharding_type, kernel,
                           shards, space.config, space.hardware.world_size)
        # FBGEMM's tables on SSD are cached by last use, whatever is asked for.
        policy = "lru" if kernel == "key_value" else space.config.cache_policy
        tables.append(table.model_copy(update={"cache_load_factor": choice.cache_load_factor, "cache_policy": policy,
                                               "coverage": choice.coverage}))
    return SparsePlan(world_size=space.hardware.world_size, ranks_per_host=space.hardware.local_size,
                      device=space.hardware.device, tables=tuple(tables))
