"""The results of a study's runs, averaged over seeds: what its table, its plots and its fits are made of."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from longer_rec.report.run_files import read_run_files
from longer_rec.study.scaling import MIN_POINTS, fit_scaling
from longer_rec.study.spec import StudyConfig, Variant
from longer_rec.study.tasks import Task

Row = dict[str, Any]
_METRICS: Final = ("auc", "logloss", "gauc", "ne")
Costs = Mapping[Path, Mapping[str, Any]]
Runs = Mapping[Path, Mapping[int, Task]]


def study_content(study: StudyConfig, grid: Sequence[Variant], runs: Runs, costs: Costs, choices: Mapping[Path, str],
                  failed: Mapping[str, str]) -> dict[str, Any]:
    """All that the table and the page show: rows in the order of the study's file, fits, and where it was run."""
    finished = {variant.folder: {seed: _read_result(task) for seed, task in runs.get(variant.folder, {}).items()
                                 if task.done} for variant in grid}
    reference = {(variant.data, *variant.point.values()): finished[variant.folder] for variant in grid
                 if variant.model == study.reference}
    rows = []
    for variant in grid:
        results = finished[variant.folder]
        job = variant.job(study.directory)
        row = {"data": variant.data, "model": variant.model, "point": variant.point, "seeds": len(results),
               "missing": len(study.seeds) - len(results), "choice": choices.get(variant.folder),
               "max_events": job.data.max_events, **_cost(costs.get(variant.folder))}
        for name in (*_METRICS, "requests_per_s", "train_s", "requests"):
            row[name] = mean_and_error([result[name] for result in results.values()])
        base = reference.get((variant.data, *variant.point.values()), {})
        row["delta_auc"] = None if variant.model == study.reference else mean_and_error(
            [results[seed]["auc"] - base[seed]["auc"] for seed in results if seed in base])
        rows.append(row)
    return {"name": study.name, "reference": study.reference, "axes": list(study.grid), "has_data": bool(study.data),
            "budget_s": study.budget_s, "searched": bool(study.search), "rows": rows, "fits": list(_fits(study, rows)),
            "failed": dict(failed), "environment": _environment(runs)}


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None] | None:
    """Mean over seeds and its standard error, which one seed does not have; None without any."""
    if not values:
        return None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(np.mean(values)), error


def _read_result(task: Task) -> dict[str, float]:
    """Test metrics of a run with its speed: seconds of training alone, evaluations on the way left out."""
    files = read_run_files(task.job.run_dir)
    result, lines = files.results[0], files.lines
    train_s = sum(line["elapsed_s"] - before.get("elapsed_s", 0.0) for before, line in pairwise([{}, *lines])
                  if line["split"] == "train")
    requests = result["steps"] * task.job.step_requests()
    return {**{name: result[name] for name in _METRICS}, "train_s": train_s, "requests": requests,
            "requests_per_s": requests / train_s if train_s else 0.0}


def _cost(cost: Mapping[str, Any] | None) -> Row:
    if cost is None:
        return dict.fromkeys(("user_mflops", "candidate_mflops", "gflops", "dense_parameters", "sparse_parameters"))
    return {"user_mflops": cost["user_flops"] / 1e6, "candidate_mflops": cost["candidate_flops"] / 1e6,
            "gflops": cost["request_flops"] / 1e9, "dense_parameters": cost["dense_parameters"],
            "sparse_parameters": cost["sparse_parameters"]}


def _fits(study: StudyConfig, rows: Sequence[Row]) -> Iterator[Row]:
    """A curve for each quantity, metric, data set and model, in that order; one that cannot be fitted says why."""
    for x in study.scaling:
        for metric in ("auc", "logloss"):
            groups: dict[tuple[str | None, str], list[Row]] = {}
            for row in rows:
                if row[metric] is not None and row[x]:
                    groups.setdefault((row["data"], row["model"]), []).append(row)
            for (data, model), own in groups.items():
                points = sorted((row[x], *row[metric]) for row in own)
                fit = fit_scaling([point[0] for point in points], [point[1] for point in points])
                yield {"x": x, "metric": metric, "data": data, "model": model, "points": points,
                       "fit": None if fit is None else vars(fit) | {"at_bound": fit.at_bound},
                       "why": "" if fit else f"{MIN_POINTS} different values are needed, "
                                             f"{len({point[0] for point in points})} are there"}


def _environment(runs: Runs) -> dict[str, list[str]]:
    """Where the finished runs were made: each fact with all values it had, for a study may be continued elsewhere."""
    facts: dict[str, list[str]] = {}
    for task in (task for tasks in runs.values() for task in tasks.values() if task.done):
        run = json.loads((task.job.run_dir / "run.json").read_text(encoding="utf-8"))
        machine, versions = run["machine"], run["versions"]
        gpus = ", ".join(gpu["name"] for gpu in machine["gpus"])
        told = {"hardware": f"{machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}"
                            + (f", {gpus}" if gpus else ""),
                "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
                "commit": run["git_commit"] or "none", "data": run["data"]["fingerprint"][:12],
                "date": run["started"][:10]}
        for name, value in told.items():
            if value not in facts.setdefault(name, []):
                facts[name].append(value)
    return facts
