"""What a study shows while it runs, and how long it has taken over all its starts."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from longer_rec.report.numbers import format_count, format_duration, format_metric
from longer_rec.report.terminal import make_console
from longer_rec.study.tasks import Task
from longer_rec.train.run_dir import write_atomically

# More than the longest few lines of metrics.jsonl.
_TAIL_BYTES: Final = 8192


class StudyProgress:
    """Counts, running runs and the time left: live in a terminal, elsewhere a line whenever a run ends.

    Draws when it is called, without a thread: runs are forked while it is open. Seconds spent are kept in ``path``.
    """

    def __init__(self, name: str, path: Path, parallel: int, num_requests: Mapping[Path, int],
                 console: Console | None = None) -> None:
        self._name, self._path, self._parallel, self._num_requests = name, path, parallel, num_requests
        self._console = console or make_console()
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._began, self._spent_before_s = time.monotonic(), self.spent_s(path)
        self.begin("", ())

    @staticmethod
    def spent_s(path: Path) -> float:
        return float(json.loads(path.read_text(encoding="utf-8"))["spent_s"]) if path.exists() else 0.0

    def begin(self, phase: str, tasks: Sequence[Task]) -> None:
        """What follows is about these tasks."""
        self._phase, self._tasks = phase, tasks
        self._started: dict[str, float] = {}
        self._durations: list[float] = []

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, waiting: Sequence[Task], running: Sequence[Task], failed: Mapping[str, str]) -> None:
        now = time.monotonic()
        names = {task.name for task in running}
        ended = [name for name in self._started if name not in names]
        self._durations += [now - self._started.pop(name) for name in ended]
        self._started |= {task.name: now for task in running if task.name not in self._started}
        counts = self._counts(waiting, running, failed, now)
        for name in ended:
            write_atomically(self._path, json.dumps({"spent_s": self._spent_before_s + now - self._began}))
            if name in failed:
                self._console.print(f"{name}: failed, {failed[name]}", style="red", markup=False, soft_wrap=True)
            elif not self._console.is_terminal:
                self._console.print(f"{name}: done; {counts}", markup=False, soft_wrap=True)
        if self._console.is_terminal:
            lines = [f"{self._name}: {counts}", *(f"  {task.name}  {self._state(task)}" for task in running)]
            self._live.update(Text("\n".join(lines) if running else ""), refresh=True)

    def _counts(self, waiting: Sequence[Task], running: Sequence[Task], failed: Mapping[str, str], now: float) -> str:
        num_done = len(self._tasks) - len(waiting) - len(running) - len(failed)
        text = f"{self._phase}: {num_done} of {len(self._tasks)} done, {len(running)} running, {len(waiting)} waiting"
        if failed:
            text += f", {len(failed)} failed"
        if self._durations and (waiting or running):
            each = sum(self._durations) / len(self._durations)
            left = len(waiting) * each + sum(max(0.0, each - now + began) for began in self._started.values())
            text += f", about {format_duration(max(1.0, left / self._parallel))} left"
        return text

    def _state(self, task: Task) -> str:
        lines = last_lines(task.job.run_dir / "metrics.jsonl")
        train = next((line for line in reversed(lines) if line.get("split") == "train"), None)
        if train is None:
            return ""
        validation = next((line for line in reversed(lines) if line.get("split") == "validation"), None)
        job = task.job  # of one process
        num_steps = math.ceil(job.train.epochs * self._num_requests[job.data.dir] / job.step_requests())
        text = f"step {format_count(train['step'])} of {format_count(num_steps)}  loss " + format_metric(
            "loss", train.get("loss"))
        if validation:
            text += f"  validation AUC {format_metric('auc', validation.get('auc'))}"
        return text + ("  evaluates" if train["step"] >= num_steps else "")


def last_lines(path: Path) -> list[dict[str, Any]]:
    """The newest whole lines of a log that is being written."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        raw = file.read().split(b"\n")[:-1]
    found = []
    for line in raw:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # its beginning lies before the tail
    return found
