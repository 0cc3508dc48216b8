"""``report.html``: one self-contained page about a run, made from the files of its directory alone."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from markupsafe import Markup, escape

from longer_rec.report import charts
from longer_rec.report.numbers import (
    METRIC_TITLES,
    MISSING,
    format_bytes,
    format_count,
    format_duration,
    format_kernel,
    format_metric,
    format_ranks,
    is_number,
    result_cells,
)
from longer_rec.report.page import Section, write_page
from longer_rec.report.quality import attention, quality
from longer_rec.report.run_files import Line, RunFiles, read_run_files

SPLITS: Final = ("train", "validation", "test")
# Parts of a step in the order in which they happen.
_PARTS: Final = {"time_data_s": "waiting for data", "time_lookup_s": "lookup", "time_tower_s": "tower",
                 "time_reduce_s": "reduction", "time_sparse_s": "sparse update", "time_dense_s": "dense update"}


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into the run's directory and return its path.

    A file that is not there costs its section, which says so; a damaged one raises ``DataError``.
    """
    files = read_run_files(run_dir)
    path = run_dir / "report.html"
    analyses = [(each.name, each.analysis) for each in (files, *_baselines(files)) if each.analysis]
    write_page(path, "report.html.j2", head=headline(files), results=results_table(files.results), curves=curves(files),
               quality=quality(analyses), attention=attention(files.analysis), directory=run_dir,
               speed=speed(files), continued=continued(files),
               data=data(files), plan=plan(files), machine=environment(files),
               config=highlight_yaml(files.config_text) if files.config_text else None)
    return path


def headline(files: RunFiles) -> Section:
    """Name, origin and the figures that matter most: of the test split, or the newest validation before its end."""
    final, split = _final_metrics(files)
    train = files.split("train")
    tiles = [(f"{split} {METRIC_TITLES[name]}", format_metric(name, final.get(name)))
             for name in ("auc", "logloss", "gauc")] if final else []
    if train:
        tiles.append(("training time", format_duration(train[-1].get("elapsed_s", 0.0))))
        tiles.append(("steps", format_count(train[-1]["step"])))
    if points(train, "requests_per_s"):
        tiles.append(("requests/s", format_count(round(_mean(train, "requests_per_s")))))
    run, version = files.run, files.run.get("versions", {}).get("longer_rec")
    ranks = files.plan.get("world_size")
    origin = [
        str(run.get("started", ""))[:16].replace("T", " ") + " UTC" * str(run.get("started")).endswith("+00:00"),
        f"{ranks} rank{'s' if ranks != 1 else ''}" if ranks else "",
        f"longer_rec {version}" if version else "",
        f"commit {run['git_commit'][:10]}" if run.get("git_commit") else "",
    ]
    return {"name": files.name, "tiles": tiles, "origin": " · ".join(part for part in origin if part)}


def results_table(rows: Sequence[Mapping[str, Any]], own: bool = True) -> Section | None:
    """Each model's metrics as text, the best of a column marked, the first one's row too; None without a row."""
    if not rows:
        return None
    titles, cells = result_cells(rows)
    first = rows[0]
    counts = [f"{format_count(first[key])} {what}" for key, what in (
        ("num_candidates", "candidates"), ("num_gauc_users", "users with both classes")) if is_number(first.get(key))]
    return {
        "titles": titles,
        "rows": [{"name": row.get("name", MISSING), "cells": of_row,
                  "time": format_duration(row["train_s"]) if row.get("train_s") else ""}
                 for row, of_row in zip(rows, cells, strict=True)],
        "own": own, "timed": any(row.get("train_s") for row in rows),
        "about": ", ".join(counts) + ("; the best of each column in bold" if len(rows) > 1 else ""),
    }


def curves(files: RunFiles) -> list[Section]:
    """Loss and AUC over steps, each with its legend; empty when nothing was logged."""
    train, validation = files.split("train"), files.split("validation")
    drawn = []
    for name, caption, trained, evaluated in (
        ("loss", "Loss over steps, in nats a candidate", points(train, "loss"), points(validation, "logloss")),
        ("auc", "AUC over steps", [], points(validation, "auc")),
    ):
        if not trained and not evaluated:
            continue
        metric = "logloss" if name == "loss" else name
        levels = [(str(row.get("name", MISSING)), row[metric]) for row in files.results if is_number(row.get(metric))]
        legend = [(1, "line", "training")] * bool(trained) + [(2, "line", "validation")] * bool(evaluated)
        legend += [(charts.level_colour(number), "dash", f"test: {model} {format_metric(metric, level)}")
                   for number, (model, level) in enumerate(levels)]
        chart = charts.curve(name, trained, evaluated, [level for _, level in levels])
        drawn.append({"caption": caption, "legend": legend, "chart": chart})
    return drawn


def speed(files: RunFiles) -> Section | None:
    """Throughput over steps and the mean split of a step's time; None when no step was logged."""
    train = files.split("train")
    rates = points(train, "requests_per_s")
    if not rates:
        return None
    durations = _durations(files.lines)
    seconds = {name: sum(line.get(key, 0.0) for line in train) for key, name in _PARTS.items()}
    seconds["other"] = max(0.0, sum(durations) - sum(seconds.values()))
    total, num_steps = sum(seconds.values()), train[-1]["step"]
    return {
        "chart": charts.throughput(rates, "requests/s"),
        "means": [(unit, format_count(_mean(train, f"{unit}_per_s")))
                  for unit in ("requests", "candidates", "events") if points(train, f"{unit}_per_s")],
        "mfu": [(f"{_mean(train, key):.1%}", of) for key, of in (("mfu", "the step"), ("mfu_tower", "the tower's part"))
                if points(train, key)],
        "step_ms": f"{1000 * total / num_steps:.1f}" if total else None,
        "parts": [{"name": name, "share": value / total, "ms": f"{1000 * value / num_steps:.1f}"}
                  for name, value in seconds.items() if value >= 0.0005 * total] if total else [],
    }


def continued(files: RunFiles) -> Section | None:
    """Each start that went on where another had saved, and each refused resize; None when there was none."""
    rows = []
    for event in files.events:
        if event["event"] == "continued":
            what = f"{event['from']} → {event['to']}" if event["from"] != event["to"] else str(event["to"])
            rows.append([format_count(event["step"]), what, format_duration(event["pause_s"]), event["time"]])
        else:
            rows.append(["", f"→ {event['to']}", f"refused: {event['why']}", event["time"]])
    head = [("After step", True), ("Processes", True), ("Pause", True), ("Time (UTC)", False)]
    return {"head": head, "rows": rows} if rows else None


def data(files: RunFiles) -> Section | None:
    """The summary of the prepared data, whatever it holds: facts, and one row for each quantity told by split."""
    summary = dict(files.run.get("data") or {})
    if not summary:
        return None
    histogram = summary.pop("history_length_histogram", None)
    shown = {"name": summary.pop("name", ""), "about": summary.pop("description", "")}
    by_split = [row for key, value in summary.items() for row in _split_rows(key, value)]
    return {
        **shown, "by_split": by_split,
        "facts": [(title(key), fact(key, value)) for key, value in summary.items() if not _split_rows(key, value)],
        "splits": [split for split in SPLITS if any(split in row for _, row in by_split)],
        "chart": _histogram(histogram, files.config),
    }


def environment(files: RunFiles) -> list[tuple[str, str]]:
    """Facts of ``run.json`` apart from the data; packages keep their names, groups are taken apart."""
    facts: list[tuple[str, str]] = []
    for key, value in files.run.items():
        if key == "data":
            continue
        group = value if isinstance(value, Mapping) else {key: value}
        facts += [(name if re.match(r"\d+\.\d", str(part)) else title(name), fact(name, part))
                  for name, part in group.items()]
    return facts


def plan(files: RunFiles) -> Section | None:
    """Rows of the sharding plan, largest table first, and what each rank holds; None without a plan."""
    if not files.plan.get("tables"):
        return None
    tables, num_ranks = sorted(files.plan["tables"], key=lambda table: -_table_bytes(table)), files.plan["world_size"]
    held = [_bytes_on_ranks(table, num_ranks) for table in tables]
    return {
        "rows": [{"colour": min(number, len(charts.SERIES) - 1) + 1, "table": table["table"],
                  "rows": format_count(table["rows"]), "dim": table["dim"], "sharding": table["sharding_type"],
                  "kernel": format_kernel(table), "ranks": format_ranks(table["ranks"]),
                  "weights": format_bytes(table["weight_bytes"]), "optimizer": format_bytes(table["optimizer_bytes"])}
                 for number, table in enumerate(tables)],
        "total": format_bytes(sum(map(sum, held))), "num_ranks": num_ranks,
        "chart": charts.rank_bytes(held),
    }


def title(key: str) -> str:
    """A key as a reader says it: ``num_oov_items`` becomes "OOV items", units leave the name."""
    words = re.sub(r"^num_|_(bytes|s|seconds)$", "", key).replace("_", " ").strip()
    words = re.sub(r"\b(oov|omp|gpu)(?=s?\b)", lambda match: match[0].upper(), words)
    return words[:1].upper() + words[1:]


def fact(key: str, value: Any) -> str:
    """A value in the unit that its key names; nested values flattened into one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {fact(name, part)}" for name, part in value.items()) or MISSING
    if isinstance(value, list | tuple):
        return "; ".join(fact(key, part) for part in value) or "none"
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    if not is_number(value):
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
    if key.endswith("bytes"):
        return format_bytes(value)
    if key.endswith(("_s", "seconds")):
        return format_duration(value)
    if key.endswith("_time"):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M UTC")
    if key.endswith("rate") or (isinstance(value, float) and 0 < abs(value) < 1):
        return f"{value:.2%}"
    return format_count(value)


def highlight_yaml(text: str) -> Markup:
    """The text escaped, its keys and comments marked."""
    marked = re.sub(r"(?m)^(\s*(?:- )?)([\w.]+)(:)", r"\1<b>\2</b>\3", str(escape(text)))
    return Markup(re.sub(r"(?m)(^|\s)(#.*)$", r"\1<i>\2</i>", marked))  # noqa: S704 - escaped above


def _final_metrics(files: RunFiles) -> tuple[Mapping[str, Any], str]:
    if files.results:
        return files.results[0], "test"
    for split in ("test", "validation"):
        if lines := files.split(split):
            return lines[-1], split
    return {}, ""


def _baselines(files: RunFiles) -> list[RunFiles]:
    """The runs beside this one, in the order of the results."""
    found = [files.directory / "baselines" / str(row.get("name")) for row in files.results[1:]]
    return [read_run_files(directory) for directory in found if directory.is_dir()]


def points(lines: Iterable[Line], key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in lines if is_number(line.get(key)) and math.isfinite(line[key])]


def _mean(lines: Iterable[Line], key: str) -> float:
    values = [value for _, value in points(lines, key)]
    return sum(values) / len(values)


def train_seconds(files: RunFiles, split: str, key: str) -> list[tuple[float, float]]:
    """(seconds of training before it, value) of each line of a split: the time of evaluations is left out."""
    found, passed = [], 0.0
    durations = iter(_durations(files.lines))
    for line in files.lines:
        if line["split"] == "train" and is_number(line.get("elapsed_s")):
            passed += next(durations)
        if line["split"] == split and points([line], key):
            found.append((passed, line[key]))
    return found


def _durations(lines: Sequence[Line]) -> list[float]:
    """Seconds of each training line: ``elapsed_s`` runs over training and evaluation alike, line after line."""
    timed = [{"split": "", "elapsed_s": 0.0}, *(line for line in lines if is_number(line.get("elapsed_s")))]
    return [max(0.0, line["elapsed_s"] - before["elapsed_s"]) for before, line in pairwise(timed)
            if line["split"] == "train"]


def _split_rows(key: str, value: Any) -> list[tuple[str, dict[str, str]]]:
    """(title, text by split) for a value told by split, or for each name of a group told by split, else nothing."""
    if _is_by_split(value):
        return [(title(key), {split: fact(key, part) for split, part in value.items()})]
    if isinstance(value, Mapping) and value and all(_is_by_split(part) for part in value.values()):
        return [(f"{title(key)}: {name.replace('_', ' ')}", {split: fact(key, one) for split, one in part.items()})
                for name, part in value.items()]
    return []


def _is_by_split(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and set(value) <= set(SPLITS)


def _histogram(bins: Sequence[Sequence[int]] | None, config: Mapping[str, Any]) -> Markup | None:
    """Drawn from (lowest, highest, requests) of each bin; None without a bin."""
    if not bins:
        return None
    settings = config.get("data")
    max_events = settings.get("max_events") if isinstance(settings, Mapping) else None
    edges = [low for low, _, _ in bins] + [bins[-1][1] + 1]
    return charts.histogram(edges, [count for _, _, count in bins], max_events)


def _table_bytes(table: Mapping[str, Any]) -> int:
    return int(table["weight_bytes"] + table["optimizer_bytes"])


def _bytes_on_ranks(table: Mapping[str, Any], num_ranks: int) -> list[float]:
    """Weights and optimizer state of one table by rank, in proportion to its shards; a replica holds all of it."""
    held, whole = [0.0] * num_ranks, _table_bytes(table)
    for shard in table.get("shards") or ():
        height, width = shard["sizes"]
        held[shard["rank"]] += whole * height * width / (table["rows"] * table["dim"])
    if not table.get("shards"):
        for rank in table["ranks"]:
            held[rank] = whole
    return held
