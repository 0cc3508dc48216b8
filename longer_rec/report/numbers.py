"""Numbers as people read them, the same in the terminal and in the report."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

MISSING: Final = "–"

# How many decimals tell two models apart: AUC and losses to 1e-4, ratios to 1e-3.
_METRIC_DECIMALS: Final = {"auc": 4, "gauc": 4, "logloss": 4, "ne": 4, "calibration": 3, "base_rate": 4, "loss": 4}

METRIC_TITLES: Final = {"auc": "AUC", "gauc": "GAUC", "logloss": "LogLoss", "ne": "NE", "calibration": "Calibration",
                        "base_rate": "Base rate", "loss": "Loss"}

# The metrics of a closing table, in the order of its columns.
RESULT_METRICS: Final = ("auc", "gauc", "logloss", "ne", "calibration")


def is_number(value: object) -> bool:
    """A finite or infinite number; NaN, text and None are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def format_metric(name: str, value: object) -> str:
    """A metric with the decimals that matter for it; a dash where it is NaN or not there."""
    return f"{value:.{_METRIC_DECIMALS.get(name, 4)}f}" if is_number(value) else MISSING


def format_count(value: float) -> str:
    """Thousands in groups; small fractions keep three significant digits."""
    if value != int(value) and abs(value) < 100:
        return f"{value:.3g}"
    return f"{value:,.0f}"


def format_bytes(num_bytes: float) -> str:
    """Binary units with three significant digits: 512 B, 1.5 KiB, 20.3 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(num_bytes) < 1000 or unit == "PiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.3g} {unit}"


def format_duration(seconds: float) -> str:
    """Two units at most: 8.4 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def format_ranks(ranks: Iterable[int]) -> str:
    """Distinct ranks in order: "0–3", or "0, 2"."""
    held = sorted(set(ranks))
    if len(held) > 2 and held == list(range(held[0], held[-1] + 1)):
        return f"{held[0]}–{held[-1]}"
    return ", ".join(map(str, held))


def format_kernel(table: Mapping[str, Any]) -> str:
    """A table's kernel and, of one behind a cache, the cached part of its rows and the hit rate to expect."""
    text = str(table.get("kernel", MISSING))
    if table.get("cache_load_factor") is not None:
        text += f" {table['cache_load_factor']:.2%}"
    if table.get("expected_hit_rate"):
        text += f", hits {table['expected_hit_rate'][table['cache_policy']]:.0%}"
    return text


def format_clock(seconds: float) -> str:
    """A running clock: 0:07, 3:20, 2:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def best_value(metric: str, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The best of the rows: highest AUC and GAUC, lowest loss and entropy, calibration nearest to 1."""
    values: list[float] = [row[metric] for row in rows if is_number(row.get(metric))]
    distance: Mapping[str, Callable[[float], float]] = {
        "auc": lambda value: -value, "gauc": lambda value: -value, "calibration": lambda value: abs(value - 1.0)}
    return min(values, key=distance.get(metric, float), default=None)


def result_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Titles of the metrics that a row has; row by row their text, and whether it is the best of several."""
    metrics = [name for name in RESULT_METRICS if any(is_number(row.get(name)) for row in rows)]
    best = {name: best_value(name, rows) if len(rows) > 1 else None for name in metrics}
    return [METRIC_TITLES[name] for name in metrics], [
        [(format_metric(name, row.get(name)), best[name] is not None and row.get(name) == best[name])
         for name in metrics] for row in rows]
