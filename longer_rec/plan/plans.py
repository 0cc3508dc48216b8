"""Plans as files: their hash, and what differs between two."""

from longer_rec.config import config_hash
from longer_rec.sparse.planfile import SparsePlan, TablePlan

_FIELDS = ("rows", "dim", "pooled", "sharding_type", "kernel", "ranks", "cache_load_factor")


def plan_hash(plan: SparsePlan) -> str:
    """Twelve digits that change with everything a plan says."""
    return config_hash(plan)[:12]


def plan_differences(first: SparsePlan, second: SparsePlan) -> list[str]:
    """A line for each thing that differs; none for plans that do the same."""
    lines = [f"{name}: {getattr(first, name)} -> {getattr(second, name)}"
             for name in ("world_size", "ranks_per_host", "device") if getattr(first, name) != getattr(second, name)]
    old, new = ({(table.module, table.table): table for table in plan.tables} for plan in (first, second))
    lines += [f"table {name!r}: only in the first" for key in sorted(old.keys() - new.keys()) for name in [key[1]]]
    lines += [f"table {name!r}: only in the second" for key in sorted(new.keys() - old.keys()) for name in [key[1]]]
    for key in sorted(old.keys() & new.keys()):
        changes = _changes(old[key], new[key])
        if changes:
            lines.append(f"table {key[1]!r}: {', '.join(changes)}")
    return lines


def _changes(old: TablePlan, new: TablePlan) -> list[str]:
    changes = [f"{name} {getattr(old, name)} -> {getattr(new, name)}" for name in _FIELDS
               if getattr(old, name, None) != getattr(new, name, None)]
    if not changes and old.shards != new.shards:
        changes.append("the same ranks hold other blocks of it")
    return changes
