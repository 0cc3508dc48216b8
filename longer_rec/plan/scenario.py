"""One question to the planner: this job, on that machine. And its answer: bytes of every rank, seconds of a step."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pydantic
import torch

from longer_rec.config import Config
from longer_rec.data.history import Dataset
from longer_rec.data.order import sample_positions, sample_rows
from longer_rec.errors import ConfigError
from longer_rec.job import Job, build_ranker, input_widths
from longer_rec.model.flops import tower_flops
from longer_rec.model.longer import TowerConfig
from longer_rec.model.memory import tower_bytes
from longer_rec.ranker import Ranker
from longer_rec.schema import Schema
from longer_rec.sparse.optimizers import apply_table_optimizer
from longer_rec.sparse.options import Choice, Hardware
from longer_rec.sparse.search import Found, Space, build_space, find_plan
from longer_rec.sparse.tables import TableConfig, find_collections, table_configs, widths

KINDS = ("weights", "optimizer", "exchange", "rows", "activations", "dense")
_SAMPLED_BATCHES = 32
# Kept free: the CUDA context, NCCL's buffers, and what the allocator cannot use.
_HEADROOM = 0.08
_BACKWARD_PER_FORWARD = 2

# History lengths and candidate counts of its requests.
Batch = tuple[list[int], list[int]]


class Constants(Config):
    """What cannot be read off a data sheet; ``--calibrate`` fits them to the machine at hand.

    Each but the last two multiplies the seconds that peak rates give: of the tower's matmuls, of reading and updating
    tables, of the dense parameters' memory traffic, of the network. ``latency_s`` is that of a round of messages.
    """

    device: Literal["cpu", "cuda"] | None = None
    tower: float = pydantic.Field(3.3, ge=0)
    lookup: float = pydantic.Field(1.0, ge=0)
    sparse: float = pydantic.Field(1.0, ge=0)
    memory: float = pydantic.Field(1.0, ge=0)
    network: float = pydantic.Field(1.0, ge=0)
    latency_s: float = pydantic.Field(2e-5, ge=0)
    activations: float = pydantic.Field(1.0, gt=0)

    def seconds(self, terms: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Of each part of a step, from what ``step_terms`` counts."""
        return {part: sum(getattr(self, name) * value for name, value in each.items()) for part, each in terms.items()}


@dataclass(frozen=True)
class Workload:
    """Lengths of a sample of batches, in the order in which training reads them; histories are not cut yet."""

    history_lengths: tuple[tuple[int, ...], ...]
    candidate_counts: tuple[tuple[int, ...], ...]
    user_ids: Mapping[str, float]

    def cut(self, max_events: int) -> list[Batch]:
        return [([min(length, max_events) for length in lengths], list(counts))
                for lengths, counts in zip(self.history_lengths, self.candidate_counts, strict=True)]


def sample_workload(dataset: Dataset, batch_requests: int, seed: int, batches: range) -> Workload:
    """Batches of the job's sample stream, counted over all workers; reads lengths alone."""
    train = dataset.split_rows("train")
    row = np.concatenate([sample_rows(sample_positions(step, batch_requests), len(train), seed)[0]
                          for step in batches]) + train.start
    user = dataset.requests.take("user", row)
    length = dataset.requests.take("event_end", row).astype(np.int64) - dataset.user_start.take("start", user)
    count = dataset.requests.take("num_candidates", row).astype(np.int64)
    count = count * (1 + (dataset.config.candidates.per_positive or 0))
    user_ids = {}
    for name, column in dataset.users.items():
        lengths = np.ones(1) if column.offsets is None else np.diff(column.offsets)[user.astype(np.int64)]
        user_ids[f"users.{name}"] = float(lengths.mean())
    shape = (len(batches), batch_requests)
    return Workload(tuple(map(tuple, length.reshape(shape).tolist())), tuple(map(tuple, count.reshape(shape).tolist())),
                    user_ids)


@dataclass(frozen=True)
class Scenario:
    """A job on a machine. ``row_factor`` scales every table; ``choices`` constrain tables by name; ``batches`` of
    the data stand for all."""

    job: Job
    dataset: Dataset
    hardware: Hardware
    constants: Constants = Constants()
    row_factor: float = 1.0
    choices: Mapping[str, Choice] = field(default_factory=dict)
    batches: range = range(_SAMPLED_BATCHES)

    def __post_init__(self) -> None:
        if self.job.sparse.placement is not None:
            raise ConfigError(f"sparse.placement={self.job.sparse.placement} goes by the memory of the machine that "
                              "trains and is not planned for; add sparse.placement=null sparse.device_memory=null, and "
                              "give kernels with --constrain, such as item=fused_uvm_caching")

    def change(self, **changes: Any) -> "Scenario":
        """With another batch, L, number of ranks, memory, tables; ``ConfigError`` as for the job itself."""
        job, hardware = self.job, self.hardware
        data: dict[str, Any] = {name: changes.pop(name) for name in ("batch_requests", "max_events") if name in changes}
        machine = {name: changes.pop(name) for name in ("world_size", "device_bytes") if name in changes}
        if data:
            job = job.model_copy(update={"data": job.data.model_copy(update=data)})
        if machine:
            hardware = replace(hardware, **machine)
        return replace(self, job=job, hardware=hardware, **changes)

    def with_choice(self, tables: Iterable[TableConfig], **choice: Any) -> "Scenario":
        """With this said of these tables, beside what is said of them already."""
        changed = {table.name: replace(self.choices.get(table.name, Choice()), **choice) for table in tables}
        return replace(self, choices={**self.choices, **changed})

    @cached_property
    def schema(self) -> Schema:
        schema = self.dataset.schema
        tables = tuple(table.model_copy(update={"num_rows": max(1, round(table.num_rows * self.row_factor))})
                       for table in schema.tables)
        return schema.model_copy(update={"tables": tables})

    @cached_property
    def ranker(self) -> Ranker:
        with torch.device("meta"):
            ranker = build_ranker(self.job, self.schema, torch.device("meta"))
        # The estimators read the update rule off the parameters.
        apply_table_optimizer(ranker.sparse.parameters(), self.job.sparse)
        return ranker

    @property
    def tables(self) -> list[TableConfig]:
        """Every table of the model, as TorchRec describes it."""
        return [table for each in find_collections(self.ranker).values() for table in table_configs(each)]

    @property
    def pooled_tables(self) -> set[str]:
        return {feature.table for feature in self.schema.user_features if feature.multi_valued}

    @cached_property
    def workload(self) -> Workload:
        return sample_workload(self.dataset, self.job.data.batch_requests, self.job.seed, self.batches)

    @property
    def workers_per_rank(self) -> int:
        """Logical workers that the busiest rank hosts."""
        num_workers = self.job.elastic.num_workers or self.hardware.world_size
        return -(-num_workers // self.hardware.world_size)

    @property
    def batch_requests_per_rank(self) -> int:
        return self.job.data.batch_requests * self.workers_per_rank

    @cached_property
    def ids_per_request(self) -> dict[str, float]:
        """Mean number of ids a request looks up, by key."""
        batches = self.workload.cut(self.job.data.max_events)
        num_requests = self.job.data.batch_requests * len(batches)
        history = sum(sum(lengths) for lengths, _ in batches) / num_requests
        candidates = sum(sum(counts) for _, counts in batches) / num_requests
        return {**{f"history.{feature.name}": history for feature in self.schema.history_features},
                **{f"candidates.{feature.name}": candidates for feature in self.schema.item_features},
                **self.workload.user_ids}

    def largest_activations(self, batches: Iterable[Batch]) -> dict[str, int]:
        """Bytes by part of the tower, of the batch that needs most; none for a baseline."""
        model, train = self.job.model, self.job.train
        if not isinstance(model, TowerConfig):
            return {}
        sizes = [tower_bytes(model, input_widths(self.schema, self.job), len(self.schema.tasks), *batch,
                             train.recompute, 2 if train.precision == "bf16" else 4) for batch in batches]
        return max(sizes, key=lambda parts: sum(parts.values()))

    @cached_property
    def activation_parts(self) -> dict[str, int]:
        """Bytes by part of the tower, of the sampled batch that needs most."""
        largest = self.largest_activations(self.workload.cut(self.job.data.max_events))
        return {name: int(size * self.constants.activations) for name, size in largest.items()}

    @cached_property
    def fixed_bytes(self) -> dict[str, int]:
        """What every rank holds whatever the plan: looked-up rows, activations, and the tower with AdamW."""
        width = widths(self.schema, self.job.sparse)
        pooled = {f"users.{feature.name}" for feature in self.schema.user_features if feature.multi_valued}
        rows = sum((1.0 if key in pooled else self.ids_per_request.get(key, 1.0)) * columns * 4
                   for key, columns in width.items())
        # Weights, two moments, gradients; and of the reduction the workers' subtrees, what is sent and received.
        vectors = 4 + max(1, math.ceil(math.log2(self.workers_per_rank + 1))) + 2
        return {"rows": int(rows * self.batch_requests_per_rank), "activations": sum(self.activation_parts.values()),
                "dense": self.num_dense * 4 * vectors}

    @property
    def num_dense(self) -> int:
        return sum(parameter.numel() for parameter in self.ranker.tower.parameters())

    @property
    def headroom_bytes(self) -> int:
        return int(_HEADROOM * self.hardware.device_bytes)

    @property
    def reserved_bytes(self) -> int:
        """What tables and their exchange cannot have of a device."""
        return sum(self.fixed_bytes.values()) + self.headroom_bytes

    @cached_property
    def flops(self) -> float:
        """Of one rank's forward pass, on average over the sampled batches."""
        if not isinstance(self.job.model, TowerConfig):
            return 0.0
        batches = self.workload.cut(self.job.data.max_events)
        total = sum(tower_flops(self.job.model, input_widths(self.schema, self.job), len(self.schema.tasks), *batch)
                    .total for batch in batches)
        return total / len(batches) * self.workers_per_rank

    def space(self) -> Space:
        """Every way to place the tables."""
        return build_space(self.ranker, self.job.sparse, self.hardware, self.batch_requests_per_rank,
                           self.ids_per_request, self.reserved_bytes, self.choices, self.job.elastic.is_strict)


@dataclass(frozen=True)
class Outcome:
    """A search and what its plan costs: ``held[kind][rank]`` in bytes, ``step_s`` by part."""

    scenario: Scenario
    proposer: str
    partitioner: str
    found: Found
    held: Mapping[str, list[int]]
    terms: Mapping[str, Mapping[str, float]]
    step_s: Mapping[str, float]

    @property
    def fits(self) -> bool:
        return self.found.plan is not None

    @property
    def fullest(self) -> int:
        return max(map(sum, zip(*self.held.values(), strict=True)))

    @property
    def total_s(self) -> float:
        return sum(self.step_s.values()) if self.fits else math.nan

    @property
    def imbalance(self) -> float:
        """Fullest rank over the mean, of what the plan decides."""
        sizes = [sum(parts) for parts in zip(*(self.held[kind] for kind in KINDS[:3]), strict=True)]
        return max(sizes) * len(sizes) / sum(sizes) if sum(sizes) else 1.0


def solve(scenario: Scenario, proposer: str = "greedy", partitioner: str = "perf", space: Space | None = None
          ) -> Outcome:
    """Search and count."""
    space = space or scenario.space()
    found = find_plan(space, proposer, partitioner)
    num_ranks = scenario.hardware.world_size
    held = {kind: [scenario.fixed_bytes.get(kind, 0)] * num_ranks for kind in KINDS}
    times = {name: [0.0] * num_ranks for name in ("forward", "forward_exchange", "backward", "backward_exchange")}
    for shard in found.placed:
        for kind in KINDS[:3]:
            held[kind][shard.rank] += getattr(shard.size, kind)
        for name, values in times.items():
            values[shard.rank] += getattr(shard, f"{name}_s")
    terms = step_terms(scenario, {name: max(values) for name, values in times.items()})
    return Outcome(scenario, proposer, partitioner, found, held, terms, scenario.constants.seconds(terms))


def step_terms(scenario: Scenario, tables: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Each part of a step, as the trainer's clock names them, in seconds at peak rates (rounds for ``latency_s``) by
    the constant they are multiplied with; ``tables``: of the slowest rank."""
    hardware, size = scenario.hardware, scenario.num_dense * 4
    num_ranks = hardware.world_size
    # Ranks that share a core wait for each other.
    share = max(1.0, min(num_ranks, hardware.ranks_per_host) / hardware.cores) if hardware.cores else 1.0
    rounds = float(math.ceil(math.log2(num_ranks)))
    # TorchRec's estimator lets one rank pay for sending to itself.
    forward_exchange, backward_exchange = (tables[name] * (num_ranks > 1)
                                           for name in ("forward_exchange", "backward_exchange"))
    forward_passes = 1 + _BACKWARD_PER_FORWARD + bool(scenario.job.train.recompute)
    return {
        "lookup": {"lookup": tables["forward"] * share, "network": forward_exchange, "latency_s": 2 * rounds},
        "tower": {"tower": scenario.flops * forward_passes * share / hardware.flops[scenario.job.train.precision]},
        "reduce": {"memory": 3 * size * share / hardware.device_bw, "latency_s": 2 * rounds,
                   "network": 2 * size * (num_ranks - 1) / num_ranks / hardware.network_bw},
        "sparse": {"sparse": tables["backward"] * share, "network": backward_exchange, "latency_s": rounds},
        "dense": {"memory": 7 * size * share / hardware.device_bw},
    }
