"""What all learned baselines share: inputs, event tokens, head and interaction statistics are LONGER's own.

A baseline differs in two functions alone: ``encode_events`` makes of a user's events what the candidates need,
``candidate_inputs`` gives what a candidate sees in it. So two towers differ in how the history is read and in nothing
else.
"""

from dataclasses import replace

import pydantic
import torch
from torch import Tensor, nn

from longer_rec.config import Config
from longer_rec.errors import ConfigError
from longer_rec.model.compressor import CompressConfig
from longer_rec.model.head import Head, HeadConfig, scaled_inputs
from longer_rec.model.inputs import CandidateSide, InputWidths, UserSide, keep_newest
from longer_rec.model.instances import InstanceTokensConfig, build_instances
from longer_rec.model.interaction import InteractionConfig, build_interaction
from longer_rec.model.jagged import request_of
from longer_rec.model.state import LayerCache, UserState
from longer_rec.model.tokens import EventTokens


class BaselineConfig(Config):
    """``interaction``: the statistics' MLP straight into the head; it has no token of its own."""

    interaction: InteractionConfig | None = None
    head: HeadConfig = HeadConfig()
    compress: CompressConfig | None = pydantic.Field(None, description="a source model of instance tokens")
    instances: InstanceTokensConfig | None = None


class SequenceConfig(BaselineConfig):
    """D = ``width``; the tokens are LONGER's with merge size 1."""

    width: int = pydantic.Field(32, ge=1)
    projection_hidden: int = pydantic.Field(0, ge=0, description="hidden width of the input projection; 0: linear")
    age_buckets: int = pydantic.Field(64, ge=2)
    age_width: int = pydantic.Field(8, ge=1)


class Baseline(nn.Module):
    """Raw embeddings x ``id_scale``, dense features, statistics and the two hooks' outputs -> head."""

    def __init__(self, config: BaselineConfig, widths: InputWidths, num_tasks: int, max_events: int,
                 candidate_width: int = 0, user_width: int = 0) -> None:
        super().__init__()
        if not widths.item:
            raise ConfigError("the tower needs at least one item feature; add one to the schema")
        if config.interaction is not None and config.interaction.placement == "added":
            raise ConfigError("model.interaction.placement=added adds to a candidate's token, which a baseline does "
                              "not attend with; leave placement out")
        if config.interaction is not None and not config.interaction.to_head:
            raise ConfigError("model.interaction.to_head=false leaves a baseline's statistics unread; set it to true "
                              "or model.interaction to null")
        self.item_names, self.user_names = tuple(widths.item), tuple(widths.user)
        self.scale, self.max_events = config.head.id_scale, max_events
        self.interaction = build_interaction(config.interaction, widths)
        raw_candidate, raw_user = config.head.raw_widths(widths)
        if config.interaction is not None:
            raw_candidate += config.interaction.width
        self.instances = build_instances(config.instances, widths, self.interaction)
        if config.instances is not None:
            raw_candidate += config.instances.out_width
        self.head = Head(config.head, candidate_width + raw_candidate, user_width + raw_user, num_tasks,
                         config.compress)

    def encode_events(self, user: UserSide) -> UserState:
        """What the candidates need of a user's events; ``head_BF`` are inputs of the head here, for ``encode`` to go on
        with."""
        return UserState(no_inputs(user))

    def candidate_inputs(self, state: UserState, candidates: CandidateSide) -> list[Tensor]:
        """Inputs of the head that depend on the candidate and the history (each C x .)."""
        return []

    def encode(self, user: UserSide) -> UserState:
        user = keep_newest(user, self.max_events)
        state = self.encode_events(user)
        parts = [state.head_BF, *scaled_inputs(user.user_embedding, self.user_names, self.scale)]
        parts.append(user.dense_BF.to(self.head.user.weight.dtype))
        runs = self.interaction.encode(user) if self.interaction is not None else None
        instances = self.instances.encode(user) if self.instances is not None else None
        return replace(state, head_BF=self.head.encode(torch.cat(parts, dim=1)), matches=runs, instances=instances,
                       past=user.instances if self.head.compressor is not None else None)

    def score(self, state: UserState, candidates: CandidateSide) -> Tensor:
        """Logits C x Y."""
        parts = self.candidate_inputs(state, candidates)
        statistics = []
        if self.interaction is not None and state.matches is not None:
            statistics = [self.interaction.score(state.matches, candidates)]
            parts += statistics
        if self.instances is not None and state.instances is not None:
            parts.append(self.instances.score(state.instances, candidates, statistics))
        parts += scaled_inputs(candidates.embedding, self.item_names, self.scale)
        parts.append(candidates.dense_CF.to(self.head.user.weight.dtype))
        request_C = request_of(candidates.length_B, candidates.dense_CF.shape[0])
        return self.head(torch.cat(parts, dim=1), state.head_BF, request_C, state.past)


class SequenceTower(Baseline):
    """Its events and candidates go through one projection, one token an event."""

    def __init__(self, config: SequenceConfig, widths: InputWidths, num_tasks: int, max_events: int,
                 candidate_width: int, user_width: int = 0) -> None:
        super().__init__(config, widths, num_tasks, max_events, candidate_width, user_width)
        self.tokens = EventTokens(widths, config.width, 1, config.projection_hidden, max_events, config.age_buckets,
                                  config.age_width)


def check_heads(num_heads: int, width: int) -> None:
    """Raise ``ConfigError`` where heads do not divide the width."""
    if width % num_heads:
        divisors = [heads for heads in range(1, width + 1) if width % heads == 0]
        raise ConfigError(f"model.num_heads={num_heads} does not divide model.width={width}; use one of {divisors}")


def no_inputs(user: UserSide) -> Tensor:
    """B x 0: no input of the head."""
    return user.dense_BF[:, :0]


def user_vectors(vector_BD: Tensor) -> tuple[LayerCache]:
    """What a tower leaves that makes one vector of a user: a cache of one key a request."""
    one_B = torch.ones(vector_BD.shape[0], dtype=torch.int64, device=vector_BD.device)
    return (LayerCache(vector_BD.unsqueeze(1), vector_BD.unsqueeze(1), one_B),)


def vector_of(state: UserState, candidates: CandidateSide) -> Tensor:
    """C x D: the vector of each candidate's user."""
    request_C = request_of(candidates.length_B, candidates.dense_CF.shape[0])
    return state.layers[0].value_SHE.squeeze(1).index_select(0, request_C)
