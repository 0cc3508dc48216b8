"""Every example runs as its first lines say, says something, and leaves nothing behind."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run_example(path: Path, *arguments: object, cwd: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(cwd)}
    done = subprocess.run([sys.executable, str(path), *map(str, arguments)], cwd=cwd, env=environment, text=True,
                          capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_every_example_is_known_and_short() -> None:
    assert [path.stem for path in EXAMPLES] == ["01_first_run", "02_your_own_log", "04_instance_tokens",
                                                   "05_serve"]
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) < 100, path


def test_the_first_run_learns_and_ranks_in_the_directory_it_is_given(tmp_path: Path) -> None:
    printed = run_example(EXAMPLES[0], tmp_path / "made", cwd=tmp_path)
    assert figure(printed, r"test AUC ([\d.]+)") >= 0.95
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"data", "run"}
    assert (tmp_path / "made" / "run" / "report.html").exists()
    head, *ranked = printed.splitlines()[-9:]
    assert "and 8 candidates, best first:" in head
    assert [line.split()[-1] for line in ranked] == ["1"] * 4 + ["0"] * 4, "the planted positives come first"


def test_a_log_of_ones_own_is_learned_and_nothing_is_left_behind(tmp_path: Path) -> None:
    printed = run_example(EXAMPLES[1], cwd=tmp_path)
    assert figure(printed, r"(?m)^shop +test AUC ([\d.]+)") >= 0.8
    assert figure(printed, r"(?m)^no_sequence +test AUC ([\d.]+)") <= 0.7
    assert not list(tmp_path.iterdir())


def test_tokens_tell_what_the_history_leaves_out(tmp_path: Path) -> None:
    printed = run_example(EXAMPLES[2], cwd=tmp_path)
    assert figure(printed, r"(?m)^base: test AUC ([\d.]+)") <= 0.65
    assert figure(printed, r"(?m)^tokens: test AUC ([\d.]+)") >= 0.8
    assert not list(tmp_path.iterdir())


def test_what_was_trained_is_served_and_a_stored_history_scores_alike(tmp_path: Path) -> None:
    printed = run_example(EXAMPLES[3], cwd=tmp_path)
    assert figure(printed, r"of AUC ([\d.]+)") >= 0.6
    answers = re.findall(r"(?m)^(with its history|a second time|with the stored history) \(\w+\): (.*)$", printed)
    assert len(answers) == 3
    assert len({answer for _, answer in answers}) == 1
    assert "the server answers 404: the user has no stored history" in printed
    assert not list(tmp_path.iterdir())


def figure(printed: str, pattern: str) -> float:
    found = re.search(pattern, printed)
    assert found, printed
    return float(found[1])
