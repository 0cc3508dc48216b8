"""``plan.html``: one self-contained page about sharding plans, in the style of a run's report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from longer_rec.errors import DataError
from longer_rec.report import charts

Section = dict[str, Any]


def write_plan_page(path: Path, title: str, about: str, machines: Sequence[Section]) -> None:
    """One section a machine: ``name``, ``about``, and, where there are some, ``tiles``, ``searches``, ``tables``,
    ``bytes``, ``ranks`` (kind -> bytes by rank, with ``limit``), ``need``, ``remedies`` and ``sweep``; tables are
    {head, rows, own} of text, ``own`` the row to mark."""
    pages = jinja2.Environment(loader=jinja2.PackageLoader("longer_rec.report", "."), autoescape=True,
                               undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    drawn = [{"tiles": (), "searches": None, "tables": None, "remedies": None, "need": None, "bytes": None, **machine,
              "ranks": _ranks(number, machine.get("ranks"), machine.get("limit")),
              "sweep": _sweep(number, machine.get("sweep"))} for number, machine in enumerate(machines)]
    page = pages.get_template("plan.html.j2").render(title=title, about=about, machines=drawn)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; free space or correct its permissions") from None


def _ranks(number: int, held: Mapping[str, Sequence[float]] | None, limit: float | None) -> Section | None:
    if held is None:
        return None
    chart = charts.rank_bytes(list(held.values()), limit, f"ranks{number}")
    near = limit is not None and limit < 4 * max(map(sum, zip(*held.values(), strict=True)))
    return {"legend": list(enumerate(held, start=1)), "limited": near, "chart": Markup(chart)}  # noqa: S704 - our own SVG


def _sweep(number: int, sweep: Section | None) -> Section | None:
    if sweep is None:
        return None
    figures = [(caption, Markup(charts.what_if(f"sweep{number}-{unit}", sweep["values"], sweep[key], unit,  # noqa: S704
                                               sweep["limit"] if unit == "bytes" else None)))
               for caption, key, unit in (("Bytes of the fullest rank", "bytes", "bytes"),
                                          ("Estimated time of a step", "ms", "ms"))]
    return {"legend": list(enumerate(sweep["bytes"], start=1)), "figures": figures, "axis": sweep["axis"],
            "table": sweep["table"]}
