"""Attention by position and age against a softmax over one candidate's keys at a time, in fp64."""

import math

import pytest
import torch

from longer_rec.model.attention_profile import attention_mass
from longer_rec.model.longer import LongerTower, TowerConfig
from longer_rec.model.recompute import apply_recompute
from tests.reference.attention import merge_ref
from tests.reference.longer import (
    candidate_token,
    each_candidate,
    event_tokens,
    interaction_ref,
    layer_steps,
    one_request,
)
from tests.reference.towers import DAY_S, WIDTHS, make_candidates, make_user, randomise

POSITION_EDGE, AGE_EDGE = [1, 2, 4, 8], [6 * DAY_S, 9 * DAY_S, 24 * DAY_S]


def build(**settings):
    config = TowerConfig(**{"width": 6, "num_queries": 2, "num_self_layers": 2, **settings})
    tower = LongerTower(config, WIDTHS, 1, max_events=9).double().eval()
    randomise(tower)
    return tower


def mass_ref(tower, user, candidates, position_edge, age_edge):
    """Twin of ``attention_mass``: each candidate's whole sequence through the reference's layers."""
    def bucket(value, edge):
        return sum(value >= each for each in edge)

    K, layers = tower.config.merge_size, tower.causal_layers
    edges = (position_edge, age_edge)
    totals = [torch.zeros(len(layers), tower.config.heads + 1, len(edge) + 3, dtype=torch.float64) for edge in edges]
    for alone, candidate in each_candidate(user, candidates, tower.max_events):
        age = alone.age_T.tolist()
        merged, _ = merge_ref(tower.merge, event_tokens(tower, alone), alone.length_B)
        own = [candidate_token(tower, candidate)]
        if tower.config.num_candidate_tokens == 2:
            own.insert(0, tower.interaction_token(interaction_ref(tower.interaction, alone, candidate)))
        older = [(len(merged) - 1 - m) * K for m in range(len(merged))]  # events between a token's newest and now
        values = (older, [age[len(age) - 1 - each] for each in older])
        for depth, step in enumerate(layer_steps(tower, merged, tower.globals(alone)[0], own)):
            for total, edge, value in zip(totals, edges, values, strict=True):
                place = [len(edge) + 1 + bool(is_own) if m is None else bucket(value[m], edge)
                         for m, is_own in zip(step.event_S, step.is_own_S, strict=True)]
                add_layer(total[depth], layers[depth], step, len(own), place)
    return totals


def add_layer(total, layer, step, num_own, place):
    """Each own token's softmax, of its copies the last one's, over the keys it sees; then with all scores 0."""
    query_w, key_w, _ = layer.qkv.weight.split(step.token_SX.shape[1])
    normed = layer.attention_norm(step.token_SX)
    for head in [*range(layer.num_heads), None]:
        part = slice((head or 0) * layer.head_width, ((head or 0) + 1) * layer.head_width)
        for own in range(-num_own, 0):
            seen = step.seen_QS[own].nonzero().squeeze(1)
            score = layer.query_norm(normed[own] @ query_w[part].T) @ layer.key_norm(normed[seen] @ key_w[part].T).T
            score = score * (head is not None) / math.sqrt(layer.head_width)
            for key, weight in zip(seen.tolist(), score.softmax(-1), strict=True):
                total[layer.num_heads if head is None else head, place[key]] += weight


@pytest.mark.parametrize("settings", [{}, {"merge_size": 3, "num_cls_tokens": 2}, {"user_token": False},
                                      {"merge_size": 1, "interaction": {"placement": "token"}},
                                      {"merge_size": 1, "sampling": "uniform"}, {"sampling": "learnable"},
                                      {"norm": "hybrid_star", "count_matches": True},
                                      {"phd": {"copies": 3}, "interaction": {}},
                                      {"phd": {"copies": 3, "window": 3, "chunk": 2}},
                                      {"sampling": "all", "num_queries": 50, "pooling": "globals+mean"}])
def test_mass_equals_a_softmax_of_one_candidate_at_a_time(settings):
    tower = build(**settings)
    user, candidates = make_user([5, 0, 12, 1]), make_candidates([2, 3, 1, 2])
    with torch.no_grad():
        expected = mass_ref(tower, user, candidates, POSITION_EDGE, AGE_EDGE)
    found = attention_mass(tower, user, candidates, torch.tensor(POSITION_EDGE), torch.tensor(AGE_EDGE))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # softmax in fp32
    num_tokens = 8 * tower.config.num_candidate_tokens
    for mass in found:
        torch.testing.assert_close(mass.sum(-1), torch.full(mass.shape[:2], float(num_tokens), dtype=torch.float64))
        assert mass.shape[:2] == (3, tower.config.heads + 1)
    assert found[0][:, :, :-2].sum() > 0


def test_requests_add_up_and_no_history_leaves_nothing_to_look_at():
    tower, edges = build(), (torch.tensor(POSITION_EDGE), torch.tensor(AGE_EDGE))
    user, candidates = make_user([5, 7]), make_candidates([2, 3])
    rows = [0, 2]
    for both, *apart in zip(attention_mass(tower, user, candidates, *edges), *(
            attention_mass(tower, one_request(user, request, 9),
                           make_split(candidates, rows[request], count), *edges)
            for request, count in ((0, 2), (1, 3))), strict=True):
        torch.testing.assert_close(both, sum(apart), rtol=1e-6, atol=1e-6)
    for mass in attention_mass(tower, make_user([0]), make_candidates([4]), *edges):
        assert not mass[:, :, :-2].any()
        assert (mass[:, :, -2:] > 0).all()


def make_split(candidates, first, count):
    return type(candidates)({name: value[first:first + count] for name, value in candidates.embedding.items()},
                            {name: value[first:first + count] for name, value in candidates.id.items()},
                            candidates.dense_CF[first:first + count], torch.tensor([count]))


@pytest.mark.parametrize("parts", [[], ["cross", "self"]])
def test_a_tower_that_was_profiled_scores_as_before(parts):
    tower = build()
    apply_recompute(tower, parts)
    user, candidates = make_user([5, 0]), make_candidates([2, 1])
    before = tower.score(tower.encode(user), candidates), [dict(vars(layer)) for layer in tower.causal_layers]
    attention_mass(tower, user, candidates, torch.tensor(POSITION_EDGE), torch.tensor(AGE_EDGE))
    assert [vars(layer).keys() for layer in tower.causal_layers] == [each.keys() for each in before[1]]
    assert torch.equal(tower.score(tower.encode(user), candidates), before[0])
