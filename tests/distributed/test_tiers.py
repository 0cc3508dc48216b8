"""Where a table lives changes no bit of what is trained."""

import json
from pathlib import Path

import pytest

from longer_rec.checkpoint.inspect import find_checkpoint
from tests.distributed.test_elastic import COMMON, assert_same_run, logged_steps, shop, train_rank
from tests.reference.ranks import run_ranks

__all__ = ["shop"]  # a fixture, used by its name

PLAN = "sparse.plan={item: row_wise, user: table_wise, kind: table_wise, interests: table_wise}"
STEPS = (*COMMON, PLAN, "sparse.default_dim=32")
# The first leaves a part of the item table without a place, the second nearly everything but state.
TIERS = {"some": ("sparse.placement=auto", "sparse.device_memory=30kB"),
         "little": ("sparse.placement=auto", "sparse.device_memory=5kB", "sparse.cache_policy=lru"),
         "caching": ("sparse.kernel=fused_uvm_caching",)}


def planned(run_dir: Path) -> dict[str, dict]:
    return {table["table"]: table for table in json.loads((run_dir / "plan.json").read_text())["tables"]}


@pytest.fixture(scope="module")
def on_the_device(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "fused"
    run_ranks(train_rank, 2, run_dir, shop, STEPS, timeout_s=120)
    assert {table["kernel"] for table in planned(run_dir).values()} == {"fused"}
    assert len(logged_steps(run_dir)) >= 5
    return run_dir


@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_trains_bitwise_the_same_strict_run(shop: Path, on_the_device: Path, tier: str,
                                                       tmp_path: Path) -> None:
    run_ranks(train_rank, 3 if tier == "little" else 2, tmp_path / "run", shop, (*STEPS, *TIERS[tier]), timeout_s=120)
    assert_same_run(on_the_device, tmp_path / "run")
    tables = planned(tmp_path / "run")
    kernels = {name: table["kernel"] for name, table in tables.items()}
    if tier == "some":
        assert kernels["item"] == "fused_uvm_caching"
        assert "fused" in kernels.values()
        rates = tables["item"]["expected_hit_rate"]
        assert 0 < rates["lru"] < 1
        assert 0 < rates["lfu"] < 1
    elif tier == "little":
        assert "fused_uvm" in kernels.values()
        assert {table["cache_policy"] for table in tables.values()} == {"lru"}
    else:
        assert set(kernels.values()) == {"fused_uvm_caching"}


def test_a_run_moves_between_tiers_and_processes_bitwise(shop: Path, on_the_device: Path,
                                                         tmp_path: Path) -> None:
    for processes, stop_after, tier in ((2, 2, "little"), (3, 4, "caching"), (1, None, "some")):
        stopped = run_ranks(train_rank, processes, tmp_path / "run", shop, (*STEPS, *TIERS[tier]), stop_after,
                            timeout_s=120)
        assert stopped == [stop_after is not None] * processes
        if stop_after:
            assert find_checkpoint(tmp_path / "run").name == f"step-{stop_after}"
    assert_same_run(on_the_device, tmp_path / "run")
