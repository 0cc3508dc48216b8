"""From a job to a ranker that is spread over the ranks. The order of the steps is the documentation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from longer_rec.checkpoint.manager import CheckpointManager
from longer_rec.data.history import Dataset
from longer_rec.errors import ConfigError
from longer_rec.model.inputs import InputWidths
from longer_rec.model.tower import build_tower
from longer_rec.ranker import Ranker
from longer_rec.runtime.determinism import derive_seed
from longer_rec.runtime.distributed import World, on_main
from longer_rec.schema import Schema
from longer_rec.sparse.init import initialize_tables
from longer_rec.sparse.optimizers import RankerOptimizer
from longer_rec.sparse.planfile import SparsePlan
from longer_rec.sparse.planner import build_plan
from longer_rec.sparse.sharding import shard_ranker
from longer_rec.sparse.tables import build_tables, widths
from longer_rec.train.job import Job
from longer_rec.train.recompute import apply_recompute


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
    # 2. Rank 0 plans for all; the plan covers every table.
    plan = on_main(world, lambda: plan_tables(ranker, job, dataset, world))
    # 3. Tables sharded with their update rule inside backward; the tower stays replicated, its gradients ours.
    model = shard_ranker(ranker, plan, job.sparse, world.device)
    # 4. Rows filled by (seed, table, row), whatever shard they are in.
    initialize_tables(model, job.seed, job.sparse)
    # 5. AdamW for the tower beside the fused update of the tables.
    return ParallelRanker(model, RankerOptimizer(model, job.sparse, job.dense), plan)


def check_job(job: Job, dataset: Dataset, world: World) -> None:
    """``ConfigError`` where the job cannot be built for this data and this world; a collective call.

    Everything is built on the meta device: no memory is taken, nothing is written.
    """
    try:
        with torch.device("meta"):
            ranker = build_ranker(job, dataset.schema, torch.device("meta"))
        on_main(world, lambda: plan_tables(ranker, job, dataset, world))
    except ConfigError as error:
        raise ConfigError(f"{job.name}: {error}") from None


def build_ranker(job: Job, schema: Schema, device: torch.device) -> Ranker:
    """The unsharded ranker: its tables on the meta device, its tower drawn from the job's seed."""
    tables = build_tables(schema, job.sparse, device="meta")
    torch.manual_seed(derive_seed(job.seed, "tower"))
    tower = build_tower(job.model, input_widths(schema, job), len(schema.tasks), job.data.max_events).to(device)
    apply_recompute(tower, job.train.recompute)
    return Ranker(schema, tables, tower)


def plan_tables(ranker: Ranker, job: Job, dataset: Dataset, world: World) -> SparsePlan:
    """Where each table goes; a function of the job, the data's counts and the world."""
    return build_plan(ranker, job.sparse, world, job.data.batch_requests,
                      ids_per_request(dataset, job.data.max_events), strict=job.elastic.is_strict)


def ids_per_request(dataset: Dataset, max_events: int) -> dict[str, float]:
    """Mean number of ids a request looks up, by key, from the data's own counts: what the planner weighs tables by."""
    summary = dataset.summary
    candidates = sum(summary["candidates"].values()) / max(1, sum(summary["requests"].values()))
    history = min(max_events, summary["history_length"]["mean"])
    return {**{f"history.{feature.name}": history for feature in dataset.schema.history_features},
            **{f"candidates.{feature.name}": candidates for feature in dataset.schema.item_features}}


def input_widths(schema: Schema, job: Job) -> InputWidths:
    """What the tower must know of the tables."""
    width = widths(schema, job.sparse)
    return InputWidths(
        item={feature.name: width[f"candidates.{feature.name}"] for feature in schema.item_features},
        event={feature.name: width[f"history.{feature.name}"] for feature in schema.event_features},
        user={feature.name: width[f"users.{feature.name}"] for feature in schema.user_features},
        num_dense=len(schema.user_dense),
        num_item_dense=len(schema.item_dense),
    )
