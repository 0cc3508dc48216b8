"""``longer-rec schedule``: from a file of jobs to a table, ``schedule.json`` and a picture of each policy."""

import json
import re
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from longer_rec.config import load_config
from longer_rec.errors import ConfigError
from longer_rec.report import charts
from longer_rec.report.numbers import format_duration
from longer_rec.report.page import make_directory, write_page
from longer_rec.report.terminal import make_console, make_table
from longer_rec.schedule.devices import best_share, growths, trimmed
from longer_rec.schedule.jobs import Simulation, all_jobs
from longer_rec.schedule.simulate import Outcome, simulate

_MOST_ROWS = 128
_COLUMNS = ("policy", "mean", "against gang", "p50", "p90", "waiting", "makespan", "held", "busy", "resizes")


def share_lines(num_workers: int, devices: Sequence[str]) -> list[str]:
    """How one job's workers lie best on ``type=COUNTxRATE`` devices, and the ways to grow, as lines to read."""
    if not devices:
        raise ConfigError(f"--job {num_workers}: TYPE=COUNTxRATE of its devices is missing; give such as v100=2x3.1")
    found = [re.fullmatch(r"([^=]+)=(\d+)x(\d+\.?\d*)", text) for text in devices]
    for text, match in zip(devices, found, strict=True):
        if match is None or not int(match[2]) or not float(match[3]):
            raise ConfigError(f"device {text!r} is not TYPE=COUNTxRATE above 0; give such as v100=2x3.1")
    names = [match[1] for match in found if match]
    counts = tuple(int(match[2]) for match in found if match)
    rates = tuple(float(match[3]) for match in found if match)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{' '.join(devices)}: type {twice!r} is given {names.count(twice)} times; name it once")
    if sum(counts) > num_workers:
        raise ConfigError(f"{' '.join(devices)}: {sum(counts)} devices for --job {num_workers}, which can use at most "
                          f"{num_workers}, one for each worker; take devices away or raise --job")
    share, used = best_share(counts, rates, num_workers), trimmed(counts, rates, num_workers)
    lines = [f"elastic.num_workers={num_workers} 'elastic.shares={[each for each in share.by_device if each]}'",
             f"step {share.step_s:.4g} s, {share.throughput:.4g} mini-batches/s, waste {share.waste:.1%}"]
    lines += [f"{counts[i] - used[i]} of {counts[i]} {names[i]} add nothing: the step is as short without"
              for i in range(len(counts)) if used[i] < counts[i]]
    best = sorted(growths(counts, rates, num_workers), key=lambda growth: (-growth[0], -growth[2]))
    return lines + [f"+ {more} {names[i]}: {1 + speedup * more:.2f} times as fast" for speedup, i, more in best[:5]]


def run_schedule(path: Path, overrides: Sequence[str], out: Path) -> None:
    """Simulate every policy of the file, print the table, write ``schedule.json`` and ``schedule.html``."""
    simulation = load_config(Simulation, path, overrides)
    jobs = all_jobs(simulation)
    make_directory(out)
    outcomes = [simulate(simulation.cluster, jobs, policy, simulation.pause_s, simulation.settle_s)
                for policy in simulation.policies]
    measures = [measure(outcome) for outcome in outcomes]
    rows = [_row(each, measures[0]) for each in measures]
    head, *lines = zip(_COLUMNS, *rows, strict=True)
    table = make_table(f"{simulation.name}: time from arrival to end of {len(jobs)} jobs", head, head[1:], space=1)
    for line in lines:
        table.add_row(*line)
    console = make_console()
    console.print(table)
    end = max(measure["makespan_s"] for measure in measures)
    devices = ", ".join(f"{count} {name}" for name, count in simulation.cluster.devices.items())
    content = {"name": simulation.name, "policies": [{**each, "jobs": _job_rows(outcome)} for each, outcome in zip(
        measures, outcomes, strict=True)]}
    try:
        (out / "schedule.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}; give another directory") from None
    write_page(out / "schedule.html", "schedule.html.j2", title=simulation.name, about=f"{len(jobs)} jobs on {devices}",
               table={"head": [(name, name != "policy") for name in _COLUMNS], "rows": rows},
               names=[job.name for job in jobs] if len(jobs) <= charts.NUM_JOB_COLOURS else None,
               charts=[(each.policy, f"Devices over time, {len(each.segments):,} placements of {len(jobs):,} jobs",
                        _gantt(each, simulation, end)) for each in outcomes])
    console.print(f"page: {out / 'schedule.html'}", soft_wrap=True)


def measure(outcome: Outcome) -> dict[str, Any]:
    """What a policy comes to; ``held`` and ``busy`` are parts of the device-seconds that there were."""
    finished = [(job, job.end_s - job.spec.arrival_s, job.first_s - job.spec.arrival_s) for job in outcome.jobs
                if job.end_s is not None and job.first_s is not None]
    spans = np.array([span for _, span, _ in finished])
    makespan_s = max(segment.end_s for segment in outcome.segments)
    there = sum(count * (min(until, makespan_s) - min(at, makespan_s))
                for kind in {kind for _, kind, _ in outcome.capacity}
                for (at, count), (until, _) in pairwise(
                    [*((at, count) for at, own, count in outcome.capacity if own == kind), (makespan_s, 0)]))
    return {
        "policy": outcome.policy, "mean_s": float(spans.mean()), "p50_s": float(np.quantile(spans, 0.5)),
        "p90_s": float(np.quantile(spans, 0.9)), "waiting_s": float(np.mean([waited for *_, waited in finished])),
        "makespan_s": makespan_s,
        "held": sum((each.end_s - each.start_s) * len(each.devices) for each in outcome.segments) / there,
        "busy": sum(each.steps * each.busy_s for each in outcome.segments) / there,
        "resizes": sum(job.resizes for job, *_ in finished) / len(finished)}


def _row(own: dict[str, Any], first: dict[str, Any]) -> list[str]:
    times = [format_duration(own[f"{name}_s"]) for name in ("mean", "p50", "p90", "waiting", "makespan")]
    against = f"{first['mean_s'] / own['mean_s']:.2f} x" if first["policy"] == "gang" else ""
    return [own["policy"], times[0], against, *times[1:], f"{own['held']:.0%}", f"{own['busy']:.0%}",
            f"{own['resizes']:.1f}"]


def _job_rows(outcome: Outcome) -> list[dict[str, Any]]:
    return [{"name": job.spec.name, "num_workers": job.spec.num_workers, "arrival_s": job.spec.arrival_s,
             "first_s": job.first_s, "end_s": job.end_s, "resizes": job.resizes} for job in outcome.jobs]


def _gantt(outcome: Outcome, simulation: Simulation, end_s: float) -> Markup:
    """At most 128 devices, as many of each type as its part of the cluster is."""
    most = {i: max(count for _, kind, count in outcome.capacity if kind == i) for i in range(len(
        simulation.cluster.devices))}
    shrink = min(1.0, _MOST_ROWS / sum(most.values()))
    rows = {i: round(count * shrink) for i, count in most.items()}
    first = {i: sum(rows[other] for other in range(i)) for i in rows}
    bars, labels = list[tuple[int, int, float, float, int]](), list[tuple[int, int, float, float, str]]()
    for each in outcome.segments:
        own = sorted((kind, first[kind] + number) for kind, number in each.devices if number < rows[kind])
        start, stop = each.start_s / 3600, each.end_s / 3600
        # Rows of a type side by side are one bar: rows less their places are equal there. The largest bears the name.
        blocks = [[row for _, (_, row) in block] for _, block in groupby(
            enumerate(own), lambda entry: (entry[1][0], entry[1][1] - entry[0]))]
        bars += [(block[0], block[-1] + 1, start, stop, each.job) for block in blocks]
        if blocks:
            block = max(blocks, key=len)
            labels.append((block[0], block[-1] + 1, start, stop, outcome.jobs[each.job].spec.name))
    names = list(simulation.cluster.devices)
    bands = [(f"{names[i]} ({rows[i]} of {most[i]})" if rows[i] < most[i] else names[i], rows[i]) for i in rows]
    return charts.gantt(f"gantt-{outcome.policy}", bars, [band for band in bands if band[1]], end_s / 3600, labels)
