"""What a terminal or a log file shows of a run."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from longer_rec.report.numbers import (
    best_value,
    format_bytes,
    format_clock,
    format_count,
    format_duration,
    format_metric,
    format_ranks,
)
from longer_rec.report.terminal import TrainProgress, doctor_table, make_table, plan_table, results_table

NAN = float("nan")


def console(width=140, terminal=False):
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, highlight=False,
                   color_system="standard" if terminal else None)


def printed(screen):
    return screen.file.getvalue()


def squeezed(screen):
    return [" ".join(line.split()) for line in printed(screen).splitlines() if line.strip()]


PLAN = [
    {"table": "item", "rows": 62_105, "dim": 32, "sharding_type": "row_wise", "kernel": "fused", "ranks": (0, 1, 2, 3),
     "weight_bytes": 62_105 * 128, "optimizer_bytes": 62_105 * 4},
    {"table": "user[b]", "rows": 100, "dim": 8, "sharding_type": "table_wise", "kernel": "fused", "ranks": (1,),
     "weight_bytes": 3200, "optimizer_bytes": 400}]


def test_plan_table_shows_every_table_and_the_sum():
    screen = console()
    plan_table(PLAN, screen)
    lines = squeezed(screen)
    assert "item 62,105 32 row_wise fused 0–3 7.58 MiB 243 KiB" in lines
    assert "user[b] 100 8 table_wise fused 1 3.12 KiB 400 B" in lines
    assert "2 tables 62,205 7.58 MiB 243 KiB" in lines


def test_a_narrow_table_folds_text_and_headers_between_words_and_never_a_number():
    screen = console(width=60)
    table = make_table(None, ["proposer", "partitioner", "of which", "fullest rank", "planned in"],
                       ["fullest rank", "planned in"], space=1)
    table.add_row("greedy", "perf", "words that fold where there is little room", "1,234.56 GiB", "0.01 s")
    table.pad_edge, table.collapse_padding = False, True
    screen.print(table)
    lines = [line.rstrip() for line in printed(screen).splitlines()]
    assert max(map(len, lines)) <= 60
    text = "\n".join(lines)
    for whole in ("proposer", "partitioner", "of which", "fullest", "planned", "greedy", "1,234.56 GiB", "0.01 s"):
        assert whole in text, text
    assert "fullest rank" not in text


def test_a_table_of_many_spreads_folds_them_at_their_spaces():
    screen = console(width=80)
    titles = ["AUC", "LogLoss", "GAUC", "NE", "requests/s", "training s"]
    table = make_table("study", ["model", "num_queries", *titles], titles)
    table.add_row("longer", "100", *["0.8123 ± 0.0012"] * 4, "12,345", "1,234")
    screen.print(table)
    lines = [line.split() for line in printed(screen).splitlines()]
    assert lines[-2:] == [["longer", "100", *["0.8123", "±"] * 4, "12,345", "1,234"], ["0.0012"] * 4]


def test_a_table_that_fits_is_not_folded():
    screen = console(width=60)
    table = make_table(None, ["proposer", "fullest rank"], ["fullest rank"])
    table.add_row("greedy", "1 GiB")
    screen.print(table)
    assert squeezed(screen) == ["proposer fullest rank", "greedy 1 GiB"]


RESULTS = [
    {"name": "longer", "auc": 0.75, "logloss": 0.4, "calibration": 0.97, "gauc": NAN, "train_s": 200.0},
    {"name": "count", "auc": 0.7, "logloss": 0.43, "calibration": 1.02, "gauc": NAN}]


def test_results_table_shows_only_metrics_that_some_model_has():
    screen = console()
    results_table(RESULTS, screen)
    assert squeezed(screen) == ["Results", "model AUC LogLoss Calibration training",
                                "longer 0.7500 0.4000 0.970 3 min 20 s", "count 0.7000 0.4300 1.020"]


def test_the_best_of_each_column_is_bold_in_a_terminal():
    screen = console(terminal=True)
    results_table(RESULTS, screen)
    bold = re.findall(r"\x1b\[1m([\d.]+)", printed(screen))
    assert bold == ["0.7500", "0.4000", "1.020"]


@pytest.mark.parametrize(("metric", "values", "best"), [
    ("auc", [0.7, 0.8, NAN], 0.8), ("logloss", [0.4, 0.5, None], 0.4), ("calibration", [0.9, 1.05, 1.2], 1.05),
    ("ne", [NAN], None), ("ne", [], None)])
def test_best_knows_each_metrics_direction(metric, values, best):
    assert best_value(metric, [{metric: value} for value in values]) == best


def test_results_without_metrics_still_name_the_model():
    screen = console()
    results_table([{"name": "empty", "auc": NAN}], screen)
    assert "empty" in printed(screen)


def test_a_remedy_of_the_doctor_stays_on_one_line_to_be_copied():
    remedy = "pip install " + " ".join(f"package-{number}==1.0.{number}" for number in range(30))
    screen = console(width=60)
    doctor_table([SimpleNamespace(name="versions", status="fail", detail="torch 2.13 with FBGEMM 1.6", remedy=remedy),
                  SimpleNamespace(name="row_wise", status="ok", detail="trained 3 steps [2 ranks]", remedy="")], screen)
    assert f"versions: {remedy}" in printed(screen).splitlines()
    assert "row_wise ok trained 3 steps [2 ranks]" in squeezed(screen)


def train_line(loss):
    return {"loss": loss, "requests_per_s": 1234.4, "elapsed_s": 1.0}


def test_a_log_gets_a_line_in_ten_seconds_and_always_the_last_step_and_evaluations():
    screen, now = console(), [0.0]
    with TrainProgress("LONGER", 1000, start=100, console=screen, clock=lambda: now[0]) as progress:
        for step in range(120, 1001, 20):
            now[0] += 1.0
            progress.update(step, train_line(0.5))
            if step == 500:
                progress.update(step, {"validation_auc": 0.7412, "validation_logloss": 0.41, "validation_gauc": NAN})
    lines = squeezed(screen)
    assert lines == [
        "LONGER: step 300 of 1,000 loss 0.5000 1,234 requests/s 0:35 left",
        "LONGER: step 500 of 1,000 loss 0.5000 1,234 requests/s 0:25 left",
        "LONGER: step 500: validation AUC 0.7412 LogLoss 0.4100 GAUC –",
        "LONGER: step 700 of 1,000 loss 0.5000 AUC 0.7412 1,234 requests/s 0:15 left",
        "LONGER: step 900 of 1,000 loss 0.5000 AUC 0.7412 1,234 requests/s 0:05 left",
        "LONGER: step 1,000 of 1,000 loss 0.5000 AUC 0.7412 1,234 requests/s 0:00 left"]


def test_a_terminal_gets_a_bar_and_evaluations_stay_above_it():
    screen = console(terminal=True, width=100)
    with TrainProgress("LONGER", 50, console=screen) as progress:
        progress.update(25, train_line(0.5))
        progress.update(25, {"validation_auc": 0.7, "validation_logloss": 0.4, "validation_gauc": 0.6})
        progress.update(50, train_line(0.4))
    text = re.sub(r"\x1b\[[\d;?]*\w", "", printed(screen))
    assert "━" in text
    assert "50/50 loss 0.4000  AUC 0.7000  1,234 requests/s" in text
    assert text.count("LONGER: step 25: validation AUC 0.7000") == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_other_ranks_stay_silent(terminal):
    screen = console(terminal=terminal)
    with TrainProgress("LONGER", 10, enabled=False, console=screen) as progress:
        progress.update(10, train_line(0.5))
        progress.update(10, {"validation_auc": 0.7})
    assert printed(screen) == ""


def test_a_run_with_nothing_left_to_do_divides_by_nothing():
    screen = console()
    with TrainProgress("LONGER", 100, start=100, console=screen) as progress:
        progress.update(100, train_line(NAN))
    assert squeezed(screen) == ["LONGER: step 100 of 100 loss – 1,234 requests/s 0:00 left"]


@pytest.mark.parametrize(("text", "expected"), [
    (format_bytes(0), "0 B"), (format_bytes(999), "999 B"), (format_bytes(1023), "0.999 KiB"),
    (format_bytes(1536), "1.5 KiB"), (format_bytes(25 * 2**30), "25 GiB"), (format_bytes(3 * 2.0**50), "3 PiB"),
    (format_count(1234567), "1,234,567"), (format_count(0.12345), "0.123"), (format_count(1234.5), "1,234"),
    (format_duration(8.44), "8.4 s"), (format_duration(59.97), "1 min 0 s"), (format_duration(7500), "2 h 5 min"),
    (format_ranks([3, 1, 2, 1]), "1–3"), (format_ranks([0, 2, 3]), "0, 2, 3"), (format_ranks([1, 0]), "0, 1"),
    (format_clock(7), "0:07"), (format_clock(200), "3:20"), (format_clock(7500), "2:05:00"),
    (format_metric("auc", 0.74125), "0.7412"), (format_metric("calibration", 1.0), "1.000"),
    (format_metric("auc", NAN), "–"), (format_metric("auc", None), "–"),
    (format_metric("logloss", float("inf")), "inf")])
def test_numbers_read_as_people_write_them(text, expected):
    assert text == expected
