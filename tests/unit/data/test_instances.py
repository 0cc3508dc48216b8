"""The store of instance tokens against a plain list of records, and its faults."""

import multiprocessing
import re
import resource
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longer_rec.data.instances import (
    BLOCK_RECORDS,
    InstanceReader,
    InstanceWriter,
    StoreManifest,
    instance_ids,
    read_store_manifest,
)
from longer_rec.data.store import Array
from longer_rec.errors import DataError

USERS = np.array([7, 2**63 + 5, 2**64 - 1, 0], np.uint64)
WIDTH = 5


def manifest(**settings: Any) -> StoreManifest:
    return StoreManifest.model_validate({
        "width": WIDTH, "vectors": "float32", "tasks": ["click", "buy"], "features": {"item": "a" * 64},
        "source": {"run": "r", "step": 3, "stored": "pre"}, **settings})


def records(kind: StoreManifest, count: int, seed: int = 0, first: int = 0, spread: int = 40) -> tuple[Array, Array]:
    """Users and records in order of time, with many ties; the ids of all are different."""
    random = np.random.default_rng(seed)
    user = USERS[random.integers(0, len(USERS) - 1, count)]  # the last has none
    time = np.sort(random.integers(first, first + spread, count))
    ids = instance_ids(user, time, np.arange(count), np.arange(first, first + count))
    return user, kind.pack(time, ids, random.integers(0, 2, (count, 2)), random.integers(0, 9, (count, 1)),
                           random.random((count, WIDTH), np.float32))


def filled(path: Path, kind: StoreManifest, user: Array, rows: Array, pieces: int = 7) -> Path:
    with InstanceWriter(path, kind) as writer:
        for part in np.array_split(np.arange(len(rows)), min(pieces, len(rows))):
            writer.append(user[part], rows[part], {"done": int(part[-1]) + 1, "total": len(rows)})
    return path


def fetch_ref(user: Array, rows: Array, wanted: Sequence[int], before: Sequence[int], max_tokens: int, delay_s: int = 0,
              retention_s: int | None = None) -> list[Array]:
    """Twin of ``InstanceReader.fetch``."""
    found = []
    for one, end in zip(wanted, before, strict=True):
        known = (user == np.uint64(one)) & (rows["time"] + delay_s < end)
        if retention_s is not None:
            known &= rows["time"] >= end - retention_s
        found.append(rows[known][-max_tokens:])
    return found


@pytest.mark.parametrize(("delay_s", "retention_s"), [(0, None), (6, None), (0, 9), (5, 13)])
@pytest.mark.parametrize("count", [1, 200, 700])
def test_fetch_gives_the_newest_records_known_strictly_before_a_time(
        tmp_path: Path, count: int, delay_s: int, retention_s: int | None) -> None:
    kind = manifest(delay_s=delay_s, retention_s=retention_s)
    user, rows = records(kind, count)
    reader = InstanceReader(filled(tmp_path / "store", kind, user, rows))
    wanted = [int(one) for one in USERS] * 14
    before = [time for time in (-3, 0, 1, 5, 11, 12, 13, 20, 27, 39, 40, 41, 46, 99) for _ in USERS]
    lengths = set()
    for max_tokens in (1, BLOCK_RECORDS, 100, 10_000):
        given, length_B = reader.fetch(wanted, before, max_tokens)
        expected = fetch_ref(user, rows, wanted, before, max_tokens, delay_s, retention_s)
        assert length_B.tolist() == [len(each) for each in expected]
        assert given.tobytes() == b"".join(each.tobytes() for each in expected)
        lengths |= set(length_B.tolist())
    assert 0 in lengths
    assert count < 700 or max(lengths) > 2 * BLOCK_RECORDS or retention_s


def test_a_request_at_the_very_time_of_an_instance_does_not_see_it(tmp_path: Path) -> None:
    kind = manifest()
    rows = kind.pack(np.array([100]), np.array([1], np.uint64), np.ones((1, 2)), np.zeros((1, 1)), np.zeros((1, WIDTH)))
    reader = InstanceReader(filled(tmp_path / "store", kind, USERS[:1], rows, 1))
    assert [reader.fetch([7], [time], 9)[1].tolist() for time in (99, 100, 101)] == [[0], [0], [1]]


@pytest.mark.parametrize(("vectors", "bound"), [("float32", 0.0), ("float16", 2**-11), ("int8", 0.5 / 255 + 1e-6)])
def test_vectors_come_back_within_the_rounding_of_their_kind(tmp_path: Path, vectors: str, bound: float) -> None:
    kind = manifest(vectors=vectors)
    vector_NI = np.random.default_rng(1).random((300, WIDTH), np.float32)
    rows = kind.pack(np.arange(300), np.arange(300, dtype=np.uint64), np.ones((300, 2)), np.zeros((300, 1)), vector_NI)
    reader = InstanceReader(filled(tmp_path / "store", kind, np.repeat(USERS[:1], 300), rows))
    given, _ = reader.fetch([7], [999], 300)
    assert np.abs(kind.unpack_vectors(given) - vector_NI).max() <= bound
    assert (bound == 0) == bool((kind.unpack_vectors(given) == vector_NI).all())


def test_adding_again_changes_nothing_and_adding_on_equals_adding_at_once(tmp_path: Path) -> None:
    kind = manifest()
    user, rows = records(kind, 500)
    more_user, more = records(kind, 400, seed=2, first=39)  # its first time is the other's last
    once = filled(tmp_path / "once", kind, np.concatenate([user, more_user]), np.concatenate([rows, more]), 1)
    twice = filled(tmp_path / "twice", kind, user, rows, 3)
    with InstanceWriter(twice, kind) as writer:
        assert writer.append(user, rows, {"done": 1, "total": 1}) == 0
        both = np.concatenate([user[-200:], more_user]), np.concatenate([rows[-200:], more])
        assert writer.append(*both, {"done": 1, "total": 1}) == 400
        assert writer.progress()["instances"] == 900
    ask = ([int(one) for one in USERS], [999] * 4, 10_000)
    assert InstanceReader(once).fetch(*ask)[0].tobytes() == InstanceReader(twice).fetch(*ask)[0].tobytes()


def test_what_has_outlived_its_retention_is_removed(tmp_path: Path) -> None:
    kind = manifest()
    user, rows = records(kind, 700)
    path = filled(tmp_path / "store", kind, user, rows)
    with InstanceWriter(path, kind) as writer:
        num_removed = writer.finish(700, oldest=30)
    found, _ = InstanceReader(path).fetch([int(one) for one in USERS], [999] * 4, 10_000)
    assert len(found) == 700 - num_removed == InstanceReader(path).progress()["instances"] < 700
    assert (found["time"] >= 30).sum() == (rows["time"] >= 30).sum()  # blocks go as a whole


def test_size_follows_the_formula(tmp_path: Path) -> None:
    kind = manifest(width=64, vectors="float16")
    user = np.repeat(np.arange(20, dtype=np.uint64), 640)
    rows = np.zeros(len(user), kind.record)
    rows["time"], rows["id"] = np.tile(np.arange(640), 20), np.arange(len(user))
    path = filled(tmp_path / "store", kind, user, rows, 1)
    size = (path / "data.mdb").stat().st_size
    assert kind.record.itemsize == 8 + 8 + 2 * 4 + 4 + 64 * 2
    assert 1.0 <= size / kind.store_bytes(len(user)) < 1.1


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda rows: rows["time"].__isub__(10), "the clock goes backwards"),
    (lambda rows: rows["label"].__setitem__((3, 1), np.nan), "has no label yet"),
])
def test_a_refused_record_leaves_the_store_as_it_was(tmp_path: Path, spoil: Any, message: str) -> None:
    kind = manifest()
    user, rows = records(kind, 300)
    path = filled(tmp_path / "store", kind, user, rows)
    more_user, more = records(kind, 50, seed=3, first=35)
    good = more.copy()
    more["id"] += np.uint64(1)
    spoil(more)
    with InstanceWriter(path, kind) as writer:
        with pytest.raises(DataError, match=message):
            writer.append(more_user, more, {"done": 9, "total": 9})
        assert writer.progress() == {"done": 300, "total": 300, "instances": 300}
        assert writer.append(more_user[good["time"] >= 39], good[good["time"] >= 39], {"done": 9, "total": 9}) > 0


def test_a_store_of_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    kind = manifest()
    path = filled(tmp_path / "store", kind, *records(kind, 10))
    with pytest.raises(DataError, match="was made by run 'r' at step 3.*not by run 'other'"):
        InstanceWriter(path, manifest(source={"run": "other", "step": 3, "stored": "pre"}))
    assert read_store_manifest(path) == kind
    assert InstanceReader(path).progress()["instances"] == 10


def test_what_is_no_whole_store_is_told_so(tmp_path: Path) -> None:
    kind = manifest()
    with pytest.raises(DataError, match=r"no store of instances.*longer-rec compress"):
        InstanceReader(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    with pytest.raises(DataError, match="not empty and no store"):
        InstanceWriter(tmp_path / "full", kind)
    with InstanceWriter(tmp_path / "half", kind) as writer:
        writer.append(*records(kind, 10), {"done": 10, "total": 30})
    with pytest.raises(DataError, match="not filled yet: 10 of 30"):
        InstanceReader(tmp_path / "half")
    path = filled(tmp_path / "store", kind, *records(kind, 10))
    (path / "store.json").write_text((path / "store.json").read_text().replace('"step": 3', '"step": 4'))
    with pytest.raises(DataError, match="is damaged"):
        InstanceReader(path)


def _fetch_in_child(reader: InstanceReader, answers: Any) -> None:
    answers.put(reader.fetch([7], [999], 9)[0].tobytes())


def test_a_reader_works_in_forked_processes_and_on_in_their_parent(tmp_path: Path) -> None:
    kind = manifest()
    reader = InstanceReader(filled(tmp_path / "store", kind, *records(kind, 300)))
    expected = reader.fetch([7], [999], 9)[0].tobytes()
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    children = [context.Process(target=_fetch_in_child, args=(reader, answers)) for _ in range(2)]
    for child in children:
        child.start()
    assert [answers.get() for _ in children] == [expected, expected]
    for child in children:
        child.join(20)
        assert child.exitcode == 0
    assert reader.fetch([7], [999], 9)[0].tobytes() == expected


def _fill_a_small_disk(path: Path, kind: StoreManifest, answers: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    user, rows = records(kind, 20_000, spread=10_000)
    done = 0
    try:
        with InstanceWriter(path, kind) as writer:
            for part in np.array_split(np.arange(len(rows)), 40):
                writer.append(user[part], rows[part], {"done": int(part[-1]) + 1, "total": len(rows)})
                done = int(part[-1]) + 1
    except DataError as error:
        answers.put((done, str(error)))


def test_a_full_disk_is_told_and_the_store_goes_on_from_its_last_commit(tmp_path: Path) -> None:
    kind, path = manifest(), tmp_path / "store"
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_fill_a_small_disk, args=(path, kind, answers))
    child.start()
    done, message = answers.get()
    child.join(20)
    assert 0 < done < 20_000
    assert re.search(f"cannot write {path}.*run the same command again", message)
    user, rows = records(kind, 20_000, spread=10_000)
    with InstanceWriter(path, kind) as writer:
        assert writer.progress() == {"done": done, "total": 20_000, "instances": done}
        assert writer.append(user, rows, {"done": 20_000, "total": 20_000}) == 20_000 - done
    found, _ = InstanceReader(path).fetch([int(one) for one in USERS], [1 << 40] * 4, 100_000)
    whole = InstanceReader(filled(tmp_path / "whole", kind, user, rows, 1))
    assert found.tobytes() == whole.fetch([int(one) for one in USERS], [1 << 40] * 4, 100_000)[0].tobytes()
