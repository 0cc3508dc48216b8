"""Lookups are counted as training makes them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from longer_rec.batch import RequestBatch
from longer_rec.data import frequency
from longer_rec.data.batches import make_batch
from longer_rec.data.frequency import STORED_EVENTS, count_lookups, stored_lookups
from longer_rec.data.history import Dataset
from longer_rec.data.loader import DataConfig, TrainLoader
from longer_rec.data.prepare import summary_lines
from longer_rec.data.replay import replay_lookups
from tests.unit.data.logs import DESCRIPTION, LABELLED, prepared, random_log

USERS = {"source": {"files": ["users.csv"]}, "key": "who",
         "features": [{"name": "likes", "multi_valued": True}, {"name": "town"}]}
EVENTS = 7


def in_batches(dataset: Dataset, batches: Iterable[RequestBatch]) -> dict[str, np.ndarray]:
    """The slow way: every id of every batch."""
    counts = {name: np.zeros(rows) for name, rows in dataset.schema.num_rows.items()}
    for batch in batches:
        for features, values in ((dataset.schema.history_features, batch.history),
                                 (dataset.schema.item_features, batch.candidates),
                                 (dataset.schema.user_features, batch.users)):
            for feature in features:
                np.add.at(counts[feature.table], values[feature.name].numpy(), 1)
    return counts


def with_users(folder: Path, description: dict) -> Dataset:
    log = random_log()
    folder.mkdir(parents=True, exist_ok=True)
    pl.DataFrame({"who": log["who"].unique(maintain_order=True)}).with_row_index("n").select(
        "who", likes=pl.when(pl.col("n") % 3 > 0).then(pl.format("a{}|b", pl.col("n") % 4)),
        town=pl.col("n") % 5).write_csv(folder / "users.csv")
    return prepared(folder, log, {**description, "users": USERS})


@pytest.mark.parametrize("max_events", [1, EVENTS, 10_000])
def test_counts_are_those_of_an_epoch_of_batches(max_events: int, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frequency, "_CHUNK_EVENTS", 128)  # several chunks of events, of requests, of candidates
    monkeypatch.setattr(frequency, "_CHUNK_REQUESTS", 13)
    dataset = with_users(tmp_path, LABELLED)
    train = dataset.split_rows("train")
    expected = in_batches(dataset, [make_batch(dataset, np.arange(train.start, train.stop), max_events=max_events)])
    counted = count_lookups(dataset, max_events)
    assert counted.keys() == expected.keys() == {"item", "kind", "price", "place", "user", "likes", "town"}
    for table, count in expected.items():
        assert count.sum() > 0
        np.testing.assert_array_equal(counted[table], count, err_msg=table)


def test_negatives_count_with_their_expectation(tmp_path: Path) -> None:
    candidates = {"kind": "negatives", "per_positive": 8}
    dataset = prepared(tmp_path, random_log(num_rows=2000), {**DESCRIPTION, "candidates": candidates})
    train = dataset.split_rows("train")
    rows, epochs = np.arange(train.start, train.stop), range(20)
    drawn = in_batches(dataset, (make_batch(dataset, rows, max_events=1, epoch=epoch) for epoch in epochs))["item"]
    counted = count_lookups(dataset, max_events=1)["item"]
    assert counted.sum() == pytest.approx(drawn.sum() / len(epochs), rel=1e-9)
    assert counted[1:] == pytest.approx(drawn[1:] / len(epochs), rel=0.1)


def test_what_is_stored_is_what_would_be_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = with_users(tmp_path, DESCRIPTION)
    longest = dataset.summary["history_length"]["max"]
    assert EVENTS < longest < STORED_EVENTS
    for max_events in (longest, STORED_EVENTS, 10_000):
        stored, counted = stored_lookups(dataset, max_events), count_lookups(dataset, max_events)
        assert stored is not None
        assert stored.keys() == counted.keys()
        for table, count in counted.items():
            np.testing.assert_array_equal(stored[table], count, err_msg=table)
    assert stored_lookups(dataset, longest - 1) is None
    monkeypatch.setattr(frequency, "STORED_EVENTS", EVENTS)
    short = with_users(tmp_path / "short", DESCRIPTION)
    assert stored_lookups(short, EVENTS + 1) is None
    stored = stored_lookups(short, EVENTS)
    assert stored is not None
    np.testing.assert_array_equal(stored["item"], count_lookups(short, EVENTS)["item"])


def test_the_summary_says_how_unequal_lookups_are(tmp_path: Path) -> None:
    dataset = with_users(tmp_path, DESCRIPTION)
    counted = count_lookups(dataset, STORED_EVENTS)["item"]
    hottest = np.sort(counted)[::-1]
    shares = [hottest[:round(part * len(hottest))].sum() / hottest.sum() for part in (0.01, 0.1, 0.5)]
    assert dataset.summary["lookups"]["tables"]["item"]["hottest"] == pytest.approx(shares)
    told = "\n".join(summary_lines(dataset.path, detail=True))
    assert (f"  item: {counted.sum():,.0f}; of its {len(counted):,} rows the hottest 1% have {shares[0]:.1%}, "
            f"10% have {shares[1]:.1%}, 50% have {shares[2]:.1%}") in told


def test_data_prepared_without_lookups_keeps_working(tmp_path: Path) -> None:
    dataset = with_users(tmp_path, DESCRIPTION)
    dataset.manifest["summary"].pop("lookups")
    assert stored_lookups(dataset, STORED_EVENTS) is None


def test_replay_is_what_training_looks_up(tmp_path: Path) -> None:
    dataset = with_users(tmp_path, DESCRIPTION)
    config = DataConfig(dir=tmp_path, max_events=EVENTS, batch_requests=5, loader_processes=0)
    loader = TrainLoader(dataset, config, seed=3, num_workers=3, workers=range(3), start_step=0, num_steps=4)
    replayed = list(replay_lookups(dataset, config, seed=3, num_workers=3, num_steps=4))
    assert len(replayed) == 4
    for step, found in enumerate(replayed):
        expected = in_batches(dataset, loader.make_step(step))
        for table, (row, count) in found.items():
            np.testing.assert_array_equal(np.flatnonzero(expected[table]), row)
            np.testing.assert_array_equal(expected[table][row], count)
        assert found.keys() == {table for table, count in expected.items() if count.any()}
