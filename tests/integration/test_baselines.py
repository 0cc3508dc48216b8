"""Every tower through the real commands."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.conftest import CONFIG, TINY, metric_lines
from tests.reference.commands import CommandServer

MODELS = ["kind: transformer", "kind: sum_pooling, interaction: {fields: [item], hidden: [4]}", "kind: din",
          "kind: sim_hard", "kind: twin", "kind: hstu", "kind: sasrec"]


@pytest.mark.parametrize("model", MODELS)
def test_a_baseline_is_trained_and_evaluated_by_the_commands(commands: CommandServer, synthetic: Path, tmp_path: Path,
                                                             model: str) -> None:
    outcome = commands.run("train", CONFIG, f"run_dir={tmp_path}", f"data.dir={synthetic}", *TINY, f"model={{{model}}}")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert 0.0 < row["logloss"] < 1.0


def test_a_baseline_on_one_and_on_two_processes_matches_bitwise(run: Callable[..., Path]) -> None:
    overrides = (*TINY, "elastic.num_workers=2", "model={kind: hstu, width: 8, interaction: {}}")
    assert metric_lines(run("one", *overrides, ranks=1)) == metric_lines(run("two", *overrides, ranks=2))


def test_a_tower_whose_sizes_are_not_counted_is_not_planned(commands: CommandServer, synthetic: Path, tmp_path: Path
                                                            ) -> None:
    outcome = commands.run("plan", CONFIG, f"data.dir={synthetic}", "model={kind: din}", "--topology",
                           "2x1GB:device=cpu", "--out", tmp_path / "plan")
    assert outcome.code == 2
    assert re.fullmatch(r"longer-rec: model\.kind=din cannot be planned: [^\n]* longer and transformer alone; [^\n]*\n",
                        outcome.err), outcome
    assert not (tmp_path / "plan" / "plan.json").exists()
