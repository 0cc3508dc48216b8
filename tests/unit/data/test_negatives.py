"""Sampled negatives: by popularity, never in the basket, a function of (seed, epoch, request) and nothing else."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from longer_rec.data.batches import make_batch
from longer_rec.data.history import Dataset
from longer_rec.errors import DataError
from tests.unit.data.logs import DESCRIPTION, prepared, random_log

_DIGEST = """
import hashlib, sys
from pathlib import Path
from longer_rec.data.batches import make_batch
from longer_rec.data.history import open_dataset
dataset = open_dataset(Path(sys.argv[1]))
batch = make_batch(dataset, dataset.split_rows("train"), max_events=5, epoch=3)
print(hashlib.sha256(batch.candidates["item"].numpy().tobytes()).hexdigest())
"""


def negatives(dataset: Dataset, rows: range | list[int], epoch: int | None) -> list[list[int]]:
    batch = make_batch(dataset, rows, max_events=1, epoch=epoch)
    parts = zip(batch.candidates["item"].split(batch.num_candidates_B.tolist()),
                batch.label_CY[:, 0].split(batch.num_candidates_B.tolist()), strict=True)
    return [item[label == 0].tolist() for item, label in parts]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepared(tmp_path_factory.mktemp("log"), random_log(2000))


def test_a_request_has_the_same_negatives_in_any_batch(dataset: Dataset) -> None:
    rows = dataset.split_rows("train")
    together = negatives(dataset, rows, 4)
    assert negatives(dataset, list(rows)[::-1], 4)[::-1] == together
    assert [negatives(dataset, [row], 4)[0] for row in rows[:20]] == together[:20]


def test_negatives_are_the_same_in_another_process(dataset: Dataset) -> None:
    batch = make_batch(dataset, dataset.split_rows("train"), max_events=5, epoch=3)
    command = [sys.executable, "-c", _DIGEST, str(dataset.path)]
    other = subprocess.run(command, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == hashlib.sha256(batch.candidates["item"].numpy().tobytes()).hexdigest()


def test_epochs_have_fresh_negatives_and_evaluation_its_own(dataset: Dataset) -> None:
    rows = dataset.split_rows("train")
    drawn = [negatives(dataset, rows, epoch) for epoch in (None, 0, 1)]
    assert drawn[0] == negatives(dataset, rows, None)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        equal = np.mean(np.concatenate(drawn[first]) == np.concatenate(drawn[second]))
        assert equal < 0.1


def test_epochs_may_differ_within_a_batch(dataset: Dataset) -> None:
    rows = list(dataset.split_rows("train")[:2])
    mixed = make_batch(dataset, rows, max_events=1, epoch=np.asarray([0, 7])).candidates["item"].tolist()
    apart = [make_batch(dataset, [row], max_events=1, epoch=epoch).candidates["item"].tolist()
             for row, epoch in zip(rows, (0, 7), strict=True)]
    assert mixed == apart[0] + apart[1]


def test_negatives_follow_the_training_counts(tmp_path: Path) -> None:
    what = np.concatenate([np.repeat([1, 2, 3], [600, 300, 100]), np.zeros(2, int)])
    order = np.random.default_rng(0).permutation(1000)
    log = pl.DataFrame({"who": np.arange(1002) % 7, "what": np.concatenate([what[:1000][order], what[1000:]]),
                        "when": np.arange(1002), "kind": 0, "price": 1.0, "place": "x"})
    dataset = prepared(tmp_path, log, {**DESCRIPTION, "candidates": {"kind": "negatives", "per_positive": 50},
                                       "split": {"fractions": [1, 0, 0]}})
    item = dataset.encoders["item"].values.to_list()  # type: ignore[union-attr]
    assert item == [0, 1, 2, 3]
    user_of_zero = [int(one) for one in dataset.split_rows("train")
                    if make_batch(dataset, [one], max_events=1).candidates["item"][0] == 1]
    drawn = np.concatenate([np.concatenate(negatives(dataset, user_of_zero, epoch)) for epoch in range(40)])
    counts = np.bincount(drawn, minlength=5)
    assert counts[:2].tolist() == [0, 0]
    assert np.allclose(counts[2:] / counts.sum(), [0.6, 0.3, 0.1], atol=0.03)


def test_a_basket_of_everything_is_an_error_and_not_an_endless_loop(tmp_path: Path) -> None:
    log = pl.DataFrame({"who": 1, "what": [1, 2, 3] * 4, "when": np.repeat(np.arange(4), 3), "kind": 0, "price": 1.0,
                        "place": "x"})
    dataset = prepared(tmp_path, log, {**DESCRIPTION, "split": {"fractions": [1, 0, 0]}})
    with pytest.raises(DataError, match="no negative in 256 draws, its 3 positives are nearly all of the 3 items"):
        make_batch(dataset, [0], max_events=1)
