"""``comparison.html``: several runs on one page, from the files of their directories alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from longer_rec.config import flatten
from longer_rec.errors import ConfigError
from longer_rec.report import charts
from longer_rec.report.html import points, results_table, train_seconds
from longer_rec.report.numbers import MISSING
from longer_rec.report.page import Section, write_page
from longer_rec.report.quality import quality
from longer_rec.report.run_files import RunFiles, read_run_files


def write_comparison(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page, beside the first run where ``out`` does not say where, and return its path.

    ``ConfigError`` for a run that is given twice and for more runs than can be told apart; ``DataError`` for a damaged
    file and a directory that is no run.
    """
    places = [directory.resolve() for directory in run_dirs]
    if len(places) > len(charts.SERIES):
        raise ConfigError(f"{len(places)} runs are more than the {len(charts.SERIES)} lines that can be told apart; "
                          "compare fewer")
    for place in places:
        if places.count(place) > 1:
            raise ConfigError(f"{place} is given more than once; a comparison needs different runs")
    runs = [read_run_files(directory) for directory in run_dirs]
    named = dict(zip(_names(runs), runs, strict=True))
    data = {name: str(files.run.get("data", {}).get("fingerprint", ""))[:12] for name, files in named.items()}
    path = out or places[0].parent / "comparison.html"
    write_page(path, "compare.html.j2", names=list(named), notes=_notes(named, data),
               results=results_table([{**files.results[0], "name": name} for name, files in named.items()
                                      if files.results], own=False),
               curves=_curves(named), settings=_settings(named),
               quality=quality([(name, files.analysis) for name, files in named.items() if files.analysis],
                               len(set(data.values())) == 1))
    return path


def _names(runs: Sequence[RunFiles]) -> list[str]:
    """A run's own name where no other has it, else with its directory."""
    names = [files.name for files in runs]
    return [name if names.count(name) == 1 else f"{name} ({files.directory})"
            for name, files in zip(names, runs, strict=True)]


def _notes(named: Mapping[str, RunFiles], data: Mapping[str, str]) -> list[str]:
    """What a reader must know before comparing: different data, and what is missing with the command that makes it."""
    notes = []
    if len(set(data.values()) - {""}) > 1:
        prepared = ", ".join(f"{name}: {mark or 'unknown'}" for name, mark in data.items())
        notes.append(f"The runs are on different data ({prepared}): their figures cannot be compared as models.")
    for name, files in named.items():
        if not files.results:
            notes.append(f"{name} has not ended: no results.json. Run longer-rec train on with its configuration.")
        if not files.lines:
            notes.append(f"{name} has no metrics.jsonl, which longer-rec train writes: no curves.")
        if files.analysis is None:
            notes.append(f"{name} has no analysis.json: no figures by history length. Make it with longer-rec eval "
                         f"{files.directory}.")
    return notes


def _curves(named: Mapping[str, RunFiles]) -> list[Section]:
    """Loss and validation AUC, over steps, over requests and over training time."""
    legend = [(*charts.run_style(number), name) for number, name in enumerate(named)]
    drawn = []
    for split, key, title in (("train", "loss", "Training loss"), ("validation", "auc", "Validation AUC")):
        for scale, x_title in (("step", "step"), ("requests", "requests seen"), ("seconds", "training time")):
            series = [_rescaled(files, split, key, scale) for files in named.values()]
            if any(series):
                drawn.append({"caption": f"{title} over {x_title}{'s' * (scale == 'step')}", "legend": legend,
                              "chart": charts.overlay(f"{key}-{scale}", series, x_title, smooth=split == "train")})
    return drawn


def _rescaled(files: RunFiles, split: str, key: str, scale: str) -> list[tuple[float, float]]:
    """(x, value) of a run's lines; nothing where the files do not say how many requests a step takes."""
    found = points(files.split(split), key)
    if scale == "seconds":
        return train_seconds(files, split, key)
    if scale == "requests":
        settings = files.config.get("data")
        batch = settings.get("batch_requests") if isinstance(settings, Mapping) else None
        if batch is None or "num_workers" not in files.run:
            return []
        return [(step * batch * files.run["num_workers"], value) for step, value in found]
    return found


def _settings(named: Mapping[str, RunFiles]) -> Section | None:
    """A row for each setting in which the runs themselves differ; None with fewer than two configurations."""
    flat = {name: flatten(files.config) for name, files in named.items() if files.config}
    if len(flat) < 2:
        return None
    keys = dict.fromkeys(key for settings in flat.values() for key in settings)
    rows = [[key, *(str(settings.get(key, MISSING)) for settings in flat.values())] for key in keys
            if key.partition(".")[0] not in ("name", "run_dir", "baselines")]
    return {"head": [("setting", False), *((name, False) for name in flat)],
            "rows": [row for row in rows if len(set(row[1:])) > 1]}
