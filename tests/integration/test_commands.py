"""What the commands that read a run print, and what they leave as it was."""

import json
import re
import shutil
from pathlib import Path

from longer_rec.checkpoint.inspect import find_checkpoint
from tests.integration.conftest import CONFIG, TINY
from tests.reference.commands import CommandServer


def test_eval_repeats_the_metrics_of_the_run_exactly(commands: CommandServer, trained: Path) -> None:
    """On the same machine, from the checkpoint alone."""
    outcome = commands.run("eval", trained)
    assert (outcome.code, outcome.err) == (0, "")
    (row,) = json.loads((trained / "results.json").read_text())
    for name in ("auc", "logloss"):
        assert f"{row[name]:.4f}" in outcome.out
    other = commands.run("eval", trained, "--split", "validation")
    assert other.code == 0
    assert other.out != outcome.out


def test_eval_writes_the_analysis_again_bit_for_bit_and_nothing_else(commands: CommandServer, trained: Path) -> None:
    analysis = trained / "analysis.json"
    expected = analysis.read_bytes()
    analysis.unlink()
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    assert commands.run("eval", trained, "--split", "validation").code == 0
    assert not analysis.exists()
    assert commands.run("eval", trained).code == 0
    assert analysis.read_bytes() == expected
    analysis.unlink()
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()} == before


def test_one_report_of_one_run_and_one_page_of_several(commands: CommandServer, trained: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    (other / "analysis.json").write_text('{"calibration": 1}')
    page, first = tmp_path / "page.html", (trained / "report.html").read_text()
    (trained / "report.html").unlink()
    shutil.rmtree(trained / "checkpoints")
    assert commands.run("report", trained).out == f"{trained / 'report.html'}\n"
    assert abs(len((trained / "report.html").read_text()) / len(first) - 1) < 0.05, "made of the files alone"
    damaged = commands.run("report", trained, other)
    assert damaged.code == 2
    assert re.fullmatch(rf"longer-rec: {other}/analysis.json is damaged: .* `longer-rec eval {other}`.*\n", damaged.err)
    (other / "analysis.json").unlink()
    outcome = commands.run("report", trained, other, "--out", page)
    assert (outcome.code, outcome.out, outcome.err) == (0, f"{page}\n", "")
    assert "Make it with longer-rec eval" in page.read_text()
    for arguments, words in (((trained, trained), "more than once"), ((trained, "--out", page), "for several runs"),
                             ((trained, tmp_path / "none"), "holds none of a run's files")):
        refused = commands.run("report", *arguments)
        assert refused.code == 2
        assert words in refused.err
        assert refused.err.count("\n") == 1


def test_inspect_lists_tables_and_the_position(commands: CommandServer, trained: Path) -> None:
    outcome = commands.run("inspect", trained)
    assert (outcome.code, outcome.err) == (0, "")
    step = find_checkpoint(trained).name.removeprefix("step-")
    assert outcome.out.startswith(f"step {step}: ")
    assert re.search(r"(?m)^  item +4,001 x 8  float32, momentum1 4,001$", outcome.out)
    assert re.search(rf"(?m)^  step +{step}$", outcome.out)
    assert "data_fingerprint" in outcome.out
    assert outcome.out == commands.run("inspect", find_checkpoint(trained)).out


def test_diff_tells_equal_from_unequal_checkpoints(commands: CommandServer, trained: Path) -> None:
    older, newer = sorted((trained / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    same = commands.run("diff", newer, trained)
    assert (same.code, same.out, same.err) == (0, "all tensors are bitwise equal\n", "")
    different = commands.run("diff", older, newer)
    assert (different.code, different.err) == (1, "")
    assert re.search(r"(?m)^model/\S*item\.weight: values, \d+ of 32008 values, by \S+ at most\b", different.out)
    assert re.search(r"(?m)^step: \d+ and \d+$", different.out)


def test_replay_runs_the_step_again_at_which_a_run_was_given_up(commands: CommandServer, trained: Path) -> None:
    nothing = commands.run("replay", trained)
    assert nothing.code == 2
    assert re.fullmatch(r"longer-rec: \S+ holds no step that was given up; there is nothing to replay\n", nothing.err)
    checkpoint = min((trained / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    shutil.copytree(checkpoint, trained / "failure" / checkpoint.name)
    outcome = commands.run("replay", trained)
    assert (outcome.code, outcome.err) == (0, "")
    assert re.fullmatch(rf"step {int(checkpoint.name[5:]) + 1}, not finite in it:\n"
                        r"weights are finite, the largest is \S+ in \S+\n"
                        r"worker 0: loss 0\.\d+\n", outcome.out), outcome.out


def test_train_again_changes_no_metric_and_no_checkpoint(commands: CommandServer, trained: Path) -> None:
    checkpoint = {path.name: path.read_bytes() for path in find_checkpoint(trained).iterdir()}
    metrics = (trained / "metrics.jsonl").read_text().splitlines()
    outcome = commands.run("train", trained / "config.yaml", f"run_dir={trained}")
    assert (outcome.code, outcome.err) == (0, "")
    assert "continues from step" in outcome.out
    assert {path.name: path.read_bytes() for path in find_checkpoint(trained).iterdir()} == checkpoint
    splits = [json.loads(line)["split"] for line in metrics]
    again = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["split"] for line in again] == splits, "the test line is written once, however often it is asked for"


def test_prepare_again_leaves_the_data_alone(commands: CommandServer, tmp_path: Path) -> None:
    arguments = ("prepare", "synthetic", "--out", tmp_path / "data", "num_users=10")
    first = commands.run(*arguments)
    assert (first.code, first.err) == (0, "")
    assert first.out.startswith(f"prepared {tmp_path / 'data'}\n  10 users")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert commands.run(*arguments) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_moved_run_and_moved_data_are_still_one_run(commands: CommandServer, trained: Path, synthetic: Path,
                                                      tmp_path: Path) -> None:
    shutil.copytree(synthetic, tmp_path / "moved")
    outcome = commands.run("train", CONFIG, f"run_dir={trained}", f"data.dir={tmp_path / 'moved'}", *TINY)
    assert (outcome.code, outcome.err) == (0, "")


def test_a_profile_accounts_for_the_whole_step(commands: CommandServer, synthetic: Path, tmp_path: Path) -> None:
    outcome = commands.run("bench", "profile", CONFIG, f"data.dir={synthetic}", "data.max_events=200", "--steps", 3,
                           "--nproc", 2, "--out", tmp_path / "profile")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    rows = {row["part"].strip(): row for row in json.loads((tmp_path / "profile/profile.json").read_text())["rows"]}
    inside = [rows[part] for part in ("input", "merge", "interaction", "cross", "self", "head", "rest of the tower")]
    outside = [rows[part] for part in ("waiting for data", "lookup", "tower", "reduction", "table update",
                                       "dense update", "everything else")]
    whole = rows["the whole step"]["ms"]
    assert abs(sum(row["ms"] for row in inside) - rows["tower"]["ms"]) < 1e-6 * whole
    assert abs(sum(row["ms"] for row in outside) - whole) < 1e-6 * whole
    assert all(row["ms"] > 0 for row in [*inside[:-1], *outside[:-1]])
    assert abs(sum(row["gflop"] or 0.0 for row in inside) - rows["tower"]["gflop"]) < 1e-6
    assert rows["lookup"]["num_bytes"] > rows["table update"]["num_bytes"] > 0
    assert f"a step of {whole:.1f} ms; 2 ranks" in outcome.out
    trace = json.loads((tmp_path / "profile/trace.json").read_text())["traceEvents"]
    assert {"time_tower_s", "part of the tower: cross"} <= {event.get("name") for event in trace}
    refused = commands.run("bench", "profile", CONFIG, f"data.dir={synthetic}", "train.epochs=0.01", "--steps", 99)
    assert refused.code == 2
    assert "steps, 107 are wanted" in refused.err
