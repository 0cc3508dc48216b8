"""SASRec: a causal encoder's last output, compared with the candidate (Kang & McAuley 2018, arXiv 1808.09781).

h = the newest event's output after all layers, r(v) = <h, v> (equation 5). The paper trains r at every position against
one sampled negative; here it is trained as every tower, on the candidates of a request at the last position alone. The
head gets h * v, which holds r as its sum, so that logits are calibrated and features can join.
"""

from typing import Literal

import pydantic
import torch
from torch import Tensor, nn

from longer_rec.model.baselines.common import (
    SequenceConfig,
    SequenceTower,
    check_heads,
    no_inputs,
    user_vectors,
    vector_of,
)
from longer_rec.model.inputs import CandidateSide, InputWidths, UserSide
from longer_rec.model.layers import CausalLayer
from longer_rec.model.norms import layer_norms
from longer_rec.model.sampling import Queries, newest
from longer_rec.model.state import UserState


class SasRecConfig(SequenceConfig):
    """Layers are the tower's pre-norm ones."""

    kind: Literal["sasrec"] = "sasrec"
    num_layers: int = pydantic.Field(2, ge=1)
    num_heads: int = pydantic.Field(1, ge=1)
    ffn_multiple: int = pydantic.Field(4, ge=1)
    dropout: float = pydantic.Field(0.0, ge=0.0, lt=1.0)


class SasRecTower(SequenceTower):
    """One vector a user, 0 for an empty history."""

    def __init__(self, config: SasRecConfig, widths: InputWidths, num_tasks: int, max_events: int) -> None:
        super().__init__(config, widths, num_tasks, max_events, config.width)
        check_heads(config.num_heads, config.width)
        layers = [CausalLayer(config.width, config.num_heads, config.ffn_multiple, config.dropout, "layer", 0.0,
                              layer_norms("pre", depth)) for depth in range(config.num_layers)]
        for layer in layers:
            layer.own_gain.requires_grad_(False)  # of candidates, which do not go through these layers
            with torch.no_grad():
                # Values pass through, so that h starts near a sum of items, which a candidate can be compared with.
                layer.qkv.weight[2 * config.width:].copy_(torch.eye(config.width))
                layer.proj.weight.copy_(4.0 * torch.eye(config.width))
        self.layers = nn.ModuleList(layers)
        self.final_norm = nn.LayerNorm(config.width)

    def encode_events(self, user: UserSide) -> UserState:
        token_SX = self.tokens.events(user)
        last_B = user.length_B.clamp(max=1)
        for depth, layer in enumerate(self.layers):
            assert isinstance(layer, CausalLayer)
            is_last = depth == len(self.layers) - 1
            queries = newest(user.length_B, last_B) if is_last else Queries(user.length_B)
            token_SX, _ = layer.encode(token_SX, user.length_B, queries)
        output_QX = self.final_norm(token_SX)
        vector_BD = output_QX.new_zeros(last_B.numel(), output_QX.shape[1])
        vector_BD = vector_BD.index_copy(0, last_B.nonzero().squeeze(1), output_QX)
        return UserState(no_inputs(user), user_vectors(vector_BD))

    def candidate_inputs(self, state: UserState, candidates: CandidateSide) -> list[Tensor]:
        return [self.tokens.candidates(candidates) * vector_of(state, candidates)]
