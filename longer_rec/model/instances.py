"""Instance tokens as a second sequence of any tower (IAT, arXiv 2604.08933, stage 2).

A token is [sigmoid(W z + b) ; side], z the stored vector and side the projection of the instance's features, labels,
age and position. A candidate asks with [what the request knows of it, compressed ; its features through the same
projection], and what it finds joins the tower before its feature interaction, beside the ordinary history. No gradient
enters the vectors.
"""

from typing import Literal

import pydantic
import torch
from torch import Tensor, nn

from longer_rec.config import Config
from longer_rec.errors import ConfigError
from longer_rec.model.activation_unit import ActivationUnit
from longer_rec.model.inputs import CandidateSide, InputWidths, UserSide, concat_features
from longer_rec.model.interaction import Interaction
from longer_rec.model.jagged import request_of
from longer_rec.model.linear import Linear
from longer_rec.model.state import InstanceMemory, LayerCache
from longer_rec.model.token_stack import TokenStack
from longer_rec.model.tokens import EventTokens


class InstanceTokensConfig(Config):
    """How a tower reads the tokens of ``data.instances``; a token is ``width`` wide, vector and side half each.

    ``merge_size`` and ``num_queries`` belong to LONGER: K tokens become one, and so many of them are queries.
    """

    aggregator: Literal["din", "transformer", "longer"] = "transformer"
    width: int = pydantic.Field(128, ge=8, multiple_of=2)
    num_layers: int = pydantic.Field(1, ge=1)
    num_heads: int = pydantic.Field(4, ge=1)
    ffn_multiple: int = pydantic.Field(2, ge=1)
    dropout: float = pydantic.Field(0.0, ge=0.0, lt=1.0)
    merge_size: int = pydantic.Field(2, ge=1, description="longer alone")
    num_queries: int = pydantic.Field(50, ge=1, description="longer alone")
    activation_hidden: int = pydantic.Field(16, ge=1, description="din alone")
    age_buckets: int = pydantic.Field(64, ge=2)
    out_width: int = pydantic.Field(64, ge=1, description="of what joins the tower")


class InstanceTokens(nn.Module):
    """``encode`` a user's instances once, ``score`` candidates against them: C x ``out_width``."""

    def __init__(self, config: InstanceTokensConfig, widths: InputWidths, num_statistics: int) -> None:
        super().__init__()
        half, K = config.width // 2, config.merge_size if config.aggregator == "longer" else 1
        if K * config.width % config.num_heads:
            raise ConfigError(f"model.instances.num_heads={config.num_heads} does not divide the width "
                              f"{K * config.width}; choose a divisor")
        given = widths.instance
        assert given is not None
        self.config, self.item_names, self.user_names = config, tuple(widths.item), tuple(widths.user)
        self.feature_names = given.features
        action = {name: widths.event[name] for name in given.features if name in widths.event}
        side = InputWidths({name: widths.item[name] for name in given.features if name in widths.item},
                           {**action, "label": given.num_labels}, {}, 0)
        self.adapt = Linear(given.width, half)
        self.side = EventTokens(side, half, 1, 0, given.max_tokens, config.age_buckets, 8)
        user_width = sum(widths.user.values()) + widths.num_dense + sum(widths.item.values())
        self.ask_user = Linear(user_width, half)
        self.ask = Linear(sum(widths.item.values()) + widths.num_item_dense + num_statistics, half, bias=False)
        if config.aggregator == "din":
            self.norm = nn.LayerNorm(config.width)
            self.activation = ActivationUnit(config.width, config.activation_hidden)
        else:
            self.stack = TokenStack(config.width, config.num_layers, config.num_heads, config.ffn_multiple,
                                    config.dropout, K, config.num_queries if config.aggregator == "longer" else None)
        self.out = Linear(K * config.width, config.out_width)

    def encode(self, user: UserSide) -> InstanceMemory:
        """Keys and values of the tokens, and the user's share of what candidates ask with."""
        past = user.instances
        assert past is not None
        tokens = UserSide({**past.embedding, "label": past.label_NY}, {}, past.age_N, past.length_B, {}, user.dense_BF)
        adapted_ND = torch.sigmoid(self.adapt(past.vector_NI.detach().to(self.adapt.weight.dtype)))
        token_ND = torch.cat([adapted_ND, self.side.events(tokens)], dim=1)
        if self.config.aggregator == "din":
            token_NHE = self.norm(token_ND).unsqueeze(1)
            layers: tuple[LayerCache, ...] = (LayerCache(token_NHE, token_NHE, past.length_B),)
        else:
            layers = self.stack.encode(token_ND, past.length_B)
        return InstanceMemory(layers, self.ask_user(torch.cat(self._user_inputs(user), dim=1)))

    def _user_inputs(self, user: UserSide) -> list[Tensor]:
        """The user's features, and the mean of the history: the sequence features of the paper's query."""
        event_TE = concat_features(user.event_embedding, self.item_names)
        sum_BE = event_TE.new_zeros(user.length_B.numel(), event_TE.shape[1])
        sum_BE = sum_BE.index_add(0, request_of(user.length_B, event_TE.shape[0]), event_TE)
        parts = [user.user_embedding[name] for name in self.user_names]
        return [*parts, user.dense_BF.to(sum_BE.dtype), sum_BE / user.length_B.clamp(min=1).unsqueeze(1)]

    def score(self, memory: InstanceMemory, candidates: CandidateSide, statistics_CF: list[Tensor]) -> Tensor:
        """C x ``out_width``; ``statistics_CF``: what else the tower knows of candidate and history."""
        item_CE = concat_features(candidates.embedding, self.item_names)
        request_C = request_of(candidates.length_B, item_CE.shape[0])
        asked = self.ask(torch.cat([item_CE, candidates.dense_CF.to(item_CE.dtype), *statistics_CF], dim=1))
        asked = torch.sigmoid(asked + memory.ask_BF.index_select(0, request_C))
        token_CD = torch.cat([asked, self.side.candidates(candidates)], dim=1)
        if self.config.aggregator == "din":
            token_CD = self.norm(token_CD)
            return self.out(self.activation.pool(token_CD, memory.layers[0], candidates.length_B))
        token_CX = token_CD.repeat(1, self.stack.merge_size)
        return self.out(self.stack.score(token_CX, memory.layers, candidates.length_B))


def build_instances(config: InstanceTokensConfig | None, widths: InputWidths, interaction: Interaction | None
                    ) -> InstanceTokens | None:
    """The module of a configuration, if there is one; what ``interaction`` gives is part of the question."""
    num_statistics = interaction.config.width if interaction is not None else 0
    return InstanceTokens(config, widths, num_statistics) if config is not None else None
