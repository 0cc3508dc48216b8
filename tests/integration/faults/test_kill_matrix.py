"""`kill -9` of one rank at any point of any step: the run recovers by itself and nothing of its results differs.

A seeded sample; LONGER_REC_FAULTS=full takes 50 points and writes benchmarks/results/reliability_kills.md.
"""

import os
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from longer_rec.checkpoint.inspect import diff_checkpoints, find_checkpoint
from tests.integration.conftest import metric_lines
from tests.integration.faults.faults import POINTS, Faults, launch_run
from tests.reference.provenance import RESULTS, provenance

FULL = os.environ.get("LONGER_REC_FAULTS") == "full"
_COMMAND = "LONGER_REC_FAULTS=full python -m pytest tests/integration/faults/test_kill_matrix.py"
STEPS, SAVE_EVERY, RANKS = 10, 2, 2
SHORT = ("train.epochs=0.2", f"train.checkpoint_every={SAVE_EVERY}", "train.log_every=1", "train.eval_every=5",
         "train.eval_requests=50", "data.max_events=200", "train.timeout_s=20")


@dataclass(frozen=True)
class Kill:
    """Of a rank at a point of a step; of one that saves where the point is in a save."""

    rank: int
    step: int
    point: str


def kills() -> list[Kill]:
    """50 kills, every point seven times or more."""
    rng = random.Random(0)
    found = []
    for index in range(50):
        point = POINTS[index % len(POINTS)]
        saves = point in ("save", "rename", "latest")
        step = rng.randrange(SAVE_EVERY, STEPS + 1, SAVE_EVERY) if saves else rng.randrange(STEPS)
        found.append(Kill(0 if point in ("rename", "latest") else rng.randrange(RANKS), step, point))
    return found


SAMPLE = kills() if FULL else [kills()[index] for index in (0, 16, 25, 41)]


def equal_results(broken: Path, whole: Path) -> bool:
    return (diff_checkpoints(find_checkpoint(broken), find_checkpoint(whole)).tensors == []
            and metric_lines(broken) == metric_lines(whole))


def recovery_s(clock: Path) -> float:
    """From the signal until the last rank of the next attempt has its state back."""
    ticks = [line.split() for line in clock.read_text().splitlines()]
    struck = [float(when) for when, what, *_ in ticks if what == "struck"]
    restored = [float(when) for when, what, _, attempt in ticks if (what, attempt) == ("restored", "1")]
    assert (len(struck), len(restored)) == (1, RANKS), "one strike, one restart"
    return max(restored) - struck[0]


@pytest.mark.timeout(1200 if FULL else 180)
def test_a_killed_rank_costs_seconds_and_no_bit(synthetic: Path, tmp_path: Path) -> None:
    with launch_run(tmp_path / "whole", synthetic, *SHORT) as whole:
        assert (whole.wait(), whole.err) == (0, "")
    assert len(metric_lines(tmp_path / "whole")) == STEPS + 2 + 1
    rows = []
    for kill in SAMPLE:
        run_dir = tmp_path / f"{kill.point}-{kill.rank}-{kill.step}"
        while run_dir.exists():  # the same kill drawn twice
            run_dir = run_dir.with_name(f"{run_dir.name}-again")
        faults = Faults().kill(rank=kill.rank, step=kill.step).during(kill.point)
        with launch_run(run_dir, synthetic, *SHORT, faults=faults) as run:
            code = run.wait(90)
        assert code == 0, (kill, run.err)
        # A process that makes batches may still find its rank gone, and say so.
        said = [line for line in run.err.splitlines() if line.startswith("longer-rec: ")]
        assert said == [f"longer-rec: rank {kill.rank} of {RANKS} was killed by SIGKILL; starting again (1 of 3)"], kill
        assert equal_results(run_dir, tmp_path / "whole"), kill
        assert not list((run_dir / "checkpoints").glob("step-*.tmp")), kill
        rows.append((kill, recovery_s(run.folder / "clock")))
    assert len(rows) == len(SAMPLE)
    if FULL:
        write_results(rows)


def write_results(rows: list[tuple[Kill, float]]) -> None:
    """One table by point, one of all kills."""
    def line(name: str, which: Callable[[Kill], bool]) -> str:
        times = sorted(seconds for kill, seconds in rows if which(kill))
        return (f"| {name} | {len(times)} | {len(times)} | {statistics.median(times):.2f} | {times[-1]:.2f} |")

    times = [seconds for _, seconds in rows]
    table = "\n".join(line(point, lambda kill, point=point: kill.point == point) for point in POINTS)
    each = "\n".join(f"| {kill.point} | {kill.step} | {kill.rank} | {seconds:.2f} |" for kill, seconds in rows)
    (RESULTS / "reliability_kills.md").write_text(f"""\
# A rank killed at 50 points of a run

**Theme.** A rank that dies anywhere, also in the middle of a save, must cost seconds and no bit of the result.

**Answer.** {len(rows)} of {len(rows)} runs recovered by themselves, each with one restart, and ended with weights,
optimizer state and metrics that are bitwise those of the uninterrupted run. From the signal until all ranks had their
state back it took {statistics.median(times):.2f} s in the median and {max(times):.2f} s at most.

| killed during | runs | recovered, bitwise equal | median s | longest s |
|---|---|---|---|---|
{table}
{line("all", lambda _: True)}

`input`: while its batches are made; `forward` and `backward`: of the tower; `update`: between the update of the tables
and the dense step; `save`: between writing the tensors and fsync; `rename`: after the manifest, before the directory
gets its name; `latest`: after that, before `LATEST` names it. {RANKS} ranks under the supervisor of `longer-rec
launch`, {STEPS} steps of `configs/synthetic_debug.yaml`, a checkpoint every {SAVE_EVERY}; ranks and steps are seeded.

{provenance(_COMMAND, "torch")}
## Every kill
| during | step | rank | s |
|---|---|---|---|
{each}
""", encoding="utf-8")
