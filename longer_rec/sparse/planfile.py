"""A sharding plan as data: what is printed, saved as ``plan.json``, agreed on by all ranks, and then obeyed."""

import json
from pathlib import Path

import pydantic
from torchrec.distributed.types import (
    CacheAlgorithm,
    CacheParams,
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
    ShardMetadata,
)

from longer_rec.config import Config, build_config, config_hash
from longer_rec.errors import ConfigError
from longer_rec.sparse.tables import CachePolicy, ShardingName

FLOAT_BYTES = 4


class Shard(Config):
    """A block of a table, and the rank that holds it."""

    rank: int = pydantic.Field(ge=0)
    offsets: tuple[int, int]
    sizes: tuple[int, int]


class TablePlan(Config):
    """Where one table lives. ``module`` is the path of its collection inside the sharded module.

    ``exact`` says whether training gives bitwise the same table for every number of ranks, given the same logical
    workers: pooled row-wise lookups and replicas sum in an order that depends on it.
    The last four belong to ``fused_uvm_caching`` and ``key_value``; see ``placement.py`` and ``cache.py``.
    """

    module: str
    table: str
    rows: int = pydantic.Field(ge=1)
    dim: int = pydantic.Field(ge=1)
    pooled: bool
    sharding_type: ShardingName
    kernel: str
    ranks: tuple[int, ...] = pydantic.Field(min_length=1)
    shards: tuple[Shard, ...]
    weight_bytes: int
    optimizer_bytes: int
    exact: bool
    cache_load_factor: float | None = pydantic.Field(None, gt=0, le=1, description="cached part of the rows")
    cache_policy: CachePolicy = "lfu"
    coverage: float | None = pydantic.Field(None, description="share of fetches that go to as many rows as "
                                           "the cache holds, the hottest")
    expected_hit_rate: dict[str, float] | None = None


class SparsePlan(Config):
    """The plan of every table of a model for ``world_size`` ranks."""

    version: int = 1
    world_size: int = pydantic.Field(ge=1)
    ranks_per_host: int = pydantic.Field(ge=1)
    device: str
    tables: tuple[TablePlan, ...]

    def sharding_plan(self) -> ShardingPlan:
        """The plan in TorchRec's terms."""
        modules: dict[str, EmbeddingModuleShardingPlan] = {}
        for table in self.tables:
            shards = [ShardMetadata(shard_offsets=list(shard.offsets), shard_sizes=list(shard.sizes),
                                    placement=self._placement(shard.rank)) for shard in table.shards]
            modules.setdefault(table.module, EmbeddingModuleShardingPlan())[table.table] = ParameterSharding(
                sharding_type=table.sharding_type, compute_kernel=table.kernel, ranks=list(table.ranks),
                sharding_spec=EnumerableShardingSpec(shards) if shards else None,
                cache_params=cache_params(table.cache_load_factor, table.cache_policy))
        return ShardingPlan(plan=dict(modules))

    def _placement(self, rank: int) -> str:
        device = self.device
        if device == "cuda":
            # Placements name the device within its host; hosts of one run hold equally many ranks.
            device = f"cuda:{rank % self.ranks_per_host}"
        return f"rank:{rank}/{device}"


def cache_params(load_factor: float | None, policy: CachePolicy) -> CacheParams | None:
    """A cache in TorchRec's terms."""
    if load_factor is None:
        return None
    return CacheParams(algorithm=CacheAlgorithm[policy.upper()], load_factor=load_factor)


def save_plan(plan: SparsePlan, path: Path) -> None:
    """Write ``plan.json``."""
    path.write_text(json.dumps(plan.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")


def load_plan(path: Path) -> SparsePlan:
    """Read ``plan.json``; ``ConfigError`` when it is missing or not a plan."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"plan {str(path)!r} cannot be read: {error}; give the path of a plan.json") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not a plan; plans are written to plan.json")
    return build_config(SparsePlan, content, str(path))


def plan_hash(plan: SparsePlan) -> str:
    """Twelve digits that change with everything a plan says."""
    return config_hash(plan)[:12]
