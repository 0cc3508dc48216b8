"""A prepared dataset says what the log says, whatever the order and division of its rows."""

import fcntl
import os
import resource
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from longer_rec.batch import validate_batch
from longer_rec.data import files, store
from longer_rec.data import prepare as prepare_module
from longer_rec.data.batches import make_batch
from longer_rec.data.encode import Vocabulary, encode_values
from longer_rec.data.history import Dataset, open_dataset
from longer_rec.data.prepare import prepare
from longer_rec.data.spill import Spill
from longer_rec.errors import ConfigError, DataError
from tests.unit.data.logs import DESCRIPTION, LABELLED, naive_requests, prepared, random_log, whole, write_log

SPLITS = ("train", "validation", "test")


def all_rows(dataset: Dataset) -> np.ndarray:
    return np.arange(sum(dataset.num_requests(split) for split in SPLITS))


def raw_items(dataset: Dataset) -> list[int | None]:
    vocabulary = dataset.encoders["item"]
    assert isinstance(vocabulary, Vocabulary)
    return [None, *vocabulary.values.to_list()]


@pytest.mark.parametrize("description", [DESCRIPTION, LABELLED], ids=["negatives", "rows"])
@pytest.mark.parametrize("max_events", [1, 7, 1000])
def test_batches_equal_the_log_read_row_by_row(tmp_path: Path, description: dict, max_events: int) -> None:
    log = random_log()
    dataset = prepared(tmp_path, log, description)
    expected = naive_requests(log, labelled=description is LABELLED)
    batch = make_batch(dataset, all_rows(dataset), max_events=max_events)
    validate_batch(batch, dataset.schema)
    item, user_of = raw_items(dataset), dataset.raw_users
    known = set(item[1:])
    event, candidate, empty, seen = 0, 0, 0, set()
    for row, (length, count) in enumerate(zip(batch.history_length_B.tolist(), batch.num_candidates_B.tolist(),
                                              strict=True)):
        time = int(batch.request_time_B[row])
        request = expected[user_of[int(dataset.requests.take("user", np.asarray([row]))[0])], time]
        seen.add((request.user, time))
        times = batch.history_time_T[event:event + length].tolist()
        got = [item[one] for one in batch.history["item"][event:event + length].tolist()]
        assert times == [one for one, _ in request.history][-max_events:] if request.history else length == 0
        if max_events == 1000:
            assert sorted(zip(times, map(str, got), strict=True)) == sorted(
                (one, str(what if what in known else None)) for one, what in request.history)
        labels = batch.label_CY[candidate:candidate + count, 0].tolist()
        offered = [item[one] for one in batch.candidates["item"][candidate:candidate + count].tolist()]
        wanted = [(what if what in known else None, label) for what, label in request.candidates]
        if description is LABELLED:
            assert sorted(zip(map(str, offered), labels, strict=True)) == sorted((str(a), b) for a, b in wanted)
        else:
            positives = sorted(what for what, _ in wanted if what is not None)
            assert sorted(a for a, b in zip(offered, labels, strict=True) if b == 1) == positives
            negatives = [a for a, b in zip(offered, labels, strict=True) if b == 0]
            assert len(negatives) == 2 * len(positives)
            assert not set(negatives) & {what for what, _ in request.candidates}
        event, candidate, empty = event + length, candidate + count, empty + (length == 0)
    assert empty == 12  # each user's first request
    lost = {key for key, one in expected.items() if not any(what in known for what, _ in one.candidates)}
    assert seen == (set(expected) if description is LABELLED else set(expected) - lost)


def test_side_features_follow_the_item(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, random_log())
    batch = make_batch(dataset, all_rows(dataset), max_events=50)
    item, kinds = raw_items(dataset), dataset.encoders["kind"]
    assert isinstance(kinds, Vocabulary)
    for side in (batch.history, batch.candidates):
        raw, kind = [item[one] for one in side["item"].tolist()], side["kind"]
        expected = encode_values(kinds, [None if one is None else one % 7 for one in raw], "kind")
        assert kind.tolist() == expected.tolist()


def test_event_features_follow_the_event(tmp_path: Path) -> None:
    log = random_log().with_columns(place=pl.when(pl.col("what") % 5 > 0).then(pl.col("place")))
    dataset = prepared(tmp_path, log)
    batch = make_batch(dataset, [int(dataset.split_rows("test")[-1])], max_events=1000)
    user = dataset.raw_users[int(dataset.requests.take("user", batch.request_row_B.numpy())[0])]
    mine = {(row["when"], row["what"]): row for row in log.to_dicts() if row["who"] == user}
    item, checked = raw_items(dataset), 0
    events = zip(batch.history_time_T.tolist(), batch.history["item"].tolist(), strict=True)
    for index, (time, one) in enumerate(events):
        if one:
            row, checked = mine[time, item[one]], checked + 1
            assert int(batch.history["price"][index]) == 1 + (row["price"] >= 2) + (row["price"] >= 4)
            place = encode_values(dataset.encoders["place"], [row["place"]], "x")
            assert int(batch.history["place"][index]) == place[0]
    assert checked > 20


@pytest.mark.parametrize("description", [DESCRIPTION, LABELLED, {**LABELLED, "split": {"kind": "per_user"}}],
                         ids=["negatives", "rows", "per user"])
def test_the_order_of_the_files_rows_changes_nothing(tmp_path: Path, description: dict) -> None:
    log = random_log()
    shuffled = log.sample(fraction=1, shuffle=True, seed=1)
    assert not shuffled.equals(log)
    first, second = (prepared(tmp_path / name, one, description) for name, one in (("a", log), ("b", shuffled)))
    assert first.manifest["files"] == second.manifest["files"]
    assert first.manifest["inputs"] != second.manifest["inputs"]


def test_neither_partitions_nor_chunks_change_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, items = random_log(num_users=40), []
    for name, rows in (("one", 10**6), ("many", 30)):
        monkeypatch.setattr(prepare_module, "_PARTITION_ROWS", rows)
        monkeypatch.setattr(files, "CHUNK_ROWS", rows)
        items.append(prepared(tmp_path / name, log).manifest["files"])
    assert items[0] == items[1]


def test_several_record_batches_change_no_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    for name, bits in (("one", 18), ("many", 5)):
        monkeypatch.setattr(store, "_BATCH_BITS", bits)
        dataset = prepared(tmp_path / name, random_log())
        batches.append(make_batch(dataset, all_rows(dataset), max_events=20))
    for field in ("history_time_T", "label_CY", "request_time_B", "history_length_B"):
        assert getattr(batches[0], field).equal(getattr(batches[1], field))
    assert batches[0].history["item"].equal(batches[1].history["item"])


def test_ties_are_in_no_order_of_items(tmp_path: Path) -> None:
    log = pl.DataFrame({"who": np.repeat(np.arange(50), 42), "what": np.tile(np.arange(42), 50), "kind": 0,
                        "price": 1.0, "place": "x",
                        "when": np.repeat(np.arange(50) * 100, 42) + np.tile(np.arange(42) // 40, 50)})
    dataset = prepared(tmp_path, log, {**DESCRIPTION, "split": {"fractions": [1, 0, 0]}})
    order = whole(dataset.events, "item").reshape(50, 42)[:, :40].astype(np.int64)
    assert np.array_equal(np.sort(order, axis=1), np.tile(np.arange(1, 41), (50, 1)))
    rank = np.corrcoef(order.ravel(), np.tile(np.arange(40), 50))[0, 1]
    assert abs(rank) < 0.1
    assert len({tuple(row) for row in order.tolist()}) == 50


def test_what_training_never_saw_is_row_0_and_counted(tmp_path: Path) -> None:
    when = np.concatenate([np.arange(80), np.arange(80, 100)])
    what = np.where(when >= 90, 1000 + when, when % 10)
    log = pl.DataFrame({"who": np.where(when >= 95, "late", "early"), "what": what, "when": when, "kind": what % 3,
                        "price": 1.0, "place": "x", "liked": when % 2})
    dataset = prepared(tmp_path, log, LABELLED)
    summary = dataset.summary
    assert dataset.num_requests("test") == 10
    assert summary["unseen_item_events"] == {"train": 0, "validation": 0, "test": 10}
    assert summary["unseen_item_candidates"] == {"train": 0, "validation": 0, "test": 10}
    assert summary["unseen_user_requests"] == {"train": 0, "validation": 0, "test": 5}
    test = make_batch(dataset, dataset.split_rows("test"), max_events=9)
    assert test.candidates["item"].tolist() == [0] * 10
    assert sorted(test.users["user"].tolist()) == [0] * 5 + [1] * 5
    assert dataset.schema.num_rows == {"item": 11, "kind": 4, "price": 4, "place": 6, "user": 2}
    # An unseen user has a history all the same.
    assert sorted(test.history_length_B[test.users["user"] == 0].tolist()) == [0, 1, 2, 3, 4]


def test_unseen_positives_are_dropped_beside_sampled_negatives(tmp_path: Path) -> None:
    when = np.arange(100)
    what = np.where(when >= 90, 1000 + when % 2 * when, when % 10)
    what = np.where(when == 95, 3, what)
    log = pl.DataFrame({"who": 1, "what": what, "when": when, "kind": 0, "price": 1.0, "place": "x"})
    dataset = prepared(tmp_path, log)
    assert dataset.num_requests("test") == 1
    assert dataset.summary["requests_without_candidates"] == {"train": 0, "validation": 0, "test": 9}
    assert dataset.summary["unseen_item_candidates"]["test"] == 9


def test_per_user_split_follows_each_users_own_time(tmp_path: Path) -> None:
    log = random_log(num_rows=2000, num_users=15)
    dataset = prepared(tmp_path, log, {**LABELLED, "split": {"kind": "per_user", "fractions": [0.7, 0.2, 0.1]}})
    user, time = whole(dataset.requests, "user"), whole(dataset.requests, "time")
    split = np.repeat([0, 1, 2], [dataset.num_requests(one) for one in SPLITS])
    for one in range(15):
        mine = np.argsort(time[user == one])
        assert np.all(np.diff(split[user == one][mine]) >= 0)
        assert abs((split[user == one] == 0).mean() - 0.7) < 0.02
        assert abs((split[user == one] == 1).mean() - 0.2) < 0.02
    assert dataset.summary["unseen_user_requests"] == {"train": 0, "validation": 0, "test": 0}


def test_global_split_cuts_at_one_time(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, random_log(num_rows=3000), {**LABELLED, "split": {"fractions": [0.5, 0.3, 0.2]}})
    times = [whole(dataset.requests, "time")[list(dataset.split_rows(split))] for split in SPLITS]
    assert times[0].max() < times[1].min() <= times[1].max() < times[2].min()
    total = sum(map(len, times))
    assert np.allclose([len(one) / total for one in times], [0.5, 0.3, 0.2], atol=0.02)


@pytest.mark.parametrize(("mode", "kept"), [("all", 600), ("positives", None), ("unlabelled", None)])
def test_the_history_holds_the_rows_that_were_asked_for(tmp_path: Path, mode: str, kept: int | None) -> None:
    log = random_log().with_columns(liked=pl.when(pl.col("what") % 3 > 0).then(pl.col("liked")))
    dataset = prepared(tmp_path, log, {**LABELLED, "history": mode})
    condition = {"all": pl.lit(True), "positives": pl.col("liked") == 1, "unlabelled": pl.col("liked").is_null()}[mode]
    assert sum(dataset.summary["events"].values()) == len(log.filter(condition)) > 50
    assert sum(dataset.summary["candidates"].values()) == log["liked"].count()
    batch = make_batch(dataset, all_rows(dataset), max_events=1000)
    validate_batch(batch, dataset.schema)


@pytest.mark.parametrize(("policy", "rows"), [("keep", 5), ("drop", 4)])
def test_duplicates_are_counted_kept_or_dropped(tmp_path: Path, policy: str, rows: int) -> None:
    log = pl.DataFrame({"who": 1, "what": [1, 2, 2, 3, 4], "when": [1, 2, 2, 3, 4], "kind": 0,
                        "price": [1.0, 5.0, 1.0, 1.0, 1.0], "place": "x"})
    dataset = prepared(tmp_path, log, {**DESCRIPTION, "duplicates": policy, "split": {"fractions": [1, 0, 0]}})
    assert dataset.summary["duplicate_rows"] == 1
    assert dataset.summary["events"]["train"] == rows


def test_bad_rows_may_be_dropped_up_to_a_bound(tmp_path: Path) -> None:
    log = random_log().with_columns(when=pl.when(pl.col("what") == 3).then(None).otherwise(pl.col("when")))
    bad = log["when"].null_count()
    dropping = {**DESCRIPTION, "bad_rows": "drop", "max_bad_fraction": 0.2}
    assert prepared(tmp_path / "a", log, dropping).summary["bad_rows_dropped"] == bad > 3
    with pytest.raises(DataError, match=rf"{bad} of \d+ rows are bad, more than max_bad_fraction=0.001"):
        prepared(tmp_path / "b", log, {**dropping, "max_bad_fraction": 0.001})


def test_rare_values_share_row_0(tmp_path: Path) -> None:
    log = random_log(num_items=200)
    dataset = prepared(tmp_path, log, {**DESCRIPTION, "items": {"min_count": 3}})
    assert dataset.item_count[0] == 0
    assert dataset.item_count[1:].min() == 3
    assert dataset.summary["unseen_item_events"]["train"] > 0


def test_quantiles_make_equally_full_buckets(tmp_path: Path) -> None:
    feature = {"name": "price", "type": "bucketed", "quantiles": 4}
    dataset = prepared(tmp_path, random_log(4000), {**DESCRIPTION, "event_features": [feature]})
    counts = np.bincount(whole(dataset.events, "price"), minlength=5)
    assert counts[0] == 0
    assert counts[1:].min() > 0.22 * counts.sum()


def test_prepared_twice_is_left_alone_and_other_settings_are_refused(tmp_path: Path) -> None:
    path, out = write_log(tmp_path, random_log()), tmp_path / "out"
    prepare(str(path), out)
    before = (out / "manifest.json").stat().st_mtime_ns
    assert prepare(str(path), out) == out
    assert (out / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="was prepared from other settings or files; choose another --out"):
        prepare(str(path), out, overrides=["tie_seed=5"])
    write_log(tmp_path, random_log(seed=1))
    with pytest.raises(ConfigError, match="other settings or files"):
        prepare(str(path), out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is no prepared dataset; choose another"):
        prepare(str(path), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DataError("x"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("stage", ["spill_log", "write_tables", "write_store", "write_manifest"])
def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException,
                                    stage: str) -> None:
    original = getattr(prepare_module, stage)

    def fail_at_the_end(*arguments: object) -> None:
        original(*arguments)
        raise error

    path = write_log(tmp_path, random_log())
    monkeypatch.setattr(prepare_module, stage, fail_at_the_end)
    with pytest.raises((KeyboardInterrupt, DataError)):
        prepare(str(path), tmp_path / "out")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["log.parquet", "log.yaml"]
    monkeypatch.setattr(prepare_module, stage, original)
    open_dataset(prepare(str(path), tmp_path / "out"))


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    path = write_log(tmp_path, random_log())
    (tmp_path / "out.tmp" / "spill").mkdir(parents=True)
    (tmp_path / "out.tmp" / "spill" / "00000.arrow").write_bytes(b"half a file")
    open_dataset(prepare(str(path), tmp_path / "out"))
    assert not (tmp_path / "out.tmp").exists()


def test_two_processes_do_not_write_the_same_dataset(tmp_path: Path) -> None:
    path = write_log(tmp_path, random_log())
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "theirs").write_text("half a file")
    handle = os.open(tmp_path / "out.tmp", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="is being written by another process; wait for it"):
        prepare(str(path), tmp_path / "out")
    assert (tmp_path / "out.tmp" / "theirs").exists()
    os.close(handle)
    open_dataset(prepare(str(path), tmp_path / "out"))


@pytest.mark.parametrize("limit_bytes", [500, 3000, 10_000, 20_000])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, limit_bytes: int) -> None:
    path = write_log(tmp_path, random_log(5000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        with pytest.raises(DataError, match=r"cannot write .*out: .*check space"):
            prepare(str(path), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["log.parquet", "log.yaml"]


def test_every_damaged_file_is_named(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, random_log())
    names = sorted(one.name for one in dataset.path.iterdir())
    assert len(names) > 10
    assert "lookups.arrow" in names
    random = np.random.default_rng(0)
    for name in names:
        content = (dataset.path / name).read_bytes()
        for _ in range(12):
            damaged = bytearray(content)
            damaged[random.integers(len(content))] ^= 1 << random.integers(8)
            (dataset.path / name).write_bytes(damaged)
            with pytest.raises(DataError, match="damaged|no prepared dataset"):
                open_dataset(dataset.path)
        (dataset.path / name).write_bytes(content[:-1] if name != "manifest.json" else content[:-2])
        with pytest.raises(DataError, match=r"damaged|no prepared dataset"):
            open_dataset(dataset.path)
        (dataset.path / name).unlink()
        with pytest.raises(DataError, match=name):
            open_dataset(dataset.path)
        (dataset.path / name).write_bytes(content)
    assert open_dataset(dataset.path).fingerprint == dataset.fingerprint


def test_a_user_lies_in_one_partition_and_no_row_is_lost(tmp_path: Path) -> None:
    log = random_log(num_users=100).select(user="who", item="what", time="when")
    partitions = Spill(tmp_path, num_partitions=32)
    for start in range(0, len(log), 100):
        partitions.add(log[start:start + 100])
    partitions.close()
    frames = list(partitions.frames())
    assert len(frames) > 16
    assert sum(frame["user"].n_unique() for frame in frames) == log["user"].n_unique()
    assert pl.concat(frames).select("user", "item", "time").sort(pl.all()).equals(log.sort(pl.all()))


@pytest.mark.parametrize(("label", "told"), [({"column": "liked", "at_least": 2}, "are 0"),
                                             ({"column": "liked", "at_least": 0}, "are 1")])
def test_a_training_period_of_one_class_is_refused(tmp_path: Path, label: dict, told: str) -> None:
    description = {**LABELLED, "columns": {**LABELLED["columns"], "label": label}}
    with pytest.raises(DataError, match=f"{told}.*check columns.label"):
        prepared(tmp_path, random_log(), description)
    assert not list(tmp_path.glob("out*"))
