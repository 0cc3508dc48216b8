"""Sections made of ``analysis.json``: metrics by history length and activity, calibration, where candidates look."""

from collections.abc import Callable, Sequence
from typing import Final

from longer_rec.report import charts
from longer_rec.report.numbers import format_count, format_metric
from longer_rec.report.page import Section
from longer_rec.report.run_files import Analysis, Bucket, Estimate, Profile

_DIMENSIONS: Final = {"history_length": ("history length", "events before the request, from"),
                      "user_activity": ("user activity", "requests of the user in the split, from")}


def quality(analyses: Sequence[tuple[str, Analysis]], same_data: bool = True) -> Section | None:
    """Figures, tables behind them, and the legend of the runs; None without an analysis.

    Counts are told where all runs were tested on the same data.
    """
    if not analyses:
        return None
    runs = [analysis for _, analysis in analyses]
    legend = [(*charts.run_style(number), name) for number, (name, _) in enumerate(analyses)]
    figures, tables = [], []
    for key, (title, x_title) in _DIMENSIONS.items():
        by_low = [{bucket.low: bucket for bucket in getattr(run, key)} for run in runs]
        lows = sorted(set().union(*by_low))
        for metric, name in (("auc", "AUC"), ("logloss", "LogLoss")):
            drawn = charts.intervals(f"{key}-{metric}", [charts.short_count(low) for low in lows], [
                [getattr(buckets.get(low), metric, None) for low in lows] for buckets in by_low], x_title)
            figures.append({"caption": f"{name} by {title}", "chart": drawn, "legend": legend})
        tables.append((f"By {title}", _bucket_grid([name for name, _ in analyses], lows, by_low, same_data)))
    calibration = charts.reliability("calibration", [
        [(entry.predicted, entry.observed) for entry in run.calibration.bins] for run in runs])
    figures.append({"caption": "Calibration: observed rate over prediction, in bins of equally many candidates",
                    "chart": calibration, "legend": [
                        (colour, kind, f"{name}: error {format_metric('error', run.calibration.error)}")
                        for (colour, kind, name), run in zip(legend, runs, strict=True)]})
    tables += [(f"Calibration: {name}", _calibration_grid(run)) for name, run in analyses]
    return {"figures": figures, "tables": tables}


def attention(analysis: Analysis | None) -> Section | None:
    """The first and the last layer: figures by position and age, and a table of what lies outside the history."""
    if analysis is None or analysis.attention is None:
        return None
    found = analysis.attention
    count = len(found.position.layers)
    shown = {0: "layer 1"} | ({count - 1: f"layer {count}"} if count > 1 else {})
    figures, rows = [], []
    for index, name in shown.items():
        for key, profile, x_title, place in (
                ("position", found.position, "events older than the newest, from", format_count),
                ("age", found.age, "age at the request, from", _age)):
            figures += _profile_figure(f"{key}{index}", f"By {key}, {name}", profile, index, x_title, place)
        layer = found.position.layers[index]
        for head, paid in [*((f"head {number}", each) for number, each in enumerate(layer.heads, start=1)),
                           ("all keys alike", layer.uniform)]:
            rows.append([f"{name}, {head}", *(f"{share:.2%}" for share in (sum(paid[:-2]), paid[-2], paid[-1]))])
    return {"about": f"{format_count(found.candidates)} candidates of {found.requests} requests, spread evenly over "
                     "the test split", "figures": figures,
            "table": {"head": [("", False), ("history", True), ("user globals", True), ("own tokens", True)],
                      "rows": rows}}


def _profile_figure(name: str, caption: str, profile: Profile, index: int, x_title: str,
                    place: Callable[[float], str]) -> list[Section]:
    """Shares of what is paid to the history alone; nothing where there was none."""
    layer = profile.layers[index]
    seen = [bucket for bucket, share in enumerate(layer.uniform[:-2]) if share > 0]
    if not seen:
        return []
    lows = [0, *profile.edges]

    def of_history(paid: Sequence[float]) -> list[float]:
        return [paid[bucket] / sum(paid[:-2]) for bucket in seen]

    chart = charts.shares(name, [place(lows[bucket]) for bucket in seen], of_history(layer.uniform),
                          [of_history(head) for head in layer.heads if sum(head[:-2])], x_title)
    return [{"caption": caption, "chart": chart, "legend": [(1, "line", "attention paid to the history"),
                                                            ("muted", "line", "tokens of the history")]}]


def _bucket_grid(names: Sequence[str], lows: Sequence[int], by_low: Sequence[dict[int, Bucket]], counted: bool
                 ) -> Section:
    titles = [f"{name} {metric}" if len(names) > 1 else metric for name in names for metric in ("AUC", "LogLoss")]
    rows = []
    for low in lows:
        found = [buckets.get(low) for buckets in by_low]
        first = next(bucket for bucket in found if bucket)
        counts = [format_count(first.candidates), format_count(first.users)] * counted
        rows.append([format_count(low), format_count(first.high), *counts,
                     *(_told(name, getattr(bucket, name, None)) for bucket in found for name in ("auc", "logloss"))])
    return {"head": [(name, True) for name in ("from", "to", *["candidates", "users"] * counted, *titles)],
            "rows": rows}


def _calibration_grid(run: Analysis) -> Section:
    return {"head": [(name, True) for name in ("candidates", "predicted", "observed")],
            "rows": [[format_count(entry.candidates), format_metric("rate", entry.predicted),
                      _told("rate", entry.observed)] for entry in run.calibration.bins]}


def _told(metric: str, estimate: Estimate | None) -> str:
    value, low, high = estimate or (None, None, None)
    if low is None:
        return format_metric(metric, value)
    return f"{format_metric(metric, value)} ({format_metric(metric, low)} – {format_metric(metric, high)})"


def _age(seconds: float) -> str:
    """1 min, 6 h, 7 d, 2 y: ages in the largest unit that they fill."""
    for unit_s, unit in ((365 * 86400, "y"), (86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit_s:
            return f"{seconds / unit_s:g} {unit}"
    return f"{seconds:g}"
