"""A run becomes a bundle that scores as the run does, or none."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longer_rec.bundle import load_bundle, quantise_rows, read_bundle_manifest
from longer_rec.data.history import open_dataset
from longer_rec.errors import ServeError
from longer_rec.train.evaluate import evaluate_scorer
from longer_rec.train.export import ExportOptions, check_auc_loss, check_parity
from tests.integration.conftest import CommandServer
from tests.reference.bundles import shop_dataset, write_random_bundle
from tests.reference.servers import running_server


@pytest.fixture(scope="module")
def bundle(commands: CommandServer, trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "bundle"
    outcome = commands.run("export", trained_once, "--out", path)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    return path


def test_the_server_scores_the_test_split_as_the_run_does(commands: CommandServer, trained_once: Path, synthetic: Path,
                                                          bundle: Path) -> None:
    measured = read_bundle_manifest(bundle)[0].measured
    assert max(measured[f"{way}_max_logit_difference"] for way in ("uncached", "cached", "split")) <= 1e-5
    with running_server(bundle) as server, server.client() as client:
        served = evaluate_scorer(open_dataset(synthetic), "test", client.score, client.model()["max_events"])
        told = commands.run("eval", trained_once, "--server", server.url)
    assert served["auc"] == pytest.approx(measured["auc"], abs=1e-6)
    assert told.code == 0
    assert f"{measured['auc']:.4f}" in told.out


def test_a_bundle_holds_no_pickle_and_every_damaged_file_is_named(bundle: Path) -> None:
    assert {path.suffix for path in bundle.iterdir()} == {".json", ".arrow", ".safetensors"}
    for path in sorted(bundle.iterdir()):
        content = path.read_bytes()
        for damaged in (content[:-2], bytes([content[0] ^ 1]) + content[1:]):
            path.write_bytes(damaged)
            with pytest.raises(ServeError, match=re.escape(str(path if path.name != "bundle.json" else bundle))):
                load_bundle(bundle)
        path.unlink()
        with pytest.raises(ServeError, match=re.escape(path.name)):
            load_bundle(bundle)
        path.write_bytes(content)
    load_bundle(bundle)


def test_rounded_embeddings_are_within_half_a_step_and_measured(commands: CommandServer, trained_once: Path,
                                                                tmp_path: Path) -> None:
    weight = torch.randn(50, 8) * torch.logspace(-6, 3, 50).unsqueeze(1)
    weight[3] = 0.25
    rows, span = quantise_rows(weight)
    restored = span[:, :1] + rows * span[:, 1:]
    assert bool(((restored - weight).abs() <= 0.5001 * span[:, 1:] + 1e-6 * weight.abs()).all())
    outcome = commands.run("export", trained_once, "--out", tmp_path / "small", "--embeddings", "int8")
    assert outcome.code == 0, outcome
    measured = read_bundle_manifest(tmp_path / "small")[0].measured
    assert measured["auc_loss"] == measured["auc"] - measured["rounded_auc"] <= 5e-4
    assert 0 < measured["rounding_max_logit_difference"] < 1
    for loss in (6e-4, float("nan")):
        with pytest.raises(ServeError, match="embeddings as int8 lose .* more than 0.0005; export others or raise"):
            check_auc_loss(loss, ExportOptions(embeddings="int8"))


def test_a_bundle_that_scores_otherwise_is_refused_with_the_place(tmp_path: Path) -> None:
    dataset = shop_dataset(tmp_path / "shop")
    path = write_random_bundle(dataset, tmp_path / "bundle")
    trained, bundle = load_bundle(path).ranker, load_bundle(path)
    differences = check_parity(trained, bundle, dataset, torch.device("cpu"))
    assert len(differences) == 3
    assert max(differences.values()) <= 1e-5
    bundle.tables.get_buffer("place")[1] += 1e-2
    with pytest.raises(ServeError, match=r"uncached logits part from training's by \S+ at request \d+ of the data"):
        check_parity(trained, bundle, dataset, torch.device("cpu"))
    encode = trained.tower.encode
    bundle = load_bundle(path)
    bundle.ranker.tower.encode = lambda user: replace(  # type: ignore[method-assign]
        encode(user), head_BF=encode(user).head_BF + 1e-3 * (user.length_B.numel() == 1))
    with pytest.raises(ServeError, match="cached logits part from training's"):
        check_parity(trained, bundle, dataset, torch.device("cpu"))


def test_an_export_over_something_or_of_nothing_is_refused(commands: CommandServer, trained_once: Path, bundle: Path,
                                                           tmp_path: Path) -> None:
    for run, out, message in ((trained_once, bundle, "exists; choose another --out"),
                              (tmp_path, tmp_path / "out", "is no readable run directory")):
        outcome = commands.run("export", run, "--out", out)
        assert (outcome.code, message in outcome.err, outcome.err.count("\n")) == (2, True, 1), outcome
    assert not list(tmp_path.iterdir())
