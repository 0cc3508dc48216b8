"""Tables for open id spaces: rows for those ids that come often enough, given to others when there are no more.

TorchRec's managed-collision collections ask a module which row an id has; this is that module. TorchRec's own one
evicts over all rows of a rank, from what the rank has seen since the last eviction. Here an id belongs to one of 64
buckets by its highest bits and a bucket to one rank, and all that is decided follows from the bucket's state and the
ids of the step: the model does not depend on the number of ranks, and all state is in buffers, in every checkpoint.
"""

from collections.abc import Callable, Mapping
from typing import Literal, Self

import pydantic
import torch
from torch import Tensor
from torchrec import EmbeddingCollection, EmbeddingConfig, JaggedTensor
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection
from torchrec.modules.mc_modules import ManagedCollisionCollection, ManagedCollisionModule

from longer_rec.config import Config
from longer_rec.runtime.hashing import splitmix64
from longer_rec.schema import OPEN_ID_BITS

# Parts that a table of open ids is divided into; each rank holds as many of them.
BUCKETS = 64
_BUCKET_BITS = BUCKETS.bit_length() - 1
# Counters of ids that have no row yet, by hash: so many for each row.
_COUNTERS = 8
_NEVER_LEAVES = (1 << 63) - 1
Start = Callable[[Tensor], Tensor]


class ManagedConfig(Config):
    """The rows of a table of open ids: how many there are, which ids get one, and which lose theirs."""

    rows: int = pydantic.Field(ge=2 * BUCKETS, le=1 << 40, description=f"a multiple of {BUCKETS}")
    policy: Literal["lfu", "lru"] = pydantic.Field("lfu", description="whose row is given to another id: that of the "
                                                   "least often, or of the least recently used one")
    admit_after: int = pydantic.Field(2, ge=1, description="workers' batches with an id before it gets a row")
    halve_every: int = pydantic.Field(0, ge=0, description="steps after which all counts are halved; 0: never")

    @pydantic.model_validator(mode="after")
    def _check_rows(self) -> Self:
        if self.rows % BUCKETS:
            raise ValueError(f"rows={self.rows} is no multiple of {BUCKETS}; use {self.rows + -self.rows % BUCKETS}")
        return self


class OpenIds(ManagedCollisionModule):
    """Rows ``first`` to ``first + count`` of a table's ``config.rows``, whole buckets of them.

    The first row of a bucket is what all its ids look up that have none; the others belong to one id each. ``use`` (V)
    is how often (LFU) or at which step (LRU) a row's id was last counted, ``seen`` how often ids without a row were.
    """

    def __init__(self, config: ManagedConfig, first: int, count: int, device: torch.device) -> None:
        # The segments are the same on any number of ranks, and so is what a checkpoint says of them.
        super().__init__(device=device, output_segments=[0, config.rows])
        self.config, self.first, self.count = config, first, count
        self.per_bucket = config.rows // BUCKETS
        self.register_buffer("ids", torch.zeros(count, dtype=torch.int64, device=device))
        self.register_buffer("use", torch.full((count,), -1, dtype=torch.int64, device=device))
        self.register_buffer("seen", torch.zeros(count, _COUNTERS, dtype=torch.int64, device=device))
        self._rows: tuple[Tensor, list[Tensor], Start] | None = None

    def attach(self, weight_VE: Tensor, states: list[Tensor], start: Start) -> None:
        """The rows that are this module's to start anew, their optimizer state, and how an id's row begins."""
        self._rows = weight_VE, states, start

    @torch.no_grad()
    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """In training: count the ids of a step, and give rows to those that have earned one.

        Sorts all rows of the rank: 19 ms a step for 100,000 of them, 140 ms for a million (one core of an AMD Zen 5,
        busy otherwise, November 2026).
        """
        if self.training:
            self._current_iter_tensor += 1
            ids, count = torch.unique(torch.cat([one.values() for one in features.values()]), return_counts=True)
            known = ids > 0
            slot, hit = self._find(ids)
            self.use[slot[hit]] = self._used(self.use[slot[hit]] + count[hit])
            self._admit(ids[known & ~hit], count[known & ~hit])
            # int(): a host sync on GPUs, for those who halve.
            if self.config.halve_every and int(self._current_iter_tensor) % self.config.halve_every == 0:
                self.seen.div_(2, rounding_mode="floor")
                if self.config.policy == "lfu":
                    self.use.copy_(torch.where(self.use > 0, self.use // 2, self.use))
        return features

    def _used(self, count: Tensor) -> Tensor:
        return count if self.config.policy == "lfu" else self._current_iter_tensor.expand_as(count)

    def _admit(self, ids: Tensor, count: Tensor) -> None:
        """Ids, ascending, without a row: those seen ``admit_after`` times take the places of the least used.

        Of a bucket's ids the most seen comes first, of its rows the least used, in ties the smaller id; a row is left
        to its id if that was used more (LFU), or in this very step (LRU).
        """
        bucket = (ids >> (OPEN_ID_BITS - _BUCKET_BITS)) - self.first // self.per_bucket
        counters = self.per_bucket * _COUNTERS
        at = bucket * counters + (splitmix64(ids) & ((1 << 62) - 1)) % counters
        self.seen.view(-1).index_add_(0, at, count)
        earned = self.seen.view(-1)[at]
        ready = earned >= self.config.admit_after
        ids, bucket, earned = ids[ready], bucket[ready], earned[ready]
        order = torch.argsort(earned, descending=True, stable=True)
        order = order[torch.argsort(bucket[order], stable=True)]
        ids, bucket, earned = ids[order], bucket[order], earned[order]
        place = torch.arange(len(ids), device=ids.device) - torch.searchsorted(bucket, bucket)
        use = self.use.view(-1, self.per_bucket).clone()
        use[:, 0] = _NEVER_LEAVES
        by_id = torch.argsort(self.ids.view_as(use), dim=1, stable=True)
        leaving = by_id.gather(1, torch.argsort(use.gather(1, by_id), dim=1, stable=True))
        slot = bucket * self.per_bucket + leaving[bucket, place.clamp(max=self.per_bucket - 1)]
        new = self._used(earned)
        takes = (place < self.per_bucket - 1) & (new > self.use[slot])
        self._give(slot[takes], ids[takes], new[takes])

    def _give(self, slot: Tensor, ids: Tensor, use: Tensor) -> None:
        self.ids[slot], self.use[slot] = ids, use
        assert self._rows is not None, "rows are attached before training"
        weight_VE, states, start = self._rows
        weight_VE[slot] = start(ids).to(weight_VE.dtype)
        for state in states:
            state[slot] = 0

    def _find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The row that each id has here, and whether it has one."""
        ordered, slot = torch.sort(self.ids)
        at = torch.searchsorted(ordered, ids).clamp(max=self.count - 1)
        return slot[at], (ordered[at] == ids) & (ids > 0)

    def remap(self, features: dict[str, JaggedTensor], mutate_miss_lengths: bool = True,
              write_weights: Tensor | None = None) -> dict[str, JaggedTensor]:
        """Ids as rows of the whole table."""
        rows = {}
        for name, feature in features.items():
            slot, hit = self._find(feature.values())
            shared = (feature.values() >> (OPEN_ID_BITS - _BUCKET_BITS)) * self.per_bucket
            rows[name] = JaggedTensor(torch.where(hit, slot + self.first, shared), feature.weights_or_none(),
                                      feature.lengths())
        return rows

    def forward(self, features: dict[str, JaggedTensor], mutate_miss_lengths: bool = True) -> dict[str, JaggedTensor]:
        return self.remap(self.profile(features))

    def preprocess(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        return features

    def evict(self) -> Tensor | None:
        """None: rows are started anew where they are given away. TorchRec's way has no CPU kernel."""
        return None

    def output_size(self) -> int:
        return self.count

    def input_size(self) -> int:
        return 1 << OPEN_ID_BITS

    def buckets(self) -> int:
        return BUCKETS

    def validate_state(self) -> None:
        """Any state of as many rows is one."""

    def open_slots(self) -> Tensor:
        return (self.ids == 0).sum().reshape(1)

    def rebuild_with_output_id_range(self, output_id_range: tuple[int, int], output_segments: list[int],
                                     device: torch.device | None = None) -> "OpenIds":
        """A rank's part of it, empty."""
        first, end = output_id_range
        return OpenIds(self.config, first, end - first, device or self.device)


def embedding_configs(collection: EmbeddingCollection | ManagedCollisionEmbeddingCollection) -> list[EmbeddingConfig]:
    """TorchRec's description of each table of a collection, of open ids or not."""
    managed = isinstance(collection, ManagedCollisionEmbeddingCollection)
    return list((collection._embedding_collection if managed else collection).embedding_configs())


def open_collection(collection: EmbeddingCollection, managed: Mapping[str, ManagedConfig]
                    ) -> ManagedCollisionEmbeddingCollection:
    """The collection, its ids mapped to rows by ``OpenIds``."""
    tables = collection.embedding_configs()
    # Replaced by each rank's own part when it is sharded: no memory for it here.
    modules: dict[str, ManagedCollisionModule] = {
        table.name: OpenIds(managed[table.name], 0, table.num_embeddings, torch.device("meta")) for table in tables}
    remap = ManagedCollisionCollection(modules, tables)
    return ManagedCollisionEmbeddingCollection(collection, remap, return_remapped_features=False)
