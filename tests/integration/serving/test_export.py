"""A run becomes a bundle that scores as the run does, or none."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import longer_rec.train.export
from longer_rec.bundle import load_bundle, quantise_rows, read_bundle_manifest
from longer_rec.data.history import open_dataset
from longer_rec.errors import ConfigError, ServeError
from longer_rec.train.evaluate import evaluate_scorer
from longer_rec.train.export import ExportOptions, export_run
from tests.integration.conftest import CommandServer
from tests.reference.ranks import run_ranks
from tests.reference.servers import running_server


@pytest.fixture(scope="module")
def bundle(commands: CommandServer, trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "bundle"
    outcome = commands.run("export", trained_once, "--out", path)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    return path


def test_the_server_scores_the_test_split_as_the_run_does(commands: CommandServer, trained_once: Path, synthetic: Path,
                                                          bundle: Path) -> None:
    measured = read_bundle_manifest(bundle).measured
    assert max(measured[f"{way}_max_logit_difference"] for way in ("uncached", "cached", "split")) <= 1e-5
    with running_server(bundle) as server, server.client() as client:
        served = evaluate_scorer(open_dataset(synthetic), "test", client.score, client.model()["max_events"])
        told = commands.run("eval", trained_once, "--server", server.url)
    assert served["auc"] == pytest.approx(measured["auc"], abs=1e-6)
    offline = commands.run("eval", trained_once)
    figure = re.compile(r"\d\.\d{4}")
    assert told.code == 0
    assert figure.findall(told.out)[:4] == figure.findall(offline.out)[:4] != []


def test_a_bundle_holds_no_pickle_and_every_damaged_file_is_named(bundle: Path) -> None:
    assert {path.suffix for path in bundle.iterdir()} == {".json", ".arrow", ".safetensors"}
    for path in sorted(bundle.iterdir()):
        content = path.read_bytes()
        for damaged in (content[:-1], bytes([content[0] ^ 1]) + content[1:]):
            path.write_bytes(damaged)
            with pytest.raises(ServeError, match=re.escape(str(path if path.name != "bundle.json" else bundle))):
                load_bundle(bundle)
        path.unlink()
        with pytest.raises(ServeError, match=re.escape(path.name)):
            load_bundle(bundle)
        path.write_bytes(content)
    load_bundle(bundle)


def test_rounded_embeddings_are_within_half_a_step_and_measured(trained_once: Path, tmp_path: Path) -> None:
    weight = torch.randn(50, 8) * torch.logspace(-6, 3, 50).unsqueeze(1)
    weight[3] = 0.25
    rows, span = quantise_rows(weight)
    restored = span[:, :1] + rows * span[:, 1:]
    assert bool(((restored - weight).abs() <= 0.5001 * span[:, 1:] + 1e-6 * weight.abs()).all())
    run_ranks(_export, 1, trained_once, tmp_path / "small", ExportOptions(embeddings="int8"), False)
    manifest = read_bundle_manifest(tmp_path / "small")
    assert manifest.measured["auc_loss"] == manifest.measured["auc"] - manifest.measured["rounded_auc"] <= 5e-4
    assert 0 < manifest.measured["rounding_max_logit_difference"] < 1


@pytest.mark.parametrize(("spoil", "message"), [
    ("tower", "uncached logits part from training's by"), ("rows", "embeddings as int8 lose")])
def test_what_does_not_score_like_the_run_is_refused(trained_once: Path, tmp_path: Path, spoil: str, message: str
                                                     ) -> None:
    options = ExportOptions(embeddings="int8", max_auc_loss=0)
    with pytest.raises(AssertionError, match=re.escape(message)):
        run_ranks(_export, 1, trained_once, tmp_path / "out", options, spoil)
    assert not list(tmp_path.glob("out*"))


def test_an_export_over_something_is_refused(trained_once: Path, bundle: Path) -> None:
    with pytest.raises(ConfigError, match="exists; choose another --out"):
        export_run(trained_once, bundle, ExportOptions())


def _export(rank: int, world_size: int, run_dir: Path, out: Path, options: ExportOptions, spoil: Any) -> None:
    if spoil == "tower":
        load = longer_rec.train.export.load_bundle

        def spoiled(path: Path) -> Any:
            bundle = load(path)
            with torch.no_grad():
                bundle.ranker.tower.head.candidate.bias.add_(1e-3)
            return bundle

        longer_rec.train.export.load_bundle = spoiled
    elif spoil == "rows":
        evaluate, calls = longer_rec.train.export.evaluate, []

        def worse(*arguments: Any, **names: Any) -> dict[str, float]:
            calls.append(1)
            metrics = evaluate(*arguments, **names)
            return {**metrics, "auc": metrics["auc"] - 0.01 * (len(calls) - 1)}

        longer_rec.train.export.evaluate = worse
    export_run(run_dir, out, options)
