"""Reading checkpoints without their run: what is in one, and how two differ."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longer_rec.checkpoint.manager import CheckpointManager
from longer_rec.checkpoint.manifest import MANIFEST, Manifest, TensorEntry, damaged_files, read_manifest
from longer_rec.checkpoint.tensors import iterate_tensors
from longer_rec.errors import CheckpointError


@dataclass(frozen=True)
class CheckpointSummary:
    """Step, tensors (whole shapes, by key), the caller's extra, bytes on disk, and the faults of its files."""

    step: int
    tensors: dict[str, TensorEntry]
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
    return CheckpointSummary(step=manifest.step, tensors=manifest.tensors, extra=manifest.extra,
                             num_bytes=sum(entry.num_bytes for entry in manifest.files.values()),
                             faults=damaged_files(path, manifest.files.items()))


def diff_checkpoints(a: Path, b: Path) -> CheckpointDifference:
    """Which tensors and entries differ; one tensor at a time in memory. ``CheckpointError`` if one is damaged."""
    manifest_a, manifest_b = _whole(a), _whole(b)
    common = {key: entry for key, entry in manifest_a.tensors.items() if manifest_b.tensors.get(key) == entry}
    differences = [_describe_mismatch(key, manifest_a.tensors.get(key), manifest_b.tensors.get(key))
                   for key in sorted(manifest_a.tensors.keys() | manifest_b.tensors.keys()) if key not in common]
    for (key, value_a), (_, value_b) in zip(iterate_tensors(a, common), iterate_tensors(b, common), strict=True):
        unequal = _bits(value_a) != _bits(value_b)
        if bool(unequal.any()):
            change = (value_a.double() - value_b.double())[unequal.view(value_a.shape)].abs().max().item()
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


def summary_lines(summary: CheckpointSummary) -> list[str]:
    """A checkpoint for reading: position, tensors, faults."""
    width = max((len(key) for key in summary.tensors), default=0)
    return [f"step {summary.step}, {len(summary.tensors)} tensors, {summary.num_bytes / 1e6:.1f} MB",
            *(f"{key}: {json.dumps(value)}" for key, value in sorted(summary.extra.items())),
            *(f"{key:{width}}  {entry.dtype} {' x '.join(map(str, entry.shape)) or 'scalar'}"
              for key, entry in sorted(summary.tensors.items())),
            *(f"damaged: {fault}" for fault in summary.faults)]


def difference_lines(difference: CheckpointDifference) -> list[str]:
    """What differs, a line each; none for equal checkpoints."""
    return [*(f"{key}: {json.dumps(a)} and {json.dumps(b)}" for key, (a, b) in sorted(difference.extra.items())),
            *(f"{entry.key}: {entry.kind}, {entry.detail}" for entry in difference.tensors)]


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


def _bits(value: torch.Tensor) -> torch.Tensor:
    """Values as integers of their size, so that NaN equals itself and 0.0 is not -0.0."""
    if not value.is_floating_point():
        return value
    return value.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()])
