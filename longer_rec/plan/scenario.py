"""One question to the planner: this job, on that machine. And its answer: bytes of every rank, seconds of a step."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import pydantic
import torch

from longer_rec.config import Config
from longer_rec.data.history import Dataset
from longer_rec.data.workload import Batch, Workload, sample_workload
from longer_rec.elastic.assignment import resolve_num_workers
from longer_rec.errors import ConfigError
from longer_rec.job import Job, build_ranker, input_widths, row_fetches, row_lookups
from longer_rec.model.baselines.common import SequenceConfig
from longer_rec.model.flops import tower_flops
from longer_rec.model.longer import TowerConfig
from longer_rec.model.memory import tower_bytes
from longer_rec.ranker import Ranker
from longer_rec.schema import Schema
from longer_rec.sparse.optimizers import apply_table_optimizer
from longer_rec.sparse.options import Choice, Hardware
from longer_rec.sparse.placement import DoesNotFit, Floats, place_equally, tiers_of
from longer_rec.sparse.planner import named_types
from longer_rec.sparse.search import TIMES, Found, Space, build_space, check_choices, find_plan
from longer_rec.sparse.tables import TableConfig, every_table, widths

KINDS = ("weights", "optimizer", "exchange", "rows", "activations", "dense")
# Kept free: the CUDA context, NCCL's buffers, and what the allocator cannot use.
_HEADROOM = 0.08
_BACKWARD_PER_FORWARD = 2


class Constants(Config):
    """What cannot be read off a data sheet; ``--calibrate`` fits them to the machine at hand.

    The first five multiply the seconds that peak rates give: of the tower's matmuls, of reading and updating tables, of
    the dense parameters' memory traffic, of the network. ``latency_s`` is that of a round of messages, ``call_s`` what
    the host takes for a table or a dense parameter whatever its size.
    """

    device: Literal["cpu", "cuda"] | None = None
    tower: float = pydantic.Field(3.3, ge=0)
    lookup: float = pydantic.Field(1.0, ge=0)
    sparse: float = pydantic.Field(1.0, ge=0)
    memory: float = pydantic.Field(1.0, ge=0)
    network: float = pydantic.Field(1.0, ge=0)
    latency_s: float = pydantic.Field(2e-5, ge=0)
    call_s: float = pydantic.Field(2e-5, ge=0)
    activations: float = pydantic.Field(1.0, gt=0)

    def seconds(self, terms: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Of each part of a step, from what ``step_terms`` counts."""
        return {part: sum(getattr(self, name) * value for name, value in each.items()) for part, each in terms.items()}


@dataclass(frozen=True)
class Scenario:
    """A job on a machine. ``row_factor`` scales every table; ``choices`` constrain tables by name; ``batches`` of the
    data (None: the first) stand for all; ``counts`` keeps how often rows are looked up, by L."""

    job: Job
    dataset: Dataset
    hardware: Hardware
    constants: Constants = Constants()
    row_factor: float = 1.0
    choices: Mapping[str, Choice] = field(default_factory=dict)
    batches: range | None = None
    counts: dict[int, Mapping[str, Floats]] = field(default_factory=dict, compare=False, repr=False)

    def change(self, **changes: Any) -> "Scenario":
        """With another batch, L, number of ranks, memory, tables."""
        data: dict[str, Any] = {name: changes.pop(name) for name in ("batch_requests", "max_events") if name in changes}
        sizes = ("world_size", "memory_bytes", "host_bytes", "ssd_bytes", "ssd_bw")
        machine = {name: changes.pop(name) for name in sizes if name in changes}
        return replace(self, job=self.job.model_copy(update={"data": self.job.data.model_copy(update=data)}),
                       hardware=replace(self.hardware, **machine), **changes)

    def with_choice(self, tables: Iterable[TableConfig], **choice: Any) -> "Scenario":
        """With this said of these tables, beside what is said of them already."""
        changed = {table.name: replace(self.allowed.get(table.name, Choice()), **choice) for table in tables}
        return replace(self, choices={**self.choices, **changed})

    @cached_property
    def allowed(self) -> Mapping[str, Choice]:
        """``choices``, and the types that ``sparse.plan`` names."""
        if self.job.sparse.plan == "auto":
            return self.choices
        return {**{name: Choice((kind,)) for name, kind in named_types(self.ranker, self.job.sparse).items()},
                **self.choices}

    @property
    def lookups(self) -> Mapping[str, Floats]:
        """Lookups of each row of each table in an epoch."""
        max_events = self.job.data.max_events
        if max_events not in self.counts:
            self.counts[max_events] = row_lookups(self.job, self.dataset)
        return self.counts[max_events]

    @cached_property
    def placed(self) -> Mapping[str, Choice]:
        """``allowed``, with the kernels of ``sparse.placement``; ``DoesNotFit`` when nothing holds the tables."""
        job, hardware = self.job, self.hardware
        if job.sparse.placement is None:
            return self.allowed
        fetches = row_fetches(job, self.dataset, self.lookups, hardware.world_size)
        places = place_equally(self.tables, fetches, job.sparse, hardware.world_size, tiers_of(hardware, job.sparse))
        return {name: replace(self.allowed.get(name, Choice()), kernels=(place.kernel,),
                              cache_load_factor=place.cache_load_factor, coverage=round(place.coverage, 4))
                for name, place in places.items()}

    def unplaced(self) -> "Scenario":
        """The same without ``sparse.placement``."""
        sparse = self.job.sparse.model_copy(update={"placement": None, "device_memory": None})
        return replace(self, job=self.job.model_copy(update={"sparse": sparse}))

    @cached_property
    def schema(self) -> Schema:
        schema = self.dataset.schema
        tables = tuple(table if table.name in schema.open_tables else table.model_copy(
            update={"num_rows": max(1, round(table.num_rows * self.row_factor))}) for table in schema.tables)
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
        return [table for _, _, table in every_table(self.ranker)]

    @property
    def pooled_tables(self) -> set[str]:
        return {feature.table for feature in self.schema.user_features if feature.multi_valued}

    @cached_property
    def workload(self) -> Workload:
        more = {} if self.batches is None else {"batches": self.batches}
        return sample_workload(self.dataset, self.job.data.batch_requests, self.job.data.max_events, self.job.seed,
                               **more)

    @property
    def num_workers(self) -> int:
        return self.job.elastic.num_workers or self.hardware.world_size

    @property
    def workers_per_rank(self) -> int:
        """Logical workers that the busiest rank hosts."""
        return -(-self.num_workers // self.hardware.world_size)

    @property
    def batch_requests_per_rank(self) -> int:
        return self.job.data.batch_requests * self.workers_per_rank

    @cached_property
    def ids_per_request(self) -> dict[str, float]:
        """Mean number of ids a request looks up, by key."""
        return self.workload.ids_per_request(self.schema)

    def largest_activations(self, batches: Iterable[Batch]) -> dict[str, int]:
        """Bytes by part of the tower, of the batch that needs most; none for a baseline without event tokens."""
        model, train = self.job.model, self.job.train
        if isinstance(model, SequenceConfig):
            raise ConfigError(f"model.kind={model.kind} cannot be planned: activations and work are counted for longer "
                              "and transformer alone; plan with one of those, the tables of both models are the same")
        if not isinstance(model, TowerConfig):
            return {}
        sizes = [tower_bytes(model, input_widths(self.schema, self.job), len(self.schema.tasks), *batch,
                             train.recomputed_whole, 4 if train.default_precision == "fp32" else 2,
                             4 if self.hardware.device == "cpu" else None) for batch in batches]
        return max(sizes, key=lambda parts: sum(parts.values()))

    @cached_property
    def activation_parts(self) -> dict[str, int]:
        """Bytes by part of the tower, of the sampled batch that needs most."""
        largest = self.largest_activations(self.workload.batches)
        return {name: int(size * self.constants.activations) for name, size in largest.items()}

    @cached_property
    def fixed_bytes(self) -> dict[str, int]:
        """What every rank holds whatever the plan: looked-up rows, activations, and the tower with AdamW."""
        width = widths(self.schema, self.job.sparse)
        rows = sum((1.0 if key.startswith("users.") else self.ids_per_request[key]) * columns * 4
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
        batches = self.workload.batches
        total = sum(tower_flops(self.job.model, input_widths(self.schema, self.job), len(self.schema.tasks), *batch)
                    .total for batch in batches)
        return total / len(batches) * self.workers_per_rank

    def check(self) -> None:
        """``ConfigError`` for all that can be known to be wrong without a search."""
        sparse, measured_on = self.job.sparse, self.constants.device
        if measured_on not in (None, self.hardware.device):
            raise ConfigError(f"--calibration was measured on {measured_on}, {self.hardware.name} is "
                              f"{self.hardware.device}; leave it out, or calibrate there")
        if sparse.placement is not None:
            if self.row_factor != 1.0:
                raise ConfigError(f"sparse.placement={sparse.placement} goes by how often the data's rows are looked "
                                  "up, and says nothing of other rows; add sparse.placement=null")
            if named := [name for name, choice in self.choices.items() if choice.kernels]:
                raise ConfigError(f"sparse.placement={sparse.placement} decides the kernel of table {named[0]!r}; give "
                                  "it none, or add sparse.placement=null sparse.device_memory=null")
        if sparse.plan_path is not None:
            raise ConfigError(f"sparse.plan={sparse.plan!r} would be a finished plan; plan searches for one: add "
                              "sparse.plan=auto, or a sharding type")
        resolve_num_workers(self.job.elastic, self.hardware.world_size)
        check_choices(self.ranker, sparse, self.hardware, self.allowed, self.job.elastic.is_strict)

    def space(self) -> Space:
        """Every way to place the tables."""
        return build_space(self.ranker, self.job.sparse, self.hardware, self.batch_requests_per_rank,
                           self.ids_per_request, self.reserved_bytes, self.placed, self.job.elastic.is_strict)


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
    def behind(self) -> dict[str, list[int]]:
        """Bytes of tables behind the devices, by rank."""
        held = {"host": [0] * self.scenario.hardware.world_size, "ssd": [0] * self.scenario.hardware.world_size}
        for shard in self.found.placed:
            for tier, sizes in held.items():
                sizes[shard.rank] += getattr(shard.size, tier)
        return held

    @property
    def total_s(self) -> float:
        return sum(self.step_s.values()) if self.fits else math.nan

    @property
    def requests_per_s(self) -> float:
        return self.scenario.job.step_requests(self.scenario.hardware.world_size) / self.total_s

    @property
    def imbalance(self) -> float:
        """Fullest rank over the mean, of what the plan decides."""
        sizes = [sum(parts) for parts in zip(*(self.held[kind] for kind in KINDS[:3]), strict=True)]
        return max(sizes) * len(sizes) / sum(sizes) if sum(sizes) else 1.0


def solve(scenario: Scenario, proposer: str = "greedy", partitioner: str = "perf", space: Space | None = None
          ) -> Outcome:
    """Search and count."""
    try:
        found = find_plan(space or scenario.space(), proposer, partitioner)
    except DoesNotFit:
        found = Found(None, (), 0.0, 0, 0)
    num_ranks = scenario.hardware.world_size
    held = {kind: [scenario.fixed_bytes.get(kind, 0)] * num_ranks for kind in KINDS}
    times = {name: [0.0] * num_ranks for name in TIMES}
    for shard in found.placed:
        for kind in KINDS[:3]:
            held[kind][shard.rank] += getattr(shard.size, kind)
        for name, values in times.items():
            values[shard.rank] += shard.seconds[name]
    terms = step_terms(scenario, {name: max(values) for name, values in times.items()})
    return Outcome(scenario, proposer, partitioner, found, held, terms, scenario.constants.seconds(terms))


def step_terms(scenario: Scenario, tables: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Each part of a step, as the trainer's clock names them, in seconds at peak rates (rounds for ``latency_s``, calls
    for ``call_s``) by the constant they are multiplied with; ``tables``: of the slowest rank."""
    hardware, size = scenario.hardware, scenario.num_dense * 4
    num_ranks = hardware.world_size
    # Ranks that share a core wait for each other.
    share = max(1.0, hardware.local_size / hardware.cores) if hardware.cores else 1.0
    rounds = float(math.ceil(math.log2(num_ranks)))
    # TorchRec's estimator lets one rank pay for sending to itself.
    forward_exchange, backward_exchange = (tables[name] * (num_ranks > 1)
                                           for name in ("forward_exchange", "backward_exchange"))
    forward_passes = 1 + _BACKWARD_PER_FORWARD + bool(scenario.job.train.recomputed_whole)
    table_calls, dense_calls = len(scenario.tables) * share, len(list(scenario.ranker.tower.parameters())) * share
    return {
        "lookup": {"call_s": table_calls, "lookup": tables["forward"] * share, "network": forward_exchange,
                   "latency_s": 2 * rounds},
        "tower": {"tower": scenario.flops * forward_passes * share /
                  hardware.flops["fp32" if scenario.job.train.default_precision == "fp32" else "bf16"]},
        "reduce": {"call_s": dense_calls, "memory": 3 * size * share / hardware.device_bw, "latency_s": 2 * rounds,
                   "network": 2 * size * (num_ranks - 1) / num_ranks / hardware.network_bw},
        "sparse": {"call_s": table_calls, "sparse": tables["backward"] * share, "network": backward_exchange,
                   "latency_s": rounds},
        "dense": {"call_s": dense_calls, "memory": 7 * size * share / hardware.device_bw},
    }
