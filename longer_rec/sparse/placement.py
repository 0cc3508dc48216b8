"""Which memory each table lives in: by how often its rows are looked up, and by what the machine has.

Device memory, host memory behind a device cache, host memory alone, SSD behind a device cache: FBGEMM's kernels
``fused``, ``fused_uvm_caching``, ``fused_uvm`` and ``key_value``. All of it is arithmetic on counts; no GPU is
needed to plan.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from longer_rec.errors import ConfigError
from longer_rec.sparse.options import Hardware, state_bytes
from longer_rec.sparse.planfile import FLOAT_BYTES, TablePlan
from longer_rec.sparse.tables import SparseConfig, TableConfig

# A table of which this share has earned device memory is held there whole: a cache's bookkeeping costs more.
WHOLE_SHARE = 0.8
# Below this share of fetches served, a cache costs more than reading host memory.
MIN_COVERAGE = 0.1
# What FBGEMM keeps on the device for a cached table of any width: id and last use of each slot; table and count of each
# row. LRU has no counts and LFU no last use; both are reckoned with the larger of the two.
_SLOT_BYTES = 16
_ROW_BYTES = 12
_MAX_BLOCKS = 512
# The smallest cache that FBGEMM makes, one set of its ways; a table on SSD cannot do without.
_FEWEST_SLOTS = 32

Floats = npt.NDArray[np.float64]


class DoesNotFit(ConfigError):
    """The memory that there is cannot hold the tables, whatever kernel each has."""


@dataclass(frozen=True)
class Tiers:
    """What tables may take of each rank's device and host memory and of its SSD, in bytes."""

    device: int
    host: int
    ssd: int = 0


def cache_bytes(rows: int, row_bytes: int, cached_rows: int) -> int:
    """What a table of ``rows`` behind a device cache, or none, takes of the device, its state left out."""
    return cached_rows * (row_bytes + _SLOT_BYTES) + rows * _ROW_BYTES if cached_rows else 0


@dataclass(frozen=True)
class TableDemand:
    """One table as placement sees it: V rows, and for each the share of steps that look it up, ``fetches``.

    ``shares``: the part of the table that each rank holds, summing to 1. ``state_bytes`` of a row's optimizer state
    stay on the device with any kernel when ``state_on_device``, as FBGEMM does with row-wise Adagrad's.
    """

    fetches: Floats
    weight_bytes: int
    state_bytes: int
    state_on_device: bool
    shares: Sequence[float]

    @cached_property
    def served(self) -> Floats:
        """Fetches of the n hottest rows together, for n = 0 … V."""
        return np.concatenate([[0.0], np.cumsum(np.sort(self.fetches)[::-1])])

    @property
    def whole_bytes(self) -> int:
        return len(self.fetches) * (self.weight_bytes + self.state_bytes)

    def device_bytes(self, rows: int) -> int:
        """With ``rows`` of the table on the device: all of them, some in a cache, or none."""
        if rows == len(self.fetches):
            return self.whole_bytes
        state = len(self.fetches) * self.state_bytes if self.state_on_device else 0
        return state + cache_bytes(len(self.fetches), self.weight_bytes, rows)

    def host_bytes(self, rows: int) -> int:
        """What is in host memory, or on SSD, with ``rows`` on the device: nothing, or every row's weights."""
        if rows == len(self.fetches):
            return 0
        return self.whole_bytes - (len(self.fetches) * self.state_bytes if self.state_on_device else 0)

    def coverage(self, rows: int) -> float:
        """Share of the fetches that go to the ``rows`` hottest rows."""
        return float(self.served[rows] / max(self.served[-1], 1e-300))

    def missed(self, rows: int) -> float:
        """Fetches that ``rows`` on the device do not serve, per byte of the table."""
        return float((self.served[-1] - self.served[rows]) / self.whole_bytes)


@dataclass(frozen=True)
class Placement:
    """A table's kernel; ``cache_load_factor`` is the cached part of its rows, ``coverage`` the share of its fetches
    that go to as many of its hottest rows."""

    kernel: str
    cache_load_factor: float | None
    coverage: float


@dataclass
class _Budget:
    """Bytes left on each rank."""

    left: Floats
    taken: dict[str, int] = field(default_factory=dict)

    def take(self, name: str, size: int, shares: Sequence[float]) -> bool:
        """Let table ``name`` take ``size`` bytes in all, instead of what it had; False when a rank has not as much."""
        left = self.left - (size - self.taken.get(name, 0)) * np.asarray(shares)
        if (left < 0).any():
            return False
        self.left, self.taken[name] = left, size
        return True


def _budget(demands: Mapping[str, TableDemand], size: int) -> _Budget:
    return _Budget(np.full(len(next(iter(demands.values())).shares), float(size)))


def step_fetches(lookups: Floats, num_steps: float) -> Floats:
    """Share of steps in which a row is looked up at least once, from its ``lookups`` in ``num_steps`` steps.

    A step fetches a row once, however often it looks it up. As if lookups fell on steps independently (Poisson), which
    overrates how many rows a step fetches by up to 15 %, and is within 3 points of the share of them that are among
    the hottest (measured on two logs, docs/tiers.md).
    """
    return -np.expm1(-lookups / num_steps)


def place_tables(demands: Mapping[str, TableDemand], tiers: Tiers) -> dict[str, Placement]:
    """The memory of every table by the five rules of docs/tiers.md, given what each rank may take of each tier.

    A pure function. ``DoesNotFit`` when state alone does not fit (rule 1), or when host memory and SSD cannot hold what
    is not wholly on the device.
    """
    budget = _budget(demands, tiers.device)
    for name, demand in demands.items():
        if not budget.take(name, demand.device_bytes(0), demand.shares):
            raise DoesNotFit(f"sparse.device_memory={tiers.device} cannot hold the optimizer state of table {name!r} "
                             f"({demand.device_bytes(0)} bytes over its ranks), which stays on the device with any "
                             "kernel; use more ranks, sparse.optimizer=sgd, or more memory")
    rows = _rows_on_device(demands, budget)
    on_ssd = _tables_on_ssd(demands, rows, tiers)
    for name, demand in demands.items():
        if name not in on_ssd and rows[name] < len(demand.fetches) and demand.coverage(rows[name]) < MIN_COVERAGE:
            rows[name] = 0
            budget.take(name, demand.device_bytes(0), demand.shares)
    for name in on_ssd:
        rows[name] = max(rows[name], min(_FEWEST_SLOTS, len(demands[name].fetches)))
        if not budget.take(name, demands[name].device_bytes(rows[name]), demands[name].shares):
            raise DoesNotFit(f"sparse.device_memory={tiers.device} cannot hold what FBGEMM keeps there of table "
                             f"{name!r} on SSD ({demands[name].device_bytes(rows[name])} bytes over its ranks); use "
                             "more ranks or more memory")
    return {name: _placement(demand, rows[name], name in on_ssd) for name, demand in demands.items()}


def _tables_on_ssd(demands: Mapping[str, TableDemand], rows: Mapping[str, int], tiers: Tiers) -> list[str]:
    """Rule 4: of the tables that are not wholly on the device, those that host memory has no room for."""
    host, ssd, on_ssd = _budget(demands, tiers.host), _budget(demands, tiers.ssd), []
    for name, demand in sorted(demands.items(), key=lambda item: -item[1].missed(rows[item[0]])):
        size = demand.host_bytes(rows[name])
        if host.take(name, size, demand.shares):
            continue
        # FBGEMM's tables on SSD know row-wise Adagrad alone of the rules there are here.
        if not demand.state_on_device or not ssd.take(name, size, demand.shares):
            on_host = sum(np.asarray(one.shares) * one.host_bytes(rows[each]) for each, one in demands.items())
            needed, more = f"{np.max(on_host):.0f} bytes of host memory", ""
            if tiers.ssd:
                needed, more = f"{needed} or SSD", f" and {tiers.ssd}"
            remedy = "use more ranks, more memory or smaller sparse.dims"
            if tiers.ssd and not demand.state_on_device:
                remedy += ", or sparse.optimizer=rowwise_adagrad, without which nothing lies on SSD"
            raise DoesNotFit(f"tables that {tiers.device} bytes of device memory cannot hold need {needed} on a rank, "
                             f"there are {tiers.host}{more}; {remedy}")
        on_ssd.append(name)
    return on_ssd


def _placement(demand: TableDemand, rows: int, on_ssd: bool) -> Placement:
    factor = math.floor(rows / len(demand.fetches) * 1e6) / 1e6
    if on_ssd:
        return Placement("key_value", max(1e-6, factor), demand.coverage(rows))
    if rows == len(demand.fetches):
        return Placement("fused", None, 1.0)
    return Placement("fused_uvm_caching" if rows else "fused_uvm", factor or None, demand.coverage(rows))


def _rows_on_device(demands: Mapping[str, TableDemand], budget: _Budget) -> dict[str, int]:
    """Rules 2 and 3: the number of rows of each table that get a place."""
    rows = dict.fromkeys(demands, 0)
    open_ = set(demands)
    blocks = [(-density, name, upto) for name, demand in demands.items() for density, upto in _blocks(demand)]
    for _, name, upto in sorted(blocks):
        if name not in open_:
            continue
        demand = demands[name]
        num_rows = len(demand.fetches)
        if upto >= WHOLE_SHARE * num_rows or demand.device_bytes(upto) >= demand.whole_bytes:
            open_.discard(name)
            if budget.take(name, demand.whole_bytes, demand.shares):
                rows[name] = num_rows
                continue
            upto = min(upto, num_rows - 1)
        if budget.take(name, demand.device_bytes(upto), demand.shares):
            rows[name] = upto
        else:
            open_.discard(name)
    return rows


def _blocks(demand: TableDemand) -> list[tuple[float, int]]:
    """Rows from hot to cold, in at most 512 blocks that grow with their distance from the hottest.

    (Fetches per byte in the block, rows up to its end.)
    """
    num_rows = len(demand.fetches)
    ends = np.unique(np.geomspace(1, num_rows, min(num_rows, _MAX_BLOCKS)).round().astype(np.int64))
    starts = np.concatenate([[0], ends[:-1]])
    density = (demand.served[ends] - demand.served[starts]) / (ends - starts) / (demand.weight_bytes + _SLOT_BYTES)
    return list(zip(density.tolist(), ends.tolist(), strict=True))


def place_equally(tables: Iterable[TableConfig], fetches: Mapping[str, Floats], config: SparseConfig,
                  world_size: int, tiers: Tiers) -> dict[str, Placement]:
    """Placement before it is known which rank holds what: every rank an equal part of every table."""
    shares = [1 / world_size] * world_size
    return place_tables({table.name: _demand(table.embedding_dim, fetches[table.name], shares, config)
                         for table in tables}, tiers)


def apply_placement(tables: Sequence[TablePlan], fetches: Mapping[str, Floats], config: SparseConfig,
                    world_size: int, tiers: Tiers) -> list[TablePlan]:
    """Tables that have their ranks, with the kernels that ``place_tables`` gives them; replicated ones keep theirs."""
    demands = {table.table: _demand(table.dim, fetches[table.table], _shares(table, world_size), config)
               for table in tables if table.shards}
    replicated = sum(table.weight_bytes + table.optimizer_bytes for table in tables if not table.shards)
    places = place_tables(demands, replace(tiers, device=tiers.device - replicated)) if demands else {}
    return [table.model_copy(update={
        "kernel": place.kernel, "cache_load_factor": place.cache_load_factor, "cache_policy": config.cache_policy,
        "coverage": round(place.coverage, 4)}) if (place := places.get(table.table)) else table for table in tables]


def _demand(dim: int, fetches: Floats, shares: Sequence[float], config: SparseConfig) -> TableDemand:
    return TableDemand(fetches, dim * FLOAT_BYTES, state_bytes(config.optimizer, dim),
                       config.optimizer == "rowwise_adagrad", shares)


def _shares(table: TablePlan, world_size: int) -> list[float]:
    shares = [0.0] * world_size
    for shard in table.shards:
        shares[shard.rank] += shard.sizes[0] * shard.sizes[1] / (table.rows * table.dim)
    return shares


def tiers_of(hardware: Hardware, config: SparseConfig) -> Tiers:
    """``sparse.device_memory``, or half of a GPU, the rest being the tower's; all of a CPU's part of its host."""
    half = hardware.device_bytes // (2 if hardware.device == "cuda" else 1)
    return Tiers(config.device_memory or half, hardware.host_bytes_per_rank, hardware.ssd_bytes_per_rank)
