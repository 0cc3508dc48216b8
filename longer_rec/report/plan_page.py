"""``plan.html``: one self-contained page about sharding plans, in the style of a run's report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longer_rec.report import charts
from longer_rec.report.html import write_page

Section = dict[str, Any]


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
    figures = [(caption, charts.what_if(f"sweep{number}-{unit}", sweep["values"], sweep[key], unit,
                                        sweep["limit"] if unit == "bytes" else None))
               for caption, key, unit in (("Bytes of the fullest rank", "bytes", "bytes"),
                                          ("Estimated time of a step", "ms", "ms"))]
    return {"legend": list(enumerate(sweep["bytes"], start=1)), "figures": figures}
