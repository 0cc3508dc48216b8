"""Sum pooling: a history is the sum of its event tokens.

u = sum_t x_t (or mean), logit = MLP([v ; u * v ; u ; features]) for a candidate v. The base model of Deep Interest
Network (Zhou et al. 2018, arXiv 1706.06978, section 4.2) and SumPooling in LONGER's table; theirs has [v ; u] without
the product, from which an MLP learns to match ids far more slowly.
"""

from typing import Literal

from torch import Tensor

from longer_rec.model.baselines.common import SequenceConfig, SequenceTower, user_vectors, vector_of
from longer_rec.model.inputs import CandidateSide, InputWidths, UserSide
from longer_rec.model.jagged import request_of
from longer_rec.model.state import UserState


class SumPoolingConfig(SequenceConfig):
    """A sum is divided by sqrt(max_events), so that its size does not follow the tower's L."""

    kind: Literal["sum_pooling"] = "sum_pooling"
    pooling: Literal["sum", "mean"] = "sum"


class SumPoolingTower(SequenceTower):
    """One vector a user."""

    def __init__(self, config: SumPoolingConfig, widths: InputWidths, num_tasks: int, max_events: int) -> None:
        super().__init__(config, widths, num_tasks, max_events, 2 * config.width, config.width)
        self.pooling = config.pooling

    def encode_events(self, user: UserSide) -> UserState:
        token_TD = self.tokens.events(user)
        request_T = request_of(user.length_B, token_TD.shape[0])
        sum_BD = token_TD.new_zeros(user.length_B.numel(), token_TD.shape[1]).index_add(0, request_T, token_TD)
        if self.pooling == "mean":
            vector_BD = sum_BD / user.length_B.clamp(min=1).unsqueeze(1)
        else:
            vector_BD = sum_BD / self.max_events**0.5
        return UserState(vector_BD, user_vectors(vector_BD))

    def candidate_inputs(self, state: UserState, candidates: CandidateSide) -> list[Tensor]:
        token_CD = self.tokens.candidates(candidates)
        return [token_CD, token_CD * vector_of(state, candidates)]
