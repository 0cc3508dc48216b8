"""Comparing searches, asking "what if", and finding the smallest single change that makes a job fit."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from longer_rec.errors import ConfigError
from longer_rec.model.longer import TowerConfig
from longer_rec.plan.scenario import Outcome, Scenario, solve
from longer_rec.plan.topology import MAX_RANKS, SSD_BW, check_ranks, parse_bytes
from longer_rec.report.numbers import format_bytes
from longer_rec.sparse.open_ids import BUCKETS
from longer_rec.sparse.options import Choice, allowed_types, splittable
from longer_rec.sparse.placement import DoesNotFit
from longer_rec.sparse.planfile import FLOAT_BYTES
from longer_rec.sparse.search import Space
from longer_rec.sparse.tables import DIM_MULTIPLE, TableConfig

# Axes that are numbers: what they change, of which type, and the most that is planned for.
_NUMBERS: Mapping[str, tuple[str, type[int] | type[float], int]] = {
    "gpus": ("world_size", int, MAX_RANKS), "batch": ("batch_requests", int, 1 << 16),
    "L": ("max_events", int, 1 << 20), "rows": ("row_factor", float, 1 << 20)}
AXES = (*_NUMBERS, "hbm", "kernels", "constraints")
_TIB_BITS = 40
# GPUs that are sold, in GiB.
_GPU_GIB = (16, 24, 32, 40, 48, 64, 80, 96, 141, 180, 192, 288)


def parse_list(option: str, text: str, known: Iterable[str] = ()) -> list[str]:
    """Words between commas, each once and, where some are given, one of ``known``."""
    words = text.split(",")
    for word in words:
        twice = words.count(word) > 1
        if not word or twice or (known and word not in known):
            raise ConfigError(f"{option} {text!r}: {word!r} is {'given twice' if twice else 'unknown'}; use "
                              f"{' or '.join(known) or 'each value once'}")
    return words


def compare(scenario: Scenario, proposers: Sequence[str], partitioners: Sequence[str]) -> list[Outcome]:
    """Every proposer with every partitioner over one search space; the best first, ties as they were asked for.

    The best is the one that fits with the shortest step, to a part in a thousand, then with the least on its fullest
    rank.
    """
    try:
        space = scenario.space()
    except DoesNotFit:
        space = None
    outcomes = [solve(scenario, proposer, partitioner, space) for proposer in proposers for partitioner in partitioners]
    return sorted(outcomes, key=lambda one: (not one.fits, float(f"{one.total_s:.3g}") if one.fits else 0, one.fullest))


@dataclass(frozen=True)
class Sweep:
    """The axes of ``--sweep``, and for each combination of their values the scenario that it asks for."""

    names: tuple[str, ...]
    points: tuple[tuple[tuple[str, ...], Scenario], ...]


def parse_sweep(texts: Sequence[str], scenario: Scenario) -> Sweep:
    """``gpus=8,16`` and its like, one or two of them; ``ConfigError`` for any point that cannot be planned."""
    pairs = [text.partition("=")[::2] for text in texts]
    names = tuple(name for name, _ in pairs)
    if len(names) > 2 or len(set(names)) < len(names):
        raise ConfigError(f"--sweep {' --sweep '.join(texts)}: use one or two different axes")
    for name, tail in pairs:
        if name not in AXES or not tail:
            raise ConfigError(f"--sweep '{name}={tail}' cannot be read; use one of {', '.join(AXES)} with values, such "
                              "as gpus=8,16,32")
    axes = [parse_list(f"--sweep {name}", tail) for name, tail in pairs]
    points = []
    for values in itertools.product(*axes):
        changed = scenario
        for name, value in zip(names, values, strict=True):
            changed = _change(changed, name, value)
        try:
            changed.check()
        except ConfigError as error:
            raise ConfigError(f"--sweep {', '.join(map('='.join, zip(names, values, strict=True)))}: {error}") from None
        points.append((values, changed))
    return Sweep(names, tuple(points))


def _change(scenario: Scenario, name: str, value: str) -> Scenario:
    where = f"--sweep {name}={value}"
    if name == "hbm":
        return scenario.change(memory_bytes=parse_bytes(value, where))
    if name == "kernels":
        return scenario.with_choice(scenario.tables, kernels=(value,))
    if name == "constraints":  # for every table that is large enough for one of them
        for table in scenario.tables:
            types = splittable(value.split("+"), table.num_embeddings, scenario.hardware.world_size)
            scenario = scenario.with_choice([table], sharding_types=types)
        return scenario
    key, convert, most = _NUMBERS[name]
    try:
        number = convert(value)
    except ValueError:
        number = 0
    if not 0 < number <= most:
        bounds = f"a whole number from 1 to {most}" if convert is int else f"a number above 0, up to {most}"
        raise ConfigError(f"{where} cannot be planned for; use {bounds}")
    changed = scenario.change(**{key: number})
    check_ranks(changed.hardware, where)
    return changed


@dataclass(frozen=True)
class Need:
    """What the least demanding way to place a table wants: in all, and of the rank with its largest shard."""

    table: str
    total: int
    largest_shard: int
    host: int
    ssd: int


def needs(space: Space) -> list[Need]:
    """Each table's least need, largest first."""
    least: dict[str, Need] = {}
    for option in space.options:
        sizes = space.sizes[id(option)]
        need = Need(option.name, sum(size.device for size in sizes), max(size.device for size in sizes),
                    sum(size.host for size in sizes), sum(size.ssd for size in sizes))
        old = least.get(option.name, need)
        least[option.name] = min(old, need, key=lambda one: (one.largest_shard, one.total))
    return sorted(least.values(), key=lambda need: -need.total)


@dataclass(frozen=True)
class Remedy:
    """A single change after which the job fits: planned again, with this outcome."""

    text: str
    outcome: Outcome


def remedies(scenario: Scenario) -> list[Remedy]:
    """The smallest change of each kind that makes the job fit, each verified by planning."""
    return [found for ladder in _ladders(scenario) if (found := _smallest(ladder)) is not None]


def _smallest(steps: Sequence[tuple[str, Scenario]]) -> Remedy | None:
    """The first step that fits, where those after it fit too: in strides that double, then by halves."""
    low, high, best = -1, 0, None  # low does not fit, high does or is not tried
    while best is None and low < len(steps) - 1:
        high = min(high, len(steps) - 1)
        best = _tried(steps[high])
        low, high = (low, high) if best else (high, 2 * high + 1)
    while best is not None and high - low > 1:
        middle = (low + high) // 2
        if (found := _tried(steps[middle])) is not None:
            best, high = found, middle
        else:
            low = middle
    return best


def _tried(step: tuple[str, Scenario]) -> Remedy | None:
    text, changed = step
    outcome = solve(changed)
    return Remedy(text, outcome) if outcome.fits else None


def _ladders(scenario: Scenario) -> Iterator[list[tuple[str, Scenario]]]:
    """Changes of one kind, from small to large, each with its name."""
    hardware, data = scenario.hardware, scenario.job.data
    on_gpu, have = hardware.device == "cuda", hardware.device_bytes
    fewest = scenario.job.model.fewest_events if isinstance(scenario.job.model, TowerConfig) else 1
    for key, number, least in (("batch_requests", data.batch_requests, 1), ("max_events", data.max_events, fewest)):
        step = max(1, number // 32)
        yield [(f"data.{key}={size} instead of {number}", scenario.change(**{key: size}))
               for size in (*range(number - step, least, -step), least) if size < number]
    sizes = [size << 30 for size in _GPU_GIB] if on_gpu else _grown(have)
    yield [(f"{format_bytes(size)} on each device instead of {format_bytes(have)}",
            scenario.change(memory_bytes=size)) for size in sizes if size > have]
    if have <= scenario.reserved_bytes:
        return  # no other place for the tables can help
    most = min(MAX_RANKS, 64 * hardware.world_size, scenario.job.elastic.num_workers or MAX_RANKS)
    yield [(f"{ranks} ranks instead of {hardware.world_size}", scenario.change(world_size=ranks))
           for ranks in range(hardware.world_size + 1, most + 1)
           if (ranks <= hardware.ranks_per_host or ranks % hardware.ranks_per_host == 0)
           and not (scenario.job.sparse.managed and BUCKETS % ranks)]
    if on_gpu:
        yield [(f"{format_bytes(size)} on each host instead of {format_bytes(hardware.host_bytes)}",
                scenario.change(host_bytes=size)) for size in _grown(hardware.host_bytes)]
        yield from _ssd_ladders(scenario)
    yield from _table_ladders(scenario)


def _table_ladders(scenario: Scenario) -> Iterator[list[tuple[str, Scenario]]]:
    """Other places for the largest tables; those of open ids stay as they are: by rows, on the device."""
    tables = sorted((table for table in scenario.tables if table.name not in scenario.job.sparse.managed),
                    key=lambda table: -table.num_embeddings * table.embedding_dim)
    if not tables:
        return
    dim = tables[0].embedding_dim
    columns = [dim >> power for power in range(1, 8) if dim % (DIM_MULTIPLE << power) == 0]
    device = scenario.hardware.device
    if not allowed_types(tables[0].name in scenario.pooled_tables, scenario.job.sparse, torch.device(device),
                         scenario.job.elastic.is_strict)["column_wise"]:
        yield [(f"table {tables[0].name!r} column_wise in shards of {width} columns", scenario.with_choice(
            tables[:1], sharding_types=("column_wise",), kernels=(), min_columns=width)) for width in columns]
    if device == "cuda" and scenario.job.sparse.placement is None:
        names = _names(tables)
        places = {"fused": "on the device", "fused_uvm_caching": "in host memory behind a device cache",
                  "fused_uvm": "in host memory"}
        for kernel, where in places.items():
            yield [(f"{name} {where} ({kernel})", scenario.with_choice(tables[:count], kernels=(kernel,)))
                   for count, name in enumerate(names, start=1) if kernel != scenario.job.sparse.kernel]
        if scenario.job.sparse.optimizer == "rowwise_adagrad" and scenario.job.sparse.kernel != "key_value":
            yield [_to_ssd(scenario, tables[:count], name) for count, name in enumerate(names, start=1)]


def _names(tables: Sequence[TableConfig]) -> list[str]:
    """What the first table, the first two, and so on are called."""
    return [", ".join(table.name for table in tables[:count]) if count < 4 else f"the {count} largest tables"
            for count in range(1, len(tables) + 1)]


def _to_ssd(scenario: Scenario, tables: Sequence[TableConfig], name: str) -> tuple[str, Scenario]:
    """These tables on SSD; where there is none, with as many whole TB in each host as hold them all."""
    changed, more = scenario.with_choice(tables, kernels=("key_value",)), ""
    if not scenario.hardware.ssd_bytes:
        held = sum(table.num_embeddings * table.embedding_dim * FLOAT_BYTES for table in tables)
        terabytes = -(-held >> _TIB_BITS)  # rounded up
        changed, more = changed.change(ssd_bytes=terabytes << _TIB_BITS, ssd_bw=SSD_BW), f"ssd={terabytes}TB, and "
    return f"{more}{name} on SSD (key_value, not trained by this package)", changed


def _ssd_ladders(scenario: Scenario) -> Iterator[list[tuple[str, Scenario]]]:
    """More SSD for those that ask for it."""
    have, sparse = scenario.hardware.ssd_bytes, scenario.job.sparse
    if have:
        yield [(f"{format_bytes(size)} of SSD on each host instead of {format_bytes(have)}",
                scenario.change(ssd_bytes=size)) for size in _grown(have)]
    elif sparse.placement is not None and sparse.optimizer == "rowwise_adagrad":
        yield [(f"ssd={1 << power}TB on each host (tables on SSD are not trained by this package)",
                scenario.change(ssd_bytes=1 << power + _TIB_BITS, ssd_bw=SSD_BW)) for power in range(11)]


def _grown(size: int) -> list[int]:
    """A quarter more each, up to a few thousand times as much."""
    return [size * 5 ** power // 4 ** power for power in range(1, 40)]


def parse_constraints(texts: Sequence[str]) -> Mapping[str, Choice]:
    """``item=row_wise+fused_uvm`` and its like: sharding types, a kernel and ``columns:N`` of one table."""
    choices: dict[str, Choice] = {}
    for text in texts:
        table, _, tail = text.partition("=")
        words = tail.split("+")
        if not table or not all(words):
            raise ConfigError(f"--constrain {text!r} cannot be read; use TABLE=TYPE+KERNEL, such as "
                              "item=row_wise+fused")
        if table in choices:
            raise ConfigError(f"--constrain {text!r}: table {table!r} has a constraint already; say all of a table in "
                              "one, such as item=row_wise+fused")
        if twice := next((word for word in words if words.count(word) > 1), None):
            raise ConfigError(f"--constrain {text!r} says {twice} twice; keep one of them")
        choice = Choice()
        for word in words:
            columns = word.removeprefix("columns:")
            if columns != word:
                if not columns.isdecimal() or int(columns) < 1 or int(columns) % DIM_MULTIPLE:
                    raise ConfigError(f"--constrain {text!r}: {word} is not a positive multiple of {DIM_MULTIPLE}; "
                                      f"use one, such as columns:{4 * DIM_MULTIPLE}")
                if choice.min_columns:
                    raise ConfigError(f"--constrain {text!r} gives columns: more than once; keep one of them")
                choice = replace(choice, min_columns=int(columns))
            elif word.startswith("fused") or word in ("dense", "key_value"):
                if choice.kernels:
                    raise ConfigError(f"--constrain {text!r} names two kernels, {choice.kernels[0]} and {word}; a "
                                      "table has one: keep one of them")
                choice = replace(choice, kernels=(word,))
            else:
                choice = replace(choice, sharding_types=(*choice.sharding_types, word))
        choices[table] = choice
    return choices
