"""A study's table and page from given figures: the same text, the best of each data set in bold, nothing hidden."""

import csv
import io

import pytest

from longer_rec.report.study_page import csv_table, markdown_table, print_table, text_table, write_study
from longer_rec.study.scaling import fit_scaling
from longer_rec.study.table import mean_and_error
from tests.unit.test_report_html import Page, assert_self_contained

COST = {"user_mflops": 12.5, "candidate_mflops": 0.25, "gflops": 0.0225, "dense_parameters": 12_345,
        "sparse_parameters": 3_000_000}


def row(data, model, length, auc, **changes):
    none = auc is None
    return {"data": data, "model": model, "point": {"length": str(length)}, "seeds": 0 if none else 3,
            "missing": 3 if none else 0, "choice": "slow", "max_events": length, **COST,
            "auc": None if none else (auc, 0.001), "logloss": None if none else (0.4, None), "gauc": (0.6, 0.01),
            "ne": (0.8, 0.01), "delta_auc": (-0.0123, 0.002), "requests_per_s": (321.4, 5.0), "train_s": (60.4, 0.2),
            "requests": (19_284.0, 0.0), **changes}


def content(rows, **changes):
    return {"name": "example", "reference": "base", "axes": ["length"], "has_data": True, "budget_s": 60.0,
            "searched": True, "rows": rows, "fits": [], "failed": {"LONGER (d2, length 9) seed 1": "exit code 1: no"},
            "environment": {"hardware": ["2 cores"], "commit": ["abc", "def"], "date": ["2026-11-22"]},
            "command": "longer-rec study example.yaml", "spent_s": 4000.0, **changes}


ROWS = [row("d1", "base", 50, 0.7, delta_auc=None), row("d1", "LONGER", 50, 0.71),
        row("d2", "base", 50, 0.6, delta_auc=None), row("d2", "LONGER", 50, None)]


def fits():
    points = [(length, 0.8 - 0.5 * length**-0.3, 0.001) for length in (50, 100, 200, 500, 1000)]
    fit = fit_scaling([point[0] for point in points], [point[1] for point in points])
    common = {"x": "max_events", "metric": "auc", "data": "d1"}
    return [{**common, "model": "LONGER", "points": points, "fit": vars(fit) | {"at_bound": False}, "why": ""},
            {**common, "model": "base", "points": points[:3], "fit": None, "why": "4 different values are needed"}]


def test_the_markdown_table_is_kept(golden):
    golden("study/table.md", markdown_table(content(ROWS, fits=fits())))


def test_the_best_is_marked_within_a_data_set_and_not_without_a_rival():
    titles, rows = text_table(content(ROWS))
    best = [cells[titles.index("AUC")][1] for cells in rows]
    assert best == [False, True, False, False]
    assert [cells[titles.index("AUC")][0] for cells in rows] == [
        "0.7000 ± 0.0010", "0.7100 ± 0.0010", "0.6000 ± 0.0010", "–"]
    assert rows[3][titles.index("seeds")][0] == "0 (3 missing)"


@pytest.mark.parametrize("axes", [1, 5])
def test_a_narrow_terminal_loses_no_figure(axes, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    names = ["length", "width_of_rows", "num_queries", "merge_size", "learning_rate"][:axes]
    rows = [row("d1", "LONGER", 50, 0.7 + number / 100, point={name: f"value{number}{name[:3]}" for name in names})
            for number in range(3)]
    wide = content(rows, axes=names)
    print_table(wide)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    titles, table = text_table(wide)
    for cells in table:
        for title, (text, _) in zip(titles, cells, strict=True):
            if title in ("AUC", "LogLoss", "GAUC", "NE", "requests/s", "training s", *names):
                assert all(word in printed for word in text.split()), (title, text)


def test_csv_holds_every_figure_in_full():
    rows = list(csv.DictReader(io.StringIO(csv_table(content([row("d", "m", 7, 1 / 3)])))))
    assert float(rows[0]["auc"]) == 1 / 3
    assert (rows[0]["auc_error"], rows[0]["length"], rows[0]["sparse_parameters"]) == ("0.001", "7", "3000000")
    assert rows[0]["logloss_error"] == ""


def test_mean_and_standard_error():
    assert mean_and_error([]) is None
    assert mean_and_error([0.5]) == (0.5, None)
    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / 3**0.5))


def test_the_page_is_whole_and_its_own(tmp_path):
    write_study(tmp_path, content(ROWS, fits=fits()))
    html = (tmp_path / "index.html").read_text()
    page = Page(html)
    assert_self_contained(html)
    assert page.graphics == 5
    assert "LONGER (d2, length 9) seed 1 is missing: exit code 1: no" in page.sections["results"]
    assert "no curve, 4 different values are needed" in page.sections["scaling"]
    assert "0.8 - 0.5 · x^-0.300, R² 1.000" in page.sections["scaling"]
    assert "1 h 6 min" in page.sections["environment"]


def test_a_study_without_results_still_has_a_page(tmp_path):
    none = row("d", "m", 7, None, **dict.fromkeys(COST), gauc=None, ne=None, delta_auc=None, requests_per_s=None,
               train_s=None, requests=None)
    write_study(tmp_path, content([none]))
    assert "0 (3 missing)" in (tmp_path / "table.md").read_text()
