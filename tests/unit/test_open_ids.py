"""Which ids of an open id space have rows, and what refuses them."""

from collections import Counter

import numpy as np
import pytest
import torch
from torchrec import JaggedTensor

from longer_rec.config import build_config
from longer_rec.errors import ConfigError
from longer_rec.runtime.distributed import World
from longer_rec.runtime.hashing import splitmix64
from longer_rec.schema import OPEN_ID_BITS, Feature, Schema, Table
from longer_rec.sparse.open_ids import BUCKETS, ManagedConfig, OpenIds
from longer_rec.sparse.planner import build_plan
from longer_rec.sparse.tables import SparseConfig, build_tables

CPU = torch.device("cpu")
SCHEMA = Schema(tables=(Table(name="item", num_rows=100), Table(name="session", num_rows=1 << OPEN_ID_BITS)),
                item_features=(Feature(name="item", table="item"),),
                event_features=(Feature(name="session", table="session"),), tasks=("label",))


def features(ids: torch.Tensor) -> dict[str, JaggedTensor]:
    return {"session": JaggedTensor(ids, lengths=torch.tensor([len(ids)]))}


def attached(config: ManagedConfig, first: int = 0, count: int | None = None) -> OpenIds:
    module = OpenIds(config, first, count or config.rows, CPU)
    rows = torch.full((module.count, 4), -7.0)
    module.attach(rows, [torch.ones(module.count)], lambda ids: ids.to(torch.float32).unsqueeze(1).expand(-1, 4))
    return module


def drawn(seed: int, num_steps: int, spread: float = 300.0) -> list[torch.Tensor]:
    """Ids of a drifting, skewed stream, 0 for none among them."""
    random = np.random.default_rng(seed)
    known = random.integers(1, 1 << OPEN_ID_BITS, 4000)
    known[::50] = 0
    return [torch.from_numpy(known[(np.abs(random.normal(0, spread, 400)) + 20 * step).astype(int) % 4000])
            for step in range(num_steps)]


def open_ids_ref(config: ManagedConfig, steps: list[torch.Tensor]) -> dict[int, tuple[int, int]]:
    """Row and use of every id that has a row, by the definition, id by id."""
    size = config.rows // BUCKETS
    held = {bucket: [(0, -1)] * size for bucket in range(BUCKETS)}  # (id, use) of each row
    seen: Counter[tuple[int, int]] = Counter()
    for now, ids in enumerate(steps, start=1):
        count = Counter(one for one in ids.tolist() if one)
        where = {one: (bucket, row) for bucket, rows in held.items() for row, (one, _) in enumerate(rows) if one}
        for one in count.keys() & where.keys():
            bucket, row = where[one]
            held[bucket][row] = one, held[bucket][row][1] + count[one] if config.policy == "lfu" else now
        counter = {one: (one >> OPEN_ID_BITS - 6, (int(splitmix64(torch.tensor(one))) & (1 << 62) - 1) % (size * 8))
                   for one in count.keys() - where.keys()}
        for one, at in counter.items():
            seen[at] += count[one]
        for bucket, rows in held.items():
            ready = sorted((-seen[at], one) for one, at in counter.items()
                           if at[0] == bucket and seen[at] >= config.admit_after)
            leaving = sorted(range(1, size), key=lambda row, rows=rows: (rows[row][1], rows[row][0]))
            for (earned, one), row in zip(ready, leaving, strict=False):
                use = -earned if config.policy == "lfu" else now
                if use > rows[row][1]:
                    rows[row] = one, use
        if config.halve_every and now % config.halve_every == 0:
            seen = Counter({at: number // 2 for at, number in seen.items()})
            for rows in held.values() if config.policy == "lfu" else ():
                rows[:] = [(one, use // 2 if use > 0 else use) for one, use in rows]
    return {one: (bucket * size + row, use) for bucket, rows in held.items() for row, (one, use) in enumerate(rows)
            if one}


@pytest.mark.parametrize("settings", [{}, {"admit_after": 5}, {"policy": "lru"}, {"admit_after": 1, "halve_every": 7},
                                      {"policy": "lru", "admit_after": 3, "halve_every": 4}])
def test_rows_go_to_the_ids_that_the_definition_says(settings: dict) -> None:
    config, steps = ManagedConfig(rows=4 * BUCKETS, **settings), drawn(3, 40)
    module = attached(config)
    admitted: set[int] = set()
    for ids in steps:
        module(features(ids))
        admitted |= set(module.ids.tolist())
    expected = open_ids_ref(config, steps)
    held = {one: (row, use) for row, (one, use) in enumerate(zip(module.ids.tolist(), module.use.tolist(), strict=True))
            if one}
    assert held == expected
    assert len(admitted) > 2 * len(held) > 4 * BUCKETS  # rows have changed hands
    # Every id's row was started when it got it, with no optimizer state, and no other row was touched.
    weight, [state], start = module._rows
    row = torch.tensor([row for row, _ in held.values()])
    torch.testing.assert_close(weight[row], start(torch.tensor(list(held))))
    assert state[row].eq(0).all()
    shared = torch.arange(BUCKETS) * 4
    assert weight[shared].eq(-7).all()
    assert state[shared].eq(1).all()


def test_an_id_without_a_row_looks_up_its_buckets_shared_row() -> None:
    config = ManagedConfig(rows=4 * BUCKETS, admit_after=3)
    module = attached(config)
    ids = torch.tensor([5 << OPEN_ID_BITS - 6, 5 << OPEN_ID_BITS - 6, 9, 0])
    for rows in ([20, 20, 0, 0], [21, 21, 0, 0], [21, 21, 1, 0]):  # the first is seen twice a step
        assert module(features(ids))["session"].values().tolist() == rows


def test_a_step_without_ids_changes_nothing() -> None:
    module = attached(ManagedConfig(rows=2 * BUCKETS))
    assert module(features(torch.zeros(0, dtype=torch.int64)))["session"].values().tolist() == []
    assert module.ids.eq(0).all()


def test_evaluation_gives_no_rows() -> None:
    module = attached(ManagedConfig(rows=2 * BUCKETS, admit_after=1)).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module(features(drawn(1, 1)[0]))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("num_ranks", [2, 8, 64])
def test_ranks_hold_the_parts_of_what_one_would_hold(num_ranks: int) -> None:
    config, steps = ManagedConfig(rows=4 * BUCKETS), drawn(4, 12)
    whole = attached(config)
    size = config.rows // num_ranks
    parts = [attached(config, rank * size, size) for rank in range(num_ranks)]
    for ids in steps:
        looked_up = whole(features(ids))["session"].values()
        owner = ids // ((1 << OPEN_ID_BITS) // num_ranks)
        for rank, part in enumerate(parts):
            assert torch.equal(part(features(ids[owner == rank]))["session"].values(), looked_up[owner == rank])
    assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
    assert torch.equal(torch.cat([part.seen for part in parts]), whole.seen)


def plan(world_size: int = 2, **options: object) -> object:
    content = {"default_dim": 8, "plan": "row_wise", "managed": {"session": {"rows": 2 * BUCKETS}}, **options}
    config = build_config(SparseConfig, content, "test")
    return build_plan(build_tables(SCHEMA, config), config, World(0, world_size, 0, world_size, CPU))


def test_a_table_of_open_ids_is_planned_by_rows_beside_others() -> None:
    for choice in ("row_wise", "auto"):
        tables = {table.table: table for table in plan(plan=choice).tables}
        assert (tables["session"].sharding_type, tables["session"].rows) == ("row_wise", 2 * BUCKETS)
        assert tables["session"].exact


@pytest.mark.parametrize(("options", "message"), [
    ({"managed": {}}, r"'session' has open ids and needs rows; say how many, such as sparse.managed="),
    ({"managed": {"item": {"rows": 128}, "session": {"rows": 128}}}, "'item', whose ids are rows of it already"),
    ({"managed": {"sesion": {"rows": 128}}}, "sparse.managed names table 'sesion'; did you mean 'session'"),
    ({"managed": {"session": {"rows": 130}}}, "rows=130 is no multiple of 64; use 192"),
    ({"managed": {"session": {"rows": 64}}}, "rows"),
    ({"managed": {"session": {"rows": 128, "policy": "fifo"}}}, "lfu"),
    ({"plan": "table_wise"}, "'session' cannot be table_wise: the rows of open ids are given away by the rank"),
    ({"kernel": "fused_uvm"}, "are held whole on the device, for their rows change; drop kernel=fused_uvm"),
    ({"placement": "auto"}, "are held whole on the device, for their rows change; drop placement"),
    ({"world_size": 3}, "divided into 64 parts, which 3 ranks cannot share equally; use 1, 2, 4, 8, 16, 32 or 64")])
def test_what_cannot_be_kept_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**options)
