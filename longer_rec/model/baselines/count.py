"""The count heuristic: how often the candidate's values occur among the newest events. No parameters."""

from typing import Literal

import pydantic
import torch
from torch import Tensor, nn

from longer_rec.config import Config
from longer_rec.errors import ConfigError
from longer_rec.model.inputs import CandidateSide, InputWidths, UserSide, keep_newest
from longer_rec.model.interaction import InteractionConfig, group_matches, matched_rows
from longer_rec.model.state import UserState


class CountConfig(Config):
    """``weights``: item feature -> weight of one match of it; the item itself counts 1 unless named."""

    kind: Literal["count"] = "count"
    weights: dict[str, float] = pydantic.Field({})


class CountTower(nn.Module):
    """score = sum over fields of weight x matches in the history; its logits rank, they are no probabilities."""

    def __init__(self, config: CountConfig, widths: InputWidths, num_tasks: int, max_events: int) -> None:
        super().__init__()
        for name in config.weights:
            if name not in widths.item:
                raise ConfigError(f"model.weights names {name!r}; item features are {', '.join(widths.item)}")
        weights = {next(iter(widths.item)): 1.0, **config.weights}
        self.fields = tuple(weights)
        self.num_tasks, self.max_events = num_tasks, max_events
        self.statistics = InteractionConfig(decays=(), windows=(max_events,))
        self.register_buffer("weight_J", torch.tensor(list(weights.values())), persistent=False)

    def encode(self, user: UserSide) -> UserState:
        user = keep_newest(user, self.max_events)
        return UserState(user.dense_BF.new_zeros(user.length_B.numel(), 0),
                         matches=group_matches(self.statistics, self.fields, user))

    def score(self, state: UserState, candidates: CandidateSide) -> Tensor:
        assert state.matches is not None
        count_JC = matched_rows(self.fields, state.matches, candidates)[..., -1]
        weight_J: Tensor = self.get_buffer("weight_J")
        return (weight_J.unsqueeze(1) * count_JC).sum(0).unsqueeze(1).expand(-1, self.num_tasks)
