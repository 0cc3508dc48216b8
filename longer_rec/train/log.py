"""What a run writes down while it goes: metrics.jsonl and TensorBoard, on rank 0."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from torch.utils.tensorboard import SummaryWriter

from longer_rec.errors import CheckpointError
from longer_rec.train.digests import DIGESTS
from longer_rec.train.run_dir import utc_now, write_atomically, writing

Value = float | int | str | None
_METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"


class RunLog:
    """Appends one JSON object a line to ``metrics.jsonl`` and the same numbers to TensorBoard.

    ``resumed_step`` is the step that the run continues from.
    """

    def __init__(self, directory: Path, resumed_step: int) -> None:
        self._directory = directory
        self._file = (directory / _METRICS).open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, split: str, step: int, values: Mapping[str, Value]) -> None:
        # JSON has no NaN: a metric that is not defined, such as the AUC of one class, is null.
        finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                  for name, value in values.items()}
        with writing(self._directory):
            self._file.write(json.dumps({"split": split, "step": step, **finite}, allow_nan=False) + "\n")
        for name, value in finite.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{split}/{name}", value, step)

    def write_digests(self, step: int, digests: Mapping[str, str]) -> None:
        with writing(self._directory), (self._directory / DIGESTS).open("a", encoding="utf-8", buffering=1) as file:
            file.write(json.dumps({"step": step, "digests": digests}) + "\n")

    def write_continued(self, step: int, num_before: int, num_ranks: int, pause_s: float) -> None:
        """A start goes on after ``step`` with ``num_ranks`` processes; nothing was trained for ``pause_s``."""
        append_event(self._directory, "continued", step=step, pause_s=pause_s, **{"from": num_before, "to": num_ranks})
        self._board.add_scalar("continued/processes", num_ranks, step)
        self._board.add_scalar("continued/pause_s", pause_s, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with writing(self._directory):
            self._file.close()
        self._board.close()


def append_event(directory: Path, event: str, **values: Value) -> None:
    """Add a line to ``events.jsonl``: what happened to the run, which its metrics do not show."""
    line = {"event": event, "time": utc_now(), **values}
    with writing(directory), (directory / EVENTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def rewind_logs(directory: Path, step: int) -> None:
    """Drop the lines after ``step``, so that the files read as if the run had never been interrupted.

    ``CheckpointError`` names a damaged line.
    """
    for path in filter(Path.exists, (directory / _METRICS, directory / DIGESTS)):
        _drop_lines_after(path, step)


def _drop_lines_after(path: Path, step: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()  # torn by a crash while it was written; what it said is said again
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            # The test split is evaluated at the end of every start, also of one that had nothing left to train.
            if entry["step"] <= step and entry.get("split") != "test":
                kept.append(line)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{path} line {number} is damaged; remove that line to resume") from None
    write_atomically(path, b"".join(kept).decode())
