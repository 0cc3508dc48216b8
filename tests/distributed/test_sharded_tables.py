"""Sharded tables mean what unsharded tables mean, on every plan and number of ranks."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from longer_rec.batch import RequestBatch
from longer_rec.runtime.distributed import World
from longer_rec.sparse.init import initialize_tables
from longer_rec.sparse.lookup import SparseTables
from longer_rec.sparse.optimizers import DenseOptimizerConfig, RankerOptimizer, apply_table_optimizer
from longer_rec.sparse.planner import build_plan
from longer_rec.sparse.sharding import shard_ranker
from longer_rec.sparse.tables import SparseConfig, build_tables
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
        embedded = model(*batches)
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
        embedded = tables(*batches)
        outputs.update({f"output {step} {key}": value.detach().clone() for key, value in embedded.items()})
        backward(embedded, [100 * step + worker for worker in range(workers)], batches)
    return {**outputs, **full_tables(tables)}


def joined(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Outputs of all ranks one after the other, and rank 0's tables."""
    return {key: torch.cat([result[key] for result in results]) if key.startswith("output") else value
            for key, value in results[0].items()}


MIXED = {"item": "row_wise", "category": "table_wise", "action": "table_wise", "user": "row_wise",
         "tag": "data_parallel", "topic": "row_wise"}


MIXED_BAGS = {**MIXED, "tag": "table_wise"}


@pytest.mark.parametrize(("plan", "optimizer"), [
    ("table_wise", "rowwise_adagrad"), ("row_wise", "rowwise_adagrad"), ("row_wise", "adagrad"), ("row_wise", "sgd"),
    ("column_wise", "adagrad"), ("column_wise", "sgd"), (MIXED, "rowwise_adagrad"), (MIXED, "adagrad"),
    (MIXED_BAGS, "rowwise_adagrad"),
    ("auto", "rowwise_adagrad")])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_sharded_equals_unsharded_forward_and_update(plan: object, optimizer: str, pooling: str) -> None:
    """Loose to 1e-5: row-wise pooling and replicas sum in another order."""
    config = config_for(plan, optimizer, pooling=pooling)
    expected = train_unsharded(config, workers=2, steps=3)
    actual = joined(run_ranks(train_sharded, 2, config, 2, 3))
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    start = full_tables(unsharded(config))
    assert all(not torch.equal(expected[key], start[key]) for key in start), "every table must have been trained"


def test_mean_of_ids_is_their_mean() -> None:
    config = config_for("table_wise")
    tables, batch = unsharded(config), worker_batch(0, 3)
    table = tables.state_dict()["ebc.embedding_bags.tag.weight"]
    ids = batch.users["tags"].split(batch.user_length_B["tags"].tolist())
    expected = torch.stack([table[row].mean(0) if len(row) else torch.zeros(16) for row in ids])
    torch.testing.assert_close(tables(batch)["users.tags"], expected)
    assert any(len(row) == 0 for row in ids)
    assert any(len(row) > 1 for row in ids)


def test_rows_come_in_the_order_of_the_batch() -> None:
    config = config_for("table_wise")
    tables, batch = unsharded(config), worker_batch(0, 3)
    weights = tables.state_dict()
    embedded = tables(batch)
    item, user = weights["ec.dim32.embeddings.item.weight"], weights["ec.dim16.embeddings.user.weight"]
    assert torch.equal(embedded["history.item"], item[batch.history["item"]])
    assert torch.equal(embedded["candidates.item"], item[batch.candidates["item"]])
    assert torch.equal(embedded["users.user"], user[batch.users["user"]])


EXACT = {"item": "row_wise", "category": "table_wise", "action": "row_wise", "user": "row_wise", "tag": "table_wise",
         "topic": "table_wise"}


@pytest.mark.parametrize(("plan", "optimizer"), [
    ("table_wise", "rowwise_adagrad"), ("table_wise", "adagrad"), ("table_wise", "sgd"), (EXACT, "rowwise_adagrad"),
    (EXACT, "adagrad"), (EXACT, "sgd"), ("column_wise", "adagrad")])
def test_four_workers_on_one_two_four_ranks_match_bitwise(plan: object, optimizer: str) -> None:
    config = config_for(plan, optimizer)
    runs = [joined(run_ranks(train_sharded, ranks, config, 4, 10)) for ranks in (1, 2, 4)]
    for run in runs[1:]:
        assert run.keys() == runs[0].keys()
        differing = [key for key, value in run.items() if not torch.equal(value, runs[0][key])]
        assert differing == []


def initial_state(rank: int, world_size: int, config: SparseConfig) -> dict[str, Tensor]:
    return full_tables(sharded(rank, world_size, config)[0])


@pytest.mark.parametrize("plan", ["table_wise", "row_wise", "column_wise", "auto", MIXED])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_initial_tables_do_not_depend_on_plan_or_ranks(plan: object, world_size: int) -> None:
    config = config_for(plan, "adagrad" if plan in ("column_wise", "auto") else "rowwise_adagrad")
    expected = full_tables(unsharded(config))
    actual = run_ranks(initial_state, world_size, config)[0]
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def summed_gradient(rank: int, world_size: int, config: SparseConfig) -> dict[str, Tensor]:
    """Every rank sends back a gradient of ones for one and the same row."""
    model, optimizer = sharded(rank, world_size, config)
    before = full_tables(model)
    batch = worker_batch(0, 0)
    batch.history["item"].fill_(5)
    optimizer.set_lr_factor(1.0)
    model(batch)["history.item"].sum().backward()
    after = full_tables(model)
    key = "ec.dim32.embeddings.item.weight"
    return {"moved": (before[key] - after[key])[5], "events": torch.tensor(batch.num_events * world_size)}


@pytest.mark.parametrize("plan", ["table_wise", "row_wise", "column_wise"])
def test_gradients_are_summed_over_ranks_not_averaged(plan: str) -> None:
    result = run_ranks(summed_gradient, 2, config_for(plan, "sgd"))[0]
    expected = torch.full((32,), 0.1) * result["events"]
    torch.testing.assert_close(result["moved"], expected)


def zero_rate(rank: int, world_size: int, config: SparseConfig) -> list[bool]:
    model, optimizer = sharded(rank, world_size, config)
    unchanged = []
    for factor in (0.0, 1.0, 0.0):
        before = full_tables(model)
        optimizer.set_lr_factor(factor)
        batch = worker_batch(0, rank)
        backward(model(batch), [rank], [batch])
        optimizer.step()
        optimizer.zero_grad()
        after = full_tables(model)
        unchanged.append(all(torch.equal(before[key], after[key]) for key in before))
    return unchanged


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_learning_rate_set_before_backward_is_the_one_used(optimizer: str) -> None:
    assert run_ranks(zero_rate, 2, config_for("table_wise", optimizer))[0] == [True, False, True]


def uneven(rank: int, world_size: int, config: SparseConfig) -> dict[str, Tensor]:
    """Rank 1 has no request at all, as at the end of an evaluation split."""
    model, _ = sharded(rank, world_size, config)
    batch = random_batch(SCHEMA, num_requests=5 if rank == 0 else 0, seed=3)
    with torch.no_grad():
        return {key: value.clone() for key, value in model(batch).items()}


@pytest.mark.parametrize("plan", ["table_wise", "row_wise", "column_wise", MIXED])
def test_a_rank_without_requests_takes_part(plan: object) -> None:
    config = config_for(plan, "adagrad" if plan == "column_wise" else "rowwise_adagrad")
    full, empty = run_ranks(uneven, 2, config)
    expected = unsharded(config)(random_batch(SCHEMA, num_requests=5, seed=3))
    for key, value in expected.items():
        torch.testing.assert_close(full[key], value)
        assert empty[key].shape == (0, value.shape[1])


def decayed(rank: int, world_size: int, config: SparseConfig) -> dict[str, Tensor]:
    model, optimizer = sharded(rank, world_size, config)
    before = full_tables(model)["ec.dim32.embeddings.item.weight"]
    optimizer.set_lr_factor(1.0)
    batch = worker_batch(0, rank)
    batch.history["item"].fill_(5)
    batch.candidates["item"].fill_(5)
    (model(batch)["history.item"] * 0.0).sum().backward()
    return {"before": before, "after": full_tables(model)["ec.dim32.embeddings.item.weight"]}


def test_weight_decay_shrinks_the_rows_looked_up_and_no_others() -> None:
    result = run_ranks(decayed, 2, config_for("row_wise", weight_decay=0.5))[0]
    moved = (result["before"] != result["after"]).any(1)
    assert moved[5]
    torch.testing.assert_close(result["after"][5], result["before"][5] * (1 - 0.1 * 0.5))
    assert torch.equal(moved.nonzero().flatten(), torch.tensor([5]))
