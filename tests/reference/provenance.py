"""What a file of results must name: hardware, date, commit, versions."""

import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def commit() -> str:
    """The commit that the source is at."""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS, check=True, stdout=subprocess.PIPE,
                          text=True).stdout.strip()


def provenance(command: str, *packages: str) -> str:
    """Lines for the end of the file: the command, and what it ran on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    processor = model[1] if model else platform.machine()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    return (f"- Command: `{command}`\n"
            f"- Hardware: {os.cpu_count()} cores, {processor}, load {os.getloadavg()[0]:.1f}.\n"
            f"- Date: {time.strftime('%Y-%m-%d')}. Commit: {commit()}. Python {platform.python_version()}, {versions}, "
            f"`OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')}`.\n")
