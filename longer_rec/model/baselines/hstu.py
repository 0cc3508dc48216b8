"""HSTU: pointwise gated attention instead of softmax attention and FFN (Zhai et al. 2024, arXiv 2402.17152).

U, V, Q, K = split(silu(f1(norm(x)))); A = silu(Q K^T + rab(position, time)) / n; y = x + f2(norm(A V) * U) (equations
1 to 3). Unlike softmax it keeps how strong an interest is. The candidate is the last query: it sees all events and
itself.
"""

import math
from typing import Literal, cast

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longer_rec.model.baselines.common import SequenceConfig, SequenceTower, check_heads, no_inputs
from longer_rec.model.inputs import CandidateSide, InputWidths, UserSide
from longer_rec.model.jagged import position_from_newest
from longer_rec.model.linear import Linear, batched
from longer_rec.model.state import LayerCache, UserState

# Of positions and of seconds, by powers of two: bucket b holds 2^(b - 1) .. 2^b - 1, bucket 0 the distance 0.
NUM_BUCKETS = 32


class HstuConfig(SequenceConfig):
    """n, the paper's normaliser, is the tower's ``max_events``."""

    kind: Literal["hstu"] = "hstu"
    num_layers: int = pydantic.Field(2, ge=1)
    num_heads: int = pydantic.Field(1, ge=1)
    matcher_gamma: float = pydantic.Field(3.0, ge=0.0, description="W_q, W_k start as this times I; 0: random start")


class HstuTower(SequenceTower):
    """Every event goes through every layer but the last, of which the candidates read keys and values alone."""

    def __init__(self, config: HstuConfig, widths: InputWidths, num_tasks: int, max_events: int) -> None:
        super().__init__(config, widths, num_tasks, max_events, config.width)
        check_heads(config.num_heads, config.width)
        self.layers = nn.ModuleList(HstuLayer(config.width, config.num_heads, max_events, config.matcher_gamma)
                                    for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.width)

    @property
    def hstu_layers(self) -> list["HstuLayer"]:
        return cast(list[HstuLayer], list(self.layers))

    def encode_events(self, user: UserSide) -> UserState:
        lengths = user.length_B.tolist()  # host sync on GPU
        pairs = [distance_buckets(age_L) for age_L in user.age_T.split(lengths)] if len(self.layers) > 1 else []
        # A candidate stands one behind the newest event, at the request's time.
        ahead_T = (distance_bucket(position_from_newest(user.length_B, user.age_T.numel()) + 1) * NUM_BUCKETS
                   + distance_bucket(user.age_T))
        token_TD, caches = self.tokens.events(user), []
        for depth, layer in enumerate(self.hstu_layers):
            is_last = depth == len(self.layers) - 1
            token_TD, cache = layer.encode(token_TD, user.length_B, ahead_T, None if is_last else pairs)
            caches.append(cache)
        return UserState(no_inputs(user), tuple(caches))

    def candidate_inputs(self, state: UserState, candidates: CandidateSide) -> list[Tensor]:
        token_CD = self.tokens.candidates(candidates)
        for layer, cache in zip(self.hstu_layers, state.layers, strict=True):
            token_CD = layer.score(token_CD, cache, candidates.length_B)
        return [self.final_norm(token_CD)]


class HstuLayer(nn.Module):
    """One layer, its attention request by request."""

    def __init__(self, width: int, num_heads: int, max_events: int, matcher_gamma: float) -> None:
        super().__init__()
        self.num_heads, self.max_events = num_heads, max_events
        self.norm = nn.LayerNorm(width)
        self.uvqk = Linear(width, 4 * width)
        # rab: a bias per position bucket and one per time bucket, shared by the heads.
        self.position_bias = nn.Parameter(torch.zeros(NUM_BUCKETS))
        self.time_bias = nn.Parameter(torch.zeros(NUM_BUCKETS))
        self.mixed_norm = nn.LayerNorm(width)
        self.out = Linear(width, width)
        if matcher_gamma:
            with torch.no_grad():
                # Q = K = silu(gamma x) of normalised tokens: at E = 32 and gamma 3 a match scores 24, two random tokens
                # 7 +- 4, so the bias ends chance likeness; else the sum over hundreds of small scores hides a match.
                self.uvqk.weight[2 * width:].copy_(matcher_gamma * torch.eye(width).repeat(2, 1))
                self.uvqk.bias[2 * width:].zero_()
                self.position_bias.fill_(-2.0 * matcher_gamma**2)

    def encode(self, token_TD: Tensor, length_B: Tensor, ahead_T: Tensor, pairs: list[Tensor] | None
               ) -> tuple[Tensor, LayerCache]:
        """Outputs of the events (nothing without ``pairs``, their bias buckets) and what candidates read: keys with
        their bias in the last column, T x H x (E + 1), and values."""
        gate_TD, value, query, key = self._split(token_TD)
        bias = self._bias_table().index_select(0, ahead_T).to(key.dtype).view(-1, 1, 1).expand(-1, self.num_heads, 1)
        cache = LayerCache(torch.cat([key, bias], dim=-1), value, length_B)
        if pairs is None:
            return token_TD, cache
        lengths = length_B.tolist()  # host sync on GPU
        table = self._bias_table()
        mixed = [gate_TD[:0]]
        for q, k, v, pair_LL in zip(query.split(lengths), key.split(lengths), value.split(lengths), pairs, strict=True):
            bias_LL = table.index_select(0, pair_LL.flatten()).view(pair_LL.shape)
            score_HLL = batched(q.transpose(0, 1), k.permute(1, 2, 0)) + bias_LL
            mixed.append(self._mix(score_HLL, v, causal=True))
        return self._finish(token_TD, torch.cat(mixed), gate_TD), cache

    def score(self, token_CD: Tensor, cache: LayerCache, num_candidates_B: Tensor) -> Tensor:
        """C x D: each candidate over the events of its request and itself."""
        gate_CD, value, query, key = self._split(token_CD)
        own = F.silu((query * key).sum(-1, keepdim=True) + self._bias_table()[0]) / self.max_events
        query = torch.cat([query, torch.ones_like(query[..., :1])], dim=-1)
        counts, lengths = num_candidates_B.tolist(), cache.length_B.tolist()  # host sync on GPU
        mixed = [gate_CD[:0]]
        for q, k, v in zip(query.split(counts), cache.key_SHE.split(lengths), cache.value_SHE.split(lengths),
                           strict=True):
            mixed.append(self._mix(batched(q.transpose(0, 1), k.permute(1, 2, 0)), v, causal=False))
        return self._finish(token_CD, torch.cat(mixed) + (own * value).flatten(1), gate_CD)

    def _split(self, token: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gate, *rest = F.silu(self.uvqk(self.norm(token))).chunk(4, dim=-1)
        value, query, key = (each.unflatten(-1, (self.num_heads, -1)) for each in rest)
        return gate, value, query / math.sqrt(query.shape[-1]), key

    def _mix(self, score: Tensor, value_SHE: Tensor, causal: bool) -> Tensor:
        weight = F.silu(score) / self.max_events
        weight = (weight.tril() if causal else weight).to(value_SHE.dtype)
        return batched(weight, value_SHE.transpose(0, 1)).transpose(0, 1).flatten(1)

    def _finish(self, token: Tensor, mixed: Tensor, gate: Tensor) -> Tensor:
        return token + self.out(self.mixed_norm(mixed) * gate)

    def _bias_table(self) -> Tensor:
        return (self.position_bias.unsqueeze(1) + self.time_bias).flatten()


def distance_bucket(distance: Tensor) -> Tensor:
    """How many bits a distance has, at most ``NUM_BUCKETS`` - 1; a negative one (an event to come) is bucket 0."""
    return torch.frexp(distance.clamp(min=0).float()).exponent.clamp_(max=NUM_BUCKETS - 1)


def distance_buckets(age_L: Tensor) -> Tensor:
    """L x L: the row of the bias table for each pair of events of a request, query by key."""
    step_L = torch.arange(age_L.numel(), device=age_L.device)
    position = distance_bucket(step_L.unsqueeze(1) - step_L)
    return position.mul_(NUM_BUCKETS).add_(distance_bucket(age_L - age_L.unsqueeze(1)))
