"""Short training that saves nothing: how fast a model is, what it costs, and how a setting of it does."""

import time
from typing import Any, Final

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from longer_rec.data.batches import make_batch
from longer_rec.data.history import Dataset
from longer_rec.job import Job
from longer_rec.ranker import Ranker
from longer_rec.train.run import unsaved_run

_WARMUP_STEPS: Final = 8
_COUNTED_REQUESTS: Final = 48


def run_trial(job: Job, evaluates: bool) -> dict[str, Any]:
    """Train the job's steps as a run would, without checkpoints; its cost and ``requests_per_s`` after a warm-up.

    ``evaluates`` adds the metrics of ``train.eval_requests`` validation requests.
    """
    with unsaved_run(job) as trainer:
        device = trainer.world.device
        warmup = min(_WARMUP_STEPS, trainer.num_steps // 2)
        # Of the processor where there is no GPU: what else the machine does would be in the time of a wall clock.
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        started = clock()
        for batches in trainer.loader(trainer.num_steps):
            if trainer.step == warmup:
                started = clock()
            trainer.train_step([batch.to(device) for batch in batches])
            trainer.step += 1
        requests = (trainer.step - warmup) * trainer.num_workers * job.data.batch_requests
        elapsed = clock() - started
        metrics = trainer.evaluate("validation", job.train.eval_requests) if evaluates else {}
        ranker, plan = trainer.parallel.ranker, trainer.parallel.plan
        return {**count_flops(ranker, trainer.dataset, job.data.max_events, device),
                "dense_parameters": sum(parameter.numel() for parameter in ranker.tower.parameters()),
                "sparse_parameters": sum(table.rows * table.dim for table in plan.tables),
                "requests_per_s": requests / elapsed if requests else None, "validation": metrics}


@torch.no_grad()
def count_flops(ranker: Ranker, dataset: Dataset, max_events: int, device: torch.device) -> dict[str, float]:
    """FLOPs of one forward pass, counted in ``encode`` and ``score`` over requests spread evenly over the test split:
    of a request's user side, of one of its candidates, and of a request with all of them.

    One request at a time: what attention pads in groups of requests depends on the batch, not on the model.
    """
    ranker.eval()
    split = dataset.split_rows("test")
    rows = np.unique(np.linspace(split.start, split.stop - 1, _COUNTED_REQUESTS).astype(np.int64))
    user = candidate = num_candidates = 0
    for row in rows:
        batch = make_batch(dataset, [row], max_events=max_events).to(device)
        lookup = ranker.lookup(batch)
        with FlopCounterMode(display=False) as counter:
            state = ranker.tower.encode(ranker.user_side(batch, lookup))
            user += (of_user := counter.get_total_flops())
            ranker.tower.score(state, ranker.candidate_side(batch, lookup))
            candidate += counter.get_total_flops() - of_user
        num_candidates += batch.num_candidates
    return {"user_flops": user / len(rows), "candidate_flops": candidate / max(1, num_candidates),
            "request_flops": (user + candidate) / len(rows)}
