"""TWIN: one target attention, first to find a candidate's events, then to mix them (Chang et al. 2023, 2302.02352).

alpha = (K_h W_k)(v_h W_q)^T / sqrt(E) + K_c beta: inherent features of an item are compared with the candidate's, cross
features of a user's event (age, quantity, ...) add one number each (section 4.2). The general search unit keeps the
``top_k`` events of highest alpha, the exact search unit takes softmax(alpha) over them: the same parameters, hence
"two-stage consistency".
"""

from typing import Literal

import torch
from torch import Tensor, nn

from longer_rec.model.baselines.common import SequenceTower, no_inputs
from longer_rec.model.baselines.target_attention import TargetAttention, TargetConfig
from longer_rec.model.inputs import CandidateSide, InputWidths, UserSide, concat_features
from longer_rec.model.linear import Linear
from longer_rec.model.state import UserState
from longer_rec.model.tokens import age_bucket


class TwinConfig(TargetConfig):
    """The events kept are those of the highest alpha, summed over heads."""

    kind: Literal["twin"] = "twin"


class TwinTower(SequenceTower):
    """Item features are the inherent ones; event features and the age are the cross ones."""

    def __init__(self, config: TwinConfig, widths: InputWidths, num_tasks: int, max_events: int) -> None:
        super().__init__(config, widths, num_tasks, max_events, 2 * config.width)
        self.top_k = config.top_k
        self.norm = nn.LayerNorm(config.width)
        self.inherent = Linear(sum(widths.item.values()), config.width)
        self.inherent_norm = nn.LayerNorm(config.width)
        # W_c and beta in one: a linear map of each cross feature to a number, then a weight, is a linear map.
        self.cross = Linear(sum(widths.event.values()) + config.age_width, config.num_heads, bias=False)
        self.attention = TargetAttention(config)
        nn.init.orthogonal_(self.inherent.weight)

    def encode_events(self, user: UserSide) -> UserState:
        tokens = self.tokens
        token_TD = self.norm(tokens.events(user))
        age = tokens.age(age_bucket(user.age_T, tokens.get_buffer("age_boundary")))
        cross_TH = self.cross(torch.cat([*(user.event_embedding[name] for name in tokens.event_names), age], dim=1))
        compared_TD = self._compared(user.event_embedding)
        memory = self.attention.memory(compared_TD, token_TD, cross_TH, user.length_B)
        return UserState(no_inputs(user), (memory,))

    def candidate_inputs(self, state: UserState, candidates: CandidateSide) -> list[Tensor]:
        def choose(request: int, score_HCL: Tensor) -> Tensor:
            return highest(score_HCL.sum(0), self.top_k)

        token_CD = self.norm(self.tokens.candidates(candidates))
        compared_CD = self._compared(candidates.embedding)
        return [token_CD, self.attention(compared_CD, state.layers[0], candidates.length_B, choose)]

    def _compared(self, embedding: dict[str, Tensor]) -> Tensor:
        return self.inherent_norm(self.inherent(concat_features(embedding, self.item_names)))


def highest(score_CL: Tensor, top_k: int) -> Tensor:
    """C x L: the ``top_k`` highest scores of each candidate."""
    if score_CL.shape[1] <= top_k:
        return torch.ones_like(score_CL, dtype=torch.bool)
    return torch.zeros_like(score_CL, dtype=torch.bool).scatter_(1, score_CL.topk(top_k, dim=1).indices, True)
