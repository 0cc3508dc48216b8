"""The report's figures: matplotlib drawings as inline SVG that takes its colours and its font from the page.

Figures are drawn in placeholder colours, which become CSS variables in the SVG: one drawing serves the light and the
dark page. Text stays text, so it can be selected and scales with the page.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from longer_rec.report.numbers import format_bytes, format_clock, format_count
from longer_rec.report.run_files import Estimate

INK: Final = "#000001"
MUTED: Final = "#000002"
GRID: Final = "#000003"
PAPER: Final = "#000004"
SERIES: Final = tuple(f"#0000{number}0" for number in range(1, 9))
_KINDS: Final = ("line", "dash", "dots", "dash", "line", "dash", "line", "dots")
_CSS: Final = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--card",
               **{colour: f"--c{number}" for number, colour in enumerate(SERIES, start=1)}}

Floats = NDArray[np.float64]
Points = Sequence[tuple[float, float]]

# A line of an SVG costs about 20 bytes a point, and a screen shows no more of them.
_MOST_POINTS: Final = 600
# Drawn at the width of a phone's screen and scaled up on wider ones: labels stay readable on both.
_WIDTH: Final = 4.8
# As wide as the page, which its type then matches; narrow screens scroll it.
_PAGE_WIDTH: Final = 9.6
_LABEL_PT: Final = 8.0
NUM_JOB_COLOURS: Final = len(SERIES) - 1
_STYLE: Final[Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9.0,
    "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": GRID, "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.grid": True,
    "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.8, "xtick.color": MUTED,
    "ytick.color": MUTED, "ytick.left": False, "xtick.bottom": False, "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round", "figure.facecolor": "none",
}


def draw(name: str, height: float, paint: Callable[[Axes], None], width: float = _WIDTH) -> Markup:
    """SVG text of one figure; ``name`` keeps its ids apart from those of other figures on the page. Inches."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg"):]
    # The style element is global: it would restyle everything else on the page.
    svg = re.sub(r"<metadata>.*?</metadata>|<style\b.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, variable in _CSS.items():
        svg = svg.replace(colour, f"var({variable})")
    return Markup(svg)  # noqa: S704 - our own


def curve(name: str, train: Points, evaluated: Points, levels: Sequence[float]) -> Markup:
    """A quantity over steps: training points with their moving mean, evaluations as dots, results as level lines.

    Series take colours 1, 2 and, for the levels, 3 and on; the page puts the legend where it has room.
    """
    def paint(axes: Axes) -> None:
        if train:
            _line_with_mean(axes, train, color=SERIES[0])
        if evaluated:
            axes.plot(*np.array(evaluated, dtype=np.float64).T, color=SERIES[1], marker="o", markersize=4)
        for number, level in enumerate(levels):
            axes.axhline(level, color=SERIES[level_colour(number) - 1], linestyle=(0, (4, 3)), linewidth=1.3)
        _count_axis(axes, "step")
        _focus(axes, [value for _, value in train])

    return draw(name, 2.7, paint)


def overlay(name: str, runs: Sequence[Points], x_title: str, smooth: bool) -> Markup:
    """A quantity of several runs, each in its ``run_style``; ``smooth`` draws the moving mean over pale points."""
    def paint(axes: Axes) -> None:
        for number, points in enumerate(runs):
            if points and smooth:
                _line_with_mean(axes, points, **_run_line(number))
            elif points:
                axes.plot(*np.array(points, dtype=np.float64).T, marker="o", markersize=4, **_run_line(number))
        _count_axis(axes, x_title)
        if smooth:
            _focus(axes, [value for points in runs for _, value in points])

    return draw(name, 2.7, paint)


def run_style(number: int) -> tuple[int, str]:
    """Number of the CSS colour, from 1, and kind of line of a run: colours that some eyes confuse differ in kind."""
    return 1 + number, _KINDS[number]


def intervals(name: str, places: Sequence[str], runs: Sequence[Sequence[Estimate | None]], x_title: str) -> Markup:
    """Values with their intervals, run beside run at each place."""
    def paint(axes: Axes) -> None:
        for number, row in enumerate(runs):
            shift = 0.6 * ((number + 0.5) / len(runs) - 0.5)
            known = [(place + shift, *entry) for place, entry in enumerate(row) if entry and None not in entry]
            _bars(axes, known, number)
        shown = _thin(len(places), 16)
        axes.set_xticks(shown, [places[index] for index in shown])
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.set_xlabel(x_title)

    return draw(name, 2.7, paint)


def reliability(name: str, runs: Sequence[Sequence[tuple[float, Estimate]]]) -> Markup:
    """Observed rates with intervals over mean predictions; on the dashed diagonal a prediction is kept."""
    def paint(axes: Axes) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.axline((0.5, 0.5), (1, 1), color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
        for number, bins in enumerate(runs):
            _bars(axes, [(predicted, *observed) for predicted, observed in bins if None not in observed], number)
        for axis, title in ((axes.xaxis, "predicted"), (axes.yaxis, "observed")):
            # Rare clicks crowd in the corner of a linear plot.
            axis.set_label_text(title)
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
            axis.set_minor_locator(NullLocator())

    return draw(name, 3.4, paint)


def shares(name: str, places: Sequence[str], even: Sequence[float], heads: Sequence[Sequence[float]], x_title: str
           ) -> Markup:
    """Grey bars: shares of the tokens; lines: shares of the attention, pale of each head, strong of their mean."""
    def paint(axes: Axes) -> None:
        at = np.arange(len(places))
        axes.bar(at, even, width=0.86, color=MUTED, alpha=0.35)
        for head in heads:
            axes.plot(at, head, color=SERIES[0], alpha=0.35, linewidth=1)
        axes.plot(at, np.mean(heads, axis=0), color=SERIES[0], marker="o", markersize=4)
        axes.set_xticks(at, list(places), rotation=45 if max(map(len, places)) > 3 else 0)
        axes.set_xlabel(x_title)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))

    return draw(name, 2.6, paint)


def level_colour(number: int) -> int:
    """Number of the CSS colour, from 1, of a curve's level: the palette after those of training and validation."""
    return 3 + number % (len(SERIES) - 2)


def throughput(points: Points, unit: str) -> Markup:
    """A rate over steps, from zero up."""
    def paint(axes: Axes) -> None:
        _line_with_mean(axes, points, color=SERIES[2])
        axes.set_ylim(bottom=0, top=max(rate for _, rate in points) * 1.1 or 1.0)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_ylabel(unit)
        _count_axis(axes, "step")

    return draw("throughput", 2.3, paint)


def histogram(edges: Sequence[float], counts: Sequence[float], max_events: int | None) -> Markup:
    """Counts between edges, one bar of equal width each: edges grow geometrically.

    ``max_events`` is marked where it falls: histories right of the mark are cut to their newest events.
    """
    def paint(axes: Axes) -> None:
        place = np.arange(len(counts))
        axes.bar(place + 0.5, counts, width=0.86, color=SERIES[0])
        shown = _thin(len(edges), 16)
        axes.set_xticks(shown, [short_count(edges[index]) for index in shown])
        axes.set_xlabel("events before the request")
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        if max_events is not None and edges[0] < max_events < edges[-1]:
            at = float(np.interp(max_events, edges, np.arange(len(edges))))
            axes.axvline(at, color=SERIES[1], linestyle=(0, (4, 3)), linewidth=1.3)
            axes.annotate(f"newest {format_count(max_events)} are used", (at, 1.01), xycoords=("data", "axes fraction"),
                          va="bottom", ha="right" if at > len(counts) / 2 else "left", color=SERIES[1])

    return draw("histogram", 2.6, paint)


def rank_bytes(held: Sequence[Sequence[float]], limit: float | None = None, name: str = "plan") -> Markup:
    """One bar a rank, stacked from ``held[part][rank]``; parts beyond the palette share its last colour.

    ``limit``, what a rank may hold, is marked where the bars come near it.
    """
    num_ranks = len(held[0])

    def paint(axes: Axes) -> None:
        left = np.zeros(num_ranks)
        for number, sizes in enumerate(held):
            axes.barh(np.arange(num_ranks), sizes, left=left, height=0.62,
                      color=SERIES[min(number, len(SERIES) - 1)], edgecolor=PAPER, linewidth=0.5)
            left += np.array(sizes, dtype=np.float64)
        shown = _thin(num_ranks, 16)
        for rank in shown:
            axes.annotate(f" {format_bytes(left[rank])}", (left[rank], rank), va="center", color=MUTED)
        axes.set_xlim(0, left.max() * 1.2 or 1.0)
        if limit is not None and limit < 4 * left.max():
            axes.axvline(limit, color=SERIES[4], linestyle=(0, (4, 3)), linewidth=1.3)
            axes.set_xlim(0, max(limit * 1.02, left.max() * 1.2))
        axes.set_yticks(shown, [f"rank {rank}" for rank in shown])
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)

    return draw(name, 0.5 + 0.34 * min(num_ranks, 16), paint)


def gantt(name: str, bars: Sequence[tuple[int, int, float, float, int]], bands: Sequence[tuple[str, int]], end: float,
          labels: Sequence[tuple[int, int, float, float, str]] = ()) -> Markup:
    """Who holds which rows when: ``bars`` of (row, row after, from, to, colour from 0), ``bands`` of (title, rows).

    Times are hours. One path for each colour, so that ten thousand bars stay one page. ``labels``: (row, row after,
    from, to, text), drawn where the text fits into these rows and hours.
    """
    num_rows, height = sum(rows for _, rows in bands), 0.09 * max(24, sum(rows for _, rows in bands))
    # Points; the titles of the bands take their part of the width. A letter is 0.65 of the type's size at most.
    hour_pt = 72 * (_PAGE_WIDTH - 0.4 - 0.65 * 9 / 72 * max(len(title) for title, _ in bands)) / end
    row_pt = 72 * height / num_rows

    def paint(axes: Axes) -> None:
        for number, colour in enumerate(SERIES[:NUM_JOB_COLOURS]):
            own = np.array([bar[:4] for bar in bars if bar[4] % NUM_JOB_COLOURS == number], dtype=np.float64)
            if len(own):
                row, after, start, stop = own.T
                corners = np.stack([start, row, start, after, stop, after, stop, row, start, row], 1).reshape(-1, 2)
                codes = np.tile([Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY], len(own))
                axes.add_patch(PathPatch(Path(corners, codes), facecolor=colour, edgecolor=PAPER, linewidth=0.3))
        for row, after, start, stop, text in labels:
            if (after - row) * row_pt > 1.2 * _LABEL_PT and (stop - start) * hour_pt > 0.65 * _LABEL_PT * len(text) + 4:
                axes.annotate(text, ((start + stop) / 2, (row + after) / 2), ha="center", va="center",
                              fontsize=_LABEL_PT, color=PAPER)
        ends = np.cumsum([0, *(rows for _, rows in bands)])
        for edge in ends[1:-1]:
            axes.axhline(edge, color=INK, linewidth=0.7)
        axes.set_yticks((ends[:-1] + ends[1:]) / 2, [title for title, _ in bands])
        axes.set_xlim(0, end)
        axes.set_ylim(num_rows, 0)
        axes.set_xlabel("hours")
        axes.grid(visible=False)

    return draw(name, height + 0.5, paint, _PAGE_WIDTH)


def moving_mean(values: Floats) -> Floats:
    """Exponential moving mean over about a thirtieth of the points, free of bias at the start."""
    keep = 1.0 - 1.0 / max(1.0, len(values) / 30)
    smoothed, mean, weight = np.empty(len(values)), 0.0, 0.0
    for index, value in enumerate(values):
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed[index] = mean / weight
    return smoothed


def _line_with_mean(axes: Axes, points: Points, **style: Any) -> None:
    at, value = np.array(points, dtype=np.float64).T
    kept = _thin(len(at), _MOST_POINTS)
    axes.plot(at[kept], value[kept], color=style["color"], alpha=0.25, linewidth=1)
    axes.plot(at[kept], moving_mean(value)[kept], **style)


def _run_line(number: int) -> dict[str, Any]:
    colour, kind = run_style(number)
    return {"color": SERIES[colour - 1], "linestyle": {"line": "-", "dash": (0, (4, 2)), "dots": (0, (1, 1.6))}[kind]}


def _bars(axes: Axes, entries: Sequence[tuple[Any, ...]], number: int) -> None:
    """(x, value, low, high) of one run: dots joined by its line, and thin intervals."""
    if entries:
        at, value, low, high = np.array(entries, dtype=np.float64).T
        axes.plot(at, value, marker="o", markersize=4, **{**_run_line(number), "linewidth": 1.3})
        axes.vlines(at, low, high, color=_run_line(number)["color"], linewidth=1)


def _count_axis(axes: Axes, title: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    as_text = format_clock if title.endswith("time") else format_count
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: as_text(count)))
    axes.set_xlabel(title)
    axes.margins(x=0.02)
    axes.set_xlim(left=0)


def _focus(axes: Axes, values: Sequence[float]) -> None:
    """Keep the first, wild steps from flattening the rest: the top shows 99 % of the training points."""
    if len(values) >= 20:
        low, high = axes.get_ylim()
        axes.set_ylim(low, min(high, float(np.quantile(values, 0.99)) * 1.05))


def short_count(count: float) -> str:
    """Powers of two the way they are spoken: 512, 1k, 4k."""
    return f"{count / 1024:g}k" if count >= 1024 and count % 1024 == 0 else format_count(count)


def _thin(count: int, most: int) -> list[int]:
    """At most ``most`` of the indices below ``count``, evenly spaced."""
    return list(range(0, count, -(-count // most)))
