"""SIM with hard search: target attention over the newest events of the candidate's category.

Pi et al. 2020 (Search-based Interest Model, arXiv 2006.05639, section 3.1): the general search unit keeps the events
with Category(x_t) = Category(v), the exact search unit is multi-head target attention over them.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from longer_rec.errors import ConfigError
from longer_rec.model.baselines.common import SequenceTower, no_inputs
from longer_rec.model.baselines.target_attention import TargetAttention, TargetConfig
from longer_rec.model.inputs import CandidateSide, InputWidths, UserSide
from longer_rec.model.state import UserState


class SimHardConfig(TargetConfig):
    """``search_feature``: the item feature an event must share with the candidate; null: the schema's second."""

    kind: Literal["sim_hard"] = "sim_hard"
    search_feature: str | None = None


class SimHardTower(SequenceTower):
    """A candidate whose value is out of vocabulary (id 0) finds nothing."""

    def __init__(self, config: SimHardConfig, widths: InputWidths, num_tasks: int, max_events: int) -> None:
        super().__init__(config, widths, num_tasks, max_events, 2 * config.width)
        self.feature = config.search_feature or ([*widths.item][1] if len(widths.item) > 1 else "")
        if self.feature not in widths.item:
            raise ConfigError(f"model.search_feature={config.search_feature!r} is no item feature to search by; use "
                              f"one of {', '.join(widths.item)}")
        self.top_k = config.top_k
        self.norm = nn.LayerNorm(config.width)
        self.attention = TargetAttention(config)

    def encode_events(self, user: UserSide) -> UserState:
        token_TD = self.norm(self.tokens.events(user))
        memory = self.attention.memory(token_TD, token_TD, None, user.length_B)
        return UserState(no_inputs(user), (memory,), event_id_T=user.event_id[self.feature])

    def candidate_inputs(self, state: UserState, candidates: CandidateSide) -> list[Tensor]:
        memory, = state.layers
        assert state.event_id_T is not None
        events = state.event_id_T.split(memory.length_B.tolist())  # host sync on GPU
        wanted = candidates.id[self.feature].split(candidates.length_B.tolist())
        token_CD = self.norm(self.tokens.candidates(candidates))

        def choose(request: int, score_HCL: Tensor) -> Tensor:
            return newest_matches(wanted[request], events[request], self.top_k)

        return [token_CD, self.attention(token_CD, memory, candidates.length_B, choose)]


def newest_matches(candidate_id_C: Tensor, event_id_L: Tensor, top_k: int) -> Tensor:
    """C x L: the newest ``top_k`` events with each candidate's id; id 0 matches nothing."""
    match_CL = (candidate_id_C.unsqueeze(1) == event_id_L) & (event_id_L > 0)
    if event_id_L.numel() <= top_k:
        return match_CL
    from_newest_CL = match_CL.flip(1).to(torch.int32).cumsum(1).flip(1)
    return match_CL & (from_newest_CL <= top_k)
