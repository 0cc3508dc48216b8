"""``plan.html``: one self-contained page about sharding plans, in the style of a run's report."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from longer_rec.report import charts
from longer_rec.report.numbers import format_bytes
from longer_rec.report.page import Section, write_page


def write_plan_page(path: Path, title: str, about: str, machines: Sequence[Section]) -> None:
    """One section a machine: ``name``, ``about``, ``grids`` (title and table of text: ``head``, ``rows``, and ``own``,
    the row to mark) and, where there are some, ``tiles``, ``ranks`` (kind -> bytes by rank, with ``limit``), ``sweep``.
    """
    write_page(path, "plan.html.j2", title=title, about=about, machines=[
        {"tiles": (), **machine, "ranks": _ranks(number, machine.get("ranks"), machine.get("limit")),
         "sweep": _sweep(number, machine.get("sweep"))} for number, machine in enumerate(machines)])


def _ranks(number: int, held: Mapping[str, Sequence[float]] | None, limit: float | None) -> Section | None:
    if held is None:
        return None
    chart = charts.rank_bytes(list(held.values()), limit, f"ranks{number}")
    near = limit is not None and limit < 4 * max(map(sum, zip(*held.values(), strict=True)))
    return {"legend": list(enumerate(held, start=1)), "limited": near, "chart": chart}


def _sweep(number: int, sweep: Section | None) -> Section | None:
    if sweep is None:
        return None
    figures = [(caption, _what_if(f"sweep{number}-{unit}", sweep["values"], sweep[key], unit,
                                  sweep["limit"] if unit == "bytes" else None))
               for caption, key, unit in (("Bytes of the fullest rank", "bytes", "bytes"),
                                          ("Estimated time of a step", "ms", "ms"))]
    return {"legend": list(enumerate(sweep["bytes"], start=1)), "figures": figures}


def _what_if(name: str, values: Sequence[str], series: Mapping[str, Sequence[float]], unit: str,
             limit: Sequence[float] | None) -> Markup:
    """A quantity at each value of a setting, a line for each series; NaN, marked at the foot, where nothing fits.

    ``limit`` is drawn dashed: what there is, value by value.
    """
    def paint(axes: Axes) -> None:
        place = np.arange(len(values))
        for number, points in enumerate(series.values()):
            colour = charts.SERIES[number % len(charts.SERIES)]
            axes.plot(place, points, color=colour, marker="o", markersize=4)
            missing = place[np.isnan(points)]
            axes.plot(missing, np.zeros(len(missing)), color=colour, marker="x", linestyle="none", clip_on=False)
        top = np.nanmax([*(max(np.nan_to_num(points)) for points in series.values()), 1e-12])
        if limit is not None and max(limit) < 4 * top:
            axes.plot(place, limit, color=charts.SERIES[4], linestyle=(0, (4, 3)), linewidth=1.3)
            top = max(top, *limit)
        axes.set_ylim(0, top * 1.1)
        axes.set_xlim(-0.3, len(values) - 0.7)
        axes.set_xticks(place, list(values))
        axes.tick_params(axis="x", pad=9)  # below the crosses, which stand half under the axis
        if unit == "bytes":
            axes.set_yticks(np.arange(0, top * 1.1, 2.0 ** np.ceil(np.log2(top / 5))))
        axes.yaxis.set_major_formatter(FuncFormatter(
            lambda value, _: format_bytes(value) if unit == "bytes" else f"{value:g} {unit}"))

    return charts.draw(name, 2.5, paint)
