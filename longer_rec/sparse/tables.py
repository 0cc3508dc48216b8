"""The embedding tables of a schema: their configuration, and the unsharded module."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, Self, TypeAlias, get_args

import pydantic
import torch
from torch import nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    PoolingType,
)
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection

from longer_rec.config import Config
from longer_rec.errors import ConfigError
from longer_rec.schema import Schema
from longer_rec.sparse.lookup import Pooling, SparseTables
from longer_rec.sparse.open_ids import ManagedConfig, embedding_configs, open_collection

ShardingName = Literal["table_wise", "row_wise", "column_wise", "data_parallel"]
SparseOptimizerName = Literal["rowwise_adagrad", "adagrad", "sgd"]
Collection: TypeAlias = EmbeddingCollection | EmbeddingBagCollection | ManagedCollisionEmbeddingCollection
TableConfig: TypeAlias = EmbeddingConfig | EmbeddingBagConfig
KernelName = Literal["fused", "fused_uvm", "fused_uvm_caching", "key_value"]
# Those that this package trains.
TRAINED_KERNELS: tuple[KernelName, ...] = ("fused", "fused_uvm", "fused_uvm_caching")
NOT_TRAINED = ("a table on SSD (key_value) can be planned, not trained: this package cannot start its rows as a "
               "function of (seed, row), nor digest or save them, on any machine")
# Those with a device cache.
CACHED_KERNELS: tuple[KernelName, ...] = ("fused_uvm_caching", "key_value")
CachePolicy = Literal["lfu", "lru"]

# FBGEMM's kernels read vectors of four floats: other widths are refused on a GPU, at run time.
DIM_MULTIPLE = 4


class SparseConfig(Config):
    """Widths, initial spread, update rule and placement of the embedding tables.

    ``plan`` is "auto" (TorchRec's planner decides), one sharding type for every table, a sharding type for each
    table by name, or the path of a ``plan.json``.
    """

    dims: dict[str, int] = pydantic.Field(default_factory=dict, description="width of a row, by table")
    default_dim: int | None = pydantic.Field(default=None, description="width of the tables not named in dims")
    init_std: dict[str, float] = pydantic.Field(default_factory=dict, description="initial spread, by table")
    default_init_std: float = pydantic.Field(default=0.3, ge=0.0)
    pooling: Pooling = "mean"
    optimizer: SparseOptimizerName = "rowwise_adagrad"
    lr: float = pydantic.Field(default=0.01, gt=0.0)
    eps: float = pydantic.Field(default=1e-8, gt=0.0)
    weight_decay: float = pydantic.Field(default=0.0, ge=0.0, description="of the rows a step touches; "
                                         "rowwise_adagrad alone")
    managed: dict[str, ManagedConfig] = pydantic.Field(default_factory=dict, description="rows of the tables of open "
                                                       "ids, by table")
    plan: str | dict[str, ShardingName] = "auto"
    kernel: KernelName = "fused"
    placement: Literal["auto"] | None = pydantic.Field(default=None, description="a kernel for each table, by how "
                                                       "often its rows are looked up; None: kernel, for all")
    device_memory: pydantic.ByteSize | None = pydantic.Field(
        default=None, gt=0, description="what tables may take on each rank's device, such as 20GB; None: half of a "
        "GPU's memory, all of a CPU's; placement alone")
    cache_policy: CachePolicy = pydantic.Field(default="lfu", description="which rows leave a cache; placement alone")

    @pydantic.model_validator(mode="after")
    def _check_placement(self) -> Self:
        if self.placement is None and self.device_memory is not None:
            raise ValueError(f"device_memory={self.device_memory} has no effect without placement; set placement=auto")
        if self.device_memory is not None and self.device_memory < 1000:
            raise ValueError(f"device_memory={self.device_memory} is a number of bytes; write it with a unit, as 20GB")
        if self.placement is not None and self.kernel != "fused":
            raise ValueError(f"kernel={self.kernel} and placement={self.placement} exclude each other; drop one")
        if self.managed and (self.placement is not None or self.kernel != "fused"):
            raise ValueError("tables of open ids (managed) are held whole on the device, for their rows change; drop "
                             f"{'placement' if self.placement is not None else f'kernel={self.kernel}'}")
        if self.plan_path is not None and (self.placement is not None or self.kernel != "fused"):
            raise ValueError(f"plan={self.plan} is taken as it is, with its kernels; drop kernel, placement and "
                             "device_memory")
        return self

    @property
    def plan_path(self) -> Path | None:
        """``plan`` where it is a file: neither "auto" nor sharding types."""
        if isinstance(self.plan, str) and self.plan not in ("auto", *get_args(ShardingName)):
            return Path(self.plan)
        return None


def check_names(named: Iterable[str], known: Iterable[str], where: str) -> None:
    """``ConfigError`` with the nearest name when ``named`` holds a table that does not exist."""
    known = sorted(known)
    for name in named:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise ConfigError(f"{where} names table {name!r}; "
                              + (f"did you mean {near[0]!r}?" if near else f"the tables are {', '.join(known)}"))


def resolve_dims(schema: Schema, config: SparseConfig) -> dict[str, int]:
    """Width of every table of the schema; ``ConfigError`` for an unknown table, a missing or an impossible width."""
    check_names(config.dims, schema.num_rows, "sparse.dims")
    check_names(config.init_std, schema.num_rows, "sparse.init_std")
    missing = [name for name in schema.num_rows if name not in config.dims]
    if missing and config.default_dim is None:
        raise ConfigError(f"sparse.dims has no width for table {missing[0]!r}; add it or set sparse.default_dim")
    dims = {name: config.dims.get(name, config.default_dim or 0) for name in schema.num_rows}
    for name, dim in dims.items():
        if dim < DIM_MULTIPLE or dim % DIM_MULTIPLE:
            raise ConfigError(f"sparse.dims.{name}={dim}: a width is a positive multiple of {DIM_MULTIPLE}; "
                              f"use {max(DIM_MULTIPLE, -(-dim // DIM_MULTIPLE) * DIM_MULTIPLE)}")
    return dims


def resolve_rows(schema: Schema, config: SparseConfig) -> dict[str, int]:
    """Rows of every table; ``ConfigError`` unless ``managed`` names those of open ids, and no others."""
    check_names(config.managed, schema.num_rows, "sparse.managed")
    for name in schema.open_tables - config.managed.keys():
        raise ConfigError(f"table {name!r} has open ids and needs rows; say how many, such as sparse.managed="
                          f"{{{name}: {{rows: 100032}}}}")
    for name in config.managed.keys() - schema.open_tables:
        raise ConfigError(f"sparse.managed names table {name!r}, whose ids are rows of it already; leave it out, or "
                          "prepare the data with type: open for it")
    return {name: config.managed[name].rows if name in config.managed else rows
            for name, rows in schema.num_rows.items()}


def _check_pooled(schema: Schema) -> None:
    for table, keys in schema.pooled_keys.items():
        if sharers := schema.row_keys.get(table):
            raise ConfigError(f"multi-valued feature {keys[0]!r} and {sharers[0]!r} share table {table!r}; a table "
                              "is either pooled or looked up row by row: give the multi-valued feature its own table")


def widths(schema: Schema, config: SparseConfig) -> dict[str, int]:
    """Embedding width E of each key that ``SparseTables.forward`` returns."""
    dims = resolve_dims(schema, config)
    _check_pooled(schema)
    return {key: dims[table] for table, keys in [*schema.row_keys.items(), *schema.pooled_keys.items()] for key in keys}


def build_tables(schema: Schema, config: SparseConfig, device: torch.device | str = "meta") -> SparseTables:
    """The unsharded tables; on "meta" they take no memory until they are sharded.

    Values are meaningless until ``initialize_tables`` has filled them. A table that no feature uses is left out.
    """
    dims, num_rows, device = resolve_dims(schema, config), resolve_rows(schema, config), torch.device(device)
    _check_pooled(schema)
    by_dim: dict[tuple[int, bool], list[EmbeddingConfig]] = {}
    for table in schema.row_keys:
        by_dim.setdefault((dims[table], table in config.managed), []).append(EmbeddingConfig(
            name=table, num_embeddings=num_rows[table], embedding_dim=dims[table], feature_names=[table]))
    bags = [EmbeddingBagConfig(name=table, num_embeddings=num_rows[table], embedding_dim=dims[table],
                               feature_names=keys, pooling=PoolingType.SUM)
            for table, keys in schema.pooled_keys.items()]
    ec = nn.ModuleDict()
    for (dim, managed), tables in sorted(by_dim.items(), key=lambda item: item[0]):
        collection = EmbeddingCollection(tables=tables, device=device)
        ec[f"{'open' if managed else 'dim'}{dim}"] = (open_collection(collection, config.managed) if managed else
                                                      collection)
    ebc = EmbeddingBagCollection(tables=bags, device=device) if bags else None
    return SparseTables(schema, ec, ebc, config.pooling)


def find_collections(module: nn.Module) -> Mapping[str, Collection]:
    """The unsharded collections of a module by their path in it."""
    found = {path: child for path, child in module.named_modules() if isinstance(child, Collection)}
    managed = [f"{path}." for path, child in found.items() if isinstance(child, ManagedCollisionEmbeddingCollection)]
    return {path: child for path, child in found.items() if not any(path.startswith(outer) for outer in managed)}


def every_table(module: nn.Module) -> list[tuple[str, Collection, TableConfig]]:
    """(path of its collection, the collection, TorchRec's description) of each table of an unsharded module."""
    return [(path, collection, table) for path, collection in find_collections(module).items()
            for table in table_configs(collection)]


def table_configs(collection: Collection) -> list[TableConfig]:
    """TorchRec's description of each table of a collection."""
    if isinstance(collection, EmbeddingBagCollection):
        return list(collection.embedding_bag_configs())
    return embedding_configs(collection)
