"""The store of instance tokens: what a source model made of each past training instance, by user and time.

A store is a directory: ``store.json`` says what made it, lmdb holds blocks of up to 64 records of a user in order of
time, under the key (user, time of the first, number of the block). A block is replaced or added within the transaction
that counts its instances as done, so a process that is killed leaves the store of its last whole commit. Readers of any
number of processes share the file's pages. Source: IAT, arXiv 2604.08933, the section on storage.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import lmdb
import numpy as np
import numpy.typing as npt
import pydantic

from longer_rec.config import Config, build_config
from longer_rec.data.order import I64, U64, hash_u64
from longer_rec.data.store import Array
from longer_rec.errors import ConfigError, DataError

MANIFEST = "store.json"
BLOCK_RECORDS = 64
VectorKind = Literal["float32", "float16", "int8"]

_PAGE_BYTES = 4096
_MAP_BYTES = 1 << 40  # of address space, not of disk
_KEY = struct.Struct(">QQI")
_LAST = (1 << 64) - 1
_VECTOR = {"float32": np.float32, "float16": np.float16, "int8": np.uint8}
_PROGRESS = b"progress"
# One environment a process and path is all that lmdb allows; one that was inherited by a fork must not be used.
_open: dict[Path, tuple[int, bool, Any]] = {}


class StoreManifest(Config):
    """What a store holds and what made it.

    ``width``: I of a vector. ``features``: the side features, with the digest of the encoder that made their ids; a
    data set that encodes one otherwise cannot read it. ``delay_s``: until when after an instance its labels are known.
    ``retention_s``: for how long before the newest request instances are kept. ``source``: run, step, data, what is
    stored.
    """

    format: Literal[1] = 1
    width: int = pydantic.Field(ge=1)
    vectors: VectorKind
    tasks: tuple[str, ...]
    features: dict[str, str] = {}
    delay_s: int = pydantic.Field(0, ge=0)
    retention_s: int | None = pydantic.Field(None, ge=1)
    source: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Of the model that made the vectors and of how they are kept: equal stores hold equal vectors."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    @property
    def record(self) -> np.dtype[Any]:
        """One instance: its time, id, labels, side features, and its vector; int8 ones with lowest value and step."""
        scale = [("scale", "<f4", (2,))] if self.vectors == "int8" else []
        return np.dtype([("time", "<i8"), ("id", "<u8"), ("label", "<f4", (len(self.tasks),)),
                         ("feature", "<i4", (len(self.features),)), *scale,
                         ("vector", np.dtype(_VECTOR[self.vectors]).newbyteorder("<"), (self.width,))])

    def store_bytes(self, num_instances: int) -> int:
        """Bytes on disk of so many instances in whole blocks; a user's last block and the index add a few percent.

        For a service: instances of a day x days of retention.
        """
        block = -(-(BLOCK_RECORDS * self.record.itemsize + 16) // _PAGE_BYTES) * _PAGE_BYTES
        return -(-num_instances // BLOCK_RECORDS) * block

    def pack(self, time: I64, instance: U64, label_NY: Array, feature_NJ: Array, vector_NI: Array) -> Array:
        """Records of instances in the order given."""
        records = np.zeros(len(time), self.record)
        for name, values in (("time", time), ("id", instance), ("label", label_NY), ("feature", feature_NJ)):
            records[name] = values
        if self.vectors == "int8":
            low, high = vector_NI.min(1, keepdims=True), vector_NI.max(1, keepdims=True)
            step = np.maximum((high - low) / 255, np.finfo(np.float32).tiny)
            records["scale"] = np.concatenate([low, step], axis=1)
            vector_NI = np.rint((vector_NI - low) / step)
        records["vector"] = vector_NI
        return records

    def unpack_vectors(self, records: Array) -> npt.NDArray[np.float32]:
        """N x I in fp32."""
        vector_NI = records["vector"].astype(np.float32)
        return vector_NI * records["scale"][:, 1:] + records["scale"][:, :1] if self.vectors == "int8" else vector_NI


def instance_ids(user: U64, time: I64, place: I64, item: I64) -> U64:
    """hash(request, item, time). A request is one user at one time; ``place`` is the candidate's within it, which
    tells items apart that training never saw."""
    return hash_u64(user, time, place, item)


def read_store_manifest(path: Path) -> StoreManifest:
    """What a store is; ``DataError`` when there is none or a damaged one."""
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        fingerprint = content.pop("fingerprint")
        manifest = build_config(StoreManifest, content, str(path / MANIFEST))
    except (OSError, ValueError, KeyError, AttributeError, ConfigError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path} is no store of instances ({MANIFEST}: {reason}); make one with "
                        "`longer-rec compress RUN --out STORE`") from None
    if fingerprint != manifest.fingerprint:
        raise DataError(f"{path / MANIFEST} is damaged: its fingerprint is not that of its content; compress again")
    return manifest


class InstanceReader:
    """Fetches of a store's newest records; any number of processes and threads. ``num_fetched`` counts records."""

    def __init__(self, path: Path) -> None:
        self.path, self.manifest = path, read_store_manifest(path)
        progress = self.progress()
        if progress.get("done", 0) < progress.get("total", 1):
            raise DataError(f"{path} is not filled yet: {progress.get('done', 0)} of {progress.get('total', '?')} "
                            "requests are in it; run the same `longer-rec compress` again to go on")

    def progress(self) -> dict[str, int]:
        """``done`` of ``total`` requests, and the number of instances."""
        with _reading(self.path):
            return _progress(self.path)

    def knows_any(self, users: Sequence[int]) -> bool:
        """Whether there is a record of one of the users, whatever its time."""
        with _reading(self.path) as cursor:
            return any(True for user in users for _ in _walk_back(cursor, user, _KEY.pack(user, _LAST, 0)))

    def fetch(self, user: Sequence[int], before: Sequence[int], max_tokens: int) -> tuple[Array, I64]:
        """Of each user the newest ``max_tokens`` records whose labels were known strictly before a time, oldest first.

        Returns the records of all of them, one user after the other, and how many each has.
        """
        size, counts = self.manifest.record.itemsize, []
        parts: list[bytes] = []
        with _reading(self.path) as cursor:
            for one, end in zip(user, before, strict=True):
                found = self._newest(cursor, one, end, max_tokens)
                parts += reversed(found)
                counts.append(sum(map(len, found)) // size)
        return np.frombuffer(b"".join(parts), self.manifest.record), np.asarray(counts, np.int64)

    def _newest(self, cursor: Any, user: int, before: int, max_tokens: int) -> list[bytes]:
        """Bytes of the records of one user, block by block from the newest one."""
        end = before - self.manifest.delay_s
        oldest = -_LAST if self.manifest.retention_s is None else before - self.manifest.retention_s
        size, found, left = self.manifest.record.itemsize, [], max_tokens
        for block in _walk_back(cursor, user, _KEY.pack(user, _sortable(end), 0)):
            time = np.frombuffer(block, self.manifest.record)["time"]
            stop = int(np.searchsorted(time, end))
            start = max(int(np.searchsorted(time, oldest)), stop - left)
            found.append(bytes(block[start * size:stop * size]))
            left -= stop - start
            if start > 0 or left == 0:
                break
        return found


class InstanceWriter:
    """The one that adds to a store, made at ``path`` if there is none; a context, which closes it.

    ``DataError`` when the store there was made by another model or keeps vectors otherwise.
    """

    def __init__(self, path: Path, manifest: StoreManifest) -> None:
        self.path, self.manifest = path, manifest
        with _writing(path):
            path.mkdir(parents=True, exist_ok=True)
            if (path / MANIFEST).exists():
                found = read_store_manifest(path)
                if found.fingerprint != manifest.fingerprint:
                    raise DataError(f"{path} was made by {_told(found)}, not by {_told(manifest)}; choose another "
                                    "--out, or remove it")
            elif any(path.iterdir()):
                raise DataError(f"{path} is not empty and no store of instances; choose another --out")
            else:
                _write_manifest(path, manifest)
            self._environment, self._blocks, self._state = _environment(path, write=True)

    def progress(self) -> dict[str, int]:
        """``done`` of ``total`` requests, and the number of instances."""
        return _progress(self.path)

    def append(self, user: U64, records: Array, progress: dict[str, int]) -> int:
        """Add records, ``user`` says whose each is, and note the progress, in one transaction; how many were new.

        A record whose id the store has is left out, so an interrupted call can be repeated. ``DataError`` for an
        instance without a label and for one older than what the store has of its user.
        """
        if np.isnan(records["label"]).any():
            at = int(np.isnan(records["label"]).any(1).argmax())
            raise DataError(f"an instance at time {records['time'][at]} has no label yet; add it once its attribution "
                            "delay has passed")
        order = np.lexsort((np.arange(len(user)), records["time"], user))
        starts = np.flatnonzero(np.diff(user[order], prepend=user[order][:1] + np.uint64(1)))
        num_added = 0
        with _writing(self.path), self._environment.begin(write=True, buffers=True) as transaction:
            with transaction.cursor(self._blocks) as cursor:
                for rows in np.split(order, starts[1:]) if len(order) else []:
                    num_added += self._append_user(cursor, int(user[rows[0]]), records[rows])
            self._note(transaction, progress, num_added)
        return num_added

    def _note(self, transaction: Any, progress: dict[str, int], num_more: int) -> None:
        state = json.loads(bytes(transaction.get(_PROGRESS, b"{}", db=self._state)))
        state |= progress | {"instances": state.get("instances", 0) + num_more}
        transaction.put(_PROGRESS, json.dumps(state).encode(), db=self._state)

    def _append_user(self, cursor: Any, user: int, records: Array) -> int:
        """Records of one user in order of time: what is new fills the last block up and goes on in new ones."""
        last = next(_walk_back(cursor, user, _KEY.pack(user, _LAST, 0)), None)
        key, number, kept = None, 0, records[:0]
        if last is not None:
            key = bytes(cursor.key())
            number, kept = _KEY.unpack(key)[2], np.frombuffer(bytes(last), self.manifest.record)
            known: set[int] = set()
            for block in _walk_back(cursor, user, _KEY.pack(user, _LAST, 0)):
                known.update(np.frombuffer(block, self.manifest.record)["id"].tolist())
                if np.frombuffer(block, self.manifest.record)["time"][0] < records["time"][0]:
                    break
            records = records[[instance not in known for instance in records["id"].tolist()]]
            if len(records) and records["time"][0] < kept["time"][-1]:
                raise DataError(f"an instance at time {records['time'][0]} is older than the newest one of its user, "
                                f"at {kept['time'][-1]}: the clock goes backwards; add instances in order of time")
        if len(records) == 0:
            return 0
        joined = np.concatenate([kept, records])
        for first in range(0, len(joined), BLOCK_RECORDS):
            block = joined[first:first + BLOCK_RECORDS]
            key = key if first == 0 and key else _KEY.pack(user, _sortable(int(block["time"][0])), number)
            cursor.put(key, block.tobytes())
            number += 1
        return len(records)

    def finish(self, total: int, oldest: int) -> int:
        """Mark the store as whole, and remove blocks all of whose instances are older than ``oldest``; how many."""
        num_removed = 0
        with _writing(self.path), self._environment.begin(write=True, buffers=True) as transaction:
            with transaction.cursor(self._blocks) as cursor:
                is_on = cursor.first()
                while is_on:
                    time = np.frombuffer(cursor.value(), self.manifest.record)["time"]
                    is_old, count = bool(time[-1] < oldest), len(time)
                    num_removed += is_old * count
                    is_on = cursor.delete() and bool(cursor.key()) if is_old else cursor.next()
            self._note(transaction, {"done": total, "total": total}, -num_removed)
        return num_removed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _close(self.path)


def _sortable(time: int) -> int:
    """Times as unsigned integers in the same order."""
    return time + (1 << 63)


def _walk_back(cursor: Any, user: int, key: bytes) -> Iterator[Any]:
    """Blocks of a user whose keys lie before ``key``, newest first; the cursor stands at the one that was given."""
    is_on = cursor.prev() if cursor.set_range(key) else cursor.last()
    while is_on and _KEY.unpack(bytes(cursor.key()))[0] == user:
        yield cursor.value()
        is_on = cursor.prev()


def _told(manifest: StoreManifest) -> str:
    source = manifest.source
    return (f"run {source.get('run')!r} at step {source.get('step')} ({source.get('stored')}, {manifest.vectors}, "
            f"fingerprint {manifest.fingerprint[:12]})")


def _write_manifest(path: Path, manifest: StoreManifest) -> None:
    content = {**manifest.model_dump(mode="json"), "fingerprint": manifest.fingerprint}
    temporary = path.with_name(f"{path.name}.{MANIFEST}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path / MANIFEST)


def _progress(path: Path) -> dict[str, int]:
    environment, _, state = _environment(path)
    with environment.begin() as transaction:
        found: dict[str, int] = json.loads(transaction.get(_PROGRESS, b"{}", db=state))
    return found


def _environment(path: Path, write: bool = False) -> tuple[Any, Any, Any]:
    """The environment of a store and its two databases."""
    path = path.resolve()
    pid, is_writable, handles = _open.get(path, (0, False, None))
    if handles is None or pid != os.getpid() or write > is_writable:
        _close(path)
        environment = lmdb.open(str(path), map_size=_MAP_BYTES, max_dbs=2, readonly=not write, create=write,
                                max_readers=1024, readahead=False)
        environment.reader_check()
        handles = (environment, *(environment.open_db(name, create=write) for name in (b"blocks", b"state")))
        _open[path] = (os.getpid(), write, handles)
    return handles


def _close(path: Path) -> None:
    _, _, handles = _open.pop(path.resolve(), (0, False, None))
    if handles is not None:
        handles[0].close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (lmdb.Error, OSError) as error:
        raise DataError(f"cannot write {path}: {error}; check space and permissions, then run the same command again: "
                        "what was committed is kept") from None


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """A cursor over the blocks."""
    try:
        environment, blocks, _ = _environment(path)
        with environment.begin(db=blocks, buffers=True) as transaction, transaction.cursor() as cursor:
            yield cursor
    except (lmdb.Error, OSError) as error:
        raise DataError(f"cannot read {path}: {error}; run the same `longer-rec compress` again") from None
