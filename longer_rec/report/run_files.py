"""Reading a run directory: each file is optional, but what is there must be whole."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import pydantic
import yaml

from longer_rec.errors import DataError

Line = dict[str, Any]
ContentT = TypeVar("ContentT", dict[str, Any], list[Line])
Estimate = tuple[float | None, float | None, float | None]  # value, low, high; None where there is none


class Bucket(pydantic.BaseModel):
    """Candidates whose history, or user, has ``low`` to ``high`` events, or requests; value, low, high of metrics."""

    low: int
    high: int
    candidates: int
    users: int
    auc: Estimate
    logloss: Estimate


class CalibrationBin(pydantic.BaseModel):
    candidates: int
    predicted: float
    observed: Estimate


class Calibration(pydantic.BaseModel):
    error: float | None
    bins: list[CalibrationBin] = pydantic.Field(min_length=1)


class LayerProfile(pydantic.BaseModel):
    """Shares by bucket, then those of the user globals and of the candidate's own tokens; each row adds up to 1."""

    heads: list[list[float]]
    uniform: list[float]


class Profile(pydantic.BaseModel):
    """Bucket i holds [edges[i - 1], edges[i])."""

    edges: list[float]
    layers: list[LayerProfile] = pydantic.Field(min_length=1)

    @pydantic.model_validator(mode="after")
    def _check_rows(self) -> Self:
        if any(len(row) != len(self.edges) + 3 for layer in self.layers for row in (*layer.heads, layer.uniform)):
            raise ValueError(f"a row does not hold the {len(self.edges) + 3} shares of its buckets and two more")
        return self


class Attention(pydantic.BaseModel):
    requests: int
    candidates: int
    position: Profile
    age: Profile


class Analysis(pydantic.BaseModel):
    """What is read of ``analysis.json``."""

    history_length: list[Bucket]
    user_activity: list[Bucket]
    calibration: Calibration
    attention: Attention | None


@dataclass(frozen=True)
class RunFiles:
    """What the trainer wrote; None or empty where a file is not there (yet).

    ``lines`` and ``events`` are those of ``metrics.jsonl`` and ``events.jsonl``, in the order written; ``results``
    holds one row a model.
    """

    directory: Path
    config_text: str | None
    config: dict[str, Any]
    run: dict[str, Any]
    plan: dict[str, Any]
    results: list[dict[str, Any]]
    lines: list[Line]
    events: list[Line]
    analysis: Analysis | None

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.directory.resolve().name)

    def split(self, name: str) -> list[Line]:
        return [line for line in self.lines if line["split"] == name]


def read_run_files(directory: Path) -> RunFiles:
    """The files of a run; ``DataError`` when there is none of them, or one of them is damaged."""
    files = RunFiles(
        directory=directory,
        config_text=_read_text(directory / "config.yaml"),
        config=_read(directory / "config.yaml", yaml.safe_load, dict),
        run=_read(directory / "run.json", json.loads, dict),
        plan=_read(directory / "plan.json", json.loads, dict),
        results=_read(directory / "results.json", json.loads, list),
        lines=_read_lines(directory / "metrics.jsonl", {"step": int, "split": str}),
        events=_read_lines(directory / "events.jsonl", {"event": str, "time": str}),
        analysis=_read_analysis(directory),
    )
    if not any((files.config, files.run, files.plan, files.results, files.lines, files.analysis)):
        raise DataError(f"{directory} holds none of a run's files (config.yaml, run.json, metrics.jsonl, …); "
                        "give the directory that `longer-rec train` wrote")
    return files


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; restore it or remove it") from None


def _read(path: Path, parse: Callable[[str], Any], kind: type[ContentT]) -> ContentT:
    """What a file holds, empty without one."""
    text = _read_text(path)
    try:
        content = None if text is None else parse(text)
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path} is damaged: {' '.join(str(error).split())}; restore it or remove it") from None
    if content is None:
        return kind()
    if not isinstance(content, kind) or (kind is list and not all(isinstance(entry, dict) for entry in content)):
        what = "list of mappings" if kind is list else "mapping"
        raise DataError(f"{path} holds a {type(content).__name__}, not a {what}; restore it or remove it")
    return content


def _read_analysis(directory: Path) -> Analysis | None:
    path = directory / "analysis.json"
    text = _read_text(path)
    try:
        return None if text is None else Analysis.model_validate_json(text)
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        raise DataError(f"{path} is damaged: {'.'.join(map(str, fault['loc']))} {fault['msg']}; make it again with "
                        f"`longer-rec eval {directory}`, or remove it") from None


def _read_lines(path: Path, keys: dict[str, type]) -> list[Line]:
    """Objects with these keys, in the order written; a line cut short by a crash is as damaged as any other."""
    text = _read_text(path) or ""
    lines = []
    for number, raw in enumerate(text.splitlines(), start=1):
        try:
            line = json.loads(raw)
            known = isinstance(line, dict) and all(isinstance(line[key], kind) for key, kind in keys.items())
        except (ValueError, KeyError):
            known = False
        if not known:
            raise DataError(f"{path} line {number} is damaged: {raw[:60]!r} is no JSON object with "
                            f"{' and '.join(map(repr, keys))}; remove that line")
        lines.append(line)
    return lines
