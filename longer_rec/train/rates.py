"""What a process has trained since its last log line: requests, candidates, events, and the tower's own FLOPs."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from longer_rec.batch import RequestBatch
from longer_rec.job import Job, input_widths
from longer_rec.model.flops import TowerFlops, tower_flops
from longer_rec.model.longer import TowerConfig
from longer_rec.model.precision import DTYPES
from longer_rec.runtime.peak import measured_peak
from longer_rec.schema import Schema

FORWARD_AND_BACKWARD = 3  # a backward pass has two matmuls for each of the forward pass
_COUNTS = ("num_requests", "num_candidates", "num_events")


class Rates:
    """Counts of the own workers' batches; rates and utilisation of all of them from those alone: no collective call.

    Utilisation is the tower's model FLOPs (without those of recomputation) over what this process's matmuls reach
    (``runtime/peak.py``), in the whole step and in the tower's part of it. Only LONGER has a cost model.
    """

    def __init__(self, job: Job, schema: Schema, device: torch.device) -> None:
        self._job, self._schema, self._device = job, schema, device
        self._counts = [0] * len(_COUNTS)
        self._lengths: list[tuple[Tensor, Tensor]] = []
        self._peak: float | None = None

    def measure_peak(self) -> None:
        """What utilisation is told against: 0.2 s, the first time on a machine."""
        if isinstance(self._job.model, TowerConfig):
            self._peak = measured_peak(self._device, DTYPES[self._job.train.default_precision])

    def add(self, batches: Sequence[RequestBatch]) -> None:
        self._counts = [count + sum(getattr(batch, name) for batch in batches)
                        for count, name in zip(self._counts, _COUNTS, strict=True)]
        self._lengths += [(batch.history_length_B, batch.num_candidates_B) for batch in batches]

    def take(self, elapsed_s: float, tower_s: float, share: float) -> dict[str, float]:
        """For a log line; the counts start again. ``share``: of all logical workers, those that were counted."""
        values = {f"{name.removeprefix('num_')}_per_s": count / share / elapsed_s
                  for name, count in zip(_COUNTS, self._counts, strict=True)}
        if self._peak:
            total = FORWARD_AND_BACKWARD * batch_flops(self._job, self._schema, self._lengths).total
            values |= {"mfu": total / elapsed_s / self._peak, "mfu_tower": total / tower_s / self._peak,
                       "tower_gflops": total / tower_s / 1e9}
        self._counts, self._lengths = [0] * len(_COUNTS), []
        return values


def batch_flops(job: Job, schema: Schema, lengths: Sequence[tuple[Tensor, Tensor]]) -> TowerFlops:
    """Of one forward pass of LONGER over batches of these history lengths and candidate counts."""
    assert isinstance(job.model, TowerConfig)
    history, candidates = ([length for pair in lengths for length in pair[side].tolist()] for side in (0, 1))
    return tower_flops(job.model, input_widths(schema, job), len(schema.tasks), history, candidates)


def part_flops(flops: TowerFlops) -> Mapping[str, int]:
    """By the names of ``LongerTower.parts``."""
    return {"input": flops.input, "merge": flops.merge, "interaction": flops.interaction, "cross": flops.cross,
            "self": flops.self_layers, "head": flops.head}
