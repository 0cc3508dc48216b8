"""The only place where tables meet a tower: a batch of requests in, logits out."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from longer_rec.batch import RequestBatch
from longer_rec.model.inputs import CandidateSide, InstanceSide, UserSide
from longer_rec.model.tower import AnyTower
from longer_rec.schema import Schema

if TYPE_CHECKING:
    from longer_rec.sparse.lookup import SentIds, SparseTables  # imports TorchRec, which serving does without


class Ranker(nn.Module):
    """``sparse`` looks ids up, ``tower`` ranks; TorchRec shards the former and replicates the latter.

    ``sparse`` is ``sparse.lookup.SparseTables`` in training and ``bundle.ServedTables``, without TorchRec, in serving.

    Training calls ``send`` and ``receive`` once for all logical workers and ``logits`` worker by worker; evaluation
    calls ``forward``; all of them go through the tower's ``encode`` and ``score``, as serving does.
    """

    def __init__(self, schema: Schema, sparse: nn.Module, tower: AnyTower) -> None:
        super().__init__()
        self.schema = schema
        self.sparse = sparse
        self.tower = tower

    def lookup(self, batch: RequestBatch) -> dict[str, Tensor]:
        """Embeddings of every feature, by ``history.``, ``candidates.`` and ``users.`` keys; a collective call."""
        embeddings: dict[str, Tensor] = self.sparse(batch)
        return embeddings

    def send(self, batches: Sequence[RequestBatch]) -> "SentIds":
        """Start on the lookup of the own workers' batches, as far as ids alone go; a collective call."""
        return cast("SparseTables", self.sparse).send(batches)

    def receive(self, sent: "SentIds") -> dict[str, Tensor]:
        """The rest of the lookup: rows of the distinct ids, worker after worker; a collective call."""
        return cast("SparseTables", self.sparse).receive(sent)

    def logits(self, batch: RequestBatch, lookup: Mapping[str, Tensor]) -> Tensor:
        """Logits (C x Y) of one batch, given its embeddings."""
        state = self.tower.encode(self.user_side(batch, lookup))
        return self.tower.score(state, self.candidate_side(batch, lookup))

    def forward(self, batch: RequestBatch) -> Tensor:
        """Logits (C x Y): lookup, then tower."""
        return self.logits(batch, self.lookup(batch))

    def user_side(self, batch: RequestBatch, lookup: Mapping[str, Tensor]) -> UserSide:
        """What ``encode`` may see: nothing of any candidate is in it."""
        request_time_T = torch.repeat_interleave(batch.request_time_B, batch.history_length_B,
                                                 output_size=batch.num_events)
        return UserSide(
            event_embedding={feature.name: lookup[f"history.{feature.name}"]
                             for feature in self.schema.history_features},
            event_id=batch.history,
            age_T=request_time_T - batch.history_time_T,
            length_B=batch.history_length_B,
            user_embedding={feature.name: lookup[f"users.{feature.name}"] for feature in self.schema.user_features},
            dense_BF=batch.user_dense_BF,
            instances=self._instance_side(batch, lookup) if batch.instances else None,
        )

    def _instance_side(self, batch: RequestBatch, lookup: Mapping[str, Tensor]) -> InstanceSide:
        given, none = batch.instances, batch.user_dense_BF[:0]
        request_time_N = torch.repeat_interleave(batch.request_time_B, given["length"], output_size=batch.num_instances)
        return InstanceSide(
            given["length"], request_time_N - given["time"], given.get("vector", none), given.get("label", none),
            {feature.name: lookup[f"instances.{feature.name}"] for feature in self.schema.instance_features},
            given.get("row"))

    def candidate_side(self, batch: RequestBatch, lookup: Mapping[str, Tensor]) -> CandidateSide:
        """What ``score`` adds to the user's state."""
        return CandidateSide(
            embedding={feature.name: lookup[f"candidates.{feature.name}"] for feature in self.schema.item_features},
            id=batch.candidates,
            dense_CF=batch.candidate_dense_CF,
            length_B=batch.num_candidates_B,
        )
