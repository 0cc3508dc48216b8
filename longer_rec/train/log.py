"""What a run writes down while it goes: metrics.jsonl and TensorBoard, on rank 0."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from torch.utils.tensorboard import SummaryWriter

from longer_rec.errors import CheckpointError

Value = float | int | str | None


class RunLog:
    """Appends one JSON object a line to ``metrics.jsonl`` and the same numbers to TensorBoard.

    A resumed run first drops the lines after the step it resumes from, so that the file reads as if the run had
    never been interrupted.
    """

    def __init__(self, directory: Path, resumed_step: int) -> None:
        path = directory / "metrics.jsonl"
        if path.exists():
            _drop_lines_after(path, resumed_step)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, split: str, step: int, values: Mapping[str, Value]) -> None:
        # JSON has no NaN: a metric that is not defined, such as the AUC of one class, is null.
        finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                  for name, value in values.items()}
        self._file.write(json.dumps({"split": split, "step": step, **finite}, allow_nan=False) + "\n")
        for name, value in finite.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{split}/{name}", value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()


def _drop_lines_after(path: Path, step: int) -> None:
    kept = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            # The test split is evaluated at the end of every start, also of one that had nothing left to train.
            if entry["step"] <= step and entry["split"] != "test":
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{path} line {number} is damaged; remove that line to resume") from None
    path.write_text("".join(kept), encoding="utf-8")
