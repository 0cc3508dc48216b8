"""Topologies as text, and plans for machines that are not there."""

import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation

from longer_rec.errors import ConfigError
from longer_rec.plan.show import plan_differences
from longer_rec.plan.topology import PRESETS, check_ranks, parse_topology
from longer_rec.plan.whatif import parse_constraints
from longer_rec.runtime.distributed import World
from longer_rec.schema import Feature, Schema, Table
from longer_rec.sparse.optimizers import apply_table_optimizer
from longer_rec.sparse.options import Choice, Hardware
from longer_rec.sparse.planfile import SparsePlan, plan_hash
from longer_rec.sparse.planner import check_plan
from longer_rec.sparse.search import (
    PARTITIONERS,
    PROPOSERS,
    OncePerSize,
    ShardBytes,
    Space,
    build_space,
    find_plan,
    search_proposals,
)
from longer_rec.sparse.tables import SparseConfig, build_tables

GIB = 1 << 30
SCHEMA = Schema(
    tables=(Table(name="item", num_rows=40_000_000), Table(name="category", num_rows=900),
            Table(name="tag", num_rows=70)),
    item_features=(Feature(name="item", table="item"), Feature(name="category", table="category")),
    user_features=(Feature(name="tags", table="tag", multi_valued=True),), tasks=("label",))
IDS = {"item": 550.0, "category": 550.0}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def space(hardware: Hardware, choices: dict[str, Choice] | None = None, strict: bool = False, **sparse: Any) -> Space:
    config = SparseConfig(**{"default_dim": 64, **sparse})
    tables = build_tables(SCHEMA, config)
    apply_table_optimizer(tables.parameters(), config)
    return build_space(tables, config, hardware, 32, IDS, 2 * GIB, choices or {}, strict)


def planned(searched: Space) -> tuple[SparsePlan, dict[str, list[ShardBytes]]]:
    """The plan that is found, and the shards of each table."""
    found = find_plan(searched)
    assert found.plan is not None
    return found.plan, {table.table: [shard.size for shard in found.placed if shard.table == table.table]
                        for table in found.plan.tables}


def test_a_topology_says_ranks_hosts_memory_and_rates() -> None:
    eight = parse_topology("8x80GB")
    assert (eight.world_size, eight.ranks_per_host, eight.device, eight.device_bytes) == (8, 8, "cuda", 80 * GIB)
    many = parse_topology("64X40GiB:local=4,host=1TB,intra=300GB/s,inter=400Gb/s")
    assert (many.world_size, many.ranks_per_host, many.host_bytes_per_rank) == (64, 4, 256 * GIB)
    assert (many.intra_bw, many.inter_bw, many.network_bw) == (3e11, 5e10, 5e10)
    cpu = parse_topology("2x4GB:device=cpu")
    assert (cpu.world_size, cpu.local_size, cpu.device, cpu.device_bytes) == (2, 2, "cpu", 4 * GIB)


@pytest.mark.parametrize(("few", "many"), [("4x80GB", "16x80GB"), ("2xauto", "8xauto"), ("8x1GB:device=cpu",) * 2])
def test_a_machine_that_grows_is_the_larger_machine(few: str, many: str) -> None:
    larger = parse_topology(many)
    grown = replace(parse_topology(few), name=many, world_size=larger.world_size)
    assert check_ranks(grown, "here") == larger
    assert (grown.device_bytes, grown.host_bytes_per_rank) == (larger.device_bytes, larger.host_bytes_per_rank)
    assert grown.local_size * grown.device_bytes <= grown.host_bytes or not grown.cores


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_host_of_eight_and_scales(name: str) -> None:
    assert parse_topology(name.lower()).world_size == 8
    cluster = parse_topology(f"32x{name}")
    assert (cluster.world_size, cluster.ranks_per_host) == (32, 8)
    assert cluster.device_bytes == PRESETS[name].device_bytes
    assert cluster.inter_bw < cluster.intra_bw < cluster.device_bw


@pytest.mark.parametrize(("text", "message"), [
    ("", "cannot be read; use RANKSxMEMORY"), ("8 GPUs", "cannot be read"), ("0x80GB", "has 0 ranks; 1 to 4096"),
    ("1000000000xH100", "has 1000000000 ranks; 1 to 4096"), ("8x80", "'80' is not a size from 1MB to 1024TB; use a"),
    ("8x0GB", "'0GB' is not a size"), ("8x9" + "9" * 30 + "GB", "is not a size from 1MB to 1024TB"),
    ("12xH100", "12 ranks are not whole hosts of 8; use 8 or 16 ranks, or :local=6 with the topology"),
    ("8xH100:device=cpu", "H100 is cuda; leave device=cpu out"), ("8x80GB:local=4,local=8", "local is given twice"),
    ("2x4GB:device=cpu,ssd=4TB", "FBGEMM keeps tables on SSD for GPUs alone; leave ssd=4TB out, or plan"),
    ("8x80GB:ssd=4", "ssd: '4' is not a size"),
    ("8x80GB:ssd_bw=4GB/s", "ssd_bw=4GB/s has no effect without ssd; add it"),
    ("8x80GB:ssd=4TB,ssd_bw=fast", "ssd_bw='fast' is not a rate"),
    ("2x4GB:device=cpu,host=8GB", "ranks on a CPU have the host memory they are given"),
    ("8xH10", "neither a size nor one of A100, H100, H200, B200 and auto; did you mean H100"),
    ("8x80GB:local=3", "8 ranks are not whole hosts of 3"), ("8x80GB:local=x", "local=x is no number of ranks a host"),
    ("8x80GB:local=9", "local=9 is no number of ranks a host; use 1 to 8"),
    ("8x80GB:inter=fast", "inter='fast' is not a rate"), ("8x80GB:gpus=4", "'gpus=4' is not an option"),
    ("8x80GB:device=tpu", "device=tpu is unknown; use cpu or cuda"), ("8x80GB:host", "'host' is not an option")])
def test_a_topology_that_cannot_be_read_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_topology(text)


def test_every_search_gives_the_plan_of_torchrecs_own_planner() -> None:
    draw = random.Random(1)
    module = nn.Module()
    module.ebc = EmbeddingBagCollection(device=torch.device("meta"), tables=[
        EmbeddingBagConfig(name=f"t{i}", num_embeddings=int(10 ** draw.uniform(3, 7)), feature_names=[f"f{i}"],
                           embedding_dim=draw.choice([64, 128, 256])) for i in range(10)])
    topology = Topology(world_size=8, local_world_size=4, compute_device="cuda", hbm_cap=2 * GIB)
    sharders = [EmbeddingBagCollectionSharder()]
    estimators = [OncePerSize(EmbeddingPerfEstimator(topology)), EmbeddingStorageEstimator(topology)]
    for proposer in ("greedy", "uniform"):
        for make in PARTITIONERS.values():
            planner = EmbeddingShardingPlanner(
                topology=topology, batch_size=512, proposer=PROPOSERS[proposer](), partitioner=make(), debug=False,
                storage_reservation=FixedPercentageStorageReservation(0.0))
            planner.plan(module, sharders)
            expected = {option.name: (option.sharding_type, option.compute_kernel, [one.rank for one in option.shards],
                                      [one.perf for one in option.shards]) for option in planner._best_plan or ()}
            options = EmbeddingEnumerator(topology, 512, estimator=estimators).enumerate(module, sharders)
            best, _, proposals, placed = search_proposals(options, topology, PROPOSERS[proposer](), make())
            assert best is not None
            assert {option.name: (option.sharding_type, option.compute_kernel, ranks,
                                  [one.perf for one in option.shards]) for option, ranks in best} == expected
            assert len(expected) == 10
            assert placed < proposals or proposer == "uniform"


def test_every_table_is_in_the_plan_and_its_bytes_add_up() -> None:
    hardware = parse_topology("8x80GB")
    for optimizer, state in (("rowwise_adagrad", 4), ("adagrad", 256), ("sgd", 0)):
        plan, shards = planned(space(hardware, optimizer=optimizer))
        assert shards.keys() == {"item", "category", "tag"}
        for table in plan.tables:
            sizes = shards[table.table]
            assert sum(size.weights for size in sizes) == table.rows * 256 == table.weight_bytes
            assert sum(size.optimizer for size in sizes) == table.rows * state == table.optimizer_bytes
            assert sum(size.host for size in sizes) == 0


def test_a_plan_may_be_trained_and_says_what_is_wrong_with_it() -> None:
    hardware = parse_topology("4x80GB")
    searched = space(hardware)
    plan, _ = planned(searched)
    world = World(0, 4, 0, 4, torch.device("cuda"))
    check_plan(plan, searched.module, searched.config, world, strict=False)
    other = SCHEMA.model_copy(update={"tables": (Table(name="item", num_rows=7), *SCHEMA.tables[1:])})
    with pytest.raises(ConfigError, match="40000000 rows of 64 in 'ec.dim64', the model 7 rows of 64 .*plan again"):
        check_plan(plan, build_tables(other, searched.config), searched.config, world, strict=False)


def test_what_does_not_fit_has_no_plan_and_host_memory_helps() -> None:
    small = parse_topology("2x4GB:host=64GB")
    assert find_plan(space(small)).plan is None
    for kernel in ("fused_uvm", "fused_uvm_caching"):
        plan, shards = planned(space(small, {"item": Choice(kernels=(kernel,))}))
        item = next(table for table in plan.tables if table.table == "item")
        assert item.kernel == kernel
        assert sum(size.host for size in shards["item"]) == item.weight_bytes
        # The state of row-wise Adagrad stays on the device.
        assert sum(size.optimizer for size in shards["item"]) == item.optimizer_bytes
    assert find_plan(space(parse_topology("2x4GB:host=4GB"), {"item": Choice(kernels=("fused_uvm",))})).plan is None


def test_ssd_holds_what_neither_device_nor_host_memory_does() -> None:
    on_ssd = {"item": Choice(kernels=("key_value",))}
    plan, shards = planned(space(parse_topology("2x4GB:host=4GB,ssd=16GB"), on_ssd))
    item, sizes = next(table for table in plan.tables if table.table == "item"), shards["item"]
    assert (item.kernel, item.cache_policy) == ("key_value", "lru")
    assert sum(size.ssd for size in sizes) == item.weight_bytes
    assert sum(size.host for size in sizes) == 0
    assert sum(size.optimizer for size in sizes) == item.optimizer_bytes  # FBGEMM keeps it on the device
    assert max(size.ssd for size in sizes) <= 8 * GIB
    assert find_plan(space(parse_topology("2x4GB:host=4GB,ssd=8GB"), on_ssd)).plan is None


def test_reading_ssd_takes_a_block_for_each_row_that_the_cache_misses() -> None:
    machine = parse_topology("2x80GB:ssd=1TB,ssd_bw=4GB/s")

    def slowest(choice: Choice, part: str) -> float:
        found = find_plan(space(machine, {"item": replace(choice, sharding_types=("row_wise",))}))
        return max(shard.seconds[part] for shard in found.placed if shard.table == "item")

    plain = Choice(kernels=("fused",))
    for hit in (0.0, 0.5, 0.9, 1.0):
        cached = Choice(kernels=("key_value",), cache_load_factor=0.1, coverage=hit)
        # Rows of 256 bytes lie in blocks of 4096, read at 4 GB/s; hits, and all updates, in device memory.
        device, ssd = machine.device_bw, 4e9
        assert slowest(cached, "forward") == pytest.approx(
            slowest(plain, "forward") * device * (hit / device + (1 - hit) * 16 / ssd))
        assert slowest(cached, "backward") == pytest.approx(
            slowest(plain, "backward") * device * (1 / device + (1 - hit) / ssd))


def test_constraints_are_kept() -> None:
    plan, _ = planned(space(parse_topology("4x80GB"), parse_constraints(["item=column_wise+columns:16"]),
                            optimizer="adagrad"))
    item = next(table for table in plan.tables if table.table == "item")
    assert item.sharding_type == "column_wise"
    assert {shard.sizes for shard in item.shards} == {(40_000_000, 16)}


def test_a_strict_job_gets_types_that_do_not_depend_on_the_ranks() -> None:
    plan, _ = planned(space(parse_topology("4x80GB"), strict=True))
    assert all(table.exact for table in plan.tables)
    with pytest.raises(ConfigError, match=r"'tag' cannot be row_wise: .*elastic.strict rules out"):
        space(parse_topology("4x80GB"), {"tag": Choice(("row_wise",))}, strict=True)


@pytest.mark.parametrize(("constraint", "message"), [
    ("itm=row_wise", "--constrain names table 'itm'; did you mean 'item'"),
    ("item=rowwise", "'item' cannot be rowwise: known are table_wise"),
    ("item=column_wise", "'item' cannot be column_wise: rowwise_adagrad"),
    ("item=data_parallel", "'item' cannot be data_parallel: sequence tables"),
    ("item=key_value", "no SSD on the hosts of these 4 ranks; add what each has to their topology, such"),
    ("item=ssd", "'item' cannot be ssd: known are table_wise"),
    ("item=table_wise+columns:16", "of 64 columns cannot be cut into columns:16; add column_wise"),
    ("item=fused+fused", "says fused twice; keep one of them"),
    ("item=fused_uvm+fused", "names two kernels, fused_uvm and fused; a table has one: keep one of them"),
    ("item=columns:4+columns:8", "gives columns: more than once"),
    ("item=fused+", "cannot be read"), ("=fused", "cannot be read"),
    ("item=column_wise+columns:3", "columns:3 is not a positive multiple of 4; use"),
    ("item", r"cannot be read; use TABLE=TYPE\+KERNEL, such as item=row_wise\+fused$"), ("item=", "cannot be read")])
def test_a_constraint_that_cannot_be_kept_is_named(constraint: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space(parse_topology("4x80GB"), dict(parse_constraints([constraint])))


def test_ssd_needs_a_gpu_and_row_wise_adagrad() -> None:
    on_ssd = {"item": Choice(kernels=("key_value",))}
    with pytest.raises(ConfigError, match="FBGEMM keeps tables on SSD for GPUs alone; use another kernel, or plan for"):
        space(parse_topology("2x64GB:device=cpu"), on_ssd)
    with pytest.raises(ConfigError, match="rows on SSD by rowwise_adagrad alone, not sgd; use it, or another kernel"):
        space(parse_topology("2x80GB:ssd=1TB"), on_ssd, optimizer="sgd")


def test_a_table_is_constrained_once() -> None:
    with pytest.raises(ConfigError, match="'item=fused': table 'item' has a constraint already; say all of a table in"):
        parse_constraints(["item=row_wise", "item=fused"])


def test_on_a_cpu_every_kernel_is_planned_and_is_plain_memory() -> None:
    machine = parse_topology("2x64GB:device=cpu")
    plain, sizes = planned(space(machine))
    behind, same = planned(space(machine, {"item": Choice(kernels=("fused_uvm",))}, kernel="fused_uvm_caching"))
    assert {table.table: table.kernel for table in behind.tables} == {
        "item": "fused_uvm", "category": "fused_uvm_caching", "tag": "fused_uvm_caching"}
    assert sizes == same
    assert [table.shards for table in plain.tables] == [table.shards for table in behind.tables]


def test_a_plans_hash_and_differences_follow_what_it_says() -> None:
    first, again, other = (planned(space(parse_topology(text)))[0] for text in ("8x80GB", "8x80GB", "4x80GB"))
    assert plan_hash(first) == plan_hash(again) != plan_hash(other)
    assert plan_differences(first, again) == []
    lines = plan_differences(first, other)
    assert lines[0] == "world_size: 8 -> 4"
    assert any(line.startswith("table 'item': ranks 0–7 -> 0–3") for line in lines)
    fewer = first.model_copy(update={"tables": first.tables[1:]})
    assert plan_differences(first, fewer) == [f"table {first.tables[0].table!r}: only in the first"]
