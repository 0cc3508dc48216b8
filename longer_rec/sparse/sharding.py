"""From a module on the meta device and a plan to the sharded module."""

import torch
from torch import nn
from torchrec.distributed.comm_ops import set_gradient_division
from torchrec.distributed.model_parallel import DataParallelWrapper, DistributedModelParallel
from torchrec.distributed.types import ShardingEnv

from longer_rec.sparse.lookup import SparseTables
from longer_rec.sparse.optimizers import apply_table_optimizer
from longer_rec.sparse.options import build_sharders
from longer_rec.sparse.planfile import SparsePlan
from longer_rec.sparse.tables import SparseConfig, find_collections


class ReducedByCaller(DataParallelWrapper):
    """Leaves the replicated tower alone: its gradients are reduced by logical worker, not by rank."""

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        """Nothing to wrap."""


def shard_ranker(module: nn.Module, plan: SparsePlan, config: SparseConfig,
                 device: torch.device) -> DistributedModelParallel:
    """Shard every table of ``module`` by the plan, with its update rule inside backward; a collective call.

    Gradients of embeddings are **summed** over ranks: TorchRec's division by the world size is switched off for
    the whole process. A loss is therefore divided by the global number of examples, and the result does not depend
    on the number of ranks. Table values are undefined until ``initialize_tables`` or a checkpoint has filled them.
    """
    set_gradient_division(False)
    replicated = {(table.module, table.table) for table in plan.tables if table.sharding_type == "data_parallel"}
    for path, collection in find_collections(module).items():
        fused = [parameter for name, parameter in collection.named_parameters()
                 if (path, name.rsplit(".", 2)[1]) not in replicated]
        apply_table_optimizer(fused, config)
    _equalize_requests(module, plan)
    return DistributedModelParallel(module, env=None, device=device, plan=plan.sharding_plan(),
                                    sharders=build_sharders(config), data_parallel_wrapper=ReducedByCaller())


def _equalize_requests(module: nn.Module, plan: SparsePlan) -> None:
    split_bags = {table.module for table in plan.tables if table.pooled and table.sharding_type == "row_wise"}
    for path, tables in module.named_modules():
        if isinstance(tables, SparseTables):
            tables.equal_requests = f"{path}.ebc".removeprefix(".") in split_bags
