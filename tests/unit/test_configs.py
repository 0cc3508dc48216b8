"""Every shipped configuration loads, and says at its head what it is for."""

import re
from pathlib import Path

import pytest

from longer_rec.config import load_config
from longer_rec.job import Job, baseline_jobs

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
HEADER = ("Purpose", "Hardware", "Command", "Time", "Expected")

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def test_there_are_configs() -> None:
    assert {"first", "synthetic_debug"} <= {path.stem for path in CONFIGS}


@each_config
def test_a_config_loads_with_its_baselines(path: Path) -> None:
    job = load_config(Job, path)
    assert baseline_jobs(job).keys() == job.baselines.keys()


@each_config
def test_a_config_lies_where_it_is_started(path: Path) -> None:
    job = load_config(Job, path)
    for place in (job.run_dir, job.data.dir):
        assert not place.is_absolute()
        assert ".." not in place.parts


@each_config
def test_the_header_says_purpose_hardware_command_time_and_what_to_expect(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    header = "\n".join(line for line in lines[:next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    named = {match[1]: match[2] for match in re.finditer(r"(?m)^# (\w+) +(\S.*)$", header)}
    for name in HEADER:
        assert named.get(name, "").strip(), f"{path.name}: the line '# {name} …' is missing or says nothing"
    assert [name for name in named if name in HEADER] == list(HEADER)
