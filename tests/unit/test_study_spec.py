"""A study's file: its grid of jobs, its budgets, and what is wrong with it said before anything runs."""

import re
from pathlib import Path

import pytest
import yaml

from longer_rec.errors import ConfigError
from longer_rec.study.command import equal_time_epochs
from longer_rec.study.spec import load_study, source_job, variants
from tests.unit.test_configs import HEADER

STUDIES = sorted((Path(__file__).parents[2] / "configs" / "studies").glob("*.yaml"))
BASE = Path(__file__).parents[2] / "configs" / "synthetic_debug.yaml"
STUDY = {"name": "s", "base": str(BASE), "models": {"a": [], "b": ["model={kind: no_sequence}"]}}


def load(tmp_path, *overrides, **changes):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}))
    study = load_study(path, overrides)
    return study, variants(study)


def test_the_grid_is_crossed_in_the_order_of_the_file(tmp_path):
    study, grid = load(tmp_path, data={"one": [], "two": ["data.dir=two"]},
                       grid={"length": {"50": ["data.max_events=50"], "9": ["data.max_events=9"]}})
    assert [variant.label for variant in grid] == [
        f"{model} ({data}, length {length})" for data in ("one", "two") for length in (50, 9) for model in ("a", "b")]
    assert grid[-1].folder == Path("two/b/length=9")
    assert len({variant.folder for variant in grid}) == 8
    job = grid[-1].job(Path("x"), "seed=7")
    assert (str(job.data.dir), job.data.max_events, job.model.kind, job.seed) == ("two", 9, "no_sequence", 7)
    assert study.directory == Path("runs/studies/s")


def test_stores_have_a_source_each_and_a_place(tmp_path):
    stores = {"one": {"overrides": ["model.compress={dim: 8}"]}, "two": {"run": "one", "compress": ["vectors=int8"]}}
    study, (variant,) = load(tmp_path, stores=stores, common=["data.max_events=7"], seeds=[5, 6], models={
        "a": ["data.instances={store: $stores/two}", "model.instances={}"]})
    source, reader = source_job(study, "one"), variant.job(Path("x"))
    assert (source.model.compress.dim, source.data.max_events, source.seed) == (8, 7, 5)
    assert reader.data.instances.store == study.directory / "stores" / "two"
    for wrong in ({"run": "three"}, {"run": "one", "overrides": ["dense.lr=1"]}):
        with pytest.raises(ConfigError, match=r"stores\.two: run=.* takes the source of another store"):
            load(tmp_path, stores=stores | {"two": wrong})


def test_later_overrides_win_and_baselines_are_not_run(tmp_path):
    _, grid = load(tmp_path, common=["data.max_events=1", "dense.lr=0.5"],
                   data={"d": ["data.max_events=2", "data.batch_requests=2"]},
                   models={"m": ["data.max_events=3", "data.batch_requests=3"]},
                   grid={"g": {"p": ["data.max_events=4"]}})
    job = grid[0].job(Path("x"))
    assert (job.dense.lr, job.data.batch_requests, job.data.max_events) == (0.5, 2, 4)
    assert not load(tmp_path)[1][0].job(Path("x")).baselines


def test_base_lies_beside_the_study(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE.read_text())
    assert len(load(tmp_path, base="base.yaml")[1]) == 2


def test_equal_time_is_a_number_of_epochs():
    assert equal_time_epochs(200.0, 60.0, 10_000) == 1.2
    assert equal_time_epochs(333.3333, 10.0, 100_000) == 0.03333


@pytest.mark.parametrize(("changes", "message"), [
    ({"modles": {}}, r"unknown key 'modles'; did you mean 'models'\?"),
    ({"models": {}}, r"models is empty; name at least one"),
    ({"reference": "c"}, r"reference='c' is no model; use one of a, b"),
    ({"models": {"longer": []}, "reference": "longr"}, r"reference='longr' is no model; did you mean 'longer'\?"),
    ({"seeds": [0, 1, 0]}, r"seeds=\[0, 1, 0\] holds a seed twice"),
    ({"seeds": []}, r"seeds is empty; name at least one"),
    ({"base": "nowhere.yaml"}, r"cannot read .*nowhere\.yaml: .*give the path of a YAML file"),
    ({"budget_s": 0}, r"budget_s=0: input should be greater than 0"),
    ({"budget_s": -3}, r"budget_s=-3: input should be greater than 0"),
    ({"search": {"x": ["dense.lr=1"]}}, r"search and search_budget_s belong together"),
    ({"search_budget_s": 3}, r"search and search_budget_s belong together"),
    ({"parallel": 0}, r"parallel=0: input should be greater than or equal to 1"),
    ({"scaling": ["flops"]}, r"scaling\.0='flops': input should be 'max_events', 'dense_parameters' or 'gflops'"),
    ({"models": {"a/b": []}}, r"'a/b' becomes a directory; use letters"),
    ({"grid": {"length": {}}}, r"grid\.length has no point"),
    ({"models": {"a": ["model.widht=8"]}, "grid": {"L": {"50": ["data.max_events=50"]}}},
     r"models\.a \(L 50\): unknown key 'model\.widht'; did you mean 'width'\?"),
    ({"grid": {"L": {"50": ["data.max_events=0"]}}}, r"models\.a \(L 50\): data\.max_events=0: input should be"),
    ({"common": ["seed=3"]}, r"'seed=3': a study gives each run its seed itself; list seeds"),
    ({"models": {"a": ["run_dir=b"]}}, r"'run_dir=b': a study gives each run its run_dir itself; set out"),
    ({"common": ["nonsense"]}, r"models\.a: override 'nonsense' is not of the form key\.sub=value"),
    ({"search": {"x": ["dense.lr=-1"]}, "search_budget_s": 1}, r"models\.a: dense\.lr=-1: input should be greater"),
    ({"models": {"a": ["train.epochs=3"]}, "budget_s": 5}, r"models\.a: train\.epochs=3 has no effect beside budget_s"),
])
def test_a_fault_of_the_file(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as fault:
        load(tmp_path, **changes)
    assert "\n" not in str(fault.value)


def test_the_docs_tell_of_every_shipped_study():
    told = (Path(__file__).parents[2] / "docs" / "studies.md").read_text(encoding="utf-8")
    assert STUDIES
    assert [path.stem for path in STUDIES if f"\n| `{path.stem}` | " not in told] == []


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_shipped_study_resolves_and_says_what_it_is_for(path):
    study = load_study(path)
    assert study.name == path.stem
    assert study.out is None
    assert variants(study)
    header = re.findall(r"(?m)^# (\w+) +\S", path.read_text(encoding="utf-8").partition("\nname:")[0])
    assert [name for name in header if name in HEADER] == list(HEADER)
