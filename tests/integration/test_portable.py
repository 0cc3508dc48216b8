"""Level D2: a run that moves between unlike processors is bitwise the one that stayed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from longer_rec.checkpoint.inspect import diff_checkpoints, find_checkpoint
from longer_rec.config import load_config
from longer_rec.data.prepare import prepare
from longer_rec.errors import ConfigError
from longer_rec.job import Job
from longer_rec.runtime.kernels import PORTABLE_KERNELS
from longer_rec.train.digests import digest_lines
from tests.integration.conftest import CONFIG
from tests.reference.commands import CommandServer

QEMU = shutil.which("qemu-x86_64")
# Four steps.
TINY = ("elastic.num_workers=2", "elastic.digest_every=1", "data.loader_processes=0", "data.max_events=100",
        "data.batch_requests=10", "train.epochs=1", "train.checkpoint_every=2", "schedule.warmup_steps=2")


def train(run_dir: Path, data: Path, *overrides: str, emulator: tuple[str, ...] = ()) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in PORTABLE_KERNELS}
    subprocess.run([*emulator, sys.executable, "-m", "longer_rec", "train", str(CONFIG), f"run_dir={run_dir}",
                    f"data.dir={data}", *TINY, *overrides], env=environment | {"OMP_NUM_THREADS": "1"}, check=True,
                   timeout=240)


@pytest.mark.skipif(QEMU is None, reason="no qemu-x86_64 to emulate another processor (Debian: qemu-user)")
def test_a_run_that_moves_to_an_emulated_haswell_is_bitwise_the_one_that_stayed(tmp_path: Path) -> None:
    few = prepare("synthetic", tmp_path / "data", overrides=["num_users=10"])
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    train(whole, few, "elastic.level=D2")
    shutil.copytree(whole, moved)
    first, *later = sorted((moved / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    for path in later:
        shutil.rmtree(path)
    train(moved, few, "elastic.level=D2", emulator=(str(QEMU), "-cpu", "Haswell"))
    assert find_checkpoint(moved).name != first.name
    (line,) = digest_lines(whole, moved)
    assert line.startswith("digests: equal at all"), line
    assert diff_checkpoints(find_checkpoint(whole), find_checkpoint(moved)).tensors == []


def test_level_d2_is_refused_where_torch_has_chosen_its_kernels_already(commands: CommandServer, synthetic: Path,
                                                                       tmp_path: Path) -> None:
    outcome = commands.run("train", CONFIG, f"run_dir={tmp_path / 'run'}", f"data.dir={synthetic}", *TINY,
                           "elastic.level=D2")
    assert outcome.code == 2
    assert re.fullmatch("longer-rec: elastic.level=D2 needs other kernels .*; start with `ATEN_CPU_CAPABILITY=avx2 "
                        "MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=AVX2 FBGEMM_ENABLE_INSTRUCTIONS=AVX2 …`\n", outcome.err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("overrides", "message"), [
    (["elastic.level=D2"], "level=D2 is a promise that strict=false takes back, or a missing num_workers"),
    (["elastic={level: D2, num_workers: 2, strict: false}"], "level=D2 is a promise that strict=false takes back"),
    (["elastic={level: D2, num_workers: 2}", "train.precision=bf16"], "bf16 with elastic.level=D2: .*use fp32"),
    (["elastic.level=D3"], "elastic.level"),
])
def test_what_level_d2_does_not_go_with_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Job, CONFIG, overrides)
