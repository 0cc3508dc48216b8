"""Metrics of a split, computed by all ranks, exact and independent of their number."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from longer_rec.batch import RequestBatch
from longer_rec.data.batches import make_batch
from longer_rec.data.history import Dataset
from longer_rec.data.loader import DataConfig, EvalLoader
from longer_rec.data.raw import raw_request
from longer_rec.errors import Preempted
from longer_rec.job import TrainConfig
from longer_rec.model.attention_profile import attention_mass
from longer_rec.model.longer import LongerTower
from longer_rec.ranker import Ranker
from longer_rec.runtime.distributed import World
from longer_rec.runtime.preemption import StopSignal
from longer_rec.train.metrics import Floats, Ints, evaluate_scores
from longer_rec.train.precision import precision_context

BlockT = TypeVar("BlockT")
_MINUTE, _HOUR, _DAY = 60, 3600, 86400
AGE_EDGES: Final = (_MINUTE, 10 * _MINUTE, _HOUR, 6 * _HOUR, _DAY, 3 * _DAY, 7 * _DAY, 14 * _DAY, 30 * _DAY, 60 * _DAY,
                    120 * _DAY, 365 * _DAY, 730 * _DAY, 1825 * _DAY)
PROFILED_REQUESTS: Final = 256


@dataclass(frozen=True)
class Scores:
    """Candidates of a split in its order, one entry for each task; ``row_C``: the request's row in the index."""

    label_C: Floats
    logit_C: Floats
    row_C: Ints


def metrics_of(scores: Scores | None, dataset: Dataset) -> dict[str, float]:
    """AUC, LogLoss, NE, calibration and GAUC, on rank 0. ``DataError`` when a score is NaN."""
    assert scores is not None
    return evaluate_scores(scores.label_C, scores.logit_C, dataset.requests.take("user", scores.row_C))


@torch.no_grad()
def gather_scores(ranker: Ranker, dataset: Dataset, split: str, config: DataConfig, world: World, train: TrainConfig,
                  max_requests: int | None = None, stop: StopSignal | None = None) -> Scores | None:
    """Scores of ``split``, 24 bytes a candidate, on rank 0 and None elsewhere; a collective call.

    Blocks of requests are dealt to the ranks; a rank that runs out of blocks joins the others' lookups with an empty
    batch, because a lookup is a collective call. ``Preempted`` when ``stop`` received a signal.
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
        with precision_context(train, ranker.tower, world.device):
            logit_CY = ranker(batch)
        if block >= 0:
            scored.append((block, _columns(batch, logit_CY)))
    ranker.train(was_training)
    in_order = gather_blocks(scored, world)
    if in_order is None:
        return None
    label, logit, row = np.concatenate(in_order, axis=1)
    return Scores(label, logit, row.astype(np.int64))


@torch.no_grad()
def profile_attention(ranker: Ranker, dataset: Dataset, split: str, config: DataConfig, world: World,
                      train: TrainConfig) -> dict[str, Any] | None:
    """Where candidates of a fixed sample of requests, spread evenly over the split, look; a collective call.

    Shares of the attention by layer and head, ready for JSON, on rank 0 and of LONGER; None elsewhere.
    """
    tower = ranker.tower
    if not isinstance(tower, LongerTower):
        return None
    rows, size = dataset.split_rows(split), config.eval_batch_requests
    count = min(len(rows), PROFILED_REQUESTS)
    blocks = [[rows[index * len(rows) // count] for index in range(count)[first:first + size]]
              for first in range(0, count, size)]
    edges = {"position": [2 ** power for power in range(config.max_events.bit_length())], "age": list(AGE_EDGES)}
    was_training = ranker.training
    ranker.eval()
    profiled = []
    for block in range(world.rank, -(-len(blocks) // world.size) * world.size, world.size):
        own = blocks[block] if block < len(blocks) else []
        batch = make_batch(dataset, np.array(own, np.int64), max_events=config.max_events).to(world.device)
        lookup = ranker.lookup(batch)
        if own:
            with precision_context(train, ranker.tower, world.device):
                mass = attention_mass(tower, ranker.user_side(batch, lookup), ranker.candidate_side(batch, lookup),
                                      *map(torch.tensor, edges.values()))
            profiled.append((block, (batch.num_candidates, *(each.numpy(force=True) for each in mass))))
    ranker.train(was_training)
    in_order = gather_blocks(profiled, world)
    if in_order is None:
        return None
    num_candidates, *masses = (sum(each) for each in zip(*in_order, strict=True))
    shares = (mass / mass.sum(-1, keepdims=True) for mass in masses)
    return {"requests": count, "candidates": num_candidates,
            **{name: {"edges": edge, "layers": [{"heads": layer[:-1].tolist(), "uniform": layer[-1].tolist()}
                                                for layer in share]}
               for (name, edge), share in zip(edges.items(), shares, strict=True)}}


def gather_blocks(scored: list[tuple[int, BlockT]], world: World) -> list[BlockT] | None:
    """What all ranks made of their blocks, in the order of the blocks, on rank 0."""
    gathered: list[list[tuple[int, BlockT]] | None] = [None] * world.size
    dist.gather_object(scored, gathered if world.is_main else None)
    if not world.is_main:
        return None
    return [result for _, result in sorted((entry for part in gathered for entry in part or ()), key=itemgetter(0))]


def evaluate_scorer(dataset: Dataset, split: str, score: Callable[[Mapping[str, Any]], Mapping[str, Any]],
                    max_events: int) -> dict[str, float]:
    """Metrics of a split whose requests ``score`` answers from raw values, as a server does; request by request."""
    columns = []
    for row in dataset.split_rows(split):
        batch = make_batch(dataset, [row], max_events=max_events)
        logits = score(raw_request(dataset, row, max_events))["logits"]
        columns.append(_columns(batch, torch.tensor(list(logits.values()), dtype=torch.float32).T))
    label, logit, row_C = np.concatenate(columns, axis=1)
    return metrics_of(Scores(label, logit, row_C.astype(np.int64)), dataset)


def _raise_if_stopped(stop: StopSignal, split: str, world: World) -> None:
    """Every rank learns of a signal to any: 0.1 ms beside the 10 to 100 ms of a block."""
    received = torch.tensor(float(stop.received), device=world.device)
    dist.all_reduce(received, op=dist.ReduceOp.MAX)
    if received:
        raise Preempted(f"told to stop while the {split} split was evaluated; the training is saved, start again")


def _columns(batch: RequestBatch, logit_CY: Tensor) -> Floats:
    """Rows label, logit and request, a column per candidate and task; float64 holds a request's number exactly."""
    row_C = np.repeat(batch.request_row_B.numpy(force=True), batch.num_candidates_B.numpy(force=True))
    return np.stack([batch.label_CY.numpy(force=True).ravel().astype(np.float64),
                     logit_CY.double().numpy(force=True).ravel(), np.repeat(row_C, logit_CY.shape[1])])
