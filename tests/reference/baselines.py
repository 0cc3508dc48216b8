"""``baseline_ref``: every baseline as its paper writes it, one candidate at a time, event by event, no cache.

It shares with the fast path its weights and, as ``tests/reference/longer.py`` does, ``describe``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from longer_rec.model.baselines.common import Baseline
from longer_rec.model.baselines.din import DinTower
from longer_rec.model.baselines.no_sequence import NoSequenceTower
from longer_rec.model.baselines.sum_pooling import SumPoolingTower
from longer_rec.model.inputs import CandidateSide, UserSide
from tests.reference.longer import _candidate_token, _event_tokens, _interaction, one_candidate, one_request

# What a tower adds to the head's inputs: of the candidate and of the user, each 1 x some width.
Read = tuple[list[Tensor], list[Tensor]]


def baseline_ref(tower: Baseline, user: UserSide, candidates: CandidateSide) -> Tensor:
    """Twin of ``tower.score(tower.encode(user), candidates)``."""
    logits, row = [], 0
    for request in range(user.length_B.numel()):
        alone = one_request(user, request, tower.max_events)
        for _ in range(int(candidates.length_B[request])):
            logits.append(_one_candidate(tower, alone, one_candidate(candidates, row)))
            row += 1
    return torch.cat(logits) if logits else next(tower.parameters()).new_zeros(0, 1)


def _one_candidate(tower: Baseline, user: UserSide, candidate: CandidateSide) -> Tensor:
    candidate_inputs, user_inputs = _READ[type(tower)](tower, user, candidate)
    if tower.interaction is not None:
        candidate_inputs.append(_interaction(tower.interaction, user, candidate))
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
    events, own = _event_tokens(tower, user), _candidate_token(tower, candidate)
    total = torch.zeros_like(own)
    for event in events:
        total = total + event
    total = total / (max(len(events), 1) if tower.pooling == "mean" else tower.max_events**0.5)
    return [own, own * total], [total]


def _din(tower: DinTower, user: UserSide, candidate: CandidateSide) -> Read:
    unit = tower.activation
    own = tower.norm(_candidate_token(tower, candidate))
    weights, events = [], []
    for event in _event_tokens(tower, user)[-tower.num_recent:]:
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


_READ: dict[type, Callable[[Any, UserSide, CandidateSide], Read]] = {
    NoSequenceTower: _no_sequence, SumPoolingTower: _sum_pooling, DinTower: _din}
