"""A study killed, stopped, changed or with a run that fails: what is run again, and what its table says."""

import csv
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from longer_rec.cli import main
from tests.integration.conftest import CONFIG
from tests.reference.commands import CommandServer
from tests.reference.processes import Forked, fork, gone, until

FAST = ("data.max_events=20", "train.log_every=2", "train.checkpoint_every=5", "train.eval_requests=64",
        "data.loader_processes=0")
NOTHING = "model={kind: no_sequence}"
LONGER = "model={kind: longer, width: 8, num_queries: 4}"
LATEST = "runs/longer/*/checkpoints/LATEST"
# What depends on how fast the machine was.
TIMES = {"requests_per_s", "requests_per_s_error", "train_s", "train_s_error"}


def write(folder: Path, data: Path, *common: str, **changes: Any) -> Path:
    """A study of two models and two seeds, which takes some seconds and writes into ``folder``/out."""
    content = {"name": "small", "base": str(CONFIG), "out": str(folder / "out"), "seeds": [0, 1], "parallel": 2,
               "common": [*FAST, f"data.dir={data}", *common], "probe_steps": 3, "reference": "nothing",
               "models": {"nothing": [NOTHING], "longer": [LONGER]}, **changes}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def table(out: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader((out / "table.csv").open()))
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def finished(out: Path) -> dict[str, int]:
    """When each run's results were written, in nanoseconds."""
    return {str(path.parent.relative_to(out)): path.stat().st_mtime_ns for path in out.glob("runs/*/*/results.json")}


def start(path: Path, folder: Path) -> Forked:
    def command() -> int:
        sys.argv = ["longer-rec", "study", str(path)]
        main()
        return 0

    return fork(command, folder)


@pytest.fixture(scope="module")
def whole(commands: CommandServer, synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a study that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    outcome = commands.run("study", write(folder, synthetic, "train.epochs=0.6"))
    assert (outcome.code, outcome.err) == (0, ""), outcome
    return folder / "out"


def test_however_it_is_ended_the_rest_is_run_and_the_table_is_the_same(
        commands: CommandServer, synthetic: Path, tmp_path: Path, whole: Path) -> None:
    path, out = write(tmp_path, synthetic, "train.epochs=0.6"), tmp_path / "out"
    times: dict[str, int] = {}
    for number, code in ((signal.SIGTERM, 3), (signal.SIGKILL, -signal.SIGKILL)):
        saved = {path: path.read_text() for path in out.glob(LATEST)}
        with start(path, tmp_path / number.name) as study:
            # At once: runs that a killed study has left behind may still be saving.
            until(lambda saved=saved: any(path.read_text() != saved.get(path) for path in out.glob(LATEST)), 120, study)
            family = study.family()
            os.kill(study.pid, number)
            assert study.wait() == code
            assert number is signal.SIGKILL or gone(family)
        assert times.items() <= finished(out).items()
        times = finished(out)
        assert len(times) < 4
        assert not (out / "table.csv").exists()
    outcome = commands.run("study", path)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert times.items() <= finished(out).items()
    assert any("continues from step" in log.read_text() for log in out.glob("runs/*/*.log"))
    assert table(out) == table(whole)


def test_a_finished_study_runs_nothing_and_says_the_same(commands: CommandServer, whole: Path) -> None:
    before, said = finished(whole), (whole / "table.csv").read_bytes()
    assert commands.run("study", whole.parent / "small.yaml").code == 0
    assert finished(whole) == before
    assert (whole / "table.csv").read_bytes() == said


@pytest.mark.parametrize(("override", "message"), [
    ("models.longer=['model={kind: longer, width: 12, num_queries: 4}']",
     r"longer/probe\.yaml was made for other settings \(differs in model\.width\)"),
    ("seeds=[0, 0]", r"seeds=\[0, 0\] holds a seed twice"),
    ("models.longer=['model={kind: longer, num_queries: 4, num_heads: 5}']",
     r"models\.longer: model\.num_heads=5 does not divide the merged width 64"),
    ("models.longer=[data.dir=nowhere]", r"nowhere"),
])
def test_what_does_not_fit_is_refused_before_anything_runs(commands: CommandServer, whole: Path, override: str,
                                                           message: str) -> None:
    before = finished(whole)
    outcome = commands.run("study", whole.parent / "small.yaml", override)
    assert re.fullmatch(rf"longer-rec: [^\n]*{message}[^\n]*\n", outcome.err), outcome
    assert outcome.code == 2
    assert finished(whole) == before


def test_a_failing_run_stops_no_other(commands: CommandServer, synthetic: Path, tmp_path: Path) -> None:
    wild = [LONGER, "sparse.default_init_std=1.0e+38", "train.max_bad_steps=2"]
    path = write(tmp_path, synthetic, "train.epochs=0.1", models={"wild": wild, "nothing": [NOTHING]}, seeds=[0])
    out = tmp_path / "out"
    outcome = commands.run("study", path)
    assert outcome.code == 1
    assert re.search(r"wild seed 0: failed, exit code 2: longer-rec: .*not finite.* \(log: .*seed-0\.log", outcome.out)
    rows = {row["model"]: row for row in table(out)}
    assert (rows["wild"]["seeds"], rows["wild"]["missing"], rows["wild"]["auc"]) == ("0", "1", "")
    assert 0 < float(rows["nothing"]["auc"]) < 1
    assert "wild seed 0 is missing" in (out / "index.html").read_text()


def test_equal_time_with_a_search(commands: CommandServer, synthetic: Path, tmp_path: Path) -> None:
    path = write(tmp_path, synthetic, seeds=[3], budget_s=0.5, search_budget_s=0.5, search_metric="logloss",
                 search={"stuck": ["dense.lr=1.0e-9", "sparse.lr=1.0e-9"], "learns": []},
                 models={"nothing": [NOTHING], "counts": ["model={kind: count}", "train.epochs=0"]})
    out = tmp_path / "out"
    outcome = commands.run("study", path)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    nothing, counts = table(out)
    validation = {name: json.loads((out / f"trials/nothing/search-{name}.json").read_text())["validation"]["logloss"]
                  for name in ("stuck", "learns")}
    assert nothing["setting"] == min(validation, key=lambda name: validation[name])
    assert (counts["setting"], counts["requests"]) == ("", "0.0")
    rate = json.loads((out / "trials/nothing/probe.json").read_text())["requests_per_s"]
    # 16 requests a step, rounded up.
    assert float(nothing["requests"]) == pytest.approx(rate * 0.5, abs=16 + 1e-3 * rate)


def test_stores_are_filled_before_the_models_that_read_them(commands: CommandServer, synthetic: Path, tmp_path: Path
                                                            ) -> None:
    stores = {"own": {"overrides": ["model.compress={dim: 8}", "model.num_queries=4"]},
              "small": {"run": "own", "compress": ["vectors=int8"]}}
    reads = [LONGER, "data.instances={store: $stores/small, max_tokens: 8}", "model.instances={width: 16}"]
    path, out = write(tmp_path, synthetic, "train.epochs=0.1", models={"tokens": reads}, seeds=[0], stores=stores,
                      reference=None), tmp_path / "out"
    outcome = commands.run("study", path)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert re.search(r"store own: its source model has auc 0\.\d+, .*\nstore small: its source model has", outcome.out)
    (row,) = table(out)
    assert 0 < float(row["auc"]) < 1
    before = finished(out)
    assert commands.run("study", path).code == 0
    assert finished(out) == before
