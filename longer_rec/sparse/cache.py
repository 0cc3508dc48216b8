"""What a device cache will serve: FBGEMM's cache of embedding rows, simulated on the ids that training looks up.

FBGEMM's caches are 32-way set-associative. Before a step's lookup the distinct rows of the whole step that are not in
the cache are fetched from host memory, and each takes the place of the least recently (LRU) or least often (LFU)
used row of its set, never of one that this step uses. So what counts as a hit is a distinct row of a step.
Source: fbgemm_gpu 1.8, split_embeddings_cache/lru_cache_populate.cu and lfu_cache_populate.cu.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from longer_rec.sparse.placement import Floats
from longer_rec.sparse.planfile import SparsePlan, TablePlan
from longer_rec.sparse.tables import CACHED_KERNELS, CachePolicy

I64 = npt.NDArray[np.int64]
# Distinct rows of each table in one step, and how often the step looks each of them up.
Step = Mapping[str, tuple[I64, I64]]

WAYS = 32
_EMPTY = -(1 << 62)


class CacheSimulation:
    """The cache of one group of tables whose rows are numbered through; starts with the hottest rows in it.

    FBGEMM's starts empty; the simulation is of training once it has run for long, in a stretch of it that may be
    too short to fill a cache. ``expected`` (V) is how often each row is looked up in the long run.
    """

    def __init__(self, num_slots: int, policy: CachePolicy, expected: Floats) -> None:
        self.num_sets = max(1, -(-num_slots // WAYS))
        self._lfu = policy == "lfu"
        self._ids = np.full((self.num_sets, WAYS), -1, np.int64)
        # When a slot was used last; for LFU, how often its row was used at all.
        self._cost = np.full((self.num_sets, WAYS), _EMPTY, np.int64)
        self._count = expected.astype(np.int64) if self._lfu else np.zeros(0, np.int64)
        self._now = 0
        hottest = np.argsort(-expected, kind="stable")[:self.num_sets * WAYS]
        where, rank = self._ranked(hottest)
        kept = rank < WAYS
        row, slot = hottest[where[kept]], rank[kept]
        at = self._set_of(row), slot
        self._ids[at] = row
        self._cost[at] = self._count[row] if self._lfu else -1 - where[kept]

    def access(self, row: I64, count: I64) -> npt.NDArray[np.bool_]:
        """One step: which of the distinct rows were in the cache; then those that were not take their places."""
        self._now += 1
        in_set = self._set_of(row)
        match = self._ids[in_set] == row[:, None]
        hit = match.any(1)
        if self._lfu:
            self._count[row] += count
        self._cost[in_set[hit], match.argmax(1)[hit]] = self._count[row[hit]] if self._lfu else self._now
        self._insert(row[~hit])
        return hit

    def _insert(self, row: I64) -> None:
        if self._lfu:  # the most used of a set first
            row = row[np.argsort(-self._count[row], kind="stable")]
        where, rank = self._ranked(row)
        where, rank = where[rank < WAYS], rank[rank < WAYS]
        row = row[where]
        in_set = self._set_of(row)
        sets, inverse = np.unique(in_set, return_inverse=True)
        slot = np.argsort(self._cost[sets], axis=1, kind="stable")[inverse, rank]
        new = self._count[row] if self._lfu else np.full(len(row), self._now)
        loses = self._cost[in_set, slot] <= new if self._lfu else self._cost[in_set, slot] < new
        at = in_set[loses], slot[loses]
        self._ids[at], self._cost[at] = row[loses], new[loses]

    def _ranked(self, row: I64) -> tuple[I64, I64]:
        """Positions of the rows ordered by their sets, and each one's number within its set, in the given order."""
        in_set = self._set_of(row)
        order = np.argsort(in_set, kind="stable")
        first = np.searchsorted(in_set[order], in_set[order], "left")
        return order, np.arange(len(row)) - first

    def _set_of(self, row: I64) -> I64:
        """MurmurHash3's finaliser, as FBGEMM spreads rows over sets."""
        mixed = row.astype(np.uint64)
        for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(multiplier)
        return ((mixed ^ (mixed >> np.uint64(33))) % np.uint64(self.num_sets)).astype(np.int64)


def forecast_caches(plan: SparsePlan, lookups: Mapping[str, Floats], steps: Iterable[Step]) -> SparsePlan:
    """The plan with the expected hit rates of its cached tables, counted over the second half of ``steps``.

    ``lfu`` and ``lru``, of which training uses ``cache_policy``, and ``static``: the share of a step's distinct rows
    that are among the table's hottest, as many as its cache has slots, which is what a policy comes to that knows
    frequencies and nothing else. Tables of one collection that lie alike share one cache, in FBGEMM as here.
    """
    cached = [table for table in plan.tables if table.kernel in CACHED_KERNELS]
    if not cached:
        return plan
    steps = list(steps)
    rates: dict[tuple[str, str], dict[str, float]] = {}
    groups: dict[tuple[str, ...], list[TablePlan]] = {}
    for table in cached:
        ranks = "" if table.sharding_type == "row_wise" else str(table.ranks)
        groups.setdefault((table.module, table.kernel, table.sharding_type, ranks), []).append(table)
    for tables in groups.values():
        rates |= _group_rates(tables, lookups, steps)
    return plan.model_copy(update={"tables": tuple(
        table.model_copy(update={"expected_hit_rate": rates.get((table.module, table.table))})
        for table in plan.tables)})


def _group_rates(tables: Sequence[TablePlan], lookups: Mapping[str, Floats],
                 steps: Sequence[Step]) -> dict[tuple[str, str], dict[str, float]]:
    slots = [int(table.rows * (table.cache_load_factor or 0)) for table in tables]
    first = np.cumsum([0, *(table.rows for table in tables)])
    expected = np.concatenate([lookups[table.table] for table in tables])
    hits = np.zeros((3, len(tables)))
    seen = np.zeros(len(tables))
    hottest = [np.isin(np.arange(table.rows), np.argsort(-lookups[table.table], kind="stable")[:count])
               for table, count in zip(tables, slots, strict=True)]
    caches = [CacheSimulation(sum(slots), policy, expected) for policy in ("lru", "lfu")]
    for number, step in enumerate(steps):
        found = [step.get(table.table, (np.zeros(0, np.int64),) * 2) for table in tables]
        owner = np.repeat(np.arange(len(tables)), [len(row) for row, _ in found])
        row, count = (np.concatenate(parts) for parts in zip(*found, strict=True))
        hit = [cache.access(row + first[owner], count) for cache in caches]
        if 2 * number >= len(steps):
            hit.append(np.concatenate([hot[row] for hot, (row, _) in zip(hottest, found, strict=True)]))
            hits += [np.bincount(owner, one, len(tables)) for one in hit]
            seen += np.bincount(owner, minlength=len(tables))
    rate = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0).round(4)
    return {(table.module, table.table): dict(zip(("lru", "lfu", "static"), rate[:, index].tolist(), strict=True))
            for index, table in enumerate(tables)}
