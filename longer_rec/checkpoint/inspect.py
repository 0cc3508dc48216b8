"""Reading checkpoints without their run: what is in one, and how two differ."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longer_rec.checkpoint.manager import CheckpointManager
from longer_rec.checkpoint.manifest import MANIFEST, Manifest, TensorEntry, damaged_files, read_manifest
from longer_rec.checkpoint.tensors import iterate_tensors
from longer_rec.errors import CheckpointError
from longer_rec.runtime.digest import as_integers, combined_digest

_TABLE = re.compile(r"\bembedding(?:_bag)?s\.(.+)\.weight$")
_POSITION = ("name", "step", "epoch", "samples", "num_workers", "world_size", "data_fingerprint")
_MAX_DIFFERENCES = 20


@dataclass(frozen=True)
class CheckpointSummary:
    """Step, tensors (whole shapes, by key), their digest, the caller's extra, bytes on disk, faults of its files."""

    step: int
    tensors: dict[str, TensorEntry]
    digest: str
    extra: dict[str, Any]
    num_bytes: int
    faults: list[str]


@dataclass(frozen=True)
class TensorDifference:
    """How a tensor of checkpoint A differs from B's: ``kind`` is "only in A", "only in B", "shape", "type", "values".

    For "values", ``detail`` tells how many are not bitwise equal, and by how much at most (NaN where one is NaN).
    """

    key: str
    kind: str
    detail: str


@dataclass(frozen=True)
class CheckpointDifference:
    """Tensors and entries of ``extra`` (A's value, B's value) that differ; both empty for equal checkpoints."""

    tensors: list[TensorDifference]
    extra: dict[str, tuple[Any, Any]]


def inspect_checkpoint(path: Path) -> CheckpointSummary:
    """What a checkpoint holds, its files verified; in one process, on any machine."""
    manifest = read_manifest(path)
    return CheckpointSummary(step=manifest.step, tensors=manifest.tensors,
                             digest=combined_digest(manifest.digests), extra=manifest.extra,
                             num_bytes=sum(entry.num_bytes for entry in manifest.files.values()),
                             faults=damaged_files(path, manifest.files.items()))


def diff_checkpoints(a: Path, b: Path) -> CheckpointDifference:
    """Which tensors and entries differ; one tensor at a time in memory. ``CheckpointError`` if one is damaged."""
    manifest_a, manifest_b = _whole(a), _whole(b)
    common = {key: entry for key, entry in manifest_a.tensors.items() if manifest_b.tensors.get(key) == entry}
    differences = [_describe_mismatch(key, manifest_a.tensors.get(key), manifest_b.tensors.get(key))
                   for key in sorted(manifest_a.tensors.keys() | manifest_b.tensors.keys()) if key not in common]
    for (key, value_a), (_, value_b) in zip(iterate_tensors(a, common), iterate_tensors(b, common), strict=True):
        unequal = as_integers(value_a) != as_integers(value_b)
        if bool(unequal.any()):
            change = (value_a.double() - value_b.double())[unequal].abs().max().item()
            differences.append(TensorDifference(key, "values", f"{int(unequal.sum())} of {value_a.numel()} values, "
                                                f"by {change:.3g} at most"))
    keys = sorted(manifest_a.extra.keys() | manifest_b.extra.keys())
    extra = {key: (manifest_a.extra.get(key), manifest_b.extra.get(key)) for key in keys
             if manifest_a.extra.get(key) != manifest_b.extra.get(key)}
    return CheckpointDifference(sorted(differences, key=lambda difference: difference.key), extra)


def find_checkpoint(path: Path) -> Path:
    """``path`` if it is a checkpoint; the newest one in it if it is a run directory or its ``checkpoints``."""
    if (path / MANIFEST).is_file():
        return path
    for directory in (path, path / "checkpoints"):
        newest = CheckpointManager(directory).latest()
        if newest is not None:
            return newest
    raise CheckpointError(f"{path} holds no checkpoint; give a step-N directory or a run directory that has one")


def summary_lines(summary: CheckpointSummary, detail: bool = False) -> list[str]:
    """A checkpoint for reading: position, tables, parts of the tower (with ``detail`` every tensor), faults."""
    lines = [f"step {summary.step}: {len(summary.tensors)} tensors, {summary.num_bytes / 1e6:.1f} MB",
             *_position_lines({**summary.extra, "digest": summary.digest})]
    if detail:
        lines += _columns([(key, f"{_shape(entry)}  {entry.dtype}") for key, entry in sorted(summary.tensors.items())])
    else:
        lines += _parameter_lines(summary.tensors)
    return [*lines, *(f"damaged: {fault}" for fault in summary.faults)]


def difference_lines(difference: CheckpointDifference, detail: bool = False) -> list[str]:
    """What differs; none for equal checkpoints. A line for each of 20 parameters, or with ``detail`` each tensor."""
    extra = [f"{key}: {json.dumps(a)} and {json.dumps(b)}" for key, (a, b) in sorted(difference.extra.items())]
    if detail:
        return [*extra, *(f"{entry.key}: {entry.kind}, {entry.detail}" for entry in difference.tensors)]
    grouped: dict[str, list[TensorDifference]] = {}
    for entry in difference.tensors:
        grouped.setdefault(_parameter(entry.key)[0], []).append(entry)
    lines = []
    for first, *others in (sorted(entries, key=lambda entry: _parameter(entry.key)[1]) for entries in grouped.values()):
        also = ", ".join(_parameter(entry.key)[1] for entry in others)
        lines.append(f"{first.key}: {first.kind}, {first.detail}{f'; also its {also}' if also else ''}")
    more = len(lines) - _MAX_DIFFERENCES
    return [*extra, *lines[:_MAX_DIFFERENCES], *([f"and {more} more parameters"] if more > 0 else [])]


def _position_lines(extra: Mapping[str, Any]) -> list[str]:
    """Where in its run a checkpoint stands: what is known by name first, then the rest."""
    def tell(value: Any) -> str:
        if isinstance(value, str):
            return f"{value[:12]}..." if len(value) == 64 else value  # a SHA-256
        if isinstance(value, float):
            return f"{value:,.6g}"
        return f"{value:,}" if isinstance(value, int) else json.dumps(value)

    known = [key for key in _POSITION if key in extra]
    return _columns([(key, tell(extra[key])) for key in [*known, *sorted(extra.keys() - known)]])


def _parameter_lines(tensors: Mapping[str, TensorEntry]) -> list[str]:
    """Tables, a line each, and the parts of everything else, a line each, both with their optimizer's state."""
    parameters: dict[str, dict[str, TensorEntry]] = {}
    for key, entry in sorted(tensors.items()):
        parameter, state = _parameter(key)
        parameters.setdefault(parameter, {})[state] = entry
    tables: list[tuple[str, str]] = []
    parts: dict[str, list[dict[str, TensorEntry]]] = {}
    for parameter, held in parameters.items():
        name = _TABLE.search(parameter)
        if name and "" in held:
            states = "".join(f", {state} {_shape(entry)}" for state, entry in held.items() if state)
            tables.append((name[1], f"{_shape(held[''])}  {held[''].dtype}{states}"))
        else:
            parts.setdefault(".".join(parameter.split(".")[:2]), []).append(held)
    lines = []
    for part, members in parts.items():
        own = [held[""] for held in members if "" in held]
        states = "".join(f", {state}" for state in sorted({state for held in members for state in held if state}))
        num_values = sum(math.prod(entry.shape) for entry in own)
        lines.append((part, f"{len(own)} tensors, {num_values:,} values{states}"))
    return [f"{len(tables)} tables", *_columns(tables), f"{sum(map(len, parts.values()))} other parameters",
            *_columns(lines)]


def _parameter(key: str) -> tuple[str, str]:
    """The parameter that a tensor belongs to, and which state of the optimizer it is: "" for the parameter itself."""
    part, _, name = key.partition("/")
    if part != "optimizer":
        return name, ""
    parameter, _, state = name.rpartition("/")
    return parameter, state.rpartition(".")[2]


def _shape(entry: TensorEntry) -> str:
    return " x ".join(f"{size:,}" for size in entry.shape) or "scalar"


def _columns(rows: list[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:{width}}  {value}" for name, value in rows]


def _whole(path: Path) -> Manifest:
    manifest = read_manifest(path)
    faults = damaged_files(path, manifest.files.items())
    if faults:
        raise CheckpointError(faults[0])
    return manifest


def _describe_mismatch(key: str, a: TensorEntry | None, b: TensorEntry | None) -> TensorDifference:
    if a is None or b is None:
        entry = a or b
        assert entry is not None
        return TensorDifference(key, "only in B" if a is None else "only in A", f"{entry.dtype} {entry.shape}")
    if a.shape != b.shape:
        return TensorDifference(key, "shape", f"{a.shape} and {b.shape}")
    return TensorDifference(key, "type", f"{a.dtype} and {b.dtype}")
