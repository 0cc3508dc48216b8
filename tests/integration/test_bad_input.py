"""Each fault of a configuration, a log or a file: exit code 2, one line that says what, where and the remedy."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import polars as pl
import pytest
import yaml

from longer_rec.cli import main
from tests.integration.conftest import CONFIG, TINY
from tests.reference.commands import CommandServer, Outcome
from tests.reference.ranks import run_ranks
from tests.unit.data.logs import DESCRIPTION, random_log, write_log

Contents = dict[str, bytes | None]


def contents(directory: Path) -> Contents:
    """Every file below a directory with its bytes, every folder with None; not who used a run directory last."""
    return {str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
            for path in directory.rglob("*") if path.name != "lock"}


def assert_one_line(outcome: Outcome, message: str) -> None:
    assert re.fullmatch(rf"longer-rec: [^\n]*{message}[^\n]*\n", outcome.err), outcome
    assert outcome.code == 2


@pytest.mark.parametrize(("override", "message"), [
    ("data.max_evnts=3", r"synthetic_debug\.yaml: unknown key 'data\.max_evnts'; did you mean 'max_events'\?"),
    ("model.widht=16", r"synthetic_debug\.yaml: unknown key 'model\.widht'; did you mean 'width'\?"),
    ("model={kind: no_sequence, heads: {}}", r"unknown key 'model\.heads'; did you mean 'head'\?"),
    ("model.interaction.feilds=[item]", r"unknown key 'model\.interaction\.feilds'; did you mean 'fields'\?"),
    ("xyz=1", r"unknown key 'xyz'; known keys here: name, run_dir, seed"),
    ("model.width=wide", r"model\.width='wide': input should be a valid integer"),
    ("train.epochs=[1]", r"train\.epochs=\[1\]: input should be a valid number"),
    ("seed=1.5", r"seed=1\.5: input should be a valid integer"),
    ("dense.lr=-1", r"dense\.lr=-1: input should be greater than 0"),
    ("dense.lr=.nan", r"dense\.lr=nan: input should be a finite number"),
    ("sparse.plan={item: rowwise}", r"sparse\.plan\.item='rowwise': input should be 'table_wise', 'row_wise'"),
    ("model={kind: longr}", r"model\.kind='longr' is unknown; use one of 'longer', 'transformer', 'no_seq"),
    ("model={width: 8}", r"'model\.kind' is missing; add it"),
    ("model={kind:longer}", r"'kind:longer' has no value; write \{kind: longer\}, with a space behind the colon"),
    ("model.width", r"override 'model\.width' is not of the form key\.sub=value"),
    ("name.first=x", r"override 'name\.first=x': 'name' is 'synthetic_debug', not a group of keys"),
    ("baselines={a: ['model.widht=1']}", r"baselines\.a: unknown key 'model\.widht'; did you mean 'width'\?"),
    ("baselines={a-b: []}", r"baselines: 'a-b' becomes a directory; use letters"),
    # What only the data tells.
    ("model.num_heads=5", r"model\.num_heads=5 does not divide the merged width 64 .*use one of \[1, 2, 4"),
    ("data.max_events=98", r"num_queries=50 but max_events=98 and merge_size=2 give at most 49 .*max_events to 99 or"),
    ("model={kind: longer, sampling: recent_uniform, num_queries: 7}", r"num_queries=7 is odd"),
    ("model.sampling=newest", r"model\.sampling='newest': input should be 'recent', 'uniform'"),
    ("model.inner_trans={num_heads: 3}", r"inner_trans\.num_heads=3 does not divide model\.width=32; choose a divisor"),
    ("model={kind: longer, merge_size: 3, num_heads: 2, width: 5}", r"model\.num_heads=2 does not divide .*15"),
    ("model.interaction.fields=[catgory]", r"model\.interaction names the item feature 'catgory'; known are item, cat"),
    ("sparse.dims={categry: 8}", r"sparse\.dims names table 'categry'; did you mean 'category'\?"),
    ("sparse.dims={item: 6}", r"sparse\.dims\.item=6: a width is a positive multiple of 4; use 8"),
    ("sparse.plan=no/such/plan.json", r"sparse\.plan='no/such/plan\.json' is neither auto, .*, nor a file; give"),
    ("sparse.plan={item: table_wise}", r"sparse\.plan has no sharding type for table '.*'; name every table"),
    ("sparse.plan=column_wise", r"'.*' cannot be column_wise: rowwise_adagrad .*use adagrad, or"),
    ("baselines={a: ['model.num_heads=5']}", r"a: model\.num_heads=5 does not divide .*use one of"),
])
def test_a_fault_of_the_configuration(commands: CommandServer, synthetic: Path, tmp_path: Path, override: str,
                                      message: str) -> None:
    outcome = commands.run("train", CONFIG, f"run_dir={tmp_path / 'run'}", f"data.dir={synthetic}", override)
    assert_one_line(outcome, message)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(("text", "message"), [
    ("seed: 1\nname: a\nseed: 2\n", r"config\.yaml line 1: key 'seed' is given twice; keep one of them"),
    ("name: a\ndata:\n  dir: x\n  dir: y\n", r"config\.yaml line 3: key 'dir' is given twice"),
    ("name: [a\n", r"config\.yaml is not YAML: .*line 2"),
    ("- a\n- b\n", r"config\.yaml holds a list, a mapping of keys to values is needed"),
    ("", r"config\.yaml holds a NoneType, a mapping"),
    ("? [a]\n: b\n", r"config\.yaml (is not YAML|holds)"),
    ("name: \xff", r"cannot read .*config\.yaml: .*give the path of a YAML file"),
    ("name: a\n", r"config\.yaml: 'run_dir' is missing; add it; 'data' is missing"),
])
def test_a_config_file_that_is_none(commands: CommandServer, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_bytes(text.encode("latin1"))
    assert_one_line(commands.run("train", tmp_path / "config.yaml"), message)
    assert set(contents(tmp_path)) == {"config.yaml"}


@pytest.mark.parametrize(("arguments", "message"), [
    (["train"], r"Missing argument 'config' \(see `longer-rec --help`\)"),
    (["trian", "x.yaml"], r"No such command 'trian'\. Did you mean 'train'\?"),
    (["train", "--quick", "x.yaml"], r"No such option: --quick"),
    (["prepare", "synthetic"], r"Missing option '--out'"),
    (["train", "nowhere.yaml"], r"cannot read nowhere\.yaml: .*give the path of a YAML file"),
    (["prepare", "synthetic", "--out", "/proc/x"], r"cannot write /proc/x: .*choose another --out"),
    (["eval", "nowhere"], r"nowhere is no readable run directory: .*give one that `longer-rec train` wrote"),
    (["inspect", "nowhere"], r"nowhere holds no checkpoint; give a step-N directory or a run directory"),
    (["inspect", str(CONFIG)], r"synthetic_debug\.yaml holds no checkpoint; give a step-N directory"),
    (["diff", "nowhere", "nowhere"], r"nowhere holds no checkpoint; give a step-N directory"),
    (["report", "nowhere"], r"nowhere holds none of a run's files .*give the directory that `longer-rec train` wrote"),
])
def test_a_command_line_that_cannot_be(commands: CommandServer, arguments: list[str], message: str) -> None:
    before = sorted(os.listdir())
    assert_one_line(commands.run(*arguments), message)
    assert sorted(os.listdir()) == before


def nameless(log: pl.DataFrame) -> pl.DataFrame:
    """Without the user of one row."""
    return log.with_columns(who=pl.when(pl.int_range(pl.len()) != 17).then("who"))


@pytest.mark.parametrize(("change", "description", "message"), [
    (nameless, DESCRIPTION, r"log\.parquet, row 17: 'who' is null.*bad_rows: drop"),
    (lambda log: log, {**DESCRIPTION, "colums": {}}, r"log\.yaml: unknown key 'colums'; did you mean 'columns'\?"),
])
def test_a_fault_of_the_log(commands: CommandServer, tmp_path: Path, change: Callable[[pl.DataFrame], pl.DataFrame],
                            description: dict, message: str) -> None:
    """As data.prepare raises them: unit/data/test_bad_input.py has them all."""
    path = write_log(tmp_path, change(random_log()), description)
    assert_one_line(commands.run("prepare", path, "--out", tmp_path / "out"), message)
    assert set(contents(tmp_path)) == {"log.parquet", "log.yaml"}


def test_a_split_that_was_prepared_empty(commands: CommandServer, tmp_path: Path) -> None:
    path = write_log(tmp_path, random_log(), {**DESCRIPTION, "split": {"fractions": [0.9, 0, 0.1]}})
    assert commands.run("prepare", path, "--out", tmp_path / "data").code == 0
    before = contents(tmp_path)
    assert_one_line(commands.run("train", CONFIG, f"run_dir={tmp_path / 'run'}", f"data.dir={tmp_path / 'data'}"),
                    r"the validation split of .*data is empty; prepare the data with a share for it")
    assert contents(tmp_path) == before


def corrupt(path: Path) -> None:
    """Flip one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    """Leave nine tenths."""
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 9 // 10])


@pytest.mark.parametrize("damage", [corrupt, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["events.arrow", "candidates.arrow", "schema.json", "manifest.json"])
def test_a_damaged_prepared_file(commands: CommandServer, synthetic: Path, tmp_path: Path, name: str,
                                 damage: Callable[[Path], None]) -> None:
    shutil.copytree(synthetic, tmp_path / "data")
    damage(tmp_path / "data" / name)
    before = contents(tmp_path)
    outcome = commands.run("train", CONFIG, f"run_dir={tmp_path / 'run'}", f"data.dir={tmp_path / 'data'}")
    assert_one_line(outcome, rf"{re.escape(name)}.*(prepare the data again|correct the path|run `longer-rec prepare)")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("damage", [corrupt, truncate])
def test_a_run_without_a_whole_checkpoint(commands: CommandServer, trained: Path, synthetic: Path,
                                          damage: Callable[[Path], None]) -> None:
    for checkpoint in (trained / "checkpoints").glob("step-*"):
        damage(max(checkpoint.iterdir(), key=lambda path: path.stat().st_size))
    before = contents(trained)
    for arguments in (["eval", trained], ["train", trained / "config.yaml", f"run_dir={trained}"]):
        assert_one_line(commands.run(*arguments), r"none of the 2 checkpoints in .* is whole: .*start again")
    newest = max((trained / "checkpoints").glob("step-*"))
    for arguments in (["inspect", newest], ["diff", newest, newest]):
        assert_one_line(commands.run(*arguments), r"step-\d+/.*(is damaged|bytes, \d+ were written)")
    assert contents(trained) == before


def test_a_damaged_checkpoint_is_passed_over_in_one_line(commands: CommandServer, trained: Path) -> None:
    steps = sorted(int(path.name.removeprefix("step-")) for path in (trained / "checkpoints").glob("step-*"))
    truncate(trained / "checkpoints" / f"step-{steps[1]}" / "manifest.json")
    outcome = commands.run("eval", trained)
    assert outcome.code == 0
    line = rf"[^\n]*step-{steps[1]} is passed over for step-{steps[0]}: [^\n]*manifest[^\n]*\n"
    assert re.fullmatch(line, outcome.err)


def test_a_run_without_any_checkpoint_is_not_evaluated(commands: CommandServer, trained: Path) -> None:
    shutil.rmtree(trained / "checkpoints")
    before = contents(trained)
    assert_one_line(commands.run("eval", trained), r"run holds no checkpoint yet; run `longer-rec train` on")
    assert contents(trained) == before


@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
def test_a_run_with_a_truncated_file(commands: CommandServer, trained: Path, name: str) -> None:
    config = trained.with_name("config.yaml")
    shutil.copy(trained / "config.yaml", config)
    truncate(trained / name)
    before = contents(trained)
    assert_one_line(commands.run("train", config, f"run_dir={trained}"), re.escape(name))
    assert contents(trained) == before


def test_a_run_that_another_version_has_written(commands: CommandServer, trained: Path) -> None:
    run = json.loads((trained / "run.json").read_text())
    del run["config_sha256"]
    (trained / "run.json").write_text(json.dumps(run))
    before = contents(trained)
    for arguments in (("train", trained / "config.yaml", f"run_dir={trained}"), ("eval", trained)):
        assert_one_line(commands.run(*arguments), r"run\.json is not what this version .*; use the version that")
        assert contents(trained) == before


def test_a_log_with_a_damaged_line_is_refused_and_one_torn_at_its_end_is_not(commands: CommandServer,
                                                                            trained: Path) -> None:
    config, log = trained.with_name("config.yaml"), trained / "metrics.jsonl"
    shutil.copy(trained / "config.yaml", config)
    first, *others = log.read_text().splitlines(keepends=True)
    for damaged in (first[:-9].encode() + b"\n", b"\xff" + first.encode()):
        log.write_bytes(damaged + "".join(others).encode())
        before = contents(trained)
        assert_one_line(commands.run("train", config, f"run_dir={trained}"), r"metrics\.jsonl line 1 is damaged")
        assert contents(trained) == before
    # A process was killed while it wrote its last line.
    log.write_text("".join([first, *others, first[:-9]]))
    assert commands.run("train", config, f"run_dir={trained}").code == 0
    assert log.read_text().splitlines()[:-1] == "".join([first, *others]).splitlines()[:-1]


@pytest.mark.parametrize(("override", "message"), [
    ("model.width=16", r"run holds a run of another configuration \(differs in model\.width\); choose another run_dir"),
    ("elastic.num_workers=2", r"differs in elastic\.num_workers"),
    ("data.dir={other}", r"run was trained on data \w+, .*other holds \w+; choose another run_dir"),
])
def test_the_directory_of_another_run(commands: CommandServer, trained: Path, tmp_path: Path, override: str,
                                      message: str) -> None:
    other = tmp_path / "other"
    if "other" in override:
        outcome = commands.run("prepare", "synthetic", "--out", other, "seed=1", "num_users=20")
        assert outcome.code == 0, outcome
    before = contents(tmp_path)
    assert_one_line(commands.run("train", trained / "config.yaml", f"run_dir={trained}",
                                 override.format(other=other)), message)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("run_dir", "message"), [
    ("letters", r"letters exists, is not empty and is no run directory: .*; restore that, or choose another"),
    ("letters/a.txt", r"a\.txt exists, is not empty and is no run directory: .*; restore that, or choose another"),
    ("letters/a.txt/run", r"cannot write run_dir=.*a\.txt/run: Not a directory; check space and permissions"),
])
def test_a_run_dir_that_cannot_be(commands: CommandServer, synthetic: Path, tmp_path: Path, run_dir: str,
                                  message: str) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("Dear Sir")
    assert_one_line(commands.run("train", CONFIG, f"run_dir={tmp_path / run_dir}", f"data.dir={synthetic}"), message)
    assert contents(tmp_path) == {"letters": None, "letters/a.txt": b"Dear Sir"}


def test_missing_data_and_unknown_split(commands: CommandServer, trained: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    assert_one_line(commands.run("train", CONFIG, f"run_dir={tmp_path / 'new'}", "data.dir=nowhere"),
                    r"nowhere is no prepared dataset: .*run `longer-rec prepare \.\.\. --out` for it")
    assert_one_line(commands.run("eval", trained, "--split", "tset"), r"split 'tset' is unknown; known are train, val")
    assert contents(tmp_path) == before


def test_a_fault_inside_a_background_process(commands: CommandServer, synthetic: Path, tmp_path: Path) -> None:
    """The hashes hold, so only the check of a batch, far from the trainer, can see it."""
    data = tmp_path / "data"
    shutil.copytree(synthetic, data)
    manifest = json.loads((data / "manifest.json").read_text())
    schema = json.loads((data / "schema.json").read_text())
    schema["tables"][0]["num_rows"] = 8
    (data / "schema.json").write_text(json.dumps(schema))
    manifest["files"]["schema.json"] = _sha256((data / "schema.json").read_bytes())
    del manifest["manifest_sha256"]
    manifest["manifest_sha256"] = _sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())
    (data / "manifest.json").write_text(json.dumps(manifest))
    outcome = commands.run("train", CONFIG, f"run_dir={tmp_path / 'run'}", f"data.dir={data}", *TINY)
    assert_one_line(outcome, r"feature 'item': id \d+ is outside \[0, 8\) of table 'item'; encode it first")
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _command_on_rank(rank: int, world_size: int, arguments: list[str]) -> tuple[object, str]:
    sys.argv = ["longer-rec", *arguments]
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            return end.code, err.getvalue()
    return None, err.getvalue()


@pytest.mark.parametrize(("overrides", "message"), [
    (["sparse.plan=row_wise"], r"table '\w+' of \d rows cannot be split row_wise over 4 ranks: .*use table_wise"),
    (["sparse.plan=column_wise", "sparse.optimizer=adagrad"],
     r"of width 8 cannot be split column_wise over 4 ranks: .*use table_wise or row_wise"),
    (["elastic.num_workers=2"], r"elastic\.num_workers=2 is less than the 4 processes; start at most 2"),
    (["data.dir=nowhere"], r"nowhere is no prepared dataset"),
])
def test_every_rank_ends_with_the_same_line(synthetic: Path, tmp_path: Path, overrides: list[str],
                                            message: str) -> None:
    arguments = ["train", str(CONFIG), f"run_dir={tmp_path / 'run'}", f"data.dir={synthetic}", *overrides]
    outcomes = run_ranks(_command_on_rank, 4, arguments)
    for rank, (code, err) in enumerate(outcomes):
        assert code == 2
        assert re.fullmatch(rf"longer-rec: {f'rank {rank}: ' if rank else ''}[^\n]*{message}[^\n]*\n", err)
    assert contents(tmp_path) == {}


def shell(*arguments: object, cwd: Path) -> Outcome:
    """The command in a process of its own, as a user starts it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
        [str(CONFIG.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run([sys.executable, "-m", "longer_rec", *map(str, arguments)], env=environment, cwd=cwd,
                          capture_output=True, text=True, timeout=120, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_nothing_but_the_line_reaches_a_users_terminal(synthetic: Path, tmp_path: Path) -> None:
    path = write_log(tmp_path, nameless(random_log()))
    before = contents(tmp_path)
    train = ("train", CONFIG, "run_dir=run", f"data.dir={synthetic}")
    cases: Iterable[tuple[Iterable[object], str]] = (
        (("prepare", path, "--out", "out"), r"row 17: 'who' is null"),
        ((*train, "model.num_heads=5"), r"model\.num_heads=5 does not divide"),
    )
    for arguments, message in cases:
        assert_one_line(shell(*arguments, cwd=tmp_path), message)
    assert contents(tmp_path) == before


def test_every_fault_of_a_shared_config_is_told_at_once(commands: CommandServer, tmp_path: Path) -> None:
    text = yaml.safe_load(CONFIG.read_text()) | {"sede": 1, "seed": "x"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(text))
    assert_one_line(commands.run("train", tmp_path / "config.yaml"), r"unknown key 'sede'; did you mean 'seed'\?")
    assert_one_line(commands.run("train", tmp_path / "config.yaml"), r"seed='x': input should be a valid integer")
