"""Widths, plans and schedules: what is refused, and how the message helps."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from longer_rec.config import build_config
from longer_rec.errors import ConfigError
from longer_rec.runtime.distributed import World
from longer_rec.schema import Feature, Schema
from longer_rec.sparse.init import initial_values
from longer_rec.sparse.optimizers import apply_table_optimizer, warmup_cosine
from longer_rec.sparse.planfile import SparsePlan, load_plan, save_plan
from longer_rec.sparse.planner import build_plan
from longer_rec.sparse.tables import TRAINED_KERNELS, SparseConfig, build_tables, widths
from tests.reference.batches import SCHEMA

TYPES = {"item": "row_wise", "category": "table_wise", "action": "table_wise", "user": "row_wise", "tag": "table_wise",
         "topic": "data_parallel"}


def config(**options: object) -> SparseConfig:
    return build_config(SparseConfig, {"default_dim": 16, **options}, "test")


def plan(options: SparseConfig, world_size: int = 2, schema: Schema = SCHEMA) -> SparsePlan:
    world = World(rank=0, size=world_size, local_rank=0, local_size=world_size, device=torch.device("cpu"))
    return build_plan(build_tables(schema, options), options, world)


@pytest.mark.parametrize(("options", "message"), [
    ({"dims": {"itme": 16}}, "did you mean 'item'"),
    ({"init_std": {"itme": 1.0}}, "did you mean 'item'"),
    ({"dims": {"item": 16}, "default_dim": None}, "no width for table 'category'"),
    ({"dims": {"item": 18}}, "use 20"),
    ({"dims": {"item": -4}}, "use 4"),
])
def test_impossible_widths_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_tables(SCHEMA, config(**options))


@pytest.mark.parametrize(("options", "message"), [
    ({"plan": {"item": "row_wise"}}, "no sharding type for table 'category'"),
    ({"plan": {**TYPES, "itm": "row_wise"}}, "did you mean 'item'"),
    ({"plan": {**TYPES, "item": "data_parallel"}}, "corrupt memory"),
    ({"plan": {**TYPES, "item": "column_wise"}}, "use adagrad"),
    ({"plan": {**TYPES, "item": "column_wise"}, "optimizer": "adagrad", "dims": {"item": 12}}, "multiple of 4 columns"),
    ({"plan": TYPES, "weight_decay": 0.1}, "touches looked-up rows"),
    ({"plan": "row_wize"}, "neither auto, nor one of table_wise, .* nor a file"),
])
def test_impossible_plans_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(config(**options))


def test_more_ranks_than_a_table_splits_over_is_refused() -> None:
    with pytest.raises(ConfigError, match="'action' of 7 rows cannot be split row_wise over 16 ranks"):
        plan(config(plan={**TYPES, "user": "table_wise", "action": "row_wise"}), world_size=16)


def test_tables_that_do_not_fit_are_refused() -> None:
    huge = SCHEMA.model_copy(update={"tables": tuple(
        table.model_copy(update={"num_rows": 10**12}) if table.name == "item" else table for table in SCHEMA.tables)})
    with pytest.raises(ConfigError, match="no sharding plan fits 2 ranks"):
        plan(config(), schema=huge)


def test_one_rank_holds_each_table_whole() -> None:
    kinds = {size: {table.sharding_type for table in plan(config(), world_size=size).tables} for size in (1, 2)}
    assert kinds[1] == {"table_wise"}
    assert "row_wise" in kinds[2]
    assert {table.sharding_type for table in plan(config(plan="row_wise"), world_size=1).tables} == {"row_wise"}


def test_sharing_a_table_between_pooled_and_single_features_is_refused() -> None:
    shared = SCHEMA.model_copy(update={"user_features": (Feature(name="liked", table="item", multi_valued=True),)})
    with pytest.raises(ConfigError, match="give the multi-valued feature its own table"):
        build_tables(shared, config())


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_weight_decay_that_would_be_ignored_is_refused(optimizer: str) -> None:
    with pytest.raises(ConfigError, match="has no effect"):
        apply_table_optimizer([], config(optimizer=optimizer, weight_decay=0.1))


def test_a_table_is_one_feature_whatever_features_share_it() -> None:
    tables = build_tables(SCHEMA, config(dims={"item": 32}))
    assert [(table.name, table.feature_names) for table in tables.ec["dim32"].embedding_configs()] == [
        ("item", ["item"])]
    assert all(parameter.is_meta for parameter in tables.parameters())
    assert widths(SCHEMA, config(dims={"item": 32}))["candidates.item"] == 32


def test_schema_without_multi_valued_features_has_no_bags() -> None:
    schema = SCHEMA.model_copy(update={"user_features": ()})
    assert build_tables(schema, config()).ebc is None


@pytest.mark.parametrize("choice", ["auto", "table_wise", TYPES])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_plan_survives_its_file(choice: object, world_size: int, tmp_path: Path) -> None:
    made = plan(config(plan=choice), world_size)
    assert sorted(table.table for table in made.tables) == sorted(SCHEMA.num_rows)
    save_plan(made, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == made
    assert plan(config(plan=str(tmp_path / "plan.json")), world_size) == made


def test_plan_is_a_pure_function_of_its_input() -> None:
    assert plan(config(), 4) == plan(config(), 4) != plan(config(), 2)


@pytest.mark.parametrize("kernel", TRAINED_KERNELS)
@pytest.mark.parametrize("choice", ["auto", "table_wise"])
def test_every_table_of_a_cpu_plan_has_the_configured_kernel(choice: str, kernel: str) -> None:
    assert {table.kernel for table in plan(config(plan=choice, kernel=kernel)).tables} == {kernel}


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda plan: plan["tables"].pop(), "must be in it"),
    (lambda plan: plan["tables"][0].update(table="other"), "the plan"),
    (lambda plan: plan["tables"][0].update(rows=5), "plan again"),
    (lambda plan: plan.update(world_size=8), "for 8 ranks"),
    (lambda plan: plan["tables"][0].update(shards=[]), "hold 0 values")])
def test_file_of_another_model_or_machine_is_refused(spoil: Callable[[dict], None], message: str,
                                                     tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    save_plan(plan(config(plan="table_wise")), path)
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        plan(config(plan=str(path)))


def test_initial_values_of_a_block_are_those_of_the_table() -> None:
    whole = initial_values(3, "item", range(1000), range(32), 0.5)
    block = initial_values(3, "item", range(100, 357), range(8, 20), 0.5)
    assert torch.equal(block, whole[100:357, 8:20])
    one_by_one = torch.cat([initial_values(3, "item", range(row, row + 1), range(32), 0.5) for row in range(50)])
    assert torch.equal(one_by_one, whole[:50])


def test_initial_values_are_nearly_normal_and_differ_by_seed_and_table() -> None:
    values = initial_values(3, "item", range(20_000), range(32), 0.5)
    assert abs(values.mean()) < 0.003
    assert abs(values.std() - 0.5) < 0.003
    assert 0.66 < (values.abs() < 0.5).float().mean() < 0.70
    assert abs(torch.corrcoef(values.T)[0, 1]) < 0.03
    assert abs(torch.corrcoef(values[:32])[0, 1]) < 0.7
    assert len(values.unique()) > 100_000
    for seed, table in ((4, "item"), (3, "items")):
        other = initial_values(seed, table, range(20_000), range(32), 0.5)
        assert abs((other * values).mean() / 0.25) < 0.01


def test_schedule_rises_to_one_and_falls_to_its_floor() -> None:
    factors = [warmup_cosine(step, num_steps=100, warmup_steps=10, final_factor=0.1) for step in range(120)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(factors) == 1.0
    assert factors[10] == 1.0
    assert all(later <= earlier for earlier, later in pairwise(factors[10:]))
    assert factors[100:] == pytest.approx([0.1] * 20)
    assert warmup_cosine(0, num_steps=5, warmup_steps=0) == 1.0
