"""Comparing searches, asking "what if", and finding the smallest single change that makes a job fit."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch

from longer_rec.data.history import Dataset
from longer_rec.errors import ConfigError
from longer_rec.job import Job
from longer_rec.model.longer import TowerConfig
from longer_rec.plan.scenario import Outcome, Scenario, solve
from longer_rec.plan.topology import parse_bytes
from longer_rec.sparse.options import Choice, allowed_types, splittable
from longer_rec.sparse.planfile import FLOAT_BYTES
from longer_rec.sparse.search import KERNELS, PARTITIONERS, PROPOSERS, Space
from longer_rec.sparse.tables import DIM_MULTIPLE, ShardingName

_MAX_RANKS = 4096
AXES = ("gpus", "hbm", "batch", "L", "rows", "kernels", "constraints")


def compare(scenario: Scenario, proposers: Sequence[str], partitioners: Sequence[str]) -> list[Outcome]:
    """Every proposer with every partitioner over one search space; the best first, ties as they were asked for.

    The best is the one that fits with the shortest step, to a part in a thousand, then with the least on its fullest
    rank. A grid search of too many combinations proposes nothing, and is last.
    """
    for name, known in [*((one, PROPOSERS) for one in proposers), *((one, PARTITIONERS) for one in partitioners)]:
        if name not in known:
            raise ConfigError(f"{name!r} is unknown; use {', '.join(known)}")
    space = scenario.space()
    outcomes = [solve(scenario, proposer, partitioner, space) for proposer in proposers for partitioner in partitioners]
    return sorted(outcomes, key=lambda one: (not one.fits, float(f"{one.total_s:.3g}") if one.fits else 0, one.fullest))


@dataclass(frozen=True)
class Axis:
    """One ``--sweep``: the name, and each value as text with the change it makes."""

    name: str
    values: tuple[tuple[str, Callable[[Scenario], Scenario]], ...]


def parse_axis(text: str, scenario: Scenario) -> Axis:
    """``gpus=8,16`` and its like; ``ConfigError`` for what is no axis or no value of it."""
    name, _, tail = text.partition("=")
    if name not in AXES or not tail:
        raise ConfigError(f"--sweep {text!r} cannot be read; use one of {', '.join(AXES)} with values, such as "
                          "gpus=8,16,32")
    return Axis(name, tuple((value, _change(name, value, scenario)) for value in tail.split(",")))


def _change(name: str, value: str, scenario: Scenario) -> Callable[[Scenario], Scenario]:
    where = f"--sweep {name}={value}"
    if name == "hbm":
        size = parse_bytes(value, where)
        return lambda one: one.change(device_bytes=size)
    if name == "kernels":
        if value not in KERNELS:
            raise ConfigError(f"{where} is no kernel; use one of {', '.join(KERNELS)}")
        return lambda one: one.with_choice(one.tables, kernels=(value,))
    if name == "constraints":
        return lambda one: _of_types(one, value.split("+"))
    try:
        number = float(value) if name == "rows" else int(value)
    except ValueError:
        number = 0
    if number <= 0 or (name == "gpus" and number > _MAX_RANKS):
        raise ConfigError(f"{where} is not a number that can be planned for; use one above 0"
                          + f", up to {_MAX_RANKS}" * (name == "gpus"))
    if name == "gpus":
        if number > scenario.hardware.ranks_per_host and number % scenario.hardware.ranks_per_host:
            raise ConfigError(f"{where} are not whole hosts of {scenario.hardware.ranks_per_host} ranks; use a "
                              "multiple of that")
        return lambda one: _with_ranks(one, int(number))
    key = {"batch": "batch_requests", "L": "max_events", "rows": "row_factor"}[name]
    return lambda one: one.change(**{key: number})


def _with_ranks(scenario: Scenario, ranks: int) -> Scenario:
    num_workers = scenario.job.elastic.num_workers
    if num_workers is not None and ranks > num_workers:
        raise ConfigError(f"{ranks} ranks have nothing to do for elastic.num_workers={num_workers} logical workers; "
                          "use fewer ranks, or more workers")
    return scenario.change(world_size=ranks)


def _of_types(scenario: Scenario, types: list[str]) -> Scenario:
    """These sharding types for every table that is large enough for one of them."""
    ranks = scenario.hardware.world_size
    for table in scenario.tables:
        scenario = scenario.with_choice([table], sharding_types=tuple(splittable(types, table.num_embeddings, ranks)))
    return scenario


def sweep(scenario: Scenario, axes: Sequence[Axis]) -> Iterator[tuple[tuple[str, ...], Outcome]]:
    """The values of each combination, and what a greedy search finds there."""
    for combination in itertools.product(*(axis.values for axis in axes)):
        changed = scenario
        for _, change in combination:
            changed = change(changed)
        yield tuple(value for value, _ in combination), solve(changed)


@dataclass(frozen=True)
class Need:
    """What the least demanding way to place a table wants: in all, and of the rank with its largest shard."""

    table: str
    total: int
    largest_shard: int
    host: int


def needs(space: Space) -> list[Need]:
    """Each table's least need, largest first."""
    least: dict[str, Need] = {}
    for option in space.options:
        sizes = space.sizes[id(option)]
        need = Need(option.name, sum(size.device for size in sizes), max(size.device for size in sizes),
                    sum(size.host for size in sizes))
        if option.name not in least or (need.largest_shard, need.total) < (
                least[option.name].largest_shard, least[option.name].total):
            least[option.name] = need
    return sorted(least.values(), key=lambda need: -need.total)


@dataclass(frozen=True)
class Remedy:
    """A single change after which the job fits: planned again, with this outcome."""

    text: str
    outcome: Outcome


def remedies(scenario: Scenario) -> list[Remedy]:
    """The smallest change of each kind that makes the job fit, each verified by planning."""
    found = []
    for ladder in (_more_ranks, _column_splits, _offloads, _smaller_batches, _shorter_histories):
        for text, changed in ladder(scenario):
            outcome = solve(changed)
            if outcome.fits:
                found.append(Remedy(text, outcome))
                break
    return found


_Ladder = Iterable[tuple[str, Scenario]]


def _more_ranks(scenario: Scenario) -> _Ladder:
    """Host by host at first, then in growing strides: within a tenth of the least number.

    Begins where the tables, cut evenly, would fit; nothing where no number of ranks can help.
    """
    free = scenario.hardware.device_bytes - scenario.reserved_bytes
    if free <= 0:
        return
    step, ranks = scenario.hardware.ranks_per_host, scenario.hardware.world_size
    held = sum(table.num_embeddings * table.embedding_dim for table in scenario.tables) * FLOAT_BYTES
    hosts = max(-(-ranks // step), -(-held // (free * step)) - 1)
    most = min(_MAX_RANKS, 16 * max(ranks, hosts * step), scenario.job.elastic.num_workers or _MAX_RANKS)
    while (hosts := hosts + max(1, hosts // 10)) * step <= most:
        yield f"{hosts * step} ranks instead of {ranks}", scenario.change(world_size=hosts * step)


def _column_splits(scenario: Scenario) -> _Ladder:
    """The largest table in narrower and narrower columns; nothing where column_wise is refused."""
    largest = max(scenario.tables, key=lambda table: table.num_embeddings * table.embedding_dim)
    if allowed_types(largest.name in scenario.pooled_tables, scenario.job.sparse,
                     torch.device(scenario.hardware.device), scenario.job.elastic.is_strict)["column_wise"]:
        return
    columns = largest.embedding_dim if scenario.hardware.device_bytes > scenario.reserved_bytes else 0
    while columns and columns % (2 * DIM_MULTIPLE) == 0:
        columns //= 2
        yield (f"table {largest.name!r} column_wise in shards of {columns} columns",
               scenario.with_choice([largest], sharding_types=("column_wise",), kernels=(), min_columns=columns))


def _offloads(scenario: Scenario) -> _Ladder:
    """The largest table behind host memory, then two, four, ... of them, with a device cache and then without."""
    if scenario.hardware.device == "cpu" or scenario.hardware.device_bytes <= scenario.reserved_bytes:
        return
    tables = sorted(scenario.tables, key=lambda table: -table.num_embeddings * table.embedding_dim)
    for count in [*(1 << power for power in range(len(tables).bit_length()) if 1 << power < len(tables)), len(tables)]:
        for kernel in ("fused_uvm_caching", "fused_uvm"):
            names = ", ".join(table.name for table in tables[:count]) if count <= 3 else f"the {count} largest tables"
            yield f"{names} in host memory ({kernel})", scenario.with_choice(tables[:count], kernels=(kernel,))


def _smaller_batches(scenario: Scenario) -> _Ladder:
    return ((f"data.batch_requests={size} instead of {scenario.job.data.batch_requests}",
             scenario.change(batch_requests=size)) for size in _halves(scenario.job.data.batch_requests))


def _shorter_histories(scenario: Scenario) -> _Ladder:
    model = scenario.job.model
    least = model.fewest_events if isinstance(model, TowerConfig) else 1
    return ((f"data.max_events={size} instead of {scenario.job.data.max_events}", scenario.change(max_events=size))
            for size in _halves(scenario.job.data.max_events) if size >= least)


def _halves(number: int) -> Iterator[int]:
    """Three quarters, a half, three eighths, a quarter, ... down to 1."""
    seen = number
    for power in range(1, number.bit_length() + 1):
        for size in (3 * number >> (power + 1), number >> power):
            if 1 <= size < seen:
                seen = size
                yield size


def configured_choices(job: Job, dataset: Dataset) -> dict[str, Choice]:
    """The sharding types that ``sparse.plan`` names; none for "auto" and for a plan's path, which are what is asked."""
    plan, schema = job.sparse.plan, dataset.schema
    if not isinstance(plan, str):
        return {table: Choice((name,)) for table, name in plan.items()}
    used = {feature.table for feature in (*schema.history_features, *schema.item_features, *schema.user_features)}
    return {table: Choice((plan,)) for table in used if plan in get_args(ShardingName)}


def parse_constraints(texts: Sequence[str]) -> Mapping[str, Choice]:
    """``item=row_wise+fused_uvm`` and its like: sharding types, kernels and ``columns:N`` of one table."""
    choices: dict[str, Choice] = {}
    for text in texts:
        table, separator, tail = text.partition("=")
        if not separator or not tail:
            raise ConfigError(f"--constrain {text!r} cannot be read; use TABLE=TYPE+KERNEL, such as "
                              "item=row_wise+fused_uvm or item=column_wise+columns:16")
        words = tail.split("+")
        columns = next((word.removeprefix("columns:") for word in words if word.startswith("columns:")), None)
        if columns is not None and (not columns.isdigit() or int(columns) < 1 or int(columns) % DIM_MULTIPLE):
            raise ConfigError(f"--constrain {text!r}: columns:{columns} is not a positive multiple of {DIM_MULTIPLE}")
        kernels = tuple(word for word in words if word.startswith("fused") or word in ("dense", "key_value"))
        types = tuple(word for word in words if word not in kernels and not word.startswith("columns:"))
        choices[table] = Choice(types, kernels, int(columns) if columns else None)
    return choices
