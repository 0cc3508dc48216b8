"""TorchRec's planner and ours on the same tables, machine and estimates: seconds, and whether the plans are the same.

    OMP_NUM_THREADS=1 python benchmarks/bench_planner.py

Pooled tables of 10^3 to 10^7.5 rows and width 64, 128 or 256, all sharding types and kernels that TorchRec offers, its
own storage estimates and its reservation of 15 %. Nothing is allocated, no GPU is needed.
"""

import argparse
import json
import logging
import random
import time
from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import HeuristicalStorageReservation

from longer_rec.sparse.search import PARTITIONERS, PROPOSERS, OncePerSize, search_proposals

GIB = 1 << 30
BATCH = 4096


def build_module(num_tables: int) -> nn.Module:
    draw = random.Random(0)
    tables = [EmbeddingBagConfig(name=f"t{i}", num_embeddings=int(10 ** draw.uniform(3, 7.5)), feature_names=[f"f{i}"],
                                 embedding_dim=draw.choice([64, 128, 256])) for i in range(num_tables)]
    module = nn.Module()
    module.ebc = EmbeddingBagCollection(device=torch.device("meta"), tables=tables)
    return module


def stock(module: nn.Module, topology: Topology, proposer: str) -> tuple[float, dict[str, Any], float]:
    """Seconds, placement by table, rating in ms."""
    planner = EmbeddingShardingPlanner(topology=topology, batch_size=BATCH, proposer=PROPOSERS[proposer](), debug=False,
                                       storage_reservation=HeuristicalStorageReservation(percentage=0.15))
    start = time.perf_counter()
    planner.plan(module, [EmbeddingBagCollectionSharder()])
    seconds = time.perf_counter() - start
    best = planner._best_plan
    assert best is not None
    plan = {option.name: (option.sharding_type, option.compute_kernel, [shard.rank for shard in option.shards])
            for option in best}
    return seconds, plan, rating([(option, [shard.rank for shard in option.shards]) for option in best], topology)


def ours(module: nn.Module, topology: Topology, proposer: str) -> tuple[float, dict[str, Any], float, int, int]:
    start = time.perf_counter()
    sharders = [EmbeddingBagCollectionSharder()]
    free = HeuristicalStorageReservation(percentage=0.15).reserve(topology, BATCH, module, sharders)
    estimators = [OncePerSize(EmbeddingPerfEstimator(topology)), EmbeddingStorageEstimator(topology)]
    options = EmbeddingEnumerator(topology, BATCH, estimator=estimators).enumerate(module, sharders)
    best, _, proposals, placed = search_proposals(options, free, PROPOSERS[proposer](), PARTITIONERS["perf"]())
    seconds = time.perf_counter() - start
    assert best is not None
    plan = {option.name: (option.sharding_type, option.compute_kernel, ranks) for option, ranks in best}
    return seconds, plan, rating(best, topology), proposals, placed


def rating(assignment: list[tuple[Any, list[int]]], topology: Topology) -> float:
    times = [0.0] * topology.world_size
    for option, ranks in assignment:
        for shard, rank in zip(option.shards, ranks, strict=True):
            times[rank] += shard.perf.total
    return max(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    repeats = parser.parse_args().repeats
    logging.disable(logging.WARNING)
    for num_tables, ranks, proposer in ((26, 8, "greedy"), (100, 64, "uniform"), (100, 64, "greedy")):
        module = build_module(num_tables)
        topology = Topology(world_size=ranks, local_world_size=8, compute_device="cuda", hbm_cap=80 * GIB)
        pairs = [(stock(module, topology, proposer), ours(module, topology, proposer)) for _ in range(repeats)]
        (_, stock_plan, stock_rating), (_, plan, own_rating, proposals, placed) = pairs[0]
        print(json.dumps({"tables": num_tables, "ranks": ranks, "proposer": proposer,
                          "stock_s": [round(each[0][0], 2) for each in pairs],
                          "ours_s": [round(each[1][0], 2) for each in pairs], "stock_ms": stock_rating,
                          "ours_ms": own_rating, "same_plan": plan == stock_plan, "proposals": proposals,
                          "placed": placed}), flush=True)


if __name__ == "__main__":
    main()
