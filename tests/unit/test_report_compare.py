"""The page of several runs, and the sections made of an analysis."""

import json

import pytest

from longer_rec.errors import ConfigError, DataError
from longer_rec.report.compare import write_comparison
from longer_rec.report.html import train_seconds, write_report
from longer_rec.report.run_files import read_run_files
from tests.unit.test_report_html import RUN, Page, assert_self_contained, log_lines


def bucket(low, high, candidates, users, auc, logloss=0.4):
    return {"low": low, "high": high, "candidates": candidates, "positives": 1, "users": users, "auc": auc,
            "logloss": [logloss, logloss - 0.01, logloss + 0.01]}


def analysis(auc=0.7, attention=True):
    layer = {"heads": [[0.1, 0.0, 0.2, 0.1, 0.6], [0.3, 0.0, 0.2, 0.1, 0.4]], "uniform": [0.2, 0.0, 0.6, 0.1, 0.1]}
    profile = {"edges": [60, 86400], "layers": [layer, layer]}
    return {"step": 40, "max_events": 200, "whole": {},
            "history_length": [bucket(0, 0, 11, 1, [0.9, None, None]),
                               bucket(1024, 2047, 1234, 56, [auc, auc - 0.01, auc + 0.02])],
            "user_activity": [bucket(1, 1, 1245, 57, [auc, auc - 0.01, auc + 0.01])],
            "calibration": {"error": 0.0123, "bins": [
                {"candidates": 600, "predicted": 0.125, "observed": [0.1, 0.09, 0.11]},
                {"candidates": 645, "predicted": 0.5, "observed": [0.6, 0.5, 0.7]}]},
            "attention": {"requests": 256, "candidates": 5012, "position": profile, "age": profile}
            if attention else None}


def make_run(path, name, fingerprint="aaaa", max_events=200, batch=16, **settings):
    path.mkdir()
    (path / "config.yaml").write_text(f"name: {name}\nrun_dir: {path}\ndata:\n  max_events: {max_events}\n"
                                      f"  batch_requests: {batch}\n")
    (path / "run.json").write_text(json.dumps(RUN | {"data": RUN["data"] | {"fingerprint": fingerprint}}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log_lines()))
    (path / "results.json").write_text(json.dumps([{"name": name, "auc": settings.get("auc", 0.7), "logloss": 0.4}]))
    (path / "analysis.json").write_text(json.dumps(analysis(**settings)))
    return path


@pytest.fixture
def pair(tmp_path):
    return [make_run(tmp_path / "a", "first"), make_run(tmp_path / "b", "second <2>", max_events=1000, auc=0.75)]


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def test_two_runs_on_one_page(pair, tmp_path):
    path = write_comparison(pair)
    page = read(path)
    assert path == tmp_path / "comparison.html"
    assert "first, second <2>" in page.sections[""]
    assert "notes" not in page.sections
    assert "second <2> 0.7500 0.4000" in page.sections["results"]
    for x_title in ("step", "requests seen", "training time"):
        assert f"Training loss over {x_title}" in page.sections["curves"]
        assert f"Validation AUC over {x_title}" in page.sections["curves"]
    assert "0 0 11 1 0.9000 0.4000 (0.3900 – 0.4100) 0.9000" in page.sections["quality"]
    assert ("1,024 2,047 1,234 56 0.7000 (0.6900 – 0.7200) 0.4000 (0.3900 – 0.4100) 0.7500 (0.7400 – 0.7700)"
            in page.sections["quality"])
    assert "second <2>: error 0.0123" in page.sections["quality"]
    assert "600 0.1250 0.1000 (0.0900 – 0.1100)" in page.sections["quality"]
    assert page.sections["settings"].endswith("data.max_events 200 1000")
    assert page.graphics == 6 + 5
    html = path.read_text(encoding="utf-8")
    assert_self_contained(html)
    assert write_comparison(pair).read_text(encoding="utf-8") == html


def test_runs_on_different_data_are_said_to_be_and_their_counts_left_out(pair, tmp_path):
    page = read(write_comparison([pair[0], make_run(tmp_path / "c", "third", fingerprint="bbbb")]))
    assert "different data (first: aaaa, third: bbbb)" in page.sections["notes"]
    assert "candidates users" not in page.sections["quality"]
    assert "1,234" not in page.sections["quality"]


def test_what_a_run_lacks_is_said_with_the_command_that_makes_it(pair):
    for name in ("analysis.json", "results.json", "metrics.jsonl"):
        (pair[0] / name).unlink()
    page = read(write_comparison(pair))
    assert f"Make it with longer-rec eval {pair[0]}." in page.sections["notes"]
    assert "first has not ended: no results.json" in page.sections["notes"]
    assert "first has no metrics.jsonl" in page.sections["notes"]
    assert page.sections["quality"].count("second <2>: error") == 1
    assert "first: error" not in page.sections["quality"]


def test_runs_that_hold_nothing_but_a_config_make_a_page(pair):
    for run in pair:
        for name in ("analysis.json", "results.json", "metrics.jsonl", "run.json"):
            (run / name).unlink()
    page = read(write_comparison(pair))
    assert "different data" not in page.sections["notes"]
    assert page.graphics == 0


def test_runs_of_one_name_are_told_apart_by_their_directories(pair, tmp_path):
    page = read(write_comparison([pair[0], make_run(tmp_path / "c", "first")]))
    assert f"first ({pair[0]}), first ({tmp_path / 'c'})" in page.sections[""]


def test_a_run_given_twice_and_too_many_runs_are_refused(pair):
    with pytest.raises(ConfigError, match="given more than once"):
        write_comparison([pair[0], pair[1], pair[0] / ".." / pair[0].name])
    with pytest.raises(ConfigError, match="9 runs are more than the 8 lines"):
        write_comparison([pair[0] / str(number) for number in range(9)])


def test_training_time_leaves_evaluations_out(pair):
    """A step takes 1 s and each tenth one is followed by an evaluation of 5 s."""
    files = read_run_files(pair[0])
    assert [at for at, _ in train_seconds(files, "train", "loss")] == list(range(1, 41))
    assert [at for at, _ in train_seconds(files, "validation", "auc")] == [10, 20, 30, 40]


def test_a_report_shows_its_baselines_part_by_part_and_where_candidates_look(tmp_path):
    run = make_run(tmp_path / "a", "first")
    (run / "baselines").mkdir()
    make_run(run / "baselines" / "counts", "counts", auc=0.6, attention=False)
    (run / "results.json").write_text(json.dumps([{"name": "first", "auc": 0.7}, {"name": "counts", "auc": 0.6}]))
    page = read(write_report(run))
    assert "counts: error 0.0123" in page.sections["quality"]
    assert "0.7000 (0.6900 – 0.7200) 0.4000 (0.3900 – 0.4100) 0.6000 (0.5900 – 0.6200)" in page.sections["quality"]
    text = page.sections["attention"]
    assert "5,012 candidates of 256 requests" in text
    assert "By age, layer 1 0 1 d" in text, "the bucket from 1 min on holds no token"
    assert "layer 2, head 1 30.00% 10.00% 60.00%" in text
    assert "layer 2, all keys alike 80.00% 10.00% 10.00%" in text


def test_a_run_without_an_analysis_says_how_to_make_it_and_one_without_attention_has_no_such_section(tmp_path):
    run = make_run(tmp_path / "a", "first", attention=False)
    page = read(write_report(run))
    assert "attention" not in page.sections
    (run / "analysis.json").unlink()
    assert f"or with longer-rec eval {run}" in read(write_report(run)).sections["quality"]


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda found: found.pop("calibration"), "calibration Field required"),
    (lambda found: found["history_length"][0].update(auc="high"), r"history_length\.0\.auc"),
    (lambda found: found["calibration"].update(bins=[]), r"calibration\.bins"),
    (lambda found: found["attention"]["age"]["layers"][1]["uniform"].pop(), r"attention\.position .*the 5 shares")])
def test_a_damaged_analysis_is_named_with_its_place_and_remedy(tmp_path, spoil, words):
    run, found = make_run(tmp_path / "a", "first"), analysis()
    spoil(found)
    (run / "analysis.json").write_text(json.dumps(found))
    with pytest.raises(DataError, match=rf"analysis\.json is damaged: {words}.*longer-rec eval"):
        write_report(run)
    (run / "analysis.json").write_text("{")
    with pytest.raises(DataError, match=r"analysis\.json is damaged.*longer-rec eval"):
        write_comparison([run, make_run(tmp_path / "b", "second")])
