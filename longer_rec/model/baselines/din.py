"""Deep Interest Network: a candidate weighs each event by a small network of the two (Zhou et al. 2018, 1706.06978).

u(v) = sum_t a(x_t, v) x_t, a = w . act(W [x_t ; x_t * v ; v] + b), logit = MLP([v ; u(v) ; features]). The weights are
not normalised (section 4.3), so that the sum keeps how strong an interest is.
"""

from typing import Literal

import pydantic
from torch import Tensor, nn

from longer_rec.errors import ConfigError
from longer_rec.model.activation_unit import ActivationUnit
from longer_rec.model.baselines.common import SequenceConfig, SequenceTower, no_inputs
from longer_rec.model.inputs import CandidateSide, InputWidths, UserSide, keep_newest
from longer_rec.model.state import LayerCache, UserState


class DinConfig(SequenceConfig):
    """``num_recent``: the newest events that are weighed, null for all; the paper's tables have 50 and all."""

    kind: Literal["din"] = "din"
    num_recent: int | None = pydantic.Field(None, ge=1)
    activation_hidden: int = pydantic.Field(16, ge=1, description="hidden units of the activation unit")
    normalisation: Literal["none", "softmax"] = "none"


class DinTower(SequenceTower):
    """The activation unit is evaluated for every pair of a candidate and an event of its request."""

    def __init__(self, config: DinConfig, widths: InputWidths, num_tasks: int, max_events: int) -> None:
        super().__init__(config, widths, num_tasks, max_events, 2 * config.width)
        self.num_recent = config.num_recent or max_events
        if self.num_recent > max_events:
            raise ConfigError(f"model.num_recent={self.num_recent} is more than the {max_events} events of "
                              "data.max_events; lower it, or null for all of them")
        self.normalisation = config.normalisation
        self.norm = nn.LayerNorm(config.width)
        self.activation = ActivationUnit(config.width, config.activation_hidden)

    def encode_events(self, user: UserSide) -> UserState:
        user = keep_newest(user, self.num_recent)
        token_SHE = self.norm(self.tokens.events(user)).unsqueeze(1)
        return UserState(no_inputs(user), (LayerCache(token_SHE, token_SHE, user.length_B),))

    def candidate_inputs(self, state: UserState, candidates: CandidateSide) -> list[Tensor]:
        token_CD = self.norm(self.tokens.candidates(candidates))
        return [token_CD, self.activation.pool(token_CD, state.layers[0], candidates.length_B,
                                               self.normalisation == "softmax")]
