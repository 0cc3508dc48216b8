"""Training with tables of open ids: bitwise one run on any number of processes, through stops and restarts."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from longer_rec.checkpoint.inspect import find_checkpoint
from longer_rec.checkpoint.manifest import read_manifest
from longer_rec.checkpoint.tensors import iterate_tensors
from longer_rec.config import load_config
from longer_rec.data.history import open_dataset
from longer_rec.data.prepare import prepare
from longer_rec.errors import ConfigError
from longer_rec.job import Job
from longer_rec.model.interaction import ID_BITS
from longer_rec.plan.scenario import Scenario, solve
from longer_rec.plan.topology import parse_topology
from longer_rec.plan.whatif import remedies
from longer_rec.schema import OPEN_ID_BITS
from longer_rec.train.export import ExportOptions, export_run
from tests.distributed.test_elastic import COMMON, assert_same_run, logged_steps, train_rank
from tests.integration.conftest import CONFIG
from tests.reference.ranks import run_ranks

MANAGED = ("sparse.managed={session: {rows: 256, admit_after: 3}, seller: {rows: 128, policy: lru}, "
           "device: {rows: 128, admit_after: 1}}")
STEPS = (*COMMON, MANAGED, "sparse.plan={item: row_wise, user: table_wise, session: row_wise, seller: row_wise, "
                           "device: row_wise}")


@pytest.fixture(scope="module")
def open_shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log with open ids of the action (most come a few times), of the item and of the user."""
    folder = tmp_path_factory.mktemp("shop")
    random = np.random.default_rng(0)
    users, events = 60, 380
    item = random.zipf(1.3, users * events) % 3000
    pl.DataFrame({"user": np.repeat(np.arange(users), events), "item": item,
                  "time": np.tile(np.arange(events) * 60, users) + 10**9,
                  "session": [f"s{one}" if one % 17 else None for one in random.zipf(1.2, users * events) % 5000],
                  "seller": item % 700}).write_parquet(folder / "log.parquet")
    pl.DataFrame({"user": np.arange(users), "device": [f"phone {user % 50}" for user in range(users)]}
                 ).write_csv(folder / "users.csv")
    (folder / "shop.yaml").write_text(yaml.safe_dump({
        "name": "shop", "events": {"files": ["log.parquet"]},
        "columns": {"user": "user", "item": "item", "time": "time"},
        "items": {"features": [{"name": "seller", "type": "open"}]},
        "event_features": [{"name": "session", "type": "open"}],
        "users": {"source": {"files": ["users.csv"]}, "key": "user", "features": [{"name": "device", "type": "open"}]},
        "candidates": {"kind": "negatives", "per_positive": 3},
        "split": {"kind": "global_time", "fractions": [0.95, 0.02, 0.03]}}))
    return prepare(str(folder / "shop.yaml"), folder / "out")


def test_the_tower_matches_open_ids_without_cutting_them() -> None:
    assert OPEN_ID_BITS <= ID_BITS


def test_open_ids_are_hashes_of_what_the_log_says(open_shop: Path) -> None:
    dataset = open_dataset(open_shop)
    assert dataset.schema.open_tables == {"session", "seller", "device"}
    ids = dataset.events.take("session", np.arange(1000))
    assert (ids == 0).mean() == pytest.approx(1 / 17, abs=0.05)  # nulls
    assert 1 << OPEN_ID_BITS - 1 < ids.max() < 1 << OPEN_ID_BITS
    encoder = dataset.encoders["session"]
    assert set(encoder.encode(pl.Series([f"s{one}" for one in range(5000)]), "session").tolist()) >= set(ids[ids > 0])
    assert len(np.unique(dataset.items["seller"])) > 600
    assert dataset.items["seller"][0] == 0  # the unseen item's


@pytest.fixture(scope="module")
def on_two(open_shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "two"
    run_ranks(train_rank, 2, run_dir, open_shop, STEPS, timeout_s=120)
    assert len(logged_steps(run_dir)) >= 5
    return run_dir


def test_rows_are_given_away_in_training(on_two: Path) -> None:
    checkpoint = find_checkpoint(on_two)
    state = dict(iterate_tensors(checkpoint, read_manifest(checkpoint).tensors))
    [ids] = [value for name, value in state.items() if name.endswith("session.ids")]
    [seen] = [value for name, value in state.items() if name.endswith("session.seen")]
    held = int((ids > 0).sum())
    assert held > 150  # most of the 192 that may be held
    assert int((seen >= 3).sum()) > 2 * held  # more have earned one


def test_one_process_trains_bitwise_the_same(open_shop: Path, on_two: Path, tmp_path: Path) -> None:
    run_ranks(train_rank, 1, tmp_path / "run", open_shop, STEPS, timeout_s=120)
    assert_same_run(on_two, tmp_path / "run")


def test_a_run_moves_between_processes_bitwise(open_shop: Path, on_two: Path, tmp_path: Path) -> None:
    for processes, stop_after in ((2, 2), (4, None)):
        run_ranks(train_rank, processes, tmp_path / "run", open_shop, STEPS, stop_after, timeout_s=120)
    assert_same_run(on_two, tmp_path / "run")


def test_a_run_with_open_ids_is_not_exported(on_two: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="open ids .session, seller, device., and a bundle has no map"):
        export_run(on_two, tmp_path / "bundle", ExportOptions())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("machine", ["4x1GB:device=cpu", "8xH100"])
def test_tables_of_open_ids_are_planned_for_other_machines(open_shop: Path, machine: str) -> None:
    job = load_config(Job, CONFIG, [f"data.dir={open_shop}", MANAGED])
    scenario = Scenario(job, open_dataset(open_shop), parse_topology(machine))
    scenario.check()
    plan = solve(scenario).found.plan
    assert plan is not None
    tables = {table.table: table for table in plan.tables}
    assert {"session", "seller", "device", "item", "user"} <= tables.keys()
    assert (tables["session"].sharding_type, tables["session"].rows) == ("row_wise", 256)


def test_remedies_leave_tables_of_open_ids_as_they_are(open_shop: Path) -> None:
    wide = load_config(Job, CONFIG, [f"data.dir={open_shop}", MANAGED, "sparse.default_dim=64"])
    large = Scenario(wide, open_dataset(open_shop), parse_topology("2x2GB:host=64GB")).change(row_factor=9000.0)
    found = remedies(large)
    assert any("in host memory" in remedy.text for remedy in found)
    for remedy in found:
        assert remedy.outcome.found.plan is not None
        tables = {table.table: table for table in remedy.outcome.found.plan.tables}
        assert (tables["session"].kernel, tables["session"].sharding_type) == ("fused", "row_wise")
    with pytest.raises(ConfigError, match="'session' of open ids cannot use kernel 'fused_uvm': its rows are"):
        large.with_choice([table for table in large.tables if table.name == "session"], kernels=("fused_uvm",)).check()
