"""What the planner found, as tables of text: for the terminal, and for the page."""

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from longer_rec.plan.scenario import KINDS, Outcome
from longer_rec.plan.whatif import Need, Remedy, Sweep
from longer_rec.report.numbers import MISSING, format_bytes, format_count, format_kernel, format_ranks
from longer_rec.report.terminal import make_table
from longer_rec.sparse.planfile import SparsePlan, TablePlan

Grid = dict[str, Any]
# What tables have behind the devices, as it is told.
_BEHIND = {"host": "on host", "ssd": "on SSD"}
# Fields of a table that a comparison tells.
_TOLD = frozenset(("rows", "dim", "pooled", "sharding_type", "kernel", "ranks", "cache_load_factor", "cache_policy"))


def make_grid(head: str, numeric: str, rows: Sequence[Sequence[str]], **more: Any) -> Grid:
    """Column titles, those that hold numbers, rows of text, and ``own``, the row to mark."""
    return {"head": [(name, name in numeric.split("|")) for name in head.split("|")], "rows": rows, **more}


def print_grid(console: Console, title: str, grid: Grid) -> None:
    """Numbers are never cut; text folds where there is no room for it."""
    table = make_table(None, [name for name, _ in grid["head"]], [name for name, numeric in grid["head"] if numeric],
                       space=1 + (console.width > 100))
    table.pad_edge, table.collapse_padding = False, True
    for number, row in enumerate(grid["rows"]):
        table.add_row(*map(escape, row), style="bold" if number == grid.get("own") else None)
    console.print(f"[bold]{title}[/]", table, sep="\n")


def searches_grid(outcomes: Sequence[Outcome]) -> Grid:
    """Every search, the chosen one first."""
    rows = []
    for one in outcomes:
        found = one.found
        measures = [format_bytes(one.fullest), f"{one.imbalance:.2f}", _ms(one.total_s), f"{found.seconds:.2f} s"] if (
            one.fits) else ["no plan fits" if found.num_proposals else "proposed nothing", *[MISSING] * 3]
        rows.append([one.proposer, one.partitioner, *measures, format_count(found.num_proposals),
                     format_count(found.num_partitioned)])
    numeric = "fullest rank|max/mean|step ms|planned in|proposals|placed"
    return make_grid(f"proposer|partitioner|{numeric}", numeric, rows, own=0)


def parts_grid(outcome: Outcome) -> Grid:
    """Where the estimated time of a step goes."""
    return make_grid("part|ms", "ms", [[part, _ms(seconds)] for part, seconds in outcome.step_s.items()])


def tables_grids(outcome: Outcome) -> list[tuple[str, Grid]]:
    """The plan, and what it costs: largest table first; bytes of all its shards, times of its slowest."""
    assert outcome.found.plan is not None
    plan, cost = [], []
    behind = [tier for tier, held in outcome.behind.items() if tier == "host" or any(held)]
    for table in sorted(outcome.found.plan.tables, key=lambda one: -one.weight_bytes):
        shards = [shard for shard in outcome.found.placed if shard.table == table.table]
        sizes = [sum(getattr(shard.size, kind) for shard in shards)
                 for kind in ("weights", "optimizer", "exchange", *behind)]
        times = [max(shard.seconds[f"forward{what}"] + shard.seconds[f"backward{what}"] for shard in shards)
                 for what in ("", "_exchange")]
        plan.append([table.table, format_count(table.rows), str(table.dim), table.sharding_type,
                     format_kernel(table.model_dump()), format_ranks(table.ranks)])
        cost.append([table.table, *map(format_bytes, sizes), *map(_ms, times)])
    numeric = "|".join(["weights", "optimizer", "exchange", *(_BEHIND[tier] for tier in behind), "lookup ms", "net ms"])
    return [("Plan", make_grid("table|rows|dim|sharding|kernel|ranks", "rows|dim", plan)),
            ("What its tables cost", make_grid(f"table|{numeric}", numeric, cost))]


def bytes_grid(outcome: Outcome) -> Grid:
    """Bytes by kind: on the mean rank and on the fullest one."""
    by_rank = list(zip(*outcome.held.values(), strict=True))
    fullest = max(by_rank, key=sum)
    rows = []
    for number, kind in enumerate(KINDS):
        rows.append([kind, format_bytes(sum(outcome.held[kind]) / len(by_rank)), format_bytes(fullest[number])])
        if kind == "activations":
            rows += [[f"  {part}", "", format_bytes(size)]
                     for part, size in outcome.scenario.activation_parts.items() if size]
    rows.append(["in all", format_bytes(sum(map(sum, by_rank)) / len(by_rank)), format_bytes(sum(fullest))])
    rows.append(["there is", "", format_bytes(outcome.scenario.hardware.device_bytes)])
    rows.append(["kept free", "", format_bytes(outcome.scenario.headroom_bytes)])
    own = len(rows) - 3
    for tier, sizes in outcome.behind.items():
        if any(sizes):
            there = getattr(outcome.scenario.hardware, f"{tier}_bytes_per_rank")
            rows += [[_BEHIND[tier], format_bytes(sum(sizes) / len(sizes)), format_bytes(max(sizes))],
                     ["there is", "", format_bytes(there)]]
    return make_grid("kind|mean rank|fullest rank", "mean rank|fullest rank", rows, own=own)


def needs_grid(needs: Sequence[Need], free: int) -> Grid:
    """What each table needs at least, and what there is for it."""
    behind = [tier for tier in _BEHIND if tier == "host" or any(getattr(need, tier) for need in needs)]
    rows = [[need.table, format_bytes(need.total), format_bytes(need.largest_shard),
             *(format_bytes(getattr(need, tier)) for tier in behind),
             "too large for a rank" if need.largest_shard > free > 0 else ""] for need in needs]
    numeric = "|".join(["needs", "largest shard", *(_BEHIND[tier] for tier in behind)])
    return make_grid(f"table|{numeric}|", numeric, rows)


def remedies_grid(remedies: Sequence[Remedy]) -> Grid:
    rows = [[one.text, format_bytes(one.outcome.fullest), _ms(one.outcome.total_s)] for one in remedies]
    return make_grid("change|fullest rank|step ms", "fullest rank|step ms", rows)


def sweep_section(sweep: Sweep, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The table and the lines of a sweep; a line for each value of the second axis."""
    points = [(values, one) for (values, _), one in zip(sweep.points, outcomes, strict=True)]
    rows = [[*values, *([format_bytes(one.fullest), format_bytes(one.scenario.hardware.device_bytes), _ms(one.total_s),
                         format_count(one.requests_per_s), f"{one.imbalance:.2f}"] if one.fits else
                        ["no plan fits", format_bytes(one.scenario.hardware.device_bytes), *[MISSING] * 3])]
            for values, one in points]
    series: dict[str, list[Outcome]] = {}
    for values, one in points:
        series.setdefault(f"{sweep.names[1]} {values[1]}" if len(sweep.names) > 1 else "", []).append(one)
    limits = [[one.scenario.hardware.device_bytes for one in ones] for ones in series.values()]
    numeric = "fullest rank|of|step ms|requests/s|max/mean"
    return {
        "axis": " × ".join(sweep.names), "values": list(dict.fromkeys(values[0] for values, _ in points)),
        "bytes": {name: [one.fullest if one.fits else math.nan for one in ones] for name, ones in series.items()},
        "ms": {name: [1000 * one.total_s for one in ones] for name, ones in series.items()},
        "limit": limits[0] if all(each == limits[0] for each in limits) else None,
        "table": make_grid("|".join([*sweep.names, numeric]), numeric, rows)}


def plan_differences(first: SparsePlan, second: SparsePlan) -> list[str]:
    """A line for each thing that differs; none for plans that do the same."""
    old, new = ({**{name: getattr(plan, name) for name in ("world_size", "ranks_per_host", "device")},
                 **{f"table {table.table!r}": table for table in plan.tables}} for plan in (first, second))
    lines = []
    for key in dict.fromkeys((*old, *new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, TablePlan) and isinstance(after, TablePlan):
            changed = [name for name in TablePlan.model_fields if getattr(before, name) != getattr(after, name)]
            # Blocks follow from ranks and type, unless they are all that differs.
            told = [f"{name} {_told(before, name)} -> {_told(after, name)}" for name in changed if name in _TOLD]
            lines += [f"{key}: {', '.join(told or ['the same ranks hold other blocks of it'])}"] if changed else []
        elif before is None or after is None:
            lines.append(f"{key}: only in the {'second' if before is None else 'first'}")
        elif before != after:
            lines.append(f"{key}: {before} -> {after}")
    return lines


def _told(table: TablePlan, name: str) -> str:
    value = getattr(table, name)
    return format_ranks(value) if name == "ranks" else str(value)


def _ms(seconds: float) -> str:
    return MISSING if math.isnan(seconds) else f"{1000 * seconds:.{0 if seconds >= 1 else 3 - (seconds >= 0.01)}f}"
