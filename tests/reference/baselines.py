"""``baseline_ref``: every baseline as its paper writes it, one candidate at a time, event by event, no cache.

It shares with the fast path its weights and, as ``tests/reference/longer.py`` does, ``describe``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from longer_rec.model.baselines.common import Baseline
from longer_rec.model.baselines.din import DinTower
from longer_rec.model.baselines.hstu import NUM_BUCKETS, HstuLayer, HstuTower
from longer_rec.model.baselines.no_sequence import NoSequenceTower
from longer_rec.model.baselines.sasrec import SasRecTower
from longer_rec.model.baselines.sim_hard import SimHardTower
from longer_rec.model.baselines.sum_pooling import SumPoolingTower
from longer_rec.model.baselines.target_attention import TargetAttention
from longer_rec.model.baselines.twin import TwinTower
from longer_rec.model.inputs import CandidateSide, UserSide
from tests.reference.longer import candidate_token, each_candidate, event_tokens, interaction_ref, layer_ref

# What a tower adds to the head's inputs: of the candidate and of the user, each 1 x some width.
Read = tuple[list[Tensor], list[Tensor]]


def baseline_ref(tower: Baseline, user: UserSide, candidates: CandidateSide) -> Tensor:
    """Twin of ``tower.score(tower.encode(user), candidates)``."""
    logits = [_one_candidate(tower, *each) for each in each_candidate(user, candidates, tower.max_events)]
    return torch.cat(logits) if logits else next(tower.parameters()).new_zeros(0, 1)


def _one_candidate(tower: Baseline, user: UserSide, candidate: CandidateSide) -> Tensor:
    candidate_inputs, user_inputs = _READ[type(tower)](tower, user, candidate)
    if tower.interaction is not None:
        candidate_inputs.append(interaction_ref(tower.interaction, user, candidate))
    if tower.scale:
        candidate_inputs += [candidate.embedding[name] * tower.scale for name in tower.item_names]
        user_inputs += [user.user_embedding[name] * tower.scale for name in tower.user_names]
    head = tower.head
    hidden = torch.cat([*candidate_inputs, candidate.dense_CF], dim=1) @ head.candidate.weight.T + head.candidate.bias
    hidden = hidden + torch.cat([*user_inputs, user.dense_BF], dim=1) @ head.user.weight.T
    for linear in head.rest:
        hidden = linear(silu(hidden))
    return hidden


def _no_sequence(tower: NoSequenceTower, user: UserSide, candidate: CandidateSide) -> Read:
    return [], []


def _sum_pooling(tower: SumPoolingTower, user: UserSide, candidate: CandidateSide) -> Read:
    events, own = event_tokens(tower, user), candidate_token(tower, candidate)
    total = torch.zeros_like(own)
    for event in events:
        total = total + event
    total = total / (max(len(events), 1) if tower.pooling == "mean" else tower.max_events**0.5)
    return [own, own * total], [total]


def _din(tower: DinTower, user: UserSide, candidate: CandidateSide) -> Read:
    unit = tower.activation
    own = tower.norm(candidate_token(tower, candidate))
    weights, events = [], []
    for event in event_tokens(tower, user)[-tower.num_recent:]:
        event = tower.norm(event.unsqueeze(0))
        hidden = (event * own) @ unit.product.T + event @ unit.event.weight.T + unit.candidate(own)
        weights.append(unit.out(silu(hidden)))
        events.append(event)
    total = torch.zeros_like(own)
    if tower.normalisation == "softmax" and weights:
        weights = list(torch.cat(weights).softmax(0).unsqueeze(1))
    for weight, event in zip(weights, events, strict=True):
        total = total + weight * event
    return [own, total], []


def _sim_hard(tower: SimHardTower, user: UserSide, candidate: CandidateSide) -> Read:
    own = tower.norm(candidate_token(tower, candidate))
    wanted = int(candidate.id[tower.feature][0])
    found = [t for t, value in enumerate(user.event_id[tower.feature].tolist()) if value == wanted and wanted > 0]
    events = [tower.norm(event_tokens(tower, user)[t:t + 1]) for t in found[-tower.top_k:]]
    return [own, _target_attention(tower.attention, own, events, events, [0.0] * len(events))], []


def _twin(tower: TwinTower, user: UserSide, candidate: CandidateSide) -> Read:
    attention, tokens = tower.attention, tower.tokens
    inherent = tower.inherent_norm(tower.inherent(torch.cat([candidate.embedding[n] for n in tower.item_names], 1)))
    query_w, key_w = attention.query_key.weight.chunk(2)
    compared, values, extra, alpha = [], [], [], []
    for t, event in enumerate(event_tokens(tower, user)):
        bucket = int((tokens.get_buffer("age_boundary") <= float(user.age_T[t])).sum())
        cross = torch.cat([*(user.event_embedding[name][t] for name in tokens.event_names), tokens.age.weight[bucket]])
        extra.append(tower.cross.weight @ cross)
        item = torch.cat([user.event_embedding[name][t] for name in tower.item_names])
        compared.append(tower.inherent_norm(tower.inherent(item.unsqueeze(0))))
        values.append(tower.norm(event.unsqueeze(0)))
        score = ((compared[-1] @ key_w.T) * (inherent @ query_w.T)).sum() / math.sqrt(_head_width(attention))
        alpha.append((score + extra[-1].sum()).item())
    kept = sorted(range(len(alpha)), key=lambda t: -alpha[t])[:tower.top_k]
    mixed = _target_attention(attention, inherent, *([rows[t] for t in kept] for rows in (compared, values, extra)))
    return [tower.norm(candidate_token(tower, candidate)), mixed], []


def _head_width(attention: TargetAttention) -> int:
    """E, the width of a head."""
    return attention.value.out_features // attention.num_heads


def _target_attention(attention: TargetAttention, own: Tensor, compared: Sequence[Tensor], values: Sequence[Tensor],
                      extra: Sequence[Any]) -> Tensor:
    """Softmax over the given events and the candidate's own key, whose value is 0; ``extra``: an event's, per head."""
    query_w, key_w = attention.query_key.weight.chunk(2)
    heads = []
    for head in range(attention.num_heads):
        part = slice(head * _head_width(attention), (head + 1) * _head_width(attention))
        query = own @ query_w[part].T / math.sqrt(_head_width(attention))
        scores = [(query * (each @ key_w[part].T)).sum() for each in (*compared, own)]
        for t, addition in enumerate(extra):
            scores[t] = scores[t] + (addition if isinstance(addition, float) else addition[head])
        weight = torch.stack(scores).softmax(0)
        values_E = [value @ attention.value.weight[part].T for value in values]
        heads.append(sum((w * value for w, value in zip(weight, values_E, strict=False)), torch.zeros_like(query)))
    return attention.proj(torch.cat(heads, dim=1))


def _hstu(tower: HstuTower, user: UserSide, candidate: CandidateSide) -> Read:
    """One sequence of events and candidate through all layers, pair by pair."""
    token_SD = torch.cat([event_tokens(tower, user), candidate_token(tower, candidate)])
    ages = [*user.age_T.tolist(), 0]
    for layer in tower.layers:
        token_SD = _hstu_layer(layer, token_SD, ages)
    return [tower.final_norm(token_SD[-1:])], []


def _hstu_layer(layer: HstuLayer, token_SD: Tensor, ages: list[int]) -> Tensor:
    gate, value, query, key = silu(layer.uvqk(layer.norm(token_SD))).chunk(4, dim=1)
    width = value.shape[1] // layer.num_heads
    rows = []
    for i in range(len(ages)):
        heads = []
        for head in range(layer.num_heads):
            part = slice(head * width, (head + 1) * width)
            mixed = torch.zeros_like(value[0, part])
            for j in range(i + 1):
                position, time = (min(int(n).bit_length(), NUM_BUCKETS - 1) for n in (i - j, ages[j] - ages[i]))
                score = (query[i, part] * key[j, part]).sum() / math.sqrt(width)
                score = score + layer.position_bias[position] + layer.time_bias[time]
                mixed = mixed + silu(score) / layer.max_events * value[j, part]
            heads.append(mixed)
        rows.append(layer.out(layer.mixed_norm(torch.cat(heads)) * gate[i]))
    return token_SD + torch.stack(rows)


def _sasrec(tower: SasRecTower, user: UserSide, candidate: CandidateSide) -> Read:
    own, token_SD = candidate_token(tower, candidate), event_tokens(tower, user)
    if len(token_SD) == 0:
        return [own * 0.0], []
    for layer in tower.layers:
        S = len(token_SD)
        seen_SS, own_S = torch.ones(S, S, dtype=torch.bool).tril(), torch.zeros(S, dtype=torch.bool)
        token_SD = layer_ref(layer, "pre", True, token_SD, token_SD, seen_SS, own_S)
    return [own * tower.final_norm(token_SD[-1:])], []


_READ: dict[type, Callable[[Any, UserSide, CandidateSide], Read]] = {
    NoSequenceTower: _no_sequence, SumPoolingTower: _sum_pooling, DinTower: _din, SimHardTower: _sim_hard,
    TwinTower: _twin, HstuTower: _hstu, SasRecTower: _sasrec}
