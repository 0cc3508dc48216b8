"""Level D2: unlike processors compute the same bits, or the run is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longer_rec.config import load_config
from longer_rec.errors import ConfigError
from longer_rec.job import Job
from longer_rec.runtime.kernels import PORTABLE_KERNELS
from longer_rec.runtime.machine import numerics
from tests.integration.conftest import CONFIG
from tests.reference.commands import CommandServer

FULL = os.environ.get("LONGER_REC_FAULTS") == "full"
QEMU = shutil.which("qemu-x86_64")
# QEMU 7.2 gets numpy's AVX2 argsort wrong (np.unique then repeats ids), which a Haswell does not: numpy does without.
EMULATED = {"NPY_DISABLE_CPU_FEATURES": "X86_V3"}
STEPS = """if True:
    import json, sys
    from pathlib import Path
    from longer_rec.config import load_config
    from longer_rec.job import Job
    from longer_rec.train.digests import state_digests
    from longer_rec.train.run import unsaved_run

    with unsaved_run(load_config(Job, Path(sys.argv[1]), sys.argv[2:])) as trainer:
        for batches in trainer.loader(3):
            trainer.train_step(batches)
            trainer.step += 1
            print(json.dumps(state_digests(trainer.parallel.state_dict())))
    """


def steps(data: Path, level: str, emulator: tuple[str, ...] = ()) -> list[dict[str, str]]:
    """The digest of every tensor after each step of two workers, with dropout."""
    kernels = PORTABLE_KERNELS if level == "D2" else {}
    environment = {name: value for name, value in os.environ.items() if name not in PORTABLE_KERNELS} | kernels
    environment |= EMULATED if emulator else {}
    done = subprocess.run(
        [*emulator, sys.executable, "-c", STEPS, str(CONFIG), "run_dir=unused", f"data.dir={data}",
         "elastic.num_workers=2", f"elastic.level={level}", "data.loader_processes=0", "data.max_events=100",
         "data.batch_requests=4", "model.dropout=0.2", "schedule.warmup_steps=2"],
        env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# Three to eight minutes, nearly all of them for importing torch on an emulated processor.
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not FULL or QEMU is None, reason="in `make test-faults`, with qemu-x86_64 (Debian: qemu-user)")
def test_an_emulated_haswell_computes_the_same_bits_at_every_step(synthetic: Path) -> None:
    here = steps(synthetic, "D2")
    assert len(here) == 3
    assert len(here[0]) > 150
    assert steps(synthetic, "D2", emulator=(str(QEMU), "-cpu", "Haswell")) == here
    assert steps(synthetic, "D1") != here, "these digests show which kernels were used"


def test_a_checkpoint_of_level_d2_does_not_ask_for_the_model_of_processor() -> None:
    assert numerics(torch.device("cpu"), portable=True)["processor"] == "any with AVX2 and FMA"


def test_level_d2_is_refused_where_torch_has_chosen_its_kernels_already(commands: CommandServer, synthetic: Path,
                                                                       tmp_path: Path) -> None:
    outcome = commands.run("train", CONFIG, f"run_dir={tmp_path / 'run'}", f"data.dir={synthetic}",
                           "elastic.num_workers=2", "elastic.level=D2")
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
