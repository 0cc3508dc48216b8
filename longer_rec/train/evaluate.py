"""Metrics of a split, computed by all ranks, exact and independent of their number."""

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from longer_rec.batch import RequestBatch
from longer_rec.data.batches import make_batch
from longer_rec.data.history import Dataset
from longer_rec.data.loader import DataConfig, EvalLoader
from longer_rec.errors import Preempted
from longer_rec.job import Precision
from longer_rec.ranker import Ranker
from longer_rec.runtime.distributed import World, on_main
from longer_rec.runtime.preemption import StopSignal
from longer_rec.train.metrics import evaluate_scores
from longer_rec.train.precision import precision_context

FloatArray = npt.NDArray[np.float64]


@torch.no_grad()
def evaluate(ranker: Ranker, dataset: Dataset, split: str, config: DataConfig, world: World, precision: Precision,
             max_requests: int | None = None, stop: StopSignal | None = None) -> dict[str, float]:
    """AUC, LogLoss, NE, calibration and GAUC of ``split``, the same on every rank.

    Blocks of requests are dealt to the ranks; a rank that runs out of blocks joins the others' lookups with an empty
    batch, because a lookup is a collective call. Scores of the whole split meet on rank 0: 24 bytes a candidate.
    ``Preempted`` when ``stop`` received a signal, ``DataError`` when a score is NaN.
    """
    was_training = ranker.training
    ranker.eval()
    loader = EvalLoader(dataset, split, config, shard=world.rank, num_shards=world.size, max_requests=max_requests)
    blocks = iter(loader)
    scored = []
    for _ in range(loader.num_rounds):
        if stop is not None:
            _raise_if_stopped(stop, split, world)
        block, batch = next(blocks, (-1, None))
        batch = (batch or make_batch(dataset, np.empty(0, np.int64), max_events=config.max_events)).to(world.device)
        with precision_context(precision, world.device):
            logit_CY = ranker(batch)
        if block >= 0:
            scored.append((block, _columns(batch, logit_CY, dataset)))
    ranker.train(was_training)
    gathered: list[list[tuple[int, FloatArray]] | None] = [None] * world.size
    dist.gather_object(scored, gathered if world.is_main else None)

    def joined() -> dict[str, float]:
        in_order = sorted((entry for part in gathered for entry in part or ()), key=lambda entry: entry[0])
        label, logit, user = np.concatenate([columns for _, columns in in_order], axis=1)
        return evaluate_scores(label, logit, user.astype(np.int64))

    return on_main(world, joined)


def _raise_if_stopped(stop: StopSignal, split: str, world: World) -> None:
    """Every rank learns of a signal to any: 0.1 ms beside the 10 to 100 ms of a block."""
    received = torch.tensor(float(stop.received), device=world.device)
    dist.all_reduce(received, op=dist.ReduceOp.MAX)
    if received:
        raise Preempted(f"told to stop while the {split} split was evaluated; the training is saved, start again")


def _columns(batch: RequestBatch, logit_CY: Tensor, dataset: Dataset) -> FloatArray:
    """Rows label, logit and user, a column per candidate and task; float64 holds a user's number exactly."""
    user_B = dataset.requests.take("user", batch.request_row_B.numpy(force=True))
    user_C = np.repeat(user_B, batch.num_candidates_B.numpy(force=True))
    num_tasks = logit_CY.shape[1]
    return np.stack([batch.label_CY.numpy(force=True).ravel().astype(np.float64),
                     logit_CY.double().numpy(force=True).ravel(), np.repeat(user_C, num_tasks)])
