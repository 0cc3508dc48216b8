"""Every baseline against its paper's equations, one candidate at a time, and what all towers promise."""

from collections.abc import Mapping
from typing import Any

import pydantic
import pytest
import torch
from torch import Tensor

from longer_rec.errors import ConfigError
from longer_rec.model.baselines.common import Baseline
from longer_rec.model.inputs import CandidateSide, InputWidths, UserSide
from longer_rec.model.recompute import apply_recompute
from longer_rec.model.tower import AnyTower, AnyTowerConfig, build_tower
from tests.reference.baselines import baseline_ref
from tests.reference.longer import one_candidate, one_request, tower_ref
from tests.reference.towers import (
    WIDTHS,
    leaves,
    make_candidates,
    make_user,
    matching_loss,
    randomise,
    replace_candidate,
)

MAX_EVENTS = 11
# Empty, one event, exactly and more than the tower reads; no candidate, one, many.
HISTORIES, CANDIDATES = [0, 1, 7, 11, 17, 3], [2, 1, 5, 0, 3, 1]
NARROW = {"width": 4, "age_width": 3, "age_buckets": 8}
INTERACTION = {"hidden": [6, 5], "context": ["item"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "no_sequence": {"kind": "no_sequence"},
    "no_sequence with statistics": {"kind": "no_sequence", "interaction": INTERACTION},
    "sum": {"kind": "sum_pooling", **NARROW},
    "mean with statistics": {"kind": "sum_pooling", "pooling": "mean", "interaction": INTERACTION, **NARROW},
    "din": {"kind": "din", "activation_hidden": 5, **NARROW},
    "din with statistics": {"kind": "din", "interaction": INTERACTION, **NARROW},
    "din softmax": {"kind": "din", "normalisation": "softmax", "projection_hidden": 6, **NARROW},
    "din of the newest": {"kind": "din", "num_recent": 4, "head": {"id_scale": 0.0, "hidden": []}, **NARROW},
    "sim_hard": {"kind": "sim_hard", "interaction": INTERACTION, **NARROW},
    "sim_hard of the newest two": {"kind": "sim_hard", "search_feature": "item", "top_k": 2, "num_heads": 2, **NARROW},
    "twin": {"kind": "twin", "interaction": INTERACTION, **NARROW},
    "twin of the best three": {"kind": "twin", "top_k": 3, "num_heads": 2, **NARROW},
    "hstu with statistics": {"kind": "hstu", "interaction": INTERACTION, "num_layers": 1, **NARROW},
    "hstu": {"kind": "hstu", "num_heads": 2, "num_layers": 3, **NARROW},
    "sasrec": {"kind": "sasrec", "num_heads": 2, **NARROW},
    "sasrec with statistics": {"kind": "sasrec", "num_layers": 1, "interaction": INTERACTION, **NARROW},
}
# Of each kind one.
KINDS = {settings["kind"]: settings for settings in VARIANTS.values()}


def build(settings: Mapping[str, Any], widths: InputWidths = WIDTHS, num_tasks: int = 2, max_events: int = MAX_EVENTS
          ) -> AnyTower:
    torch.manual_seed(0)
    config = pydantic.TypeAdapter(AnyTowerConfig).validate_python(settings)
    return build_tower(config, widths, num_tasks, max_events)


def run(tower: AnyTower, user: UserSide, candidates: CandidateSide) -> Tensor:
    return tower.score(tower.encode(user), candidates)


@pytest.mark.parametrize("name", VARIANTS)
def test_tower_equals_reference_in_logits_and_gradients(name: str) -> None:
    tower = build(VARIANTS[name]).double()
    assert isinstance(tower, Baseline)
    randomise(tower)
    user, candidates = make_user(HISTORIES), make_candidates(CANDIDATES)
    given, wanted = run(tower, user, candidates), baseline_ref(tower, user, candidates)
    assert given.shape == (sum(CANDIDATES), 2)
    torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-9)
    inputs = [*leaves(user, candidates), *(each for each in tower.parameters() if each.requires_grad)]
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2), dtype=wanted.dtype)
    fast, slow = (torch.autograd.grad((logits * weight).sum(), inputs, allow_unused=True, materialize_grads=True)
                  for logits in (given, wanted))
    torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-9)
    assert all(bool((grad != 0).any()) for grad in slow[len(leaves(user, candidates)):]), "a parameter nobody uses"


def test_transformer_equals_the_reference_of_longer_with_all_queries() -> None:
    tower = build({"kind": "transformer", "num_self_layers": 2, **NARROW}).double()
    randomise(tower)
    user, candidates = make_user(HISTORIES), make_candidates(CANDIDATES)
    torch.testing.assert_close(run(tower, user, candidates), tower_ref(tower, user, candidates), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", VARIANTS)
def test_candidates_never_see_each_other(name: str) -> None:
    tower = build(VARIANTS[name], max_events=20)
    user, candidates = make_user([0, 30, 6], dtype=torch.float32), make_candidates([2, 40, 3], dtype=torch.float32)
    before = run(tower, user, candidates)
    for row in (0, 3, 30, 44):
        after = run(tower, user, replace_candidate(candidates, row))
        others = torch.arange(len(before)) != row
        torch.testing.assert_close(before[others], after[others], rtol=0, atol=1e-6)
        assert not torch.equal(before[row], after[row])
        request = 0 if row < 2 else 1 if row < 42 else 2
        alone = run(tower, one_request(user, request, 20), one_candidate(candidates, row))
        torch.testing.assert_close(before[row:row + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_determinism_and_nothing_at_all(kind: str) -> None:
    tower = build(KINDS[kind], max_events=20)
    user, candidates = make_user([0, 30, 6], dtype=torch.float32), make_candidates([2, 40, 3], dtype=torch.float32)
    parameters = [each for each in tower.parameters() if each.requires_grad]

    def step() -> list[Tensor]:
        logits = run(tower, user, candidates)
        return [logits, *torch.autograd.grad(logits.square().sum(), parameters)]

    torch.use_deterministic_algorithms(True)
    try:
        first, second = step(), step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = step()
    error = (low[0].float() - first[0]).abs()
    assert 0 < error.max() < 0.3
    assert all(torch.isfinite(grad).all() for grad in low)
    assert run(tower, make_user([], dtype=torch.float32), make_candidates([], dtype=torch.float32)).shape == (0, 2)
    assert run(tower, make_user([3], dtype=torch.float32), make_candidates([0], dtype=torch.float32)).shape == (0, 2)
    with pytest.raises(ConfigError, match="names 'cross', which this model does not have; leave train.recompute empty"):
        apply_recompute(tower, ["cross"])


@pytest.mark.parametrize(("settings", "message"), [
    ({"kind": "din", "num_recent": 5000}, "num_recent=5000 is more than the .* of data.max_events; lower"),
    ({"kind": "din", "interaction": {"placement": "added"}}, "placement=added adds to .*; leave placement out"),
    ({"kind": "din", "interaction": {"to_head": False}}, "to_head=false leaves a baseline's statistics unread; set it"),
    ({"kind": "transformer", "num_queries": 3}, "num_queries=3 has no meaning with model.sampling=all"),
    ({"kind": "sim_hard", "search_feature": "colour"}, "search_feature='colour' is no item feature .*item, category"),
    ({"kind": "twin", "num_heads": 5}, r"num_heads=5 does not divide model.width=32; use one of \[1, 2, 4"),
    ({"kind": "hstu", "num_heads": 3, "width": 8}, "num_heads=3 does not divide"),
    ({"kind": "sum_pooling", "interaction": {"fields": ["colour"]}}, "item feature 'colour'; known are item, category"),
])
def test_what_does_not_fit_is_refused_with_the_remedy(settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(settings)


@pytest.mark.parametrize("settings", [
    {"kind": "transformer", "merge_size": 2}, {"kind": "transformer", "sampling": "recent"},
    {"kind": "din", "num_recent": 0}, {"kind": "twin", "top_k": 0}, {"kind": "sim_hard", "top_k": 0}], ids=str)
def test_what_is_no_option_of_a_kind_is_refused(settings: Mapping[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError, match="Input should be"):
        build(settings)


@pytest.mark.parametrize("kind", ["din", "transformer", "twin", "hstu"])
def test_matching_a_candidate_with_the_history_is_learned(kind: str) -> None:
    widths = InputWidths({"item": 32}, {}, {}, 0)
    assert matching_loss(build({"kind": kind, "head": {"hidden": [32]}}, widths, 1, max_events=21)) < 0.35
