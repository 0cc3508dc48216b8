"""From a job to a ranker that is spread over the ranks. The order of the steps is the documentation."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from longer_rec.checkpoint.manager import CheckpointManager
from longer_rec.data.history import Dataset
from longer_rec.data.workload import sample_workload
from longer_rec.errors import ConfigError
from longer_rec.job import Job, build_ranker, expect_hits, row_fetches, row_lookups
from longer_rec.model.attention_plan import use_attention
from longer_rec.ranker import Ranker
from longer_rec.runtime.distributed import World, on_main
from longer_rec.runtime.machine import check_portable_kernels
from longer_rec.sparse.init import attach_open_rows, initialize_tables
from longer_rec.sparse.optimizers import RankerOptimizer
from longer_rec.sparse.planfile import SparsePlan
from longer_rec.sparse.planner import build_plan
from longer_rec.sparse.sharding import shard_ranker
from longer_rec.train.precision import check_train_precision


@dataclass(frozen=True)
class ParallelRanker:
    """A sharded ranker with its optimizer and its plan; ``ranker`` is what ``model`` wraps."""

    model: DistributedModelParallel
    optimizer: RankerOptimizer
    plan: SparsePlan

    @property
    def ranker(self) -> Ranker:
        return cast(Ranker, self.model.module)

    @property
    def tower_parameters(self) -> list[nn.Parameter]:
        return list(self.optimizer.tower.values())

    def state_dict(self) -> dict[str, Any]:
        """Every tensor of the model and of the optimizer, by unique name; sharded ones as ShardedTensor."""
        model: Mapping[str, Tensor] = self.model.state_dict()
        return {**{f"model/{name}": value for name, value in model.items()},
                **{f"optimizer/{name}": value for name, value in self.optimizer.state_dict().items()}}

    def load_latest(self, checkpoints: CheckpointManager) -> dict[str, Any] | None:
        """Fill weights and optimizer state from the newest whole checkpoint; its extra, or None without one."""
        found = checkpoints.load_latest(self.state_dict())
        return found[1] if found else None


def parallelize(job: Job, dataset: Dataset, world: World) -> ParallelRanker:
    """Build, plan, shard, fill. Tables and tower start as functions of the seed alone; a collective call."""
    # 1. Tables on the meta device, for no rank ever holds all of them, and the tower, the same on every rank.
    ranker = build_ranker(job, dataset.schema, world.device)
    torch.backends.cuda.matmul.allow_tf32 = job.train.tf32
    use_attention(job.train.attention, world.device)
    # 2. Rank 0 plans for all; the plan covers every table.
    plan = on_main(lambda: plan_tables(ranker, job, dataset, world, forecast=True))
    # 3. Tables sharded with their update rule inside backward; the tower stays replicated, its gradients ours.
    model = shard_ranker(ranker, plan, job.sparse, world.device)
    # 4. Rows filled by (seed, table, row), whatever shard they are in.
    initialize_tables(model, job.seed, job.sparse)
    attach_open_rows(model, job.seed, job.sparse)
    # 5. AdamW for the tower beside the fused update of the tables.
    return ParallelRanker(model, RankerOptimizer(model, job.sparse, job.dense, job.elastic.is_portable), plan)


def check_job(job: Job, dataset: Dataset, world: World) -> None:
    """``ConfigError`` where the job cannot be built for this data and this world; a collective call.

    Everything is built on the meta device: no memory is taken, nothing is written.
    """
    try:
        if job.elastic.is_portable:
            check_portable_kernels(world.device)
        with torch.device("meta"):
            ranker = build_ranker(job, dataset.schema, torch.device("meta"))
        check_train_precision(job.train, ranker.tower, world.device)
        use_attention(job.train.attention, world.device)
        on_main(lambda: plan_tables(ranker, job, dataset, world))
    except ConfigError as error:
        raise ConfigError(f"{job.name}: {error}") from None


def plan_tables(ranker: Ranker, job: Job, dataset: Dataset, world: World, forecast: bool = False) -> SparsePlan:
    """Where each table goes; a function of the job, the data's counts and the world.

    ``forecast`` adds the hit rates to expect of cached tables, from the batches that training begins with.
    """
    workload = sample_workload(dataset, job.data.batch_requests, job.data.max_events, job.seed)
    plan = partial(build_plan, ranker, job.sparse, world, job.data.batch_requests,
                   workload.ids_per_request(dataset.schema), job.elastic.is_strict)
    if job.sparse.placement is None:
        return plan()
    lookups = row_lookups(job, dataset, say=forecast)
    placed = plan(row_fetches(job, dataset, lookups, world.size))
    return expect_hits(placed, job, dataset, lookups) if forecast else placed
