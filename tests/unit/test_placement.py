"""Placement by frequency, and the cache that is simulated for it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from longer_rec.config import build_config
from longer_rec.errors import ConfigError
from longer_rec.report.numbers import format_kernel
from longer_rec.runtime.distributed import World
from longer_rec.sparse.cache import WAYS, CacheSimulation, forecast_caches
from longer_rec.sparse.placement import (
    MIN_COVERAGE,
    WHOLE_SHARE,
    DoesNotFit,
    Placement,
    TableDemand,
    Tiers,
    place_tables,
)
from longer_rec.sparse.planfile import SparsePlan, load_plan, save_plan
from longer_rec.sparse.planner import build_plan
from longer_rec.sparse.tables import CachePolicy, SparseConfig, build_tables
from tests.reference.batches import SCHEMA

HUGE = 1 << 60
LARGER = SCHEMA.model_copy(update={"tables": tuple(
    table.model_copy(update={"num_rows": 50 * table.num_rows}) for table in SCHEMA.tables)})
LOOKUPS = {name: 1e4 / np.arange(1, rows + 1) ** 1.2 for name, rows in LARGER.num_rows.items()}
WORLD = World(rank=0, size=2, local_rank=0, local_size=2, device=torch.device("cpu"))


def demand(fetches: np.ndarray, dim: int = 16, shares: tuple[float, ...] = (1.0,), state: int = 4) -> TableDemand:
    return TableDemand(fetches, 4 * dim, state, True, shares)


def zipf(rows: int, scale: float = 1e5) -> np.ndarray:
    return np.random.default_rng(rows).permutation(scale / np.arange(1, rows + 1))


def device_bytes(demands: dict[str, TableDemand], places: dict[str, Placement]) -> np.ndarray:
    rows = {name: len(one.fetches) if places[name].kernel == "fused"
            else round((places[name].cache_load_factor or 0) * len(one.fetches)) for name, one in demands.items()}
    return sum(np.asarray(one.shares) * one.device_bytes(rows[name]) for name, one in demands.items())


def test_what_fits_stays_on_the_device() -> None:
    demands = {"item": demand(zipf(5000)), "never": demand(np.zeros(100))}
    size = sum(one.whole_bytes for one in demands.values())
    assert {place.kernel for place in place_tables(demands, Tiers(size, 0)).values()} == {"fused"}
    assert {place.kernel for place in place_tables(demands, Tiers(size - 1, HUGE)).values()} != {"fused"}


def test_hot_tables_are_whole_warm_ones_cached_and_cold_ones_in_host_memory() -> None:
    demands = {"hot": demand(np.full(300, 1e4)), "warm": demand(zipf(20_000)), "cold": demand(np.full(50_000, 0.01))}
    places = place_tables(demands, Tiers(800_000, HUGE))
    assert {name: place.kernel for name, place in places.items()} == {
        "hot": "fused", "warm": "fused_uvm_caching", "cold": "fused_uvm"}
    warm = np.sort(zipf(20_000))[::-1]
    cached = round(20_000 * (places["warm"].cache_load_factor or 0))
    assert 1000 < cached < 10_000
    assert places["warm"].coverage == pytest.approx(warm[:cached].sum() / warm.sum())


def test_all_tables_share_one_threshold() -> None:
    """The rows on the device are fetched more often than those that are not, whatever their table."""
    demands = {"a": demand(zipf(20_000)), "b": demand(zipf(30_000, 4e5)), "c": demand(zipf(10_000, 3e4))}
    places = place_tables(demands, Tiers(2_000_000, HUGE))
    edges = []
    for name, one in demands.items():
        assert places[name].kernel == "fused_uvm_caching"
        edges.append(np.sort(one.fetches)[::-1][round(len(one.fetches) * (places[name].cache_load_factor or 0)) - 1])
    assert max(edges) / min(edges) < 1.15  # places are given in blocks, each 2 % of the rows before it


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1), st.floats(0.02, 1.2))
def test_no_rank_holds_more_than_its_budget(world_size: int, num_tables: int, seed: int, part: float) -> None:
    random = np.random.default_rng(seed)
    demands = {}
    for name in range(num_tables):
        table_wise = np.eye(world_size)[random.integers(world_size)]
        shares = table_wise if random.random() < 0.5 else np.full(world_size, 1 / world_size)
        fetches = random.pareto(random.uniform(0.5, 2), random.integers(1, 3000)) * random.uniform(0, 100)
        demands[str(name)] = TableDemand(fetches, 4 * int(random.integers(1, 64)), 4, bool(random.random() < 0.5),
                                         tuple(shares))
    budget = int(part * sum(one.whole_bytes for one in demands.values()))
    assume(budget >= sum(one.device_bytes(0) for one in demands.values()))
    places = place_tables(demands, Tiers(budget, HUGE))
    assert (device_bytes(demands, places) <= budget).all()
    assert places == place_tables(demands, Tiers(budget, HUGE))
    for place in places.values():
        assert (place.kernel == "fused_uvm_caching") == (place.cache_load_factor is not None)
        assert place.kernel != "fused_uvm_caching" or place.coverage >= MIN_COVERAGE


def test_a_cache_that_would_serve_little_is_given_up() -> None:
    flat = {"flat": demand(np.ones(10_000))}
    whole = flat["flat"].whole_bytes
    assert place_tables(flat, Tiers(whole // 20 + 200_000, HUGE))["flat"].kernel == "fused_uvm"
    assert place_tables(flat, Tiers(whole // 2 + 200_000, HUGE))["flat"].kernel == "fused_uvm_caching"


def test_a_table_that_is_nearly_on_the_device_is_held_whole_if_it_fits() -> None:
    table = demand(np.concatenate([np.full(900, 10.0), np.zeros(100)]))
    other = demand(np.full(10_000, 1.0))
    assert WHOLE_SHARE < 0.9
    assert place_tables({"table": table, "other": other}, Tiers(
        table.whole_bytes + other.device_bytes(0) + 1000, HUGE))["table"].kernel == "fused"


def test_what_host_memory_cannot_hold_is_refused() -> None:
    demands = {"warm": demand(np.full(10_000, 5.0)), "cold": demand(np.full(10_000, 1.0))}
    state = sum(one.device_bytes(0) for one in demands.values())
    one = demands["warm"].host_bytes(0)
    assert {place.kernel for place in place_tables(demands, Tiers(state, 2 * one)).values()} == {"fused_uvm"}
    with pytest.raises(ConfigError, match=f"need {2 * one} bytes of host memory on a rank, there are {2 * one - 1}"):
        place_tables(demands, Tiers(state, 2 * one - 1))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**32 - 1), st.floats(0.1, 1.2), st.floats(0, 1))
def test_what_host_memory_has_no_room_for_lies_on_ssd_the_least_missed_first(
        world_size: int, num_tables: int, seed: int, part: float, host_part: float) -> None:
    random = np.random.default_rng(seed)
    demands = {str(name): TableDemand(random.pareto(1.5, random.integers(1, 3000)) * random.uniform(0, 100),
                                      4 * int(random.integers(1, 64)), 4, True, np.full(world_size, 1 / world_size))
               for name in range(num_tables)}
    whole = sum(one.whole_bytes for one in demands.values())
    tiers = Tiers(int(part * whole), int(host_part * whole / world_size), HUGE)
    try:
        places = place_tables(demands, tiers)
    except DoesNotFit:  # what FBGEMM keeps on the device of a table on SSD
        assume(False)
    on_host = sum(one.host_bytes(0) for name, one in demands.items() if places[name].kernel.startswith("fused_uvm"))
    assert on_host <= tiers.host * world_size
    assert (device_bytes(demands, places) <= tiers.device).all()
    for name, place in places.items():
        assert (place.kernel in ("fused_uvm_caching", "key_value")) == (place.cache_load_factor is not None)
        if place.kernel == "key_value":  # there was no room left beside those that miss more
            assert on_host + demands[name].host_bytes(0) > tiers.host * world_size
    roomy = place_tables(demands, replace(tiers, host=HUGE))
    assert all(place.kernel != "key_value" for place in roomy.values())
    assert {name for name, place in places.items() if place.kernel == "fused"} == {
        name for name, place in roomy.items() if place.kernel == "fused"}


def test_a_table_on_ssd_has_a_cache_and_ssd_has_an_end() -> None:
    demands = {"warm": demand(np.full(10_000, 5.0)), "cold": demand(np.full(10_000, 1.0))}
    state, one = sum(each.device_bytes(0) for each in demands.values()), demands["warm"].host_bytes(0)
    room = Tiers(state + 12 * 10_000 + 32 * 80, one, one)
    places = place_tables(demands, room)
    assert {name: place.kernel for name, place in places.items()} == {"warm": "fused_uvm", "cold": "key_value"}
    assert round((places["cold"].cache_load_factor or 0) * 10_000) == 32
    with pytest.raises(DoesNotFit, match=f"need {2 * one} bytes of host memory or SSD on a rank, there are {one} and"):
        place_tables(demands, replace(room, ssd=one - 1))
    with pytest.raises(DoesNotFit, match="cannot hold what FBGEMM keeps there of table 'cold' on SSD"):
        place_tables(demands, replace(room, device=room.device - 1))
    sgd = {name: replace(each, state_on_device=False) for name, each in demands.items()}
    with pytest.raises(DoesNotFit, match="or sparse.optimizer=rowwise_adagrad, without which nothing lies on SSD"):
        place_tables(sgd, replace(room, host=2 * one))


def test_optimizer_state_that_cannot_leave_the_device_is_refused_when_it_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="stays on the device"):
        place_tables({"item": demand(zipf(1000))}, Tiers(3999, HUGE))


def plan(**options: object) -> SparsePlan:
    content = {"default_dim": 16, "plan": "table_wise", "placement": "auto", **options}
    config = build_config(SparseConfig, content, "test")
    return build_plan(build_tables(LARGER, config), config, WORLD, fetches=LOOKUPS)


@pytest.mark.parametrize("choice", ["table_wise", "auto"])
def test_the_plan_carries_kernels_and_caches_to_torchrec(choice: str, tmp_path: Path) -> None:
    made = plan(device_memory=120_000, plan=choice)
    kernels = {table.kernel for table in made.tables}
    assert {"fused", "fused_uvm_caching"} <= kernels
    save_plan(made, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == made
    for table in made.tables:
        sharding = made.sharding_plan().plan[table.module][table.table]
        assert sharding.compute_kernel == table.kernel
        assert (sharding.cache_params is not None) == (table.kernel == "fused_uvm_caching")
        if sharding.cache_params is not None:
            assert sharding.cache_params.load_factor == table.cache_load_factor
            assert sharding.cache_params.algorithm.name == "LFU"


def test_a_table_on_ssd_is_not_trained(tmp_path: Path) -> None:
    save_plan(plan(), tmp_path / "plan.json")
    path = tmp_path / "ssd.json"
    path.write_text((tmp_path / "plan.json").read_text().replace('"fused"', '"key_value"'))
    with pytest.raises(ConfigError, match=r"kernel 'key_value' \(a table on SSD .* can be planned, not trained"):
        plan(plan=str(path), placement=None)
    with pytest.raises(ConfigError, match="sparse.kernel=key_value: a table on SSD .* cannot start its rows as"):
        plan(kernel="key_value", placement=None)


@pytest.mark.parametrize(("options", "message"), [
    ({"device_memory": "1GB"}, "has no effect without placement"),
    ({"device_memory": 3, "placement": "auto"}, "device_memory=3 is a number of bytes; write it with a unit"),
    ({"device_memory": "1GB", "placement": "auto", "plan": "plan.json"}, "taken as it is, with its kernels; drop"),
    ({"kernel": "fused_uvm", "plan": "plan.json"}, "taken as it is, with its kernels; drop"),
    ({"placement": "auto", "kernel": "fused_uvm"}, "exclude each other"),
    ({"placement": "auto", "device_memory": "much"}, "device_memory='much'")])
def test_contradicting_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(SparseConfig, {"default_dim": 16, **options}, "test")


def test_placement_without_frequencies_is_refused() -> None:
    config = build_config(SparseConfig, {"default_dim": 16, "placement": "auto"}, "test")
    with pytest.raises(ConfigError, match="only prepared data tells"):
        build_plan(build_tables(SCHEMA, config), config, WORLD)


def cache_ref(cache: CacheSimulation, policy: CachePolicy, expected: np.ndarray, steps: list) -> list[list[bool]]:
    """Hits of each step by the definition, row by row; ``cache`` only tells the set of a row."""
    set_of = {row: int(cache._set_of(np.asarray([row]))[0]) for row in range(len(expected))}
    used = dict(enumerate(expected.astype(int)))  # LFU: times; LRU: when last
    held: list[list[int]] = [[] for _ in range(cache.num_sets)]
    for row in sorted(set_of, key=lambda row: -expected[row])[:cache.num_sets * WAYS]:
        if len(held[set_of[row]]) < WAYS:
            held[set_of[row]].append(row)
    hits = []
    for now, (rows, counts) in enumerate(steps, start=1):
        hits.append([row in held[set_of[row]] for row in rows])
        for row, count in zip(rows, counts, strict=True):
            used[row] = used[row] + count if policy == "lfu" else now + HUGE
        for number, slots in enumerate(held):
            missed = [row for row, hit in zip(rows, hits[-1], strict=True) if set_of[row] == number and not hit]
            if policy == "lfu":
                missed.sort(key=lambda row: -used[row])
            slots.sort(key=lambda row: used[row])
            free = WAYS - len(slots)
            for new, slot in zip(missed[free:], range(len(slots)), strict=False):
                if used[slots[slot]] <= used[new] if policy == "lfu" else used[slots[slot]] < used[new]:
                    slots[slot] = new
            slots.extend(missed[:free])
    return hits


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_the_simulated_cache_is_the_one_defined(policy: CachePolicy) -> None:
    random = np.random.default_rng(1)
    # Many rows of one set in one step, more than it holds, and hot ones again and again.
    expected = random.permutation(600) * 7.0
    steps = [np.unique(random.zipf(1.3, 600) % 600, return_counts=True) for _ in range(60)]
    if policy == "lru":  # one row a step: which of the rows used in one step leaves first is not defined
        steps = [(row[[index]], count[[index]]) for row, count in steps for index in range(0, len(row), 9)]
    cache = CacheSimulation(3 * WAYS, policy, expected)
    hits = [cache.access(row, count).tolist() for row, count in steps]
    assert hits == cache_ref(CacheSimulation(3 * WAYS, policy, expected), policy, expected, steps)
    assert 0.1 < np.concatenate(hits).mean() < 0.9


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_a_step_never_evicts_its_own_rows_and_a_cache_of_everything_always_hits(policy: CachePolicy) -> None:
    everything = np.arange(WAYS)
    cache = CacheSimulation(WAYS, policy, np.zeros(10 * WAYS))
    cache.access(everything + 64, np.ones(WAYS, np.int64))
    assert cache.access(everything + 64, np.ones(WAYS, np.int64)).all()
    assert not cache.access(everything, np.full(WAYS, 5)).any()
    both = np.concatenate([everything, everything + 64])
    assert cache.access(both, np.full(2 * WAYS, 5))[:WAYS].all()
    assert cache.access(everything, np.full(WAYS, 5)).all()


def test_hit_rates_are_told_for_cached_tables_alone() -> None:
    made = plan(device_memory=120_000)
    random = np.random.default_rng(0)
    steps = [{name: np.unique(random.choice(len(one), 300, p=one / one.sum()), return_counts=True)
              for name, one in LOOKUPS.items()} for _ in range(60)]
    told = forecast_caches(made, LOOKUPS, steps)
    for before, table in zip(made.tables, told.tables, strict=True):
        assert (table.expected_hit_rate is not None) == (table.kernel == "fused_uvm_caching")
        assert table == before.model_copy(update={"expected_hit_rate": table.expected_hit_rate})
        if table.expected_hit_rate is not None:
            rate = table.expected_hit_rate
            assert 0.1 < rate["lru"] < rate["lfu"] < rate["static"] + 0.05
            assert f"fused_uvm_caching {table.cache_load_factor:.2%}, hits {rate['lfu']:.0%}" == format_kernel(
                table.model_dump())
    assert forecast_caches(plan(), LOOKUPS, []) == plan()
    on_ssd = made.model_copy(update={"tables": tuple(
        table.model_copy(update={"kernel": "key_value", "cache_policy": "lru"})
        if table.kernel == "fused_uvm_caching" else table for table in made.tables)})
    assert [table.expected_hit_rate for table in forecast_caches(on_ssd, LOOKUPS, steps).tables] == [
        table.expected_hit_rate for table in told.tables]


@pytest.mark.parametrize("choice", ["table_wise", "auto"])
def test_a_plan_for_gpus_has_the_kernels_of_its_placement(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned without a GPU, by TorchRec's planner under the kernels that placement leaves it."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 1 << 30))
    config = build_config(SparseConfig, {"default_dim": 16, "plan": choice, "placement": "auto",
                                         "device_memory": 120_000}, "test")
    world = World(rank=0, size=2, local_rank=0, local_size=2, device=torch.device("cuda", 0))
    made = build_plan(build_tables(LARGER, config), config, world, fetches=LOOKUPS)
    assert {"fused", "fused_uvm_caching"} <= {table.kernel for table in made.tables}
    assert made == build_plan(build_tables(LARGER, config), config, world, fetches=LOOKUPS)
