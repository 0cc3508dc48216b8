"""A study's table as Markdown, CSV and one self-contained page with its plots."""

import csv
import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter
from rich.markup import escape

from longer_rec.report.charts import INK, MUTED, SERIES, draw
from longer_rec.report.numbers import MISSING, format_count, format_duration
from longer_rec.report.page import write_page
from longer_rec.report.terminal import make_console, make_table

Content = Mapping[str, Any]
Row = Mapping[str, Any]

# Key, title, decimals of mean and error (None: a count), and which is best: 1 the highest, -1 the lowest, 0 neither.
_COLUMNS: Final[tuple[tuple[str, str, int | None, int], ...]] = (
    ("auc", "AUC", 4, 1), ("delta_auc", "ΔAUC", 4, 0), ("logloss", "LogLoss", 4, -1), ("gauc", "GAUC", 4, 1),
    ("ne", "NE", 4, -1), ("user_mflops", "MFLOPs a user", 1, 0), ("candidate_mflops", "MFLOPs a candidate", 3, 0),
    ("dense_parameters", "dense parameters", None, 0), ("sparse_parameters", "sparse parameters", None, 0),
    ("requests_per_s", "requests/s", None, 0), ("train_s", "training s", 1, 0), ("requests", "requests", None, 0))
_AXIS_TITLES: Final = {"max_events": "sequence length", "dense_parameters": "dense parameters",
                       "gflops": "GFLOPs a request", "auc": "AUC", "logloss": "LogLoss"}


def write_study(directory: Path, content: Content) -> Path:
    """Write table.md, table.csv and index.html; the path of the last."""
    titles, rows = text_table(content)
    (directory / "table.csv").write_text(csv_table(content), encoding="utf-8")
    (directory / "table.md").write_text(markdown_table(content), encoding="utf-8")
    path = directory / "index.html"
    names, costs = _num_names(content), titles.index("MFLOPs a user")
    tables = [(what, titles[:names] + titles[part], [cells[:names] + cells[part] for cells in rows])
              for what, part in (("Results", slice(names, costs)), ("Cost", slice(costs, None)))]
    write_page(path, "study.html.j2", title=content["name"], about=_about(content), tables=tables, num_names=names,
               plots=_plots(content), scaling=_scaling(content), facts=_facts(content), failed=content["failed"])
    return path


def print_table(content: Content) -> None:
    """The table in the terminal, without what the model costs; where that is too narrow, a block for each row."""
    titles, rows = text_table(content)
    shown = [index for index, title in enumerate(titles)
             if index < _num_names(content) or title in ("AUC", "LogLoss", "GAUC", "NE", "requests/s", "training s")]
    cells = [[titles[index], *(row[index][0] for row in rows)] for index in shown]
    console = make_console()
    # Numbers fold at their spaces, and nothing folds inside a word.
    least = sum(1 + max(len(word) for text in column for word in text.split()) for column in cells) - 1
    marked = [[f"[bold]{escape(row[index][0])}[/]" if row[index][1] else escape(row[index][0]) for index in shown]
              for row in rows]
    heads = [titles[index] for index in shown]
    if least <= console.width:
        table = make_table(content["name"], heads, titles[_num_names(content):])
        for texts in marked:
            table.add_row(*texts)
    else:
        table = make_table(content["name"], ["", " "])
        table.show_header = False
        for texts in marked:
            for head, text in zip(heads, texts, strict=True):
                table.add_row(head, text)
            table.add_row()
    console.print(table)


def text_table(content: Content) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Titles, and rows of (text, whether it is the best of its column on its data)."""
    rows: Sequence[Row] = content["rows"]
    columns = [column for column in _COLUMNS if column[0] != "delta_auc" or content["reference"]]
    titles = ["data"] * content["has_data"] + ["model", *content["axes"]] + ["setting"] * content["searched"]
    titles += ["seeds", *(f"ΔAUC to {content['reference']}" if key == "delta_auc" else title
                          for key, title, _, _ in columns)]
    table = []
    for row in rows:
        cells = [(str(row["data"]), False)] * content["has_data"] + [(row["model"], False)]
        cells += [(row["point"][axis], False) for axis in content["axes"]]
        cells += [(row["choice"] or MISSING, False)] * content["searched"]
        cells.append((str(row["seeds"]) + (f" ({row['missing']} missing)" if row["missing"] else ""), False))
        rivals = [other for other in rows if other["data"] == row["data"]]
        cells += [(_text(key, row[key], decimals), _is_best(row[key], [other[key] for other in rivals], sign))
                  for key, _, decimals, sign in columns]
        table.append(cells)
    return titles, table


def markdown_table(content: Content) -> str:
    """The table with a note of where, when and how it was made."""
    titles, rows = text_table(content)
    num_names = _num_names(content)
    lines = [f"# {content['name']}", "", _about(content), "", "| " + " | ".join(titles) + " |",
             "|" + "".join(" --- |" if index < num_names else " ---: |" for index in range(len(titles)))]
    lines += ["| " + " | ".join(f"**{text}**" if best else text for text, best in row) + " |" for row in rows]
    lines += ["", *(f"- not finished: {name}: {reason}" for name, reason in content["failed"].items())]
    lines += [f"- {name}: {value}" for name, value in _facts(content)]
    fits = [f"{fit['model']}{' on ' + fit['data'] if fit['data'] else ''}, {_AXIS_TITLES[fit['metric']]} against "
            f"{_AXIS_TITLES[fit['x']]}: {_fit_text(fit)}" for fit in content["fits"]]
    return "\n".join([*lines, *(["", "## Scaling", ""] if fits else []), *(f"- {fit}" for fit in fits)]) + "\n"


def csv_table(content: Content) -> str:
    """Every figure in full: means and, in a column beside each, standard errors."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    keys = [key for key, _, _, _ in _COLUMNS] + ["gflops", "max_events"]
    pairs = {key for key in keys if any(isinstance(row[key], tuple) for row in content["rows"])}
    writer.writerow(["data", "model", *content["axes"], "setting", "seeds", "missing",
                     *(name for key in keys for name in ([key, f"{key}_error"] if key in pairs else [key]))])
    for row in content["rows"]:
        cells = [row["data"], row["model"], *row["point"].values(), row["choice"], row["seeds"], row["missing"]]
        for key in keys:
            cells += (row[key] or (None, None)) if key in pairs else [row[key]]
        writer.writerow(cells)
    return file.getvalue()


def _num_names(content: Content) -> int:
    return 1 + content["has_data"] + len(content["axes"]) + content["searched"]


def _text(key: str, value: Any, decimals: int | None) -> str:
    if value is None:
        return MISSING
    mean, error = value if isinstance(value, tuple) else (value, None)
    if decimals is None or key == "train_s":
        return f"{mean:.{decimals}f}" if decimals else format_count(round(mean))
    sign = "+" if key == "delta_auc" else ""
    return f"{mean:{sign}.{decimals}f}" + ("" if error is None else f" ± {error:.{decimals}f}")


def _is_best(value: Any, others: Sequence[Any], sign: int) -> bool:
    if not sign or value is None:
        return False
    means = [sign * other[0] for other in others if other is not None]
    return len(means) > 1 and bool(sign * value[0] == max(means))


def _about(content: Content) -> str:
    equal = "Equal requests: the epochs of the configuration."
    if content["budget_s"]:
        equal = (f"Equal time: {content['budget_s']:g} s of training a run, as a number of steps from a speed measured "
                 "before.")
    return (f"{equal} Means ± standard error over seeds, on the whole test split. FLOPs are counted in a forward pass "
            "over single test requests: of a user's side, and of each candidate.")


def _facts(content: Content) -> list[tuple[str, str]]:
    facts = [(name, "; ".join(values)) for name, values in content["environment"].items()]
    return [*facts, ("command", content["command"]), ("took", format_duration(content["spent_s"]))]


def _plots(content: Content) -> list[tuple[str, Markup]]:
    """AUC of every row with its error, and AUC against the FLOPs of a request, for each data set."""
    plots = []
    for number, data in enumerate(dict.fromkeys(row["data"] for row in content["rows"])):
        rows = [row for row in content["rows"] if row["data"] == data and row["auc"] is not None]
        if rows:
            where = f" on {data}" if data else ""
            plots.append((f"Test AUC{where}, with standard errors",
                          draw(f"auc{number}", 0.6 + 0.24 * len(rows), partial(_ranking, rows))))
        if costed := [row for row in rows if row["gflops"]]:
            plots.append((f"Test AUC{where} against the forward FLOPs of a request",
                          draw(f"flops{number}", 3.2, partial(_against_flops, costed))))
    return plots


def _label(row: Row) -> str:
    return " ".join([row["model"], *row["point"].values()])


def _ranking(rows: Sequence[Row], axes: Axes) -> None:
    place = np.arange(len(rows))
    axes.errorbar([row["auc"][0] for row in rows], place, xerr=[row["auc"][1] or 0.0 for row in rows], fmt="o",
                  markersize=5, color=SERIES[0], elinewidth=1.4)
    axes.set_yticks(place, [_label(row) for row in rows], color=INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=True, axis="both")


def _against_flops(rows: Sequence[Row], axes: Axes) -> None:
    """The points of one model are joined; its name stands at the dearest of them."""
    for number, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        own = sorted((row["gflops"], *row["auc"]) for row in rows if row["model"] == model)
        flops, mean, error = zip(*own, strict=True)
        axes.errorbar(flops, mean, yerr=[each or 0.0 for each in error], fmt="o-", markersize=4, linewidth=1.2,
                      color=SERIES[number % len(SERIES)])
        axes.annotate(model, (flops[-1], mean[-1]), xytext=(6, 4), textcoords="offset points", color=MUTED, fontsize=8)
    _log_axis(axes, "GFLOPs a request")
    axes.margins(x=0.15)


def _scaling(content: Content) -> list[dict[str, Any]]:
    """A plot for each quantity and metric on each data set, all models in it."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for fit in content["fits"]:
        groups.setdefault((fit["x"], fit["metric"], fit["data"]), []).append(fit)
    return [{"caption": f"{_AXIS_TITLES[metric]} against {_AXIS_TITLES[x]}" + (f" on {data}" if data else ""),
             "chart": draw(f"scaling{number}", 2.9, partial(_curves, fits, _AXIS_TITLES[x])),
             "legend": [(index % len(SERIES) + 1, "line", f"{fit['model']}: {_fit_text(fit)}")
                        for index, fit in enumerate(fits)]}
            for number, ((x, metric, data), fits) in enumerate(groups.items())]


def _curves(fits: Sequence[Row], title: str, axes: Axes) -> None:
    for number, found in enumerate(fits):
        colour = SERIES[number % len(SERIES)]
        x, mean, error = zip(*found["points"], strict=True)
        axes.errorbar(x, mean, yerr=[each or 0.0 for each in error], fmt="o", markersize=4, color=colour)
        if (fit := found["fit"]) is not None:
            axes.plot(fit["band_x"], fit["curve"], color=colour)
            axes.fill_between(fit["band_x"], fit["low"], fit["high"], color=colour, alpha=0.15, linewidth=0)
    _log_axis(axes, title)
    # Bands of few points may leave every scale.
    shown = [value for found in fits for _, mean, error in found["points"]
             for value in (mean - (error or 0.0), mean + (error or 0.0))]
    room = 0.35 * (max(shown) - min(shown)) or 0.01
    axes.set_ylim(min(shown) - room, max(shown) + room)


def _log_axis(axes: Axes, title: str) -> None:
    axes.set_xscale("log")
    low, high = axes.dataLim.intervalx
    if high < 30 * low:
        axes.set_xticks(np.geomspace(low, high, 4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}" if value < 10 else f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(title)


def _fit_text(found: Row) -> str:
    if (fit := found["fit"]) is None:
        return f"no curve, {found['why']}"
    sign = "+" if fit["alpha"] > 0 else "-"
    text = f"{fit['gamma']:.4g} {sign} {abs(fit['alpha']):.4g} · x^{fit['beta']:.3f}"
    return f"{text}, R² {fit['r2']:.3f}" + (", the exponent is at its bound: the points do not tell it"
                                            if fit["at_bound"] else "")
