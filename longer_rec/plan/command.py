"""``longer-rec plan``: from the words of the command line to plans, tables and a page."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from longer_rec.config import dump_config, load_config
from longer_rec.data.history import Dataset, open_dataset
from longer_rec.errors import ConfigError
from longer_rec.job import Job, expect_hits, row_lookups, source_config
from longer_rec.plan import show
from longer_rec.plan.calibrate import Measure, bytes_compared, calibrate, fit, seconds_compared
from longer_rec.plan.scenario import KINDS, Constants, Outcome, Scenario, solve
from longer_rec.plan.topology import parse_topology
from longer_rec.plan.whatif import compare, needs, parse_constraints, parse_list, parse_sweep, remedies
from longer_rec.report.numbers import format_bytes, format_count
from longer_rec.report.page import make_directory
from longer_rec.report.plan_page import write_plan_page
from longer_rec.report.terminal import make_console
from longer_rec.runtime.distributed import World
from longer_rec.runtime.logging import quiet_libraries
from longer_rec.sparse.placement import DoesNotFit
from longer_rec.sparse.planfile import load_plan, plan_hash, save_plan
from longer_rec.sparse.planner import check_plan
from longer_rec.sparse.search import KERNELS, PARTITIONERS, PROPOSERS
from longer_rec.sparse.tables import NOT_TRAINED

_CALIBRATION_STEPS = 8


@dataclass(frozen=True)
class Request:
    """The options of the command, as they were typed."""

    topologies: Sequence[str]
    proposers: str
    partitioners: str
    sweeps: Sequence[str]
    constraints: Sequence[str]
    out: Path
    calibration: Path | None


def _refuse_instances(job: Job) -> None:
    if job.data.instances is not None or source_config(job) is not None:
        raise ConfigError("plan does not predict what instance tokens or model.compress cost; plan the model without: "
                          "model.instances=null model.compress=null data.instances=null")


def plan_job(job: Job, request: Request) -> bool:
    """Plan for every topology, print what was found and write ``plan.html`` and a ``plan.json`` for each that fits.

    Whether all of them fit. Faults of the words are raised before anything is searched or written.
    """
    quiet_libraries()
    _refuse_instances(job)
    dataset = open_dataset(job.data.dir, verify=False)
    proposers = parse_list("--proposer", request.proposers, PROPOSERS)
    partitioners = parse_list("--partitioner", request.partitioners, PARTITIONERS)
    paths = [_plan_path(text, request) for text in request.topologies]
    if len(set(paths)) < len(paths):
        raise ConfigError(f"--topology {' --topology '.join(request.topologies)}: give each machine once")
    scenarios = _scenarios(job, dataset, request)
    sweeps = [parse_sweep(request.sweeps, scenario) for scenario in scenarios]
    make_directory(request.out, stale=paths)
    console, sections, all_fit = make_console(), [], True
    for scenario, sweep, path in zip(scenarios, sweeps, paths, strict=True):
        if job.sparse.placement is not None and not scenario.counts:
            scenario.counts[job.data.max_events] = row_lookups(job, dataset, say=True)
        outcomes = compare(scenario, proposers, partitioners)
        all_fit &= outcomes[0].fits
        if outcomes[0].fits and job.sparse.placement is not None:
            outcomes[0] = _with_hit_rates(outcomes[0])
        section = _found(outcomes) if outcomes[0].fits else _unfit(scenario)
        if sweep.names:
            section["sweep"] = show.sweep_section(sweep, [solve(changed) for _, changed in sweep.points])
            section["grids"].append((f"What if: {section['sweep']['axis']}", section["sweep"]["table"]))
        console.print(f"\n[bold]{section['name']}[/]  {section['about']}")
        for title, grid in section["grids"]:
            show.print_grid(console, title, grid)
        if outcomes[0].fits:
            _save(console, outcomes[0], path)
        sections.append(section)
    about = (f"{len(dataset.schema.tables)} tables, L = {job.data.max_events}, {job.data.batch_requests} requests a "
             f"worker, {job.train.precision}" + f", recomputed: {', '.join(job.train.recompute)}" *
             bool(job.train.recompute))
    write_plan_page(request.out / "plan.html", job.name, about, sections)
    console.print(f"page: {request.out / 'plan.html'}", soft_wrap=True)
    return all_fit


def _scenarios(job: Job, dataset: Dataset, request: Request) -> list[Scenario]:
    choices, constants = parse_constraints(request.constraints), _constants(request.calibration)
    if choices and job.sparse.plan != "auto":
        raise ConfigError(f"--constrain and sparse.plan={job.sparse.plan} both say what tables may be; add "
                          "sparse.plan=auto, or leave --constrain out")
    scenarios = [Scenario(job, dataset, parse_topology(text), constants, choices=choices)
                 for text in request.topologies]
    for scenario in scenarios:
        scenario.check()
    return scenarios


def _constants(path: Path | None) -> Constants:
    try:
        return load_config(Constants, path) if path else Constants()
    except ConfigError as error:
        fault = str(error).partition(";")[0]
        raise ConfigError(f"--calibration {path} is not a file that --calibrate has written ({fault}); give its "
                          "calibration.yaml") from None


def _with_hit_rates(outcome: Outcome) -> Outcome:
    scenario, found = outcome.scenario, outcome.found
    assert found.plan is not None
    plan = expect_hits(found.plan, scenario.job, scenario.dataset, scenario.lookups)
    return replace(outcome, found=replace(found, plan=plan))


def _found(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    best = outcomes[0]
    return {**_head(best.scenario), "ranks": {kind: best.held[kind] for kind in KINDS},
            "limit": best.scenario.hardware.device_bytes,
            "tiles": [("fullest rank", format_bytes(best.fullest)), ("max / mean", f"{best.imbalance:.2f}"),
                      ("step, estimated", f"{1000 * best.total_s:.3g} ms"),
                      ("requests/s, estimated", format_count(best.requests_per_s)),
                      ("plan", plan_hash(best.found.plan) if best.found.plan else "")],
            "grids": [("Searches", show.searches_grid(outcomes)), *show.tables_grids(best),
                      ("Bytes of a rank's device", show.bytes_grid(best)),
                      ("Estimated step", show.parts_grid(best))]}


def _unfit(scenario: Scenario) -> dict[str, Any]:
    """What is missing, and what would help."""
    hardware, refused = scenario.hardware, ""
    try:
        least = needs(scenario.space())
    except DoesNotFit as error:
        refused, least = f"; {error}", needs(scenario.unplaced().space())
    free = hardware.device_bytes - scenario.reserved_bytes
    fixed = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in scenario.fixed_bytes.items())
    section, found = _head(scenario), remedies(scenario)
    section["about"] += (f". No plan fits: of {format_bytes(hardware.device_bytes)} a rank "
                         f"{format_bytes(max(0, free))} are left for tables, after {fixed} and "
                         f"{format_bytes(scenario.headroom_bytes)} kept free")
    for tier, what, there in (("host", "host memory", hardware.host_bytes_per_rank),
                              ("ssd", "SSD", hardware.ssd_bytes_per_rank)):
        if needed := sum(getattr(need, tier) for need in least):
            section["about"] += (f"; tables need {format_bytes(needed)} of {what}, of which each of "
                                 f"{hardware.world_size} ranks has {format_bytes(there)}")
    section["about"] += refused
    section["grids"] = [("What each table needs at least", show.needs_grid(least, free))]
    if found:
        section["grids"].append(("Any one of these makes it fit (planned again)", show.remedies_grid(found)))
    else:
        section["about"] += ". No single change of ranks, memory, columns, kernel, batch or L makes it fit"
    return section


def _head(scenario: Scenario) -> dict[str, Any]:
    hardware = scenario.hardware
    hosts = -(-hardware.world_size // hardware.local_size)
    return {"name": hardware.name, "about": (
        f"{hardware.world_size} {hardware.device} rank{'s' * (hardware.world_size > 1)} of "
        f"{format_bytes(hardware.device_bytes)} on {hosts} host{'s' * (hosts > 1)}"
        + f" of {format_bytes(hardware.host_bytes)}" * (hardware.device == "cuda")
        + f" and {format_bytes(hardware.ssd_bytes)} of SSD at {hardware.ssd_bw / 1e9:.3g} GB/s a rank"
        * bool(hardware.ssd_bytes)
        + f", {hardware.intra_bw / 1e9:.3g} GB/s within"
        + f" and {hardware.inter_bw / 1e9:.3g} GB/s between hosts" * (hosts > 1))}


def _save(console: Console, best: Outcome, path: Path) -> None:
    plan, hardware, job = best.found.plan, best.scenario.hardware, best.scenario.job
    assert plan is not None
    world = World(0, hardware.world_size, 0, hardware.local_size, torch.device(hardware.device))
    check_plan(plan, best.scenario.ranker, job.sparse, world, job.elastic.is_strict, KERNELS)
    save_plan(plan, path)
    on_ssd = any(table.kernel == "key_value" for table in plan.tables)
    console.print(f"plan {plan_hash(plan)}: {path}; " + (NOT_TRAINED if on_ssd else f"train with sparse.plan={path}"),
                  soft_wrap=True)


def _plan_path(topology: str, request: Request) -> Path:
    name = re.sub(r"[^a-z0-9.]+", "-", topology.lower())
    return request.out / ("plan.json" if len(request.topologies) == 1 else f"plan-{name}.json")


def calibrate_job(job: Job, ranks: str, out: Path, measure: Measure) -> None:
    """Run a few steps on each number of ranks, print predicted beside measured, write ``calibration.yaml``."""
    quiet_libraries()
    if not re.fullmatch(r"\d{1,5}(,\d{1,5})*", ranks, re.ASCII):
        raise ConfigError(f"--calibrate={ranks} is not a list of numbers of ranks; use such as 1,2,4")
    numbers = [int(number) for number in parse_list("--calibrate", ranks)]
    if job.sparse.placement is not None:
        raise ConfigError(f"--calibrate measures tables where the plan puts them, sparse.placement="
                          f"{job.sparse.placement} would choose again; add sparse.placement=null "
                          "sparse.device_memory=null")
    make_directory(out)
    _refuse_instances(job)
    compared = calibrate(job, open_dataset(job.data.dir, verify=False), measure, numbers, _CALIBRATION_STEPS)
    constants = fit(compared)
    console = make_console()
    show.print_grid(console, f"Bytes, {job.name}", bytes_compared(compared))
    show.print_grid(console, "Seconds of a step", seconds_compared(compared, constants))
    (out / "calibration.yaml").write_text(dump_config(constants), encoding="utf-8")
    kept = [name for name, value in Constants() if name != "device" and getattr(constants, name) == value]
    if kept:
        console.print(f"not told apart by these runs, kept as they are without calibration: {', '.join(kept)}")
    console.print(f"calibration: {out / 'calibration.yaml'}", soft_wrap=True)


def diff_plans(files: Sequence[str]) -> list[str]:
    """What differs between two plan files, their hashes first."""
    if len(files) != 2:
        raise ConfigError(f"--diff compares two plan files, not {len(files)}; give two, such as plan/plan.json "
                          "runs/first/plan.json")
    first, second = (load_plan(Path(file)) for file in files)
    if plan_hash(first) == plan_hash(second):
        return [f"{plan_hash(first)}: the same plan"]
    return [f"{plan_hash(first)} -> {plan_hash(second)}", *show.plan_differences(first, second)]
