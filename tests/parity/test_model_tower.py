"""The packed, cached, request-level tower against the paper's picture of it, one candidate at a time."""

import itertools

import pytest
import torch

from longer_rec.model.inputs import CandidateSide, UserSide
from longer_rec.model.interaction import InteractionConfig
from longer_rec.model.longer import LongerTower
from longer_rec.model.merge import InnerTransConfig
from longer_rec.model.tower import TowerConfig, build_tower
from tests.reference.longer import tower_ref
from tests.reference.towers import WIDTHS, leaves, make_candidates, make_user, randomise

MAX_EVENTS = 11
# Empty, one event, not divisible, whole groups, more events than positions; one candidate, none, many.
HISTORIES = [0, 1, 7, 8, 17, 3]
CANDIDATES = [2, 1, 5, 0, 3, 1]


def build(seed: int = 0, **settings: object) -> LongerTower:
    torch.manual_seed(seed)
    config = TowerConfig.model_validate({"width": 4, "num_queries": 50 if settings.get("sampling") == "all" else 2,
                                         "age_width": 3, "age_buckets": 8, **settings})
    tower = build_tower(config, WIDTHS, num_tasks=2, max_events=MAX_EVENTS).double()
    assert isinstance(tower, LongerTower)
    randomise(tower)
    return tower


def assert_agrees(tower: LongerTower, user: UserSide, candidates: CandidateSide) -> None:
    """Logits and the gradients of all parameters and embeddings, in fp64."""
    wanted = tower_ref(tower, user, candidates)
    given = tower.score(tower.encode(user), candidates)
    assert given.shape == wanted.shape == (int(candidates.length_B.sum()), 2)
    torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-9)
    inputs = [*leaves(user, candidates), *tower.parameters()]
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2), dtype=wanted.dtype)
    fast = torch.autograd.grad((given * weight).sum(), inputs, allow_unused=True)
    slow = torch.autograd.grad((wanted * weight).sum(), inputs, allow_unused=True)
    reached = 0
    for left, right in zip(fast, slow, strict=True):
        left, right = (torch.zeros(()) if grad is None else grad for grad in (left, right))
        torch.testing.assert_close(left.expand_as(right) if left.dim() == 0 else left,
                                   right.expand_as(left) if right.dim() == 0 else right, rtol=1e-8, atol=1e-9,
                                   check_dtype=False)
        reached += bool((right != 0).any())
    assert reached > len(inputs) // 2


@pytest.mark.parametrize(("merge_size", "inner"), [(1, False), (2, False), (2, True), (4, False), (4, True),
                                                    (8, False), (8, True), (16, False), (16, True)])
@pytest.mark.parametrize("interaction", [False, True])
def test_tower_equals_reference_in_logits_and_gradients(merge_size: int, inner: bool, interaction: bool) -> None:
    tower = build(merge_size=merge_size, num_queries=1 if merge_size == 16 else 2,
                  inner_trans=InnerTransConfig(num_heads=2) if inner else None,
                  interaction=InteractionConfig(hidden=(6, 5), context=("item",)) if interaction else None)
    assert_agrees(tower, make_user(HISTORIES), make_candidates(CANDIDATES))


VARIANTS = {
    "no user globals": {"user_token": False},
    "cls tokens": {"num_cls_tokens": 2},
    "no queries": {"num_queries": 0},
    "every token a query": {"num_queries": 6},
    "all sampled": {"sampling": "all"},
    "uniformly sampled": {"sampling": "uniform", "num_queries": 3},
    "uniformly sampled, few of many": {"sampling": "uniform", "merge_size": 1, "num_queries": 4, "num_self_layers": 2},
    "newest and uniformly sampled": {"sampling": "recent_uniform", "merge_size": 1, "num_queries": 4},
    "sampled for the mean": {"sampling": "uniform", "num_queries": 3, "num_self_layers": 0, "pooling": "globals+mean"},
    "learned queries": {"sampling": "learnable", "num_queries": 3},
    "learned queries, no user globals": {"sampling": "learnable", "user_token": False, "interaction": {"hidden": (4,)}},
    "learned queries for the mean": {"sampling": "learnable", "pooling": "globals+mean", "num_self_layers": 0},
    "more learned queries than events": {"sampling": "learnable", "num_queries": 13, "num_self_layers": 2},
    "candidate pooled": {"pooling": "candidate", "num_cls_tokens": 1},
    "candidate pooled, cross layer alone": {"pooling": "candidate", "num_self_layers": 0},
    "cross layer alone": {"num_self_layers": 0},
    "three self layers": {"num_self_layers": 3},
    "mean pooled": {"pooling": "globals+mean"},
    "more heads than slots": {"num_heads": 4},
    "counted matches": {"count_matches": True, "num_heads": 4},
    "counted matches, two candidate tokens, hybrid norm": {"count_matches": True, "norm": "hybrid",
                                                           "interaction": {"hidden": (4,)}},
    "counted matches, copies and a window": {"count_matches": True, "num_self_layers": 2,
                                             "phd": {"copies": 3, "window": 3, "chunk": 2}},
    "counted matches, cross layer alone": {"count_matches": True, "num_self_layers": 0, "phd": {"copies": 2},
                                           "interaction": {"hidden": (4,)}},
    "rms norm": {"norm_kind": "rms"},
    "post norm": {"norm": "post", "num_self_layers": 2, "pooling": "globals+mean"},
    "hybrid norm": {"norm": "hybrid", "num_self_layers": 2, "pooling": "globals+mean"},
    "hybrid norm of one layer": {"norm": "hybrid", "num_self_layers": 0, "norm_kind": "rms", "merge_size": 1},
    "hybrid norm, starred": {"norm": "hybrid_star", "num_self_layers": 2, "pooling": "globals+mean"},
    "hybrid norm, starred, two candidate tokens": {"norm": "hybrid_star", "interaction": {"hidden": (4,)}},
    "two copies": {"phd": {}},
    "three copies of two tokens": {"phd": {"copies": 3}, "interaction": {"hidden": (4,)}, "num_self_layers": 2},
    "three copies, nothing to tell them": {"phd": {"copies": 3, "copy_embedding": False}, "user_token": False},
    "copies, cross layer alone": {"phd": {"copies": 2}, "num_self_layers": 0, "interaction": {"hidden": (4,)}},
    "one copy is none": {"phd": {"copies": 1}},
    "window": {"phd": {"window": 2, "chunk": 2}, "num_self_layers": 2},
    "window, three copies": {"phd": {"copies": 3, "window": 3, "chunk": 4}, "num_queries": 5, "merge_size": 1,
                             "num_self_layers": 3, "interaction": {"hidden": (4,)}},
    "window, no user globals": {"phd": {"copies": 3, "window": 3, "chunk": 2}, "user_token": False},
    "window over every token": {"phd": {"window": 5, "chunk": 11}, "merge_size": 1, "sampling": "all"},
    "window over sampled tokens": {"phd": {"window": 2, "chunk": 3}, "sampling": "uniform", "num_queries": 4,
                                   "merge_size": 1, "num_cls_tokens": 1, "pooling": "globals+mean"},
    "window, cross layer alone": {"phd": {"copies": 3, "window": 4, "chunk": 2}, "num_self_layers": 0},
    "window, hybrid norm": {"phd": {"copies": 3, "window": 3, "chunk": 2}, "norm": "hybrid", "num_self_layers": 2},
    "copies of two tokens, post norm": {"phd": {}, "norm": "post", "interaction": {"hidden": (4,)}},
    "projection MLP": {"projection_hidden": 6},
    "no raw ids in the head": {"head": {"id_scale": 0.0, "hidden": ()}},
    "interaction in the head alone": {"interaction": {"placement": "none", "hidden": (4,)}},
    "interaction added to the candidate": {"interaction": {"placement": "added", "hidden": (4,)}},
    "interaction as token alone": {"interaction": {"to_head": False, "fields": ("category",), "hidden": (4,)}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_equals_reference(name: str) -> None:
    assert_agrees(build(**VARIANTS[name]), make_user(HISTORIES), make_candidates(CANDIDATES))


@pytest.mark.parametrize(("history", "num_candidates"), list(itertools.product([0, 1, 11, 12], [1, 40])))
def test_one_request_alone_equals_reference(history: int, num_candidates: int) -> None:
    tower = build(interaction=InteractionConfig(hidden=(4,)))
    assert_agrees(tower, make_user([history]), make_candidates([num_candidates]))
