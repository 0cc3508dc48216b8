"""Running the step again that ended a run: where the first number that is not finite comes from."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from longer_rec.batch import RequestBatch
from longer_rec.elastic.step import cut_lookup, worker_leaves
from longer_rec.train.trainer import Trainer

_SHOWN = 5


def replay_step(trainer: Trainer) -> list[str]:
    """Forward and backward of the trainer's own workers at its step, nothing updated; a line for each finding.

    In the order of the computation: weights, table rows, logits (by request), loss, gradients.
    """
    batches = [batch.to(trainer.world.device) for batch in trainer.loader(1).make_step(trainer.step)]
    ranker = trainer.parallel.ranker
    rows, _ = cut_lookup(ranker.receive(ranker.send(batches)))
    lines = _weights(trainer.parallel.optimizer.tower)
    for worker, batch, leaves in zip(trainer.workers, batches, worker_leaves(rows, batches), strict=True):
        lines += [f"worker {worker}: {line}" for line in _replay_worker(trainer, worker, batch, leaves)]
    return lines


def _replay_worker(trainer: Trainer, worker: int, batch: RequestBatch, leaves: Mapping[str, Tensor]) -> list[str]:
    lines = _rows_not_finite(batch, leaves)
    logit_CY, loss = trainer.worker_backward(worker, batch, leaves)
    bad_C = ~torch.isfinite(logit_CY).all(dim=1)
    if bool(bad_C.any()):
        request_C = torch.repeat_interleave(batch.request_row_B, batch.num_candidates_B)
        lines.append(f"logits of {int(bad_C.sum())} of {len(bad_C)} candidates; requests (rows of the index) "
                     f"{_some(request_C[bad_C])}")
    lines.append(f"loss {loss.item() * trainer.num_workers}")
    tower = trainer.parallel.optimizer.tower
    bad = [name for name, value in tower.items() if value.grad is not None and not bool(value.grad.isfinite().all())]
    if bad:
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        lines.append(f"gradients of {len(bad)} of {len(tower)} tensors of the tower: {', '.join(bad[:_SHOWN])}{more}")
    for parameter in tower.values():
        parameter.grad = None
    return lines


def _weights(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """What is not finite; else the largest weight, for a tower about to overflow shows there."""
    bad = [f"weight {name}: {int((~value.isfinite()).sum())} of {value.numel()} values"
           for name, value in parameters.items() if not bool(value.isfinite().all())]
    if bad or not parameters:
        return bad
    largest, name = max((value.detach().abs().max().item(), name)
                        for name, value in parameters.items() if value.numel())
    return [f"weights are finite, the largest is {largest:.3g} in {name}"]


def _rows_not_finite(batch: RequestBatch, leaves: Mapping[str, Tensor]) -> list[str]:
    lines = []
    for key, value in leaves.items():
        bad = ~torch.isfinite(value).all(dim=1)
        if bool(bad.any()):
            rows = f"; ids {_some(batch.distinct[key][bad])}" if key in batch.distinct else ""
            lines.append(f"looked-up rows of {key}: {int(bad.sum())} of {len(bad)}{rows}")
    return lines


def _some(values: Tensor) -> str:
    found = values.unique().tolist()
    return ", ".join(map(str, found[:_SHOWN])) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
