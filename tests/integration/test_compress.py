"""Source run -> store -> target run -> bundle, with the real commands; kills, other stores, leaks."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from longer_rec.batch import validate_batch
from longer_rec.bundle import load_bundle
from longer_rec.checkpoint.inspect import find_checkpoint
from longer_rec.data.batches import make_batch
from longer_rec.data.history import Dataset, open_dataset
from longer_rec.data.instance_sources import (
    BatchInstances,
    InstancesConfig,
    instance_records,
    read_instances,
    side_features,
)
from longer_rec.data.instances import InstanceReader, InstanceWriter, StoreManifest
from longer_rec.data.loader import DataConfig, TrainLoader
from longer_rec.data.order import I64
from longer_rec.data.raw import raw_request
from longer_rec.data.store import Array
from longer_rec.errors import ConfigError, DataError, ServeError
from longer_rec.serve.request import Limits, encode_score
from longer_rec.train.metrics import auc
from tests.integration.conftest import CONFIG, TINY
from tests.reference.commands import CommandServer

EVERY = (1 << 60)


@pytest.fixture(scope="module")
def source(commands: CommandServer, synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("source") / "run"
    outcome = commands.run("train", CONFIG, f"run_dir={run_dir}", f"data.dir={synthetic}", *TINY,
                           "model.compress={order: user, dim: 8, reverse_second_pass: true}")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    return run_dir


@pytest.fixture(scope="module")
def store(commands: CommandServer, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store") / "store"
    outcome = commands.run("compress", source, "--out", out)
    assert outcome.code == 0, outcome
    assert "source model, test split: AUC" in outcome.out
    return out


@pytest.fixture(scope="module")
def other(commands: CommandServer, source: Path, store: Path) -> Path:
    """The same vectors, kept otherwise."""
    out = store.with_name("other")
    assert commands.run("compress", source, "--out", out, "vectors=float32").code == 0
    return out


@pytest.fixture(scope="module")
def target(commands: CommandServer, synthetic: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("target") / "run"
    outcome = commands.run("train", CONFIG, f"run_dir={run_dir}", f"data.dir={synthetic}", *TINY,
                           f"data.instances={{store: {store}, max_tokens: 12, features: [item]}}",
                           "model.instances={aggregator: longer, num_layers: 2, num_queries: 3}")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    return run_dir


def content(path: Path, dataset: Dataset) -> bytes:
    return everything(path, dataset)[0].tobytes()


def everything(path: Path, dataset: Dataset) -> tuple[Array, I64]:
    """All records, user by user, and how many each has."""
    return InstanceReader(path).fetch(dataset.user_keys.tolist(), [EVERY] * len(dataset.user_keys), 1 << 30)


def test_a_store_holds_every_logged_instance_of_every_split_once(store: Path, synthetic: Path) -> None:
    dataset = open_dataset(synthetic)
    records, length_B = everything(store, dataset)
    rows = np.arange(dataset.requests.num_rows)
    count = dataset.requests.take("num_candidates", rows)
    assert len(records) == len(np.unique(records["id"])) == count.sum() > 1000
    assert length_B.tolist() == np.bincount(dataset.requests.take("user", rows), count, len(length_B)).tolist()


def test_killed_compressing_goes_on_to_the_very_store_of_one_that_was_not(
        source: Path, store: Path, synthetic: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "longer_rec", "compress", str(source), "--out", str(out)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / "data.mdb").exists() or (out / "data.mdb").stat().st_size < 100_000:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(DataError, match="not filled yet"):
        InstanceReader(out)
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    done = again.stdout.split(" of them new")[0].split(", ")[-1]
    assert 0 < int(done.replace(",", "")) < InstanceReader(store).progress()["instances"]
    assert content(out, open_dataset(synthetic)) == content(store, open_dataset(synthetic))


def test_compressing_a_run_twice_adds_nothing(commands: CommandServer, source: Path, store: Path) -> None:
    outcome = commands.run("compress", source, "--out", store)
    assert outcome.code == 0, outcome
    assert " 0 of them new" in outcome.out
    refused = commands.run("compress", source, "--out", store, "vectors=int8")
    assert refused.code == 2
    assert "choose another --out" in refused.err


def test_with_a_retention_only_what_is_newer_is_stored_and_read(
        commands: CommandServer, source: Path, store: Path, synthetic: Path, tmp_path: Path) -> None:
    outcome = commands.run("compress", source, "--out", tmp_path / "new", "retention_days=1", "features=[]")
    assert outcome.code == 0, outcome
    dataset = open_dataset(synthetic)
    time = dataset.requests.take("time", np.arange(dataset.requests.num_rows))
    kept = everything(store, dataset)[0]["time"] >= time.max() - 86400
    num_instances = InstanceReader(tmp_path / "new").progress()["instances"]
    assert 0 < num_instances == kept.sum() < len(kept)
    reading = read_instances(dataset, InstancesConfig(store=tmp_path / "new"))
    newest = make_batch(reading, [int(time.argmax())], max_events=1)
    assert newest.num_instances > 0
    assert int((newest.request_time_B - newest.instances["time"]).max()) <= 86400


def test_what_the_transformer_made_is_stored_from_the_vectors_before_it(
        commands: CommandServer, source: Path, store: Path, synthetic: Path, tmp_path: Path) -> None:
    assert "belong together" in commands.run("compress", source, "--out", tmp_path / "post", "stored=post").err
    outcome = commands.run("compress", source, "--out", tmp_path / "post", "stored=post", f"past={store}")
    assert outcome.code == 0, outcome
    refused = commands.run("compress", source, "--out", tmp_path / "more", "stored=post", f"past={tmp_path / 'post'}")
    assert refused.code == 2
    assert "before its transformer" in refused.err
    assert content(tmp_path / "post", open_dataset(synthetic)) != content(store, open_dataset(synthetic))


def test_a_run_with_another_store_is_refused(commands: CommandServer, source: Path, other: Path, target: Path,
                                             synthetic: Path, trained_once: Path, tmp_path: Path) -> None:
    settings = (f"run_dir={target}", f"data.dir={synthetic}", *TINY,
                "model.instances={aggregator: longer, num_layers: 2, num_queries: 3}")
    for store, message in ((other, "differs in data.instances.store"), (tmp_path / "none", "no store of instances")):
        outcome = commands.run("train", CONFIG, *settings,
                               f"data.instances={{store: {store}, max_tokens: 12, features: [item]}}")
        assert outcome.code == 2, outcome
        assert message in outcome.err
    assert "is no source model" in commands.run("compress", trained_once, "--out", tmp_path / "no").err
    assert "is not served" in commands.run("export", source, "--out", tmp_path / "bundle").err


def test_a_bundle_serves_the_tokens_of_its_store_and_of_no_other(
        commands: CommandServer, store: Path, other: Path, target: Path, synthetic: Path, tmp_path: Path) -> None:
    outcome = commands.run("export", target, "--out", tmp_path / "bundle")
    assert outcome.code == 0, outcome
    bundle = load_bundle(tmp_path / "bundle")
    dataset = read_instances(open_dataset(synthetic), InstancesConfig(store=store, max_tokens=12, features=("item",)))
    row = dataset.split_rows("test")[5]
    body, expected = raw_request(dataset, row, 20), make_batch(dataset, [row], max_events=20)
    given = encode_score(bundle, body, None, Limits()).batch
    assert expected.num_instances == 12
    for name, values in expected.instances.items():
        assert torch.equal(given.instances[name], values), name
    with torch.no_grad():
        assert torch.equal(bundle.ranker(given), bundle.ranker(expected))
        silent = replace(given, instances={name: values[:0] for name, values in given.instances.items()}
                         | {"length": torch.zeros(1, dtype=torch.int64)})
        assert not torch.equal(bundle.ranker(given), bundle.ranker(silent))
    with pytest.raises(ServeError, match=r"is not the store that the model of .* was trained with"):
        load_bundle(tmp_path / "bundle", store=other)


def planted_store(dataset: Dataset, path: Path, delay_s: int = 0) -> tuple[Path, StoreManifest]:
    """Whose vectors and labels tell each candidate's own label, and nothing of any other."""
    kind = StoreManifest(width=4, vectors="float32", tasks=dataset.schema.tasks, source={"run": "planted"},
                         features=side_features(dataset, ("item",)), delay_s=delay_s)
    rows = np.arange(dataset.requests.num_rows)
    label = np.random.default_rng(0)
    with InstanceWriter(path, kind) as writer:
        for block in np.array_split(rows, 20):
            batch = make_batch(dataset, block, max_events=1, drawn=False)
            batch = replace(batch, label_CY=torch.from_numpy(label.integers(0, 2, batch.label_CY.shape)).float())
            user, records = instance_records(dataset, kind, batch, np.repeat(batch.label_CY.numpy(), 4, axis=1))
            writer.append(user, records, {"done": int(block[-1]) + 1, "total": len(rows)})
    return path, kind


@pytest.mark.parametrize("delay_s", [0, 3 * 86400])
def test_a_planted_label_is_read_only_after_its_time_and_delay(synthetic: Path, tmp_path: Path, delay_s: int) -> None:
    plain = open_dataset(synthetic)
    path, _ = planted_store(plain, tmp_path / "store", delay_s)
    dataset = read_instances(plain, InstancesConfig(store=path, max_tokens=64, features=("item",)))
    rows = np.asarray(dataset.split_rows("test"))[:200]
    own = {int(row): plain.requests.take("time", np.asarray([row]))[0] for row in rows}
    leaked, strict, truth = [], [], []
    reader = InstanceReader(path)
    for row in rows:
        batch = make_batch(dataset, [row], max_events=1, drawn=False)
        validate_batch(batch, dataset.schema)
        key = [int(plain.user_keys[plain.requests.take("user", np.asarray([row]))[0]])]
        late, _ = reader.fetch(key, [int(own[int(row)]) + delay_s + 1], 64)  # what a fetch up to its time would give
        truth.append({int(one["feature"][0]): float(one["label"][0]) for one in late
                      if one["time"] == own[int(row)]})
        for item in truth[-1]:
            leaked.append(next(float(one["label"][0]) for one in late[::-1] if one["feature"][0] == item))
            seen = [float(label) for label, other in zip(batch.instances["label"][:, 0], batch.instances["item"],
                                                         strict=True) if int(other) == item]
            strict.append(seen[-1] if seen else 0.5)
        assert batch.num_instances == 0 or int(batch.instances["time"].max()) + delay_s < own[int(row)]
    labels = [label for each in truth for label in each.values()]
    assert len(labels) > 200
    assert auc(labels, leaked) == 1.0
    assert abs(auc(labels, strict) - 0.5) < 0.12


def test_a_shorter_delay_than_the_store_s_and_foreign_features_are_refused(synthetic: Path, tmp_path: Path) -> None:
    plain = open_dataset(synthetic)
    path, _ = planted_store(plain, tmp_path / "store", delay_s=60)
    assert read_instances(plain, InstancesConfig(store=path, delay_s=61)).fingerprint != plain.fingerprint
    with pytest.raises(ConfigError, match=r"delay_s=59 is less than the 60 s"):
        read_instances(plain, InstancesConfig(store=path, delay_s=59))
    with pytest.raises(ConfigError, match="which .* does not hold"):
        read_instances(plain, InstancesConfig(store=path, features=(plain.schema.history_features[-1].name,)))
    strangers = replace(plain)
    strangers.__dict__["user_keys"] = plain.user_keys + np.uint64(1)
    with pytest.raises(DataError, match="no instance of any user"):
        read_instances(strangers, InstancesConfig(store=path))


def test_user_order_reads_every_request_once_an_epoch_in_stretches_of_the_index(synthetic: Path) -> None:
    dataset = replace(open_dataset(synthetic), instances=BatchInstances(30))
    train, size = dataset.split_rows("train"), 48
    config = DataConfig(dir=synthetic, batch_requests=size, max_events=5, loader_processes=0)
    per_epoch = -(-len(train) // size)
    loader = TrainLoader(dataset, config, seed=3, num_workers=1, workers=range(1), start_step=0, num_steps=0,
                         user_order=True, reverse_second_pass=True)
    epochs = [[loader.make_step(step)[0].request_row_B.tolist() for step in range(start, start + per_epoch)]
              for start in (0, per_epoch)]
    for batches in epochs:
        assert sorted(row for batch in batches for row in batch) == list(train)
        assert all(set(np.diff(batch)) <= {1, 1 - len(train)} for batch in batches)
    first, second = (np.asarray([batch[0] for batch in batches]) for batches in epochs)
    (moved,) = set((second[::-1] - first) % len(train))  # the second pass walks back, cut elsewhere
    assert moved % size
    assert sorted(first) != first.tolist()


def test_the_past_of_a_batch_is_its_user_s_logged_candidates_at_earlier_times(synthetic: Path) -> None:
    plain = open_dataset(synthetic)
    rows = np.arange(100, 148)
    batch = make_batch(replace(plain, instances=BatchInstances(25)), rows, max_events=1)
    user, time = plain.requests.take("user", rows), plain.requests.take("time", rows)
    logged = plain.requests.take("num_candidates", rows)
    start = np.cumsum(batch.num_candidates_B.numpy()) - batch.num_candidates_B.numpy()
    found = batch.instances["row"].split(batch.instances["length"].tolist())
    for request in range(len(rows)):
        earlier = sorted((time[other], other) for other in range(len(rows))
                         if user[other] == user[request] and time[other] < time[request])
        expected = [int(start[other]) + place for _, other in earlier for place in range(logged[other])][-25:]
        assert found[request].tolist() == expected
    assert max(map(len, found)) == 25
    assert min(map(len, found)) == 0


def test_a_run_without_tokens_says_nothing_of_them(trained_once: Path) -> None:
    manifest = json.loads((find_checkpoint(trained_once) / "manifest.json").read_text())
    assert not [name for name in manifest["tensors"] if "instance" in name or "compressor" in name]
