"""Deep Interest Network: a candidate weighs each event by a small network of the two (Zhou et al. 2018, 1706.06978).

u(v) = sum_t a(x_t, v) x_t, a = w . act(W [x_t ; x_t * v ; v] + b), logit = MLP([v ; u(v) ; features]). The weights are
not normalised (section 4.3), so that the sum keeps how strong an interest is.
"""

from typing import Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longer_rec.errors import ConfigError
from longer_rec.model.baselines.common import SequenceConfig, SequenceTower, no_inputs
from longer_rec.model.inputs import CandidateSide, InputWidths, UserSide, keep_newest
from longer_rec.model.linear import Linear, batched
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
        memory = state.layers[0]
        counts, lengths = candidates.length_B.tolist(), memory.length_B.tolist()  # host sync on GPU
        unit_CFD, shift_CF = self.activation.of_candidates(token_CD)
        interests = []
        for unit, shift, event_LD in zip(unit_CFD.split(counts), shift_CF.split(counts),
                                         memory.value_SHE.squeeze(1).split(lengths), strict=True):
            weight_CL = self.activation(unit, shift, event_LD)
            weight_CL = weight_CL.softmax(-1) if self.normalisation == "softmax" else weight_CL
            interests.append(batched(weight_CL, event_LD))
        return [token_CD, torch.cat([token_CD[:0], *interests])]


class ActivationUnit(nn.Module):
    """a(x, v) = w . silu(W_p (x * v) + W_x x + W_v v + b), for all pairs of a request by one matmul.

    W_p (x * v) + W_x x = (W_p diag(v) + W_x) x: a candidate's F x D matrix, so neither the product nor the event's
    share costs anything per pair. The difference x - v, which the paper's implementation adds, is linear in both and
    already there. SiLU in place of PReLU or Dice.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.product = nn.Parameter(torch.empty(hidden, width))
        self.event = Linear(width, hidden, bias=False)
        self.candidate = Linear(width, hidden)
        self.out = Linear(hidden, 1)
        # Starts as a matcher: x * v summed up, compared with thresholds between none and a whole match.
        with torch.no_grad():
            self.product.copy_(8.0 / width * (1 + 0.1 * torch.randn(hidden, width)))
            self.candidate.bias.copy_(torch.linspace(-6.0, -2.0, hidden))
            self.out.weight.fill_(1.0 / hidden)
            self.out.bias.zero_()
            self.event.weight.mul_(0.1)
            self.candidate.weight.mul_(0.1)

    def of_candidates(self, token_CD: Tensor) -> tuple[Tensor, Tensor]:
        """What a candidate brings to each of its pairs: C x F x D and C x F."""
        return self.product * token_CD.unsqueeze(1) + self.event.weight, self.candidate(token_CD)

    def forward(self, unit_CFD: Tensor, shift_CF: Tensor, event_LD: Tensor) -> Tensor:
        """Weights C x L of one request."""
        hidden = batched(unit_CFD.flatten(0, 1), event_LD.T).unflatten(0, shift_CF.shape) + shift_CF.unsqueeze(-1)
        return torch.einsum("cfl,f->cl", F.silu(hidden), self.out.weight[0]) + self.out.bias
