"""The root configuration: every part's own config joined into one run, and the ranker it describes."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Self

import pydantic
import torch

from longer_rec.config import Config, apply_overrides, build_config, flatten
from longer_rec.data.frequency import STORED_EVENTS, count_lookups, stored_lookups
from longer_rec.data.history import Dataset
from longer_rec.data.instance_sources import BatchInstances, read_instances
from longer_rec.data.loader import DataConfig
from longer_rec.data.replay import replay_lookups
from longer_rec.elastic.assignment import ElasticConfig, resolve_num_workers
from longer_rec.model.attention_plan import AttentionPath
from longer_rec.model.compressor import CompressConfig
from longer_rec.model.inputs import InputWidths, InstanceWidths
from longer_rec.model.precision import Precision
from longer_rec.model.recompute import apply_recompute
from longer_rec.model.tower import AnyTowerConfig, build_tower
from longer_rec.ranker import Ranker
from longer_rec.runtime.determinism import derive_seed
from longer_rec.schema import Schema
from longer_rec.sparse.cache import forecast_caches
from longer_rec.sparse.optimizers import DenseOptimizerConfig
from longer_rec.sparse.placement import Floats, step_fetches
from longer_rec.sparse.planfile import SparsePlan
from longer_rec.sparse.tables import SparseConfig, build_tables, widths

# Keys that may differ when a run directory is resumed: they move or watch the run, they do not change the model.
_FREE_KEYS = frozenset((
    "name", "run_dir", "data.dir", "data.loader_processes", "data.prefetch_batches", "data.timeout_s",
    "sparse.plan", "sparse.kernel", "sparse.placement", "sparse.device_memory", "sparse.cache_policy",
    "elastic.strict", "elastic.shares", "elastic.digest_every", "train.recompute", "train.recompute_matmuls",
    "train.max_bad_steps", "train.log_every", "train.eval_every", "train.eval_requests", "train.checkpoint_every",
    "train.keep_checkpoints", "train.keep_every", "train.timeout_s", "train.checkpoint_timeout_s"))


class ScheduleConfig(Config):
    """Linear warm-up, then half a cosine down to ``final_factor``, for dense and sparse learning rates alike."""

    warmup_steps: int = pydantic.Field(50, ge=0)
    final_factor: float = pydantic.Field(0.02, ge=0, le=1)


class TrainConfig(Config):
    """How long, how often, how precise. A step is one batch of every logical worker."""

    epochs: float = pydantic.Field(1.0, ge=0, description="passes over the training requests; 0 only evaluates")
    precision: Precision | dict[str, Precision] = pydantic.Field(
        "fp32", description="of the tower's matmuls; or by part, such as {default: fp32, merge: bf16}")
    tf32: bool = pydantic.Field(False, description="fp32 matmuls on a GPU with 10 bits of mantissa")
    attention: AttentionPath = pydantic.Field("grouped", description="flex: packed, without padding, on a GPU")
    recompute: tuple[str, ...] = pydantic.Field((), description="parts of the tower that keep no activations")
    recompute_matmuls: bool = pydantic.Field(True, description="false: those parts keep what their linear maps gave")
    clip_norm: float = pydantic.Field(1.0, gt=0, description="bound on the norm of the dense gradient")
    max_bad_steps: int = pydantic.Field(10, ge=1, description="non-finite steps in a row before the run is given up")
    log_every: int = pydantic.Field(20, ge=1, description="steps")
    eval_every: int = pydantic.Field(1000, ge=1, description="steps")
    eval_requests: int = pydantic.Field(2000, ge=1, description="validation requests of the evaluations on the way")
    checkpoint_every: int = pydantic.Field(1000, ge=1, description="steps")
    keep_checkpoints: int = pydantic.Field(2, ge=1, description="the newest ones")
    keep_every: int | None = pydantic.Field(None, ge=1, description="steps; multiples of it stay for ever")
    timeout_s: float = pydantic.Field(120.0, gt=0, description="of every collective operation of a step")
    checkpoint_timeout_s: float = pydantic.Field(1800.0, gt=0, description="of a save, all ranks' writing included")

    @property
    def default_precision(self) -> Precision:
        """Of what ``precision`` does not name."""
        return self.precision.get("default", "fp32") if isinstance(self.precision, dict) else self.precision

    @property
    def recomputed_whole(self) -> tuple[str, ...]:
        """Parts that keep nothing and whose matmuls run again: those that a plan counts less memory and more work for.

        With ``recompute_matmuls: false`` a plan is on the safe side: it counts all that the parts would keep.
        """
        return self.recompute if self.recompute_matmuls else ()

    @property
    def part_precisions(self) -> dict[str, Precision]:
        """Those of parts that ``precision`` names."""
        named = self.precision if isinstance(self.precision, dict) else {}
        return {part: precision for part, precision in named.items() if part != "default"}


class Job(Config):
    """One run: its data, its ranker, its optimizers, and the baselines its report compares it with.

    ``baselines`` maps a name to overrides of this job, such as ``["model={kind: count}", "train.epochs=0"]``; each
    is run after the main model, in ``<run_dir>/baselines/<name>``.
    """

    name: str
    run_dir: Path
    seed: int = 0
    data: DataConfig
    model: AnyTowerConfig
    sparse: SparseConfig
    dense: DenseOptimizerConfig = DenseOptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    elastic: ElasticConfig = ElasticConfig()
    train: TrainConfig = TrainConfig()
    baselines: dict[str, tuple[str, ...]] = {}

    def step_requests(self, num_processes: int = 1) -> int:
        """Training requests of one step, all logical workers together."""
        return self.data.batch_requests * (self.elastic.num_workers or num_processes)

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.baselines:
            if not name.isidentifier():
                raise ValueError(f"baselines: {name!r} becomes a directory; use letters, digits and underscores")
        if self.elastic.is_portable and self.train.precision != "fp32":
            raise ValueError(f"train.precision={self.train.precision} with elastic.level=D2: only fp32 was found equal "
                             "on unlike processors; use fp32, or D1")
        return self


def baseline_jobs(job: Job) -> dict[str, Job]:
    """The job of each baseline: this one with its overrides applied, without baselines of its own."""
    content = job.model_dump(mode="json") | {"baselines": {}}
    return {
        name: build_config(Job, apply_overrides(content, [*overrides, f"name={name}",
                                                          f"run_dir={job.run_dir / 'baselines' / name}"]),
                           f"baselines.{name}")
        for name, overrides in job.baselines.items()
    }


def row_lookups(job: Job, dataset: Dataset, say: bool = False) -> dict[str, Floats]:
    """Lookups of each row of each table in an epoch of the job: as ``prepare`` stored them, or counted now.

    ``say``: print a line where they are counted.
    """
    max_events = job.data.max_events
    stored = stored_lookups(dataset, max_events)
    if stored is not None:
        return stored
    if say:
        has = f"those for {STORED_EVENTS}" if "lookups" in dataset.summary else "none: prepare it again to keep them"
        print(f"{job.name}: counting how often rows are looked up with data.max_events={max_events}; {dataset.path} "
              f"has {has}", flush=True)
    return count_lookups(dataset, max_events)


def row_fetches(job: Job, dataset: Dataset, lookups: Mapping[str, Floats], num_processes: int) -> dict[str, Floats]:
    """For each row of each table, the share of the job's steps that look it up."""
    num_steps = dataset.num_requests("train") / job.step_requests(num_processes)
    return {table: step_fetches(count, num_steps) for table, count in lookups.items()}


def expect_hits(plan: SparsePlan, job: Job, dataset: Dataset, lookups: Mapping[str, Floats]) -> SparsePlan:
    """The plan with the hit rates to expect of its caches, from the batches that training begins with."""
    num_workers, step_requests = resolve_num_workers(job.elastic, plan.world_size), job.step_requests(plan.world_size)
    num_steps = min(200, max(4, 20_000 // step_requests))  # some seconds at 10 ms for 64 requests of 540 events
    return forecast_caches(plan, lookups, replay_lookups(dataset, job.data, job.seed, num_workers, num_steps))


def changed_keys(saved: Job, current: Job) -> list[str]:
    """Dotted keys in which two jobs differ, leaving out those that may."""
    old, new = (flatten(job.model_dump(mode="json"), _FREE_KEYS) for job in (saved, current))
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def source_config(job: Job) -> CompressConfig | None:
    """How the job's model compresses instances, if it is a source model."""
    return getattr(job.model, "compress", None)


def add_instances(job: Job, dataset: Dataset) -> Dataset:
    """``dataset`` whose batches hold the past instances that the job's model reads, if it reads any."""
    source = source_config(job)
    if job.data.instances is not None:
        return read_instances(dataset, job.data.instances)
    if source is not None and source.order == "user":
        return replace(dataset, instances=BatchInstances(source.max_tokens))
    return dataset


def build_ranker(job: Job, schema: Schema, device: torch.device) -> Ranker:
    """The unsharded ranker: its tables on the meta device, its tower drawn from the job's seed."""
    tables = build_tables(schema, job.sparse, device="meta")
    torch.manual_seed(derive_seed(job.seed, "tower"))
    tower = build_tower(job.model, input_widths(schema, job), len(schema.tasks), job.data.max_events).to(device)
    apply_recompute(tower, job.train.recompute, keep_matmuls=not job.train.recompute_matmuls)
    return Ranker(schema, tables, tower)


def input_widths(schema: Schema, job: Job) -> InputWidths:
    """What the tower must know of the tables."""
    width = widths(schema, job.sparse)
    return InputWidths(
        item={feature.name: width[f"candidates.{feature.name}"] for feature in schema.item_features},
        event={feature.name: width[f"history.{feature.name}"] for feature in schema.event_features},
        user={feature.name: width[f"users.{feature.name}"] for feature in schema.user_features},
        num_dense=len(schema.user_dense),
        num_item_dense=len(schema.item_dense),
        instance=None if (given := schema.instances) is None else InstanceWidths(
            given.width, given.num_labels, given.max_tokens, tuple(feature.name for feature in given.features)),
    )
