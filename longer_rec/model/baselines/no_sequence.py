"""The ranker without a history: the same features and the same head."""

from typing import Literal

import torch
from torch import Tensor, nn

from longer_rec.config import Config
from longer_rec.model.head import Head, HeadConfig, scaled_inputs
from longer_rec.model.inputs import CandidateSide, InputWidths, UserSide
from longer_rec.model.jagged import request_of
from longer_rec.model.state import UserState


class NoSequenceConfig(Config):
    """Raw embeddings are all there is to read, so they are not scaled down by default."""

    kind: Literal["no_sequence"] = "no_sequence"
    head: HeadConfig = HeadConfig(id_scale=1.0)


class NoSequenceTower(nn.Module):
    """Candidate and user embeddings -> head; what it scores cannot depend on the history."""

    def __init__(self, config: NoSequenceConfig, widths: InputWidths, num_tasks: int) -> None:
        super().__init__()
        self.item_names, self.user_names, self.scale = tuple(widths.item), tuple(widths.user), config.head.id_scale
        has_ids = self.scale > 0
        self.head = Head(config.head, has_ids * sum(widths.item.values()) + widths.num_item_dense,
                         has_ids * sum(widths.user.values()) + widths.num_dense, num_tasks)

    def encode(self, user: UserSide) -> UserState:
        weight = self.head.user.weight
        parts = scaled_inputs(user.user_embedding, self.user_names, self.scale)
        return UserState(self.head.encode(torch.cat([*parts, user.dense_BF.to(weight.dtype)], dim=1)))

    def score(self, state: UserState, candidates: CandidateSide) -> Tensor:
        num_candidates = candidates.id[self.item_names[0]].numel()
        parts = scaled_inputs(candidates.embedding, self.item_names, self.scale)
        parts.append(candidates.dense_CF.to(state.head_BF.dtype))
        return self.head(torch.cat(parts, dim=1), state.head_BF, request_of(candidates.length_B, num_candidates))
