"""What a run shows in a terminal: tables of the plan, the results and the machine, and the progress of training."""

import os
import sys
import time
from collections.abc import Callable, Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from longer_rec.report.numbers import (
    METRIC_TITLES,
    format_bytes,
    format_clock,
    format_count,
    format_duration,
    format_kernel,
    format_metric,
    format_ranks,
    is_number,
    result_cells,
)

if TYPE_CHECKING:
    from longer_rec.runtime.cluster_check import Check  # imports torch, which a report does without

Row = Mapping[str, Any]

# Rich assumes 80 columns where there is no terminal, and folds tables that a log file has room for.
_LOG_WIDTH: Final = 140
_UNBOUNDED: Final = 10_000
_PLAIN_EVERY_S: Final = 10.0
_STATUS_STYLE: Final = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def make_console() -> Console:
    """Standard output, as wide as the terminal, or wide enough for every table where it is a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _LOG_WIDTH, highlight=False)


def plan_table(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the tables of a ``plan.json``: one row each with its placement and its bytes, and their sum."""
    table = make_table("Sharding plan", ["table", "rows", "dim", "sharding", "kernel", "ranks", "weights", "optimizer"],
                   numeric=("rows", "dim", "weights", "optimizer"))
    for row in rows:
        table.add_row(escape(row["table"]), format_count(row["rows"]), str(row["dim"]), row["sharding_type"],
                      format_kernel(row), format_ranks(row["ranks"]), format_bytes(row["weight_bytes"]),
                      format_bytes(row["optimizer_bytes"]))
    table.add_section()
    totals = (format_bytes(sum(row[key] for row in rows)) for key in ("weight_bytes", "optimizer_bytes"))
    table.add_row(f"{len(rows)} tables", format_count(sum(row["rows"] for row in rows)), "", "", "", "", *totals,
                  style="bold")
    (console or make_console()).print(table)


def results_table(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the metrics of each model, the best of a column in bold; the first row is the run itself."""
    titles, cells = result_cells(rows)
    timed = any(row.get("train_s") for row in rows)
    numeric = titles + ["training"] * timed
    table = make_table("Results", ["model", *numeric], numeric)
    for row, of_row in zip(rows, cells, strict=True):
        duration = [format_duration(row["train_s"]) if row.get("train_s") else ""] * timed
        table.add_row(escape(str(row["name"])), *(f"[bold]{text}[/]" if best else text for text, best in of_row),
                      *duration)
    (console or make_console()).print(table)


def doctor_table(checks: "Sequence[Check]", console: Console | None = None) -> None:
    """Print each check with its status, then the lines to type, unfolded so that they can be copied."""
    console = console or make_console()
    table = make_table(None, ["check", "status", "found"])
    for check in checks:
        style = _STATUS_STYLE.get(check.status, "dim")
        table.add_row(escape(check.name), f"[{style}]{check.status}[/]", escape(check.detail))
    console.print(table)
    for check in checks:
        if check.remedy:
            console.print(f"{check.name}: {check.remedy}", markup=False, soft_wrap=True)


def make_table(title: str | None, columns: Sequence[str], numeric: Container[str] = (), space: int = 2) -> Table:
    """Borderless; numbers to the right, never cut: where there is little room it is words that fold."""
    table = _FittedTable(title=title, title_justify="left", title_style="bold", header_style="dim", box=None,
                  padding=(0, space))
    for name in columns:
        table.add_column(name, justify="right" if name in numeric else "left", no_wrap=name in numeric,
                         overflow="fold", min_width=max(map(len, name.split()), default=None))
    return table


class _FittedTable(Table):
    """Of too wide a table first the headers of numbers fold between words, then text; no header inside a word.

    Where not even that is enough, "0.81 ± 0.01" folds at its spaces.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = 0
        if self.__rich_measure__(console, options.update(width=_UNBOUNDED)).maximum > options.max_width:
            self.padding, self.pad_edge, self.collapse_padding = (0, 1), False, True
            for column in self.columns:
                if column.no_wrap:
                    column.header = str(column.header).replace(" ", "\n")
                # Rich narrows all that wraps to one width, and widens it again beyond the terminal.
                cells = max((console.measure(cell).maximum for cell in column.cells), default=0)
                column.no_wrap |= cells <= (column.min_width or 0)
                width += 1 + (max(cells, column.min_width or 0) if column.no_wrap else column.min_width or 0)
            if width > options.max_width:
                for column in self.columns:
                    sizes = [console.measure(cell) for cell in column.cells]
                    column.min_width = max([column.min_width or 0, *(size.minimum for size in sizes)])
                    column.no_wrap = all(size.maximum <= column.min_width for size in sizes)
        yield from super().__rich_console__(console, options)


class TrainProgress:
    """Progress of training: a bar in a terminal, elsewhere a plain line every ten seconds.

    Evaluations and the last step always get a line. Draws on ``update`` alone, without a thread: data workers are
    forked while it is open. Does nothing where ``enabled`` is false (ranks other than 0).
    """

    def __init__(self, name: str, num_steps: int, start: int = 0, enabled: bool = True, console: Console | None = None,
                 clock: Callable[[], float] = time.monotonic, unit: str = "step") -> None:
        self._console, self._unit = console or make_console(), unit
        self._name, self._num_steps, self._start, self._enabled = name, num_steps, start, enabled
        self._clock, self._started, self._printed = clock, clock(), clock()
        self._bar = Progress(
            TextColumn(escape(name)), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True), console=self._console, auto_refresh=False,
            disable=not (enabled and self._console.is_terminal))
        self._task = self._bar.add_task(name, total=num_steps, completed=start, figures="")
        self._train: dict[str, Any] = {}
        self._auc: object = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: int, values: Row) -> None:
        """Show the values of a log line (``loss``, ``requests_per_s``) or of an evaluation (``validation_auc``, …)."""
        if not self._enabled:
            return
        evaluation = {name.removeprefix("validation_"): value for name, value in values.items()
                      if name.startswith("validation_")}
        self._train = self._train if evaluation else dict(values)
        self._auc = evaluation.get("auc", self._auc)
        if evaluation:
            figures = "  ".join(f"{METRIC_TITLES[name]} {format_metric(name, evaluation.get(name))}"
                                for name in ("auc", "logloss", "gauc"))
            self._console.print(f"{self._name}: step {format_count(step)}: validation {figures}", markup=False)
        elif not self._console.is_terminal:
            self._print_plain(step)
        self._bar.update(self._task, completed=step, figures=self._figures(), refresh=True)

    def _print_plain(self, step: int) -> None:
        now = self._clock()
        if now - self._printed < _PLAIN_EVERY_S and step < self._num_steps:
            return
        self._printed = now
        done = step - self._start
        left_s = (now - self._started) / done * (self._num_steps - step) if done else 0.0
        self._console.print(f"{self._name}: {self._unit} {format_count(step)} of {format_count(self._num_steps)}  "
                            f"{self._figures()}  {format_clock(left_s)} left", markup=False)

    def _figures(self) -> str:
        parts = [f"loss {format_metric('loss', self._train['loss'])}"] if "loss" in self._train else []
        if is_number(self._auc):
            parts.append(f"AUC {format_metric('auc', self._auc)}")
        if is_number(self._train.get("requests_per_s")):
            parts.append(f"{format_count(self._train['requests_per_s'])} requests/s")
        if is_number(self._train.get("mfu")):
            parts.append(f"MFU {self._train['mfu']:.0%}")
        return "  ".join(parts)
