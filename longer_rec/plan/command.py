"""``longer-rec plan``: from the words of the command line to plans, tables and a page."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from longer_rec.config import dump_config
from longer_rec.data.history import open_dataset
from longer_rec.elastic.assignment import resolve_num_workers
from longer_rec.errors import ConfigError
from longer_rec.job import Job
from longer_rec.plan import show
from longer_rec.plan.calibrate import Measure, bytes_compared, calibrate, fit, seconds_compared
from longer_rec.plan.plans import plan_differences, plan_hash
from longer_rec.plan.scenario import KINDS, Constants, Outcome, Scenario
from longer_rec.plan.topology import parse_topology
from longer_rec.plan.whatif import compare, configured_choices, needs, parse_axis, parse_constraints, remedies, sweep
from longer_rec.report.numbers import format_bytes
from longer_rec.report.plan_page import write_plan_page
from longer_rec.report.terminal import make_console
from longer_rec.runtime.distributed import World
from longer_rec.runtime.logging import quiet_libraries
from longer_rec.sparse.planfile import load_plan, save_plan
from longer_rec.sparse.planner import check_plan

_CALIBRATION_STEPS = 8


@dataclass(frozen=True)
class Request:
    """The options of the command, as they were typed."""

    topologies: Sequence[str] = ("auto",)
    proposers: Sequence[str] = ("greedy", "uniform", "grid")
    partitioners: Sequence[str] = ("perf", "memory")
    sweeps: Sequence[str] = ()
    constraints: Sequence[str] = ()
    out: Path = Path("plan")
    constants: Constants = Constants()


def plan_job(job: Job, request: Request) -> bool:
    """Plan for every topology, print what was found and write ``plan.html`` and a ``plan.json`` for each that fits.

    Whether all of them fit. Faults of the words are raised before anything is searched.
    """
    quiet_libraries()
    dataset = open_dataset(job.data.dir, verify=False)
    choices = {**configured_choices(job, dataset), **parse_constraints(request.constraints)}
    scenarios = [Scenario(job, dataset, parse_topology(text), request.constants, choices=choices)
                 for text in request.topologies]
    for scenario in scenarios:
        if request.constants.device not in (None, scenario.hardware.device):
            raise ConfigError(f"--calibration was measured on {request.constants.device}, {scenario.hardware.name} is "
                              f"{scenario.hardware.device}; leave it out, or calibrate there")
    axes = [[parse_axis(text, scenario) for text in request.sweeps] for scenario in scenarios]
    if len(request.sweeps) > 2:
        raise ConfigError(f"{len(request.sweeps)} sweeps were asked for; use one or two at a time")
    for scenario in scenarios:
        resolve_num_workers(job.elastic, scenario.hardware.world_size)
        _make_directory(request.out)
        _plan_path(scenario, request).unlink(missing_ok=True)  # of an earlier call, whose job or machine was another
    console, sections, all_fit = make_console(), [], True
    for scenario, own_axes in zip(scenarios, axes, strict=True):
        outcomes = compare(scenario, request.proposers, request.partitioners)
        all_fit &= outcomes[0].fits
        section = _found(outcomes) if outcomes[0].fits else _unfit(scenario)
        if own_axes:
            section["sweep"] = show.sweep_section(own_axes, list(sweep(scenario, own_axes)))
            section["grids"].append((f"What if: {section['sweep']['axis']}", section["sweep"]["table"]))
        console.print(f"\n[bold]{section['name']}[/]  {section['about']}")
        for title, grid in section["grids"]:
            show.print_grid(console, title, grid)
        if outcomes[0].fits:
            _save(console, outcomes[0], request)
        sections.append(section)
    about = (f"{len(dataset.schema.tables)} tables, L = {job.data.max_events}, {job.data.batch_requests} requests a "
             f"worker, {job.train.precision}" + f", recomputed: {', '.join(job.train.recompute)}" *
             bool(job.train.recompute))
    write_plan_page(request.out / "plan.html", job.name, about, sections)
    console.print(f"page: {request.out / 'plan.html'}", soft_wrap=True)
    return all_fit


def _found(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    best = outcomes[0]
    return {**_head(best.scenario), "ranks": {kind: best.held[kind] for kind in KINDS},
            "limit": best.scenario.hardware.device_bytes,
            "tiles": [("fullest rank", format_bytes(best.fullest)), ("max / mean", f"{best.imbalance:.2f}"),
                      ("step, estimated", f"{1000 * best.total_s:.3g} ms"),
                      ("plan", plan_hash(best.found.plan) if best.found.plan else "")],
            "grids": [("Searches", show.searches_grid(outcomes)), ("Plan", show.tables_grid(best)),
                      ("Bytes of a rank's device", show.bytes_grid(best))]}


def _unfit(scenario: Scenario) -> dict[str, Any]:
    """What is missing, and what would help."""
    free = scenario.hardware.device_bytes - scenario.reserved_bytes
    fixed = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in scenario.fixed_bytes.items())
    section, found = _head(scenario), remedies(scenario)
    section["about"] += (f". No plan fits: of {format_bytes(scenario.hardware.device_bytes)} a rank "
                         f"{format_bytes(max(0, free))} are left for tables, after {fixed} and "
                         f"{format_bytes(scenario.headroom_bytes)} kept free")
    section["grids"] = [("What each table needs at least", show.needs_grid(needs(scenario.space()), free))]
    if found:
        section["grids"].append(("Any one of these makes it fit (planned again)", show.remedies_grid(found)))
    else:
        section["about"] += ". No single change of ranks, columns, host memory, batch or L makes it fit"
    return section


def _head(scenario: Scenario) -> dict[str, Any]:
    hardware = scenario.hardware
    hosts = -(-hardware.world_size // hardware.ranks_per_host)
    return {"name": hardware.name, "about": (
        f"{hardware.world_size} {hardware.device} rank{'s' * (hardware.world_size > 1)} of "
        f"{format_bytes(hardware.device_bytes)} on {hosts} host{'s' * (hosts > 1)} of "
        f"{format_bytes(hardware.host_bytes)}, {hardware.intra_bw / 1e9:.3g} GB/s within and "
        f"{hardware.inter_bw / 1e9:.3g} GB/s between hosts")}


def _save(console: Console, best: Outcome, request: Request) -> None:
    plan, hardware, job = best.found.plan, best.scenario.hardware, best.scenario.job
    assert plan is not None
    world = World(0, hardware.world_size, 0, min(hardware.ranks_per_host, hardware.world_size),
                  torch.device(hardware.device))
    check_plan(plan, best.scenario.ranker, job.sparse, world, job.elastic.is_strict)
    path = _plan_path(best.scenario, request)
    save_plan(plan, path)
    console.print(f"plan {plan_hash(plan)}: {path}; train with sparse.plan={path}", soft_wrap=True)


def _plan_path(scenario: Scenario, request: Request) -> Path:
    name = re.sub(r"[^A-Za-z0-9.]+", "-", scenario.hardware.name)
    return request.out / ("plan.json" if len(request.topologies) == 1 else f"plan-{name}.json")


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be made: {error.strerror}; give another directory") from None


def calibrate_job(job: Job, ranks: Sequence[int], out: Path, measure: Measure) -> None:
    """Run a few steps on each number of ranks, print predicted beside measured, write ``calibration.yaml``."""
    quiet_libraries()
    compared = calibrate(job, open_dataset(job.data.dir, verify=False), measure, ranks, _CALIBRATION_STEPS)
    constants = fit(compared)
    console = make_console()
    show.print_grid(console, f"Bytes, {job.name}", bytes_compared(compared))
    show.print_grid(console, "Seconds of a step", seconds_compared(compared, constants))
    _make_directory(out)
    (out / "calibration.yaml").write_text(dump_config(constants), encoding="utf-8")
    kept = [name for name, value in Constants() if name != "device" and getattr(constants, name) == value]
    if kept:
        console.print(f"not told apart by these runs, kept as they are without calibration: {', '.join(kept)}")
    console.print(f"calibration: {out / 'calibration.yaml'}", soft_wrap=True)


def diff_plans(first: Path, second: Path) -> list[str]:
    """What differs between two plan files, their hashes first."""
    plans = [load_plan(path) for path in (first, second)]
    if plan_hash(plans[0]) == plan_hash(plans[1]):
        return [f"{plan_hash(plans[0])}: the same plan"]
    return [f"{plan_hash(plans[0])} -> {plan_hash(plans[1])}", *plan_differences(*plans)]
