"""A checkpoint continues bitwise on the same ranks, and is the same checkpoint on any other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from longer_rec.batch import RequestBatch
from longer_rec.checkpoint.inspect import diff_checkpoints, inspect_checkpoint
from longer_rec.checkpoint.manager import CheckpointManager
from longer_rec.errors import CheckpointError
from longer_rec.runtime.distributed import World
from longer_rec.sparse.init import initialize_tables
from longer_rec.sparse.optimizers import DenseOptimizerConfig, RankerOptimizer
from longer_rec.sparse.planner import build_plan
from longer_rec.sparse.sharding import shard_ranker
from longer_rec.sparse.tables import SparseConfig, build_tables
from tests.reference.batches import SCHEMA, random_batch
from tests.reference.ranks import RankFailure, run_ranks

ROW_WISE = {"item": "row_wise", "category": "row_wise", "action": "table_wise", "user": "row_wise", "tag": "row_wise",
            "topic": "data_parallel"}


class TwoPart(nn.Module):
    """The smallest thing with sharded tables and a replicated tower."""

    def __init__(self, config: SparseConfig) -> None:
        super().__init__()
        self.sparse = build_tables(SCHEMA, config)
        torch.manual_seed(11)
        self.tower = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 1))

    def forward(self, batch: RequestBatch) -> Tensor:
        embedded = self.sparse(batch)
        return torch.stack([self.tower(value).square().sum() for value in embedded.values()]).sum()


def build(rank: int, world_size: int, plan: object, optimizer: str) -> tuple[nn.Module, RankerOptimizer]:
    config = SparseConfig.model_validate({"default_dim": 16, "plan": plan, "optimizer": optimizer, "lr": 0.1})
    world = World(rank=rank, size=world_size, local_rank=rank, local_size=world_size, device=torch.device("cpu"))
    module = TwoPart(config)
    model = shard_ranker(module, build_plan(module, config, world), config, world.device)
    initialize_tables(model, 5, config)
    return model, RankerOptimizer(model, config, DenseOptimizerConfig(lr=0.01))


def state(model: nn.Module, optimizer: RankerOptimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def train(model: nn.Module, optimizer: RankerOptimizer, steps: range, rank: int) -> None:
    for step in steps:
        optimizer.set_lr_factor(1.0 / (1 + step))
        model(random_batch(SCHEMA, num_requests=4, seed=100 * step + rank)).backward()
        for parameter in optimizer.tower.values():
            torch.distributed.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()


def local_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {f"{part}/{key}": value.local_shards()[0].tensor.clone() if isinstance(value, ShardedTensor)
            else value.detach().clone()
            for part, tensors in state.items() for key, value in tensors.items()
            if not isinstance(value, ShardedTensor) or value.local_shards()}


def train_and_save(rank: int, world_size: int, directory: Path, plan: object, optimizer_name: str) -> None:
    model, optimizer = build(rank, world_size, plan, optimizer_name)
    train(model, optimizer, range(3), rank)
    CheckpointManager(directory).save(3, state(model, optimizer), {"cursor": {"samples": 24}, "world_size": world_size})


def load_and_save(rank: int, world_size: int, source: Path, target: Path, plan: object, optimizer_name: str) -> Any:
    model, optimizer = build(rank, world_size, plan, optimizer_name)
    extra = CheckpointManager(source).load(source / "step-3", state(model, optimizer))
    # From a fresh state: loading must have reached the module and not a copy.
    CheckpointManager(target).save(3, state(model, optimizer), extra)
    return extra


def resume_and_compare(rank: int, world_size: int, directory: Path, plan: object, optimizer_name: str) -> list[str]:
    """Keys that differ between 6 steps in one go and 3 + 3 steps with a checkpoint between."""
    model, optimizer = build(rank, world_size, plan, optimizer_name)
    train(model, optimizer, range(6), rank)
    expected = local_tensors(state(model, optimizer))
    model, optimizer = build(rank, world_size, plan, optimizer_name)
    before = local_tensors(state(model, optimizer))
    CheckpointManager(directory).load_latest(state(model, optimizer))
    train(model, optimizer, range(3, 6), rank)
    actual = local_tensors(state(model, optimizer))
    assert actual.keys() == expected.keys() == before.keys()
    assert any(not torch.equal(actual[key], before[key]) for key in actual)
    return [key for key, value in expected.items() if not torch.equal(value, actual[key])]


@pytest.mark.parametrize(("plan", "optimizer"), [
    ("table_wise", "rowwise_adagrad"), (ROW_WISE, "rowwise_adagrad"), (ROW_WISE, "adagrad"), ("column_wise", "adagrad"),
    ("table_wise", "sgd")])
def test_resume_equals_uninterrupted(plan: object, optimizer: str, tmp_path: Path) -> None:
    run_ranks(train_and_save, 2, tmp_path, plan, optimizer)
    assert run_ranks(resume_and_compare, 2, tmp_path, plan, optimizer) == [[], []]


@pytest.mark.parametrize(("source", "target", "optimizer", "ranks"), [
    ("table_wise", "row_wise", "rowwise_adagrad", 4), ("row_wise", "table_wise", "rowwise_adagrad", 4),
    ("column_wise", "row_wise", "adagrad", 4), ("table_wise", "column_wise", "adagrad", 2)])
def test_checkpoint_is_bitwise_the_same_on_other_ranks_and_plans(source: object, target: object, optimizer: str,
                                                                 ranks: int, tmp_path: Path) -> None:
    run_ranks(train_and_save, 2, tmp_path / "a", source, optimizer)
    extras = run_ranks(load_and_save, ranks, tmp_path / "a", tmp_path / "b", target, optimizer)
    assert extras == [{"cursor": {"samples": 24}, "world_size": 2}] * ranks
    difference = diff_checkpoints(tmp_path / "a" / "step-3", tmp_path / "b" / "step-3")
    assert difference.tensors == []
    assert difference.extra == {}
    tensors = inspect_checkpoint(tmp_path / "b" / "step-3").tensors
    assert tensors["model/sparse.ec.dim16.embeddings.item.weight"].shape == (61, 16)
    assert sum(key.startswith("optimizer/") and "momentum" in key for key in tensors) == len(SCHEMA.tables)
    assert any(key.startswith("optimizer/tower") for key in tensors)


@pytest.mark.parametrize("optimizer", ["adagrad", "rowwise_adagrad"])
@pytest.mark.parametrize(("first", "second"), [("table_wise", "row_wise"), ("row_wise", "table_wise")])
def test_two_ranks_to_one_to_four_and_from_plan_to_plan_is_bitwise_the_same(first: str, second: str, optimizer: str,
                                                                            tmp_path: Path) -> None:
    run_ranks(train_and_save, 2, tmp_path / "2", first, optimizer)
    run_ranks(load_and_save, 1, tmp_path / "2", tmp_path / "1", second, optimizer)
    run_ranks(load_and_save, 4, tmp_path / "1", tmp_path / "4", first, optimizer)
    for ranks in ("1", "4"):
        difference = diff_checkpoints(tmp_path / "2" / "step-3", tmp_path / ranks / "step-3")
        assert difference.tensors == []
        assert difference.extra == {}
    # The files were cut anew: the tower's tensors alone are dealt to all ranks.
    assert len(list((tmp_path / "4" / "step-3").glob("__*_0.distcp"))) == 4


def load_damaged(rank: int, world_size: int, directory: Path) -> str:
    """The message, once it is known that nothing was changed."""
    model, optimizer = build(rank, world_size, "row_wise", "rowwise_adagrad")
    before = local_tensors(state(model, optimizer))
    try:
        CheckpointManager(directory).load(directory / "step-3", state(model, optimizer))
    except CheckpointError as error:
        after = local_tensors(state(model, optimizer))
        assert all(torch.equal(before[key], after[key]) for key in before)
        return str(error)
    raise AssertionError("a damaged checkpoint was loaded")


def test_damage_to_one_ranks_file_stops_every_rank(tmp_path: Path) -> None:
    run_ranks(train_and_save, 2, tmp_path, "row_wise", "rowwise_adagrad")
    path = tmp_path / "step-3" / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    messages = run_ranks(load_damaged, 2, tmp_path)
    assert all("__1_0.distcp is damaged" in message for message in messages)


def load_into_other_optimizer(rank: int, world_size: int, directory: Path) -> None:
    model, optimizer = build(rank, world_size, "row_wise", "sgd")
    CheckpointManager(directory).load_latest(state(model, optimizer))


def test_optimizer_state_is_never_dropped(tmp_path: Path) -> None:
    run_ranks(train_and_save, 2, tmp_path, "row_wise", "rowwise_adagrad")
    with pytest.raises(RankFailure, match=r"tensors that this model does not have, the first .*momentum1"):
        run_ranks(load_into_other_optimizer, 2, tmp_path)
