"""The one lookup of a step: each distinct id of a logical worker once, for all own workers together.

It has two halves. ``send`` needs ids alone, so those of the next step travel while the tower computes; ``receive``
reads the rows, which the last step's update must have reached.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function
from torchrec import EmbeddingBagCollection, EmbeddingCollection, JaggedTensor, KeyedJaggedTensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import Awaitable, ShardedModule

from longer_rec.batch import RequestBatch, deduplicate
from longer_rec.schema import Schema
from longer_rec.sparse.open_ids import embedding_configs

Pooling = Literal["sum", "mean"]


class Travelling:
    """Ids of one collection on their way to the ranks that hold the rows; every method is a collective call."""

    def __init__(self, collection: Any, ids: KeyedJaggedTensor) -> None:
        self._collection, self._ids = collection, ids
        self._whole = _whole(collection)
        self._travels = isinstance(collection, ShardedModule) and self._whole is None
        if self._travels:
            self._context = collection.create_context()
            self._sizes = collection.input_dist(self._context, ids)

    def post(self) -> None:
        """All ranks know how many ids they get: send them."""
        if self._travels:
            self._sent = _wait(self._sizes)

    def rows(self) -> Any:
        """Read the rows, and start them on their way back."""
        if self._travels:
            return self._collection.compute_and_output_dist(self._context, _wait(self._sent))
        if self._whole is not None:
            return _read(self._collection, self._whole, self._ids)
        return self._collection(self._ids)


def _whole(collection: nn.Module) -> Any:
    """TorchRec's sharding of a collection whose tables the only rank holds whole, else None."""
    shardings: dict[str, Any] = {}
    if isinstance(collection, ShardedEmbeddingCollection):
        shardings = collection._sharding_type_to_sharding
    elif isinstance(collection, ShardedEmbeddingBagCollection):
        shardings = dict(zip(collection._sharding_types, collection._embedding_shardings, strict=True))
    return shardings["table_wise"] if [*shardings] == ["table_wise"] and dist.get_world_size() == 1 else None


def _read(collection: Any, sharding: Any, ids: KeyedJaggedTensor) -> dict[str, Any]:
    """What TorchRec gives for a whole collection, from the same kernel: its way from a rank to itself, where nothing is
    sent, takes a fifth of lookup and update (configs/first.yaml, one core of an Intel Xeon, December 2026)."""
    (lookup,), order, dims = collection._lookups, sharding.feature_names(), sharding.embedding_dims()
    if order != ids.keys():
        ids = ids.permute([ids.keys().index(key) for key in order])
    found = lookup(ids)
    if isinstance(collection, ShardedEmbeddingBagCollection):
        return dict(zip(order, found.split(dims, dim=1), strict=True))
    parts = found.view(-1, dims[0]).split(ids.length_per_key())
    return {key: JaggedTensor(part, lengths=ids.lengths()) for key, part in zip(order, parts, strict=True)}


class SentIds:
    """All ids of a step on their way; ``batches`` are those of the own workers that they are from."""

    def __init__(self, batches: Sequence[RequestBatch], travelling: dict[str, Travelling]) -> None:
        self.batches, self.travelling = batches, travelling
        self._posted = False

    def post(self) -> None:
        """The second half of the way, which waits for no rank once it has sent; a second call does nothing."""
        if not self._posted:
            for each in self.travelling.values():
                each.post()
        self._posted = True


class SparseTables(nn.Module):
    """All tables of a model.

    ``ec`` holds one ``EmbeddingCollection`` for each width (TorchRec wants equal widths within one), under the name
    ``dim16`` for width 16, and one for its tables of open ids, ``open16``: history, candidate and single-valued user
    features. ``ebc`` pools the multi-valued user features and is there only when the schema has some. Sharding replaces
    these collections in place; the unsharded module is the meaning, the sharded one the speed.
    """

    def __init__(self, schema: Schema, ec: nn.ModuleDict, ebc: EmbeddingBagCollection | None, pooling: Pooling = "mean"
                 ) -> None:
        super().__init__()
        self.schema = schema
        self.ec = ec
        self.ebc = ebc
        self.pooling = pooling
        self._tables = {name: [table.name for table in embedding_configs(cast(EmbeddingCollection, collection))]
                        for name, collection in ec.items()}
        self._pooled_keys = [key for keys in schema.pooled_keys.values() for key in keys]
        # Set by sharding when a pooled table is split by rows: its reduce-scatter, under gloo, needs as many
        # requests on every rank.
        self.equal_requests = False

    def forward(self, *batches: RequestBatch) -> dict[str, Tensor]:
        """Embeddings of workers' batches, one after the other, by key.

        "history.<feature>" (T x E), "candidates.<feature>" (C x E) and "users.<feature>" (B x E), rows in the order of
        the batches' ids.
        """
        sent = self.send(batches)
        workers = split_rows(self.receive(sent), sent.batches)
        parts = [spread(batch, rows, self.schema) for batch, rows in zip(sent.batches, workers, strict=True)]
        return {key: torch.cat([part[key] for part in parts]) if parts[1:] else value
                for key, value in parts[0].items()}

    def send(self, batches: Sequence[RequestBatch]) -> SentIds:
        """Tell the other ranks how many ids each gets."""
        batches = [batch if batch.distinct else deduplicate(batch, self.schema) for batch in batches]
        travelling = {name: Travelling(self.ec[name], _distinct_ids(batches, tables))
                      for name, tables in self._tables.items()}
        if self.ebc is not None:
            travelling["ebc"] = Travelling(self.ebc, self._pooled_ids(batches))
        return SentIds(batches, travelling)

    def receive(self, sent: SentIds) -> dict[str, Tensor]:
        """Rows of each table's distinct ids, worker after worker, and of each pooled key's requests.

        Every exchange is started before the first is waited for, so that they overlap.
        """
        sent.post()
        pending = {name: each.rows() for name, each in sent.travelling.items()}
        rows: dict[str, Tensor] = {}
        # Key by key: the order in which TorchRec returns them depends on the plan.
        for name, tables in self._tables.items():
            # A collection of open ids also gives the rows that it looked up.
            found = _wait(pending[name][0] if isinstance(pending[name], tuple) else pending[name])
            rows.update({table: found[table].values() for table in tables})
        if self.ebc is not None:
            keyed = _wait(pending["ebc"])
            rows.update({key: self._pooled(keyed[key], sent.batches, key) for key in self._pooled_keys})
        return rows

    def _pooled(self, sum_BE: Tensor, batches: Sequence[RequestBatch], key: str) -> Tensor:
        """Cut the padding off, and divide by the number of ids for the mean; a request without ids stays 0."""
        length_B = _user_lengths(batches, key)
        sum_BE = sum_BE[:length_B.numel()]
        if self.pooling == "sum":
            return sum_BE
        # Here and not in TorchRec, whose mean is divided twice in a plan that mixes row_wise with other types (1.8).
        return sum_BE / length_B.clamp(min=1).unsqueeze(1)

    def _pooled_ids(self, batches: Sequence[RequestBatch]) -> KeyedJaggedTensor:
        """Ids to pool; with ``equal_requests`` filled up with empty requests to the largest number on any rank."""
        num_requests = largest = sum(batch.num_requests for batch in batches)
        if self.equal_requests:
            everyone = torch.tensor(num_requests, device=batches[0].history_length_B.device)
            dist.all_reduce(everyone, op=dist.ReduceOp.MAX)
            # .item(): a host sync on GPUs, paid by plans with pooled row-wise tables alone.
            largest = int(everyone.item())
        # TorchRec cannot shape the lengths of no requests at all.
        num_empty = max(largest, 1) - num_requests
        lengths = [nn.functional.pad(_user_lengths(batches, key), (0, num_empty)) for key in self._pooled_keys]
        return KeyedJaggedTensor(keys=self._pooled_keys, lengths=torch.cat(lengths), stride=num_requests + num_empty,
                                 values=torch.cat([batch.ids(key) for key in self._pooled_keys for batch in batches]))


def spread(batch: RequestBatch, rows: Mapping[str, Tensor], schema: Schema) -> dict[str, Tensor]:
    """The embeddings of one worker's features, by key, from the rows of its distinct ids."""
    embedded = {key: rows[key] for keys in schema.pooled_keys.values() for key in keys}
    for table, keys in schema.row_keys.items():
        spread_NE = _Spread.apply(rows[table], batch.place[table], batch.order[table], batch.start[table])
        embedded.update(zip(keys, spread_NE.split([batch.ids(key).numel() for key in keys]), strict=True))
    return embedded


class _Spread(torch.autograd.Function):
    """``index_select`` whose backward adds up one distinct id's gradients after the other, in their order.

    The sums are those of ``index_add``, in a quarter of its time, and on a GPU in the same order every time.
    """

    @staticmethod
    def forward(ctx: Any, row_VE: Tensor, place: Tensor, order: Tensor, start: Tensor) -> Tensor:
        ctx.save_for_backward(order, start)
        return row_VE.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        order, start = ctx.saved_tensors
        return nn.functional.embedding_bag(order, grads[0], start, mode="sum"), None, None, None


def split_rows(rows: dict[str, Tensor], batches: Sequence[RequestBatch]) -> list[dict[str, Tensor]]:
    """Each worker's slices of what ``receive`` returned."""
    slices = {name: value.split([batch.distinct[name].numel() if name in batch.distinct else batch.num_requests
                                 for batch in batches]) for name, value in rows.items()}
    return [{name: parts[worker] for name, parts in slices.items()} for worker in range(len(batches))]


def _distinct_ids(batches: Sequence[RequestBatch], tables: list[str]) -> KeyedJaggedTensor:
    """Distinct ids of each table, which is its own feature, and a worker where TorchRec thinks of a request."""
    values = [batch.distinct[table] for table in tables for batch in batches]
    return KeyedJaggedTensor(keys=tables, values=torch.cat(values), stride=len(batches),
                             lengths=torch.tensor([each.numel() for each in values], device=values[0].device))


def _user_lengths(batches: Sequence[RequestBatch], key: str) -> Tensor:
    name = key.partition(".")[2]
    return torch.cat([batch.user_length_B[name] for batch in batches])


def _wait(pending: Any) -> Any:
    """What other ranks sent; in a profiler's record it is an "exchange"."""
    with record_function("exchange"):
        return pending.wait() if isinstance(pending, Awaitable) else pending
