"""Sharded tables mean what unsharded tables mean, on every plan and number of ranks."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from longer_rec.batch import RequestBatch, concat_batches
from longer_rec.runtime.distributed import World
from longer_rec.sparse.init import initialize_tables
from longer_rec.sparse.optimizers import DenseOptimizerConfig, RankerOptimizer, apply_table_optimizer
from longer_rec.sparse.planner import build_plan
from longer_rec.sparse.sharding import shard_ranker
from longer_rec.sparse.tables import SparseConfig, SparseTables, build_tables
from tests.reference.batches import SCHEMA, random_batch
from tests.reference.ranks import run_ranks

DIMS = {"item": 32, "category": 16, "action": 16, "user": 16, "tag": 16, "topic": 32}
SEED = 7


def config_for(plan: object, optimizer: str = "rowwise_adagrad", **options: object) -> SparseConfig:
    return SparseConfig.model_validate({"dims": DIMS, "plan": plan, "optimizer": optimizer, "lr": 0.1, **options})


def cpu_world(rank: int, size: int) -> World:
    return World(rank=rank, size=size, local_rank=rank, local_size=size, device=torch.device("cpu"))


def sharded(rank: int, world_size: int, config: SparseConfig) -> tuple[nn.Module, RankerOptimizer]:
    tables = build_tables(SCHEMA, config)
    plan = build_plan(tables, config, cpu_world(rank, world_size))
    model = shard_ranker(tables, plan, config, torch.device("cpu"))
    initialize_tables(model, SEED, config)
    return model, RankerOptimizer(model, config, DenseOptimizerConfig())


def unsharded(config: SparseConfig) -> SparseTables:
    tables = build_tables(SCHEMA, config, device="cpu")
    initialize_tables(tables, SEED, config)
    return tables


def upstream(batch: RequestBatch, key: str, width: int, seed: int) -> Tensor:
    """A gradient for each row of an output; a function of the batch's seed, so that any rank can make it."""
    rows = {"history": batch.num_events, "candidates": batch.num_candidates, "users": batch.num_requests}
    generator = torch.Generator().manual_seed(seed * 1000 + sum(key.encode()))
    return torch.randn(rows[key.split(".")[0]], width, generator=generator)


def worker_batch(step: int, worker: int) -> RequestBatch:
    # Sizes differ between workers, and one of them has a request with nothing in its history.
    return random_batch(SCHEMA, num_requests=3 + worker, seed=100 * step + worker)


def backward(embedded: dict[str, Tensor], seeds: list[int], batches: list[RequestBatch]) -> None:
    gradients = [torch.cat([upstream(batch, key, value.shape[1], seed)
                            for seed, batch in zip(seeds, batches, strict=True)]) for key, value in embedded.items()]
    torch.autograd.backward(list(embedded.values()), gradients)


def full_tables(model: nn.Module) -> dict[str, Tensor]:
    """Every table whole, on every rank."""
    whole = {}
    for key, value in model.state_dict().items():
        if isinstance(value, ShardedTensor):
            table = torch.zeros(value.size())
            for shard in value.local_shards():
                (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
                table[row:row + rows, column:column + columns] = shard.tensor
            torch.distributed.all_reduce(table)
        else:
            table = value.detach().clone()
        whole[key] = table
    return whole


def train_sharded(rank: int, world_size: int, config: SparseConfig, workers: int, steps: int) -> dict[str, Tensor]:
    """``workers`` logical workers on ``world_size`` ranks: one lookup and one backward a step on each rank."""
    model, optimizer = sharded(rank, world_size, config)
    share = workers // world_size
    mine = range(rank * share, (rank + 1) * share)
    outputs: dict[str, Tensor] = {}
    for step in range(steps):
        batches = [worker_batch(step, worker) for worker in mine]
        optimizer.set_lr_factor(1.0 / (1 + step))
        embedded = model(concat_batches(batches))
        outputs.update({f"output {step} {key}": value.detach().clone() for key, value in embedded.items()})
        backward(embedded, [100 * step + worker for worker in mine], batches)
        optimizer.step()
        optimizer.zero_grad()
    return {**outputs, **full_tables(model)}


def train_unsharded(config: SparseConfig, workers: int, steps: int) -> dict[str, Tensor]:
    tables = unsharded(config)
    apply_table_optimizer(tables.parameters(), config)
    outputs: dict[str, Tensor] = {}
    for step in range(steps):
        for parameter in tables.parameters():
            for group in parameter._in_backward_optimizers[0].param_groups:
                group["lr"] = config.lr / (1 + step)
        batches = [worker_batch(step, worker) for worker in range(workers)]
        embedded = tables(concat_batches(batches))
        outputs.update({f"output {step} {key}": value.detach().clone() for key, value in embedded.items()})
        backward(embedded, [100 * step + worker for worker in range(workers)], batches)
    return {**outputs, **full_tables(tables)}


def joined(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Outputs of all ranks one after the other, and rank 0's tables."""
    return {key: torch.cat([result[key] for result in results]) if key.startswith("output") else value
            for key, value in results[0].items()}


MIXED = {"item": "row_wise", "category": "table_wise", "action": "table_wise", "user": "row_wise",
         "tag": "data_parallel", "topic": "row_wise"}


@pytest.mark.parametrize(("plan", "optimizer"), [
    ("table_wise", "rowwise_adagrad"), ("row_wise", "rowwise_adagrad"), ("row_wise", "adagrad"), ("row_wise", "sgd"),
    ("column_wise", "adagrad"), ("column_wise", "sgd"), (MIXED, "rowwise_adagrad"), (MIXED, "adagrad"),
    ("auto", "rowwise_adagrad")])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_sharded_equals_unsharded_forward_and_update(plan: object, optimizer: str, pooling: str) -> None:
    config = config_for(plan, optimizer, pooling=pooling)
    expected = train_unsharded(config, workers=2, steps=3)
    actual = joined(run_ranks(train_sharded, 2, config, 2, 3))
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    start = full_tables(unsharded(config))
    assert all(not torch.equal(expected[key], start[key]) for key in start), "every table must have been trained"
