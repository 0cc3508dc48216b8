"""Saving and loading the checkpoints of a run, so that a torn one is never taken for a whole one.

Commit protocol: ``step-N.tmp/`` is written and fsynced by every rank, each file hashed by the rank that wrote it;
rank 0 writes the manifest, renames the directory, and writes ``LATEST`` last. Loading verifies every hash before
torch.distributed.checkpoint sees a byte: by itself it loads most flipped bits without a word.
"""

import atexit
import datetime
import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

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
from longer_rec.checkpoint.tensors import Staging, describe, flatten, read_tensors, write_tensors
from longer_rec.errors import CheckpointError
from longer_rec.runtime.digest import join_digests, local_digests
from longer_rec.runtime.distributed import gather, num_ranks, on_all, on_main, own_rank

ValueT = TypeVar("ValueT")
LATEST = "LATEST"
_REPLACED = ".replaced"
_GRACE_S = 20.0
_STEP = re.compile(r"step-(\d+)$")
_log = logging.getLogger(__name__)


class _Saving(threading.Thread):
    """A save under way.

    A daemon, so that a process which gives up on a stopped peer can end before the group's timeout. But Python aborts
    when it ends while a thread is inside torch's writer: a process that did not wait() waits a little at its end.
    """

    def __init__(self, step: int, write: Callable[[], None]) -> None:
        super().__init__(name=f"save-step-{step}", target=write, daemon=True)
        self._fault: BaseException | None = None
        atexit.register(self.join, _GRACE_S)

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:  # raised by wait()
            self._fault = error

    def raise_fault(self) -> None:
        atexit.unregister(self.join)
        if self._fault is not None:
            raise self._fault


class CheckpointManager:
    """The checkpoints of one run, in ``directory``: the newest ``keep`` (None: all) and multiples of ``keep_every``.

    Saving, waiting and loading are collective calls (of this process alone when there is no process group): they
    succeed on every rank or raise ``CheckpointError`` on every rank. A lost peer is gloo's RuntimeError, after
    ``timeout_s`` at most while saving.
    """

    def __init__(self, directory: Path, keep: int | None = None, keep_every: int | None = None,
                 timeout_s: float = 600.0) -> None:
        if keep is not None and keep < 1:
            raise CheckpointError(f"keep={keep} checkpoints would keep none; use 1 or more, or None for all")
        if keep_every is not None and keep_every < 1:
            raise CheckpointError(f"keep_every={keep_every} is no number of steps; use 1 or more, or None")
        self._directory = directory
        self._keep = keep
        self._keep_every = keep_every
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._group: dist.ProcessGroup | None = None
        self._staging = Staging()
        self._saving: _Saving | None = None

    def save(self, step: int, state: Mapping[str, Any], extra: Mapping[str, Any]) -> Path:
        """Write ``state`` (nested dictionaries of tensors, sharded or replicated) and ``extra`` (JSON) as step N."""
        self.save_async(step, state, extra)
        self.wait()
        return self._directory / f"step-{step}"

    def save_async(self, step: int, state: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Copy ``state`` as it is now and return; a thread writes and commits the copy while training goes on.

        Waits for the save before, and raises its fault.
        """
        frozen: dict[str, Any] = json.loads(json.dumps(dict(extra)))
        entries, staged = describe(flatten(state)), self.prepare(state)
        self._saving = _Saving(step, lambda: self._write(step, staged, entries, frozen))
        self._saving.start()

    def prepare(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Copy ``state`` to memory of our own, and make the group of the saving threads; both are kept.

        Called before a run's first step, it takes from the first save the seconds of touching new memory, and lets a
        machine that has too little of it say so at once.
        """
        self.wait()  # for what the memory holds now
        if self._group is None and dist.is_initialized():
            # Its own group: on a shared one, its messages and those of the training step would meet.
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        return self._staging.copy(flatten(state))

    def wait(self) -> None:
        """Return once the save under way is committed, or raise what went wrong with it; nothing when there is none."""
        if self._saving is not None:
            self._saving.join()
            saving, self._saving = self._saving, None
            saving.raise_fault()

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, ascending."""
        return sorted(self._committed())

    def latest(self) -> Path | None:
        """The newest committed checkpoint, not yet verified."""
        return max(self._committed().items(), default=(0, None))[1]

    def _committed(self) -> dict[int, Path]:
        return {step: path for step, path in self._directories().items() if (path / MANIFEST).is_file()}

    def _directories(self) -> dict[int, Path]:
        """By step; one that is being replaced counts until its successor is there."""
        found: dict[int, Path] = {}
        paths = self._directory.iterdir() if self._directory.is_dir() else ()
        for path in sorted(paths, key=lambda path: path.suffix == _REPLACED, reverse=True):
            if match := _STEP.fullmatch(path.name.removesuffix(_REPLACED)):
                found[int(match[1])] = path
        return found

    def load(self, path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
        """Verify a checkpoint, fill ``state`` in place, return its ``extra``.

        Shards may be cut differently from those that were saved. ``CheckpointError`` names the damaged file, or the
        tensors that are only in the checkpoint or only in ``state``; nothing of ``state`` has changed then. Lazy
        optimizer state must exist beforehand: what is missing from ``state`` is refused, not dropped. At last the
        digests of what is in memory now must be those of what was in memory when it was saved.
        """
        return self._fill(path, self._verify(path), state)

    def _fill(self, path: Path, manifest: Manifest, state: Mapping[str, Any]) -> dict[str, Any]:
        tensors = flatten(state)
        _check_keys(path, manifest.tensors, _union(gather(describe(tensors))))
        read_tensors(path, tensors)
        digests = join_digests(gather(local_digests(tensors)))
        for key, digest in manifest.digests.items():
            if digests[key] != digest:
                raise CheckpointError(f"{path}: tensor {key!r} was loaded with digest {digests[key]}, saved with "
                                      f"{digest}: this machine's memory or TorchRec's resharding is at fault")
        return manifest.extra

    def load_latest(self, state: Mapping[str, Any]) -> tuple[Path, dict[str, Any]] | None:
        """Load the newest checkpoint that is whole; None when there is no checkpoint at all.

        A damaged one is reported and passed over for the one before. A whole one of another model is refused: that
        is a mistake and not an accident.
        """
        # Also those without a manifest: they had one when they got their name.
        directories = gather(self._directories())[0]
        faults: dict[int, str] = {}
        for step, path in sorted(directories.items(), reverse=True):
            try:
                manifest = self._verify(path)
            except CheckpointError as error:
                faults[step] = str(error).removesuffix("; use another checkpoint")
                continue
            for damaged, fault in faults.items() if own_rank() == 0 else ():
                _log.warning("checkpoint step-%d is passed over for step-%d: %s", damaged, step, fault)
            return path, self._fill(path, manifest, state)
        if faults:
            raise CheckpointError(f"none of the {len(faults)} checkpoints in {self._directory} is whole: "
                                  f"{next(iter(faults.values()))}; start again in another run directory")
        return None

    def _verify(self, path: Path) -> Manifest:
        """The manifest, once all files match it; the ranks share the reading."""
        manifest = on_all(_named(read_manifest, path))
        share = sorted(manifest.files.items())[own_rank()::num_ranks()]
        faults = [fault for faults in gather(on_all(_named(damaged_files, path, share))) for fault in faults]
        if faults:
            raise CheckpointError(f"{'; '.join(faults[:3])}; use another checkpoint")
        return manifest

    def _write(self, step: int, tensors: Mapping[str, Tensor], entries: Mapping[str, TensorEntry],
               extra: dict[str, Any]) -> None:
        temporary = self._directory / f"step-{step}.tmp"
        try:
            on_main(_named(self._clear_temporary, temporary), self._group)
            write_tensors(temporary, tensors, self._group)
            files = gather(on_all(_named(_hash_own, temporary), self._group), self._group)
            described, digests = zip(*gather((entries, local_digests(tensors)), self._group), strict=True)
            manifest = Manifest(step=step, files=_union(files), tensors=_union(described),
                                digests=join_digests(digests), extra=extra)
            on_main(_named(self._commit, temporary, manifest), self._group)
        except CheckpointError as error:
            # No rank is writing any more. A full disk is not left fuller than it was.
            if own_rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"saving step {step}: {error}; make room or repair the storage, then start again to "
                                  "continue from the checkpoint before") from None

    def _clear_temporary(self, temporary: Path) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._remove_stale()
        temporary.mkdir()

    def _commit(self, temporary: Path, manifest: Manifest) -> None:
        write_manifest(temporary, manifest)
        final, pointer = temporary.with_suffix(""), self._directory / f"{LATEST}.tmp"
        # Written before the commit: a disk that is full now fails the save, and not a save that stands.
        write_durably(pointer, f"{final.name}\n")
        if final.exists():
            # Saved again, as after falling back to an older step; a checkpoint until the new one stands.
            final.rename(final.with_suffix(_REPLACED))
        temporary.rename(final)
        fsync_directory(self._directory)
        pointer.rename(self._directory / LATEST)
        self._retire(manifest.step)
        fsync_directory(self._directory)
        self._remove_stale()

    def _retire(self, newest: int) -> None:
        """Take the name of a checkpoint from those that are not kept: a crash while files are deleted leaves no half.

        Steps above ``newest`` are of a line that was passed over as damaged; they must not push out a whole one.
        """
        committed = sorted((step, path) for step, path in self._committed().items() if step <= newest)
        for step, path in committed[:-self._keep] if self._keep else ():
            if self._keep_every is None or step % self._keep_every:
                path.rename(path.with_suffix(".tmp"))

    def _remove_stale(self) -> None:
        for path in self._directory.glob("step-*"):
            if path.suffix == ".tmp" or (path.suffix == _REPLACED and path.with_suffix("").exists()):
                shutil.rmtree(path)


def _named(function: Callable[..., ValueT], *arguments: Any) -> Callable[[], ValueT]:
    """``function`` with its arguments, whose faults of files are ``CheckpointError`` and name the rank."""
    def named() -> ValueT:
        try:
            return function(*arguments)
        except (CheckpointError, OSError) as error:
            raise CheckpointError(str(error) if num_ranks() == 1 else f"rank {own_rank()}: {error}") from None

    return named


def _hash_own(temporary: Path) -> dict[str, FileEntry]:
    own = {path.name: hash_file(path) for path in sorted(temporary.glob(f"__{own_rank()}_*"))}
    return {**own, ".metadata": hash_file(temporary / ".metadata")} if own_rank() == 0 else own


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
