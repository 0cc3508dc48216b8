"""A small prepared data set, and runs on it."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longer_rec.config import load_config
from longer_rec.data.prepare import prepare
from longer_rec.job import Job
from longer_rec.train.run import train
from tests.reference.commands import CommandServer, command_server
from tests.reference.ranks import run_ranks

# Two checkpoints of a few steps each.
TINY = ("train.epochs=0.05", "train.checkpoint_every=2", "train.log_every=2", "data.max_events=20",
        "model.num_queries=10", "elastic.num_workers=1")
CONFIG = Path(__file__).parents[2] / "configs" / "synthetic_debug.yaml"
TIMES = ("elapsed_s", "requests_per_s", "candidates_per_s", "events_per_s", "train_s", "mfu", "mfu_tower",
         "tower_gflops")


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare("synthetic", tmp_path_factory.mktemp("data") / "synthetic")


@pytest.fixture(scope="session")
def commands() -> Iterator[CommandServer]:
    with command_server() as server:
        yield server


@pytest.fixture(scope="session")
def trained_once(commands: CommandServer, synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    outcome = commands.run("train", CONFIG, f"run_dir={run_dir}", f"data.dir={synthetic}", *TINY)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert len(list((run_dir / "checkpoints").glob("step-*"))) == 2
    return run_dir


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> Path:
    """A run directory with two checkpoints, for the test to spoil."""
    return Path(shutil.copytree(trained_once, tmp_path / "run"))


def train_on_rank(rank: int, world_size: int, run_dir: Path, data: Path, overrides: tuple[str, ...]) -> Any:
    job = load_config(Job, CONFIG, [f"run_dir={run_dir}", f"data.dir={data}", *overrides])
    return train(job)


@pytest.fixture
def run(synthetic: Path, tmp_path: Path) -> Callable[..., Path]:
    """``run(name, *overrides, ranks=2)`` trains and returns the run directory."""
    def start(name: str, *overrides: str, ranks: int = 2) -> Path:
        run_ranks(train_on_rank, ranks, tmp_path / name, synthetic, overrides, timeout_s=120)
        return tmp_path / name

    return start


def metric_lines(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their times, which no two runs share."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES and not key.startswith("time_")}
            for line in lines]
