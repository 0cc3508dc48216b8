"""Asking for help costs no import of torch, and every command has some."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ASK = """
import contextlib, io, json, sys, time
from longer_rec.cli import app, main

texts = {}
for name in [None, *(command.name or command.callback.__name__ for command in app.registered_commands)]:
    sys.argv = ["longer-rec", *filter(None, [name]), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main()
        except SystemExit as end:
            assert end.code == 0, (name, end.code)
    texts[name or ""] = out.getvalue()
heavy = [name for name in ("torch", "torchrec", "polars", "pyarrow", "matplotlib", "numpy") if name in sys.modules]
print(json.dumps({"texts": texts, "heavy": heavy, "cpu_s": time.process_time()}))
"""
COMMANDS = {"prepare", "train", "launch", "eval", "inspect", "diff", "doctor", "report"}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                          capture_output=True, timeout=60, check=False)


def test_help_of_every_command_imports_nothing_heavy() -> None:
    done = python("-c", ASK)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["heavy"] == []
    assert answer["cpu_s"] < 2
    texts = answer["texts"]
    assert texts.keys() >= COMMANDS
    for name, text in texts.items():
        assert "Usage: longer-rec" in text
        assert name in text
    for name in texts.keys() - {""}:
        assert name in texts[""]


def test_the_command_alone_answers_with_its_help_within_two_seconds() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    alone, asked = python("-m", "longer_rec"), python("-m", "longer_rec", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (alone.returncode, alone.stderr) == (asked.returncode, asked.stderr) == (0, "")
    assert alone.stdout == asked.stdout
    # Of CPU time, for both: a busy machine makes the wall time worse, not this.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 2 * 2


LAUNCH_ON_A_GPU = """
import sys, torch

def poison():
    raise SystemExit("CUDA was asked before the ranks were forked")

torch.cuda._is_compiled = lambda: True
torch.cuda._device_count_nvml = lambda: 2
for name in ("getDeviceCount", "getArchFlags", "init", "getCurrentRawStream"):
    setattr(torch._C, f"_cuda_{name}", poison)

import longer_rec.cli, longer_rec.runtime.supervisor
longer_rec.runtime.supervisor.supervise = lambda *_, **__: int(torch.cuda.is_initialized()) or 77
sys.argv = ["longer-rec", "launch", "configs/synthetic_debug.yaml", "--nproc", "2"]
longer_rec.cli.main()
"""


def test_the_parent_of_launched_ranks_never_touches_a_gpu() -> None:
    """Else CUDA refuses to work in them. On a machine that pretends to have two."""
    done = subprocess.run([sys.executable, "-c", LAUNCH_ON_A_GPU], cwd=ROOT, text=True, capture_output=True,
                          timeout=120, check=False)
    assert done.returncode == 77, done.stderr
