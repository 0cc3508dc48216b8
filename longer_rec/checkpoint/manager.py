"""Saving and loading the checkpoints of a run, so that a torn one is never taken for a whole one.

Commit protocol: ``step-N.tmp/`` is written and fsynced by every rank, each file hashed by the rank that wrote it;
rank 0 writes the manifest, renames the directory, and writes ``LATEST`` last. Loading verifies every hash before
torch.distributed.checkpoint sees a byte: by itself it loads most flipped bits without a word.
"""

import logging
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from longer_rec.checkpoint.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    TensorEntry,
    damaged_files,
    fsync_directory,
    hash_file,
    read_manifest,
    write_durably,
    write_manifest,
)
from longer_rec.checkpoint.tensors import describe, flatten, read_tensors, write_tensors
from longer_rec.errors import CheckpointError

ValueT = TypeVar("ValueT")
LATEST = "LATEST"
_STEP = re.compile(r"step-(\d+)$")
_log = logging.getLogger(__name__)


class CheckpointManager:
    """The checkpoints of one run, in ``directory``; the newest ``keep`` of them, or all.

    ``save``, ``load`` and ``load_latest`` are collective calls (of this process alone when there is no process group):
    they succeed on every rank or raise ``CheckpointError`` on every rank.
    """

    def __init__(self, directory: Path, keep: int | None = None) -> None:
        if keep is not None and keep < 1:
            raise CheckpointError(f"keep={keep} checkpoints would keep none; use 1 or more, or None for all")
        self._directory = directory
        self._keep = keep

    def save(self, step: int, state: Mapping[str, Any], extra: Mapping[str, Any]) -> Path:
        """Write ``state`` (nested dictionaries of tensors, sharded or replicated) and ``extra`` (JSON) as step N."""
        final, temporary = self._directory / f"step-{step}", self._directory / f"step-{step}.tmp"
        tensors = flatten(state)
        _on_rank_0(self._clear_temporary, temporary)
        write_tensors(temporary, tensors)
        files = _everywhere(_hash_own, temporary)
        described = _gather(describe(tensors))
        manifest = Manifest(step=step, files=_union(files), tensors=_union(described), extra=dict(extra))
        _on_rank_0(self._commit, temporary, final, manifest)
        return final

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, ascending."""
        if not self._directory.is_dir():
            return []
        found = (_STEP.fullmatch(path.name) for path in self._directory.iterdir() if (path / MANIFEST).is_file())
        return sorted(int(match[1]) for match in found if match)

    def latest(self) -> Path | None:
        """The newest committed checkpoint, not yet verified."""
        steps = self.steps()
        return self._directory / f"step-{steps[-1]}" if steps else None

    def load(self, path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
        """Verify a checkpoint, fill ``state`` in place, return its ``extra``.

        Shards may be cut differently from those that were saved. ``CheckpointError`` names the damaged file, or the
        tensors that are only in the checkpoint or only in ``state``; nothing of ``state`` has changed then. Lazy
        optimizer state must exist beforehand: what is missing from ``state`` is refused, not dropped.
        """
        manifest = self._verify(path)
        tensors = flatten(state)
        _check_keys(path, manifest.tensors, _union(_gather(describe(tensors))))
        read_tensors(path, tensors)
        return manifest.extra

    def load_latest(self, state: Mapping[str, Any]) -> tuple[Path, dict[str, Any]] | None:
        """Load the newest checkpoint that is whole; None when there is no checkpoint at all.

        A damaged one is reported and passed over for the one before. A whole one of another model is refused: that
        is a mistake and not an accident.
        """
        steps = _gather(self.steps())[0]
        faults: dict[int, str] = {}
        for step in reversed(steps):
            path = self._directory / f"step-{step}"
            try:
                self._verify(path)
            except CheckpointError as error:
                faults[step] = str(error)
                continue
            for damaged, fault in faults.items() if _rank() == 0 else ():
                _log.warning("checkpoint step-%d is passed over for step-%d: %s", damaged, step, fault)
            return path, self.load(path, state)
        if faults:
            raise CheckpointError(f"none of the {len(faults)} checkpoints in {self._directory} is whole: "
                                  f"{next(iter(faults.values()))}; start again in another run directory")
        return None

    def _verify(self, path: Path) -> Manifest:
        """The manifest, once all files match it; the ranks share the reading."""
        manifest = _everywhere(read_manifest, path)[0]
        share = sorted(manifest.files.items())[_rank()::_size()]
        faults = [fault for faults in _everywhere(damaged_files, path, share) for fault in faults]
        if faults:
            raise CheckpointError(f"{'; '.join(faults[:3])}; use another checkpoint")
        return manifest

    def _clear_temporary(self, temporary: Path) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        for stale in self._directory.glob("step-*.tmp"):
            shutil.rmtree(stale)
        temporary.mkdir()

    def _commit(self, temporary: Path, final: Path, manifest: Manifest) -> None:
        write_manifest(temporary, manifest)
        if final.exists():
            # Saved again after falling back to an older step: out of the way under a name that is cleared.
            final.rename(final.with_name(f"{final.name}.replaced.tmp"))
        temporary.rename(final)
        fsync_directory(self._directory)
        pointer = self._directory / f"{LATEST}.tmp"
        write_durably(pointer, f"{final.name}\n")
        pointer.rename(self._directory / LATEST)
        fsync_directory(self._directory)
        for stale in self._directory.glob("step-*.tmp"):
            shutil.rmtree(stale)
        for step in self.steps()[:-self._keep] if self._keep else ():
            shutil.rmtree(self._directory / f"step-{step}")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gather(value: ValueT) -> list[ValueT]:
    """``value`` of every rank. Travels pickled between the ranks of one run, which trust each other."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * _size()
    dist.all_gather_object(values, value)
    return values


def _everywhere(function: Callable[..., ValueT], *arguments: Any) -> list[ValueT]:
    """What ``function`` returns on each rank; its first fault, raised on all of them."""
    value, fault = None, None
    try:
        value = function(*arguments)
    except (CheckpointError, OSError) as error:
        fault = str(error)
    outcomes = _gather((value, fault))
    for rank, (_, problem) in enumerate(outcomes):
        if problem is not None:
            raise CheckpointError(problem if _size() == 1 else f"rank {rank}: {problem}")
    return [value for value, _ in outcomes if value is not None]


def _on_rank_0(function: Callable[..., None], *arguments: Any) -> None:
    def alone() -> None:
        if _rank() == 0:
            function(*arguments)

    _everywhere(alone)


def _hash_own(temporary: Path) -> dict[str, FileEntry]:
    own = {path.name: hash_file(path) for path in sorted(temporary.glob(f"__{_rank()}_*"))}
    return {**own, ".metadata": hash_file(temporary / ".metadata")} if _rank() == 0 else own


def _union(parts: Iterable[Mapping[str, ValueT]]) -> dict[str, ValueT]:
    return {key: value for part in parts for key, value in sorted(part.items())}


def _check_keys(path: Path, saved: Mapping[str, TensorEntry], wanted: Mapping[str, TensorEntry]) -> None:
    unread, missing = sorted(saved.keys() - wanted.keys()), sorted(wanted.keys() - saved.keys())
    if unread:
        raise CheckpointError(f"{path} holds {len(unread)} tensors that this model does not have, the first "
                              f"{unread[0]!r}; load it with the configuration it was saved with")
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} tensors that this model has, the first {missing[0]!r}; "
                              "load it with the configuration it was saved with")
    for key, entry in wanted.items():
        if entry != saved[key]:
            raise CheckpointError(f"{path}: tensor {key!r} is {saved[key].dtype} {saved[key].shape}, this model has "
                                  f"{entry.dtype} {entry.shape}; load it with the configuration it was saved with")
