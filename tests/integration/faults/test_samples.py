"""Which samples a run has really trained on, over kills and other numbers of processes."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from longer_rec.batch import RequestBatch
from longer_rec.config import load_config
from longer_rec.data.history import open_dataset
from longer_rec.errors import Preempted
from longer_rec.job import Job
from longer_rec.train.run import train
from longer_rec.train.trainer import StepResult, Trainer
from tests.integration.conftest import CONFIG
from tests.reference.ranks import RankFailure, run_ranks

W, BATCH, EPOCHS = 2, 70, 2
OVERRIDES = (f"elastic.num_workers={W}", f"data.batch_requests={BATCH}", f"train.epochs={EPOCHS}",
             "data.max_events=5", "data.balance=false", "model.num_queries=3", "train.checkpoint_every=4",
             "train.eval_every=1000", "train.log_every=100")


def train_and_record(rank: int, world_size: int, run_dir: Path, data: Path, attempt: int,
                     sent: tuple[int, int] | None) -> None:
    """Writes each (step, worker, request rows) down; ``sent`` = (signal, step) is what the last rank sends itself."""
    original = Trainer.train_step

    def recording(self: Trainer, batches: list[RequestBatch], *upcoming: Any) -> StepResult:
        with (run_dir.parent / f"seen-{attempt}-{rank}.jsonl").open("a") as file:
            for worker, batch in zip(self.workers, batches, strict=True):
                file.write(json.dumps([self.step, worker, batch.request_row_B.tolist()]) + "\n")
        if sent is not None and self.step == sent[1] and rank == world_size - 1:
            os.kill(os.getpid(), sent[0])
        return original(self, batches, *upcoming)

    Trainer.train_step = recording  # type: ignore[method-assign]
    try:
        train(load_config(Job, CONFIG, [f"run_dir={run_dir}", f"data.dir={data}", *OVERRIDES]))
    except Preempted:
        return


def test_each_sample_is_trained_on_once_an_epoch_over_kills_and_2_1_2_processes(synthetic: Path,
                                                                               tmp_path: Path) -> None:
    """Of a step that ran again after a kill the last time counts: the others left nothing in the weights."""
    run_dir = tmp_path / "run"
    attempts = ((2, (signal.SIGKILL, 6)), (2, (signal.SIGTERM, 7)), (1, (signal.SIGKILL, 11)), (2, None))
    for attempt, (processes, sent) in enumerate(attempts):
        arguments = (run_dir, synthetic, attempt, sent)
        if sent is not None and sent[0] == signal.SIGKILL:
            with pytest.raises(RankFailure, match="signal 9"):
                run_ranks(train_and_record, processes, *arguments, timeout_s=60)
        else:
            run_ranks(train_and_record, processes, *arguments, timeout_s=60)
    seen: dict[tuple[int, int], list[int]] = {}
    num_lines = 0
    for attempt, (processes, _) in enumerate(attempts):
        for rank in range(processes):
            for line in (tmp_path / f"seen-{attempt}-{rank}.jsonl").read_text().splitlines():
                step, worker, rows = json.loads(line)
                seen[step, worker] = rows
                num_lines += 1
    assert num_lines > len(seen), "no step ran twice: the kills came right after checkpoints"
    stream = [row for key in sorted(seen) for row in seen[key]]
    train_rows = sorted(open_dataset(synthetic).split_rows("train"))
    num_requests = len(train_rows)
    assert num_requests % (W * BATCH), "an epoch ends in the middle of a step"
    for epoch in range(EPOCHS):
        assert sorted(stream[epoch * num_requests:(epoch + 1) * num_requests]) == train_rows
    assert len(stream) - EPOCHS * num_requests < W * BATCH
