"""Building towers: what is refused, what starts where, and that the plain task is learned."""

from collections.abc import Mapping
from typing import Any

import pydantic
import pytest
import torch

from longer_rec.config import Config, build_config
from longer_rec.errors import ConfigError
from longer_rec.model.inputs import CandidateSide, InputWidths
from longer_rec.model.layers import CausalLayer
from longer_rec.model.longer import LongerTower
from longer_rec.model.norms import layer_norms
from longer_rec.model.tokens import MAX_AGE_S, age_boundaries, age_bucket
from longer_rec.model.tower import AnyTowerConfig, CountConfig, CountTower, NoSequenceTower, TowerConfig, build_tower
from tests.reference.towers import DAY_S, WIDTHS, matching_loss


class Root(Config):
    tower: AnyTowerConfig = pydantic.Field(default_factory=TowerConfig)


@pytest.mark.parametrize(("content", "kind"), [
    ({"kind": "longer", "merge_size": 4, "inner_trans": {}, "num_queries": 3}, LongerTower),
    ({"kind": "no_sequence"}, NoSequenceTower), ({"kind": "count", "weights": {"category": 0.2}}, CountTower)])
def test_kind_chooses_the_tower(content: Mapping[str, Any], kind: type) -> None:
    root = build_config(Root, {"tower": content}, "test")
    assert type(build_tower(root.tower, WIDTHS, 1, 10)) is kind


@pytest.mark.parametrize(("settings", "message"), [
    ({"width": 6, "merge_size": 2, "num_heads": 5}, r"num_heads=5 does not divide the merged width 12.*\[1, 2, 3, 4"),
    ({"width": 6, "merge_size": 2, "inner_trans": {"num_heads": 4}}, r"inner_trans.num_heads=4 does not divide"),
    ({"merge_size": 1, "inner_trans": {}}, "inner_trans needs groups"),
    ({"norm": "hybrid_star", "num_self_layers": 0}, "hybrid_star .* model.num_self_layers=0 .*; set .* 1 or more"),
    ({"interaction": {"fields": ["colour"]}}, "item feature 'colour'; known are item, category"),
    ({"interaction": {"context": ["quantity"]}}, "item feature 'quantity'"),
])
def test_sizes_that_do_not_fit_are_refused_with_the_remedy(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_tower(TowerConfig.model_validate({"num_queries": 2, **settings}), WIDTHS, 1, 10)


@pytest.mark.parametrize(("settings", "message"), [
    ({"num_queries": 600}, "num_queries=600 but max_events=1000 and merge_size=2 give at most 500 merged tokens; lower "
                           "model.num_queries to 500 or less, or raise data.max_events to 1199 or more"),
    ({"num_queries": 126, "merge_size": 8}, "at most 125 merged tokens.* to 1001 or more"),
    ({"sampling": "all", "num_queries": 100}, "num_queries=100 has no meaning with model.sampling=all"),
    ({"sampling": "learnable", "num_queries": 0}, "num_queries=0 leaves model.sampling=learnable nothing to choose"),
    ({"sampling": "recent_uniform", "num_queries": 51}, "num_queries=51 is odd.*use an even number from 2"),
    ({"phd": {"copies": 1, "window": 2, "chunk": 2}}, "copies=1 has no hidden copies for window=2 and chunk=2; use"),
    ({"phd": {"window": 2}}, "window=2 and chunk=0 go together"),
    ({"phd": {"chunk": 2}}, "window=0 and chunk=2 go together"),
    ({"phd": {"window": 9, "chunk": 8}}, "window=9 is more than the 8 hidden tokens of a chunk of 8 positions with 2"),
    ({"phd": {"copies": 3, "window": 17, "chunk": 8}}, "window=17 is more than the 16 hidden tokens"),
    ({"phd": {"window": 2, "chunk": 51}}, "chunk=51 is more than the 50 model.num_queries"),
    ({"phd": {"window": 2, "chunk": 501}, "sampling": "all"}, "chunk=501 is more than the 500 merged tokens"),
    ({"phd": {"window": 2, "chunk": 2}, "sampling": "learnable"}, "window needs queries that stand for positions"),
    ({"sampling": "uniform", "num_self_layers": 0}, "sampling=uniform chooses queries that nothing reads"),
    ({"sampling": "learnable", "num_self_layers": 0, "pooling": "candidate"}, "set that, or num_self_layers to 1"),
])
def test_queries_that_cannot_be_or_go_unused_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_tower(TowerConfig.model_validate(settings), WIDTHS, 1, 1000)


def test_as_many_queries_as_there_can_be_tokens_are_allowed_and_one_more_is_not() -> None:
    for num_queries, merge_size in ((1, 1), (5, 1), (3, 4), (7, 16)):
        config = TowerConfig(width=2, num_queries=num_queries, merge_size=merge_size)
        build_tower(config, WIDTHS, 1, config.fewest_events)
        if config.fewest_events > 1:
            with pytest.raises(ConfigError, match=f"to {config.fewest_events} or more"):
                build_tower(config, WIDTHS, 1, config.fewest_events - 1)


def test_other_impossible_towers_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_events=0"):
        build_tower(TowerConfig(num_queries=2), WIDTHS, 1, 0)
    with pytest.raises(ConfigError, match="num_tasks=0"):
        build_tower(TowerConfig(num_queries=2), WIDTHS, 0, 5)
    with pytest.raises(ConfigError, match="names 'brand'"):
        build_tower(CountConfig(weights={"brand": 1.0}), WIDTHS, 1, 5)
    with pytest.raises(ConfigError, match="at least one item feature"):
        build_tower(TowerConfig(num_queries=2), InputWidths({}, {}, {}, 0), 1, 5)


def test_age_buckets_are_log_spaced_and_monotone() -> None:
    boundary = age_boundaries(64)
    assert boundary.numel() == 63
    ratio = boundary[1:] / boundary[:-1]
    torch.testing.assert_close(ratio, ratio[:1].expand(62))
    ages = torch.tensor([0, 1, 60, DAY_S, 7 * DAY_S, 365 * DAY_S, MAX_AGE_S, 40 * 365 * DAY_S])
    bucket = age_bucket(ages, boundary)
    assert bucket[0] == 0
    assert bucket[1] == 1
    assert bucket[-1] == 63
    assert (bucket.diff() >= 0).all()
    assert len(set(bucket.tolist())) >= len(ages) - 1


def test_head_j_starts_as_a_matcher_of_slot_j() -> None:
    torch.manual_seed(0)
    K, D = 4, 32
    layer = CausalLayer(K * D, K, 4, 0.0, "layer", 2.0, layer_norms("pre", 0))
    slots = torch.randn(K, D)
    query, key, _ = layer.qkv(slots.flatten()).split(K * D)
    for other in range(K):
        moved = layer.qkv(slots.roll(other, 0).flatten())[K * D:2 * K * D]
        score = (query.view(K, D) * moved.view(K, D)).sum(1) / D**0.5
        assert (score > 10).all() if other == 0 else (score < 10).all()
    assert torch.equal(key, layer.qkv(slots.flatten())[K * D:2 * K * D])


@pytest.mark.parametrize("num_heads", [0, 2, 4, 6, 8])
def test_heads_of_a_slot_start_as_matchers_of_features_of_their_own(num_heads: int) -> None:
    """With 2 heads a slot: one of the item and one of the rest; with more heads than features all read everything."""
    torch.manual_seed(0)
    widths = {"item": 16, "category": 4, "brand": 4}
    config = TowerConfig(width=24, merge_size=2, num_heads=num_heads, num_queries=2)
    tower = LongerTower(config, InputWidths(widths, {"action": 2}, {}, 0), 1, 10)
    per_slot = max(num_heads, 2) // 2
    reads: dict[str, list[bool]] = {}
    for changed in widths:
        embedding = {name: torch.randn(1, width).repeat(2, 1) for name, width in widths.items()}
        embedding[changed] = torch.randn(2, widths[changed])
        token_CX = tower.tokens.candidates(CandidateSide(embedding, {}, torch.zeros(2, 0), torch.tensor([2])))
        assert token_CX.shape == (2, 48)
        parts = (token_CX[0] != token_CX[1]).view(2, per_slot, -1).any(dim=2)
        assert torch.equal(parts[0], parts[1]), "both slots alike"
        reads[changed] = parts[0].tolist()
    expected = {2: {"item": [True, False], "category": [False, True], "brand": [False, True]},
                3: {"item": [True, False, False], "category": [False, True, False], "brand": [False, False, True]}}
    assert reads == expected.get(per_slot, dict.fromkeys(widths, [True] * per_slot))


@pytest.mark.parametrize("settings", [
    {"merge_size": 1}, {"merge_size": 2}, {"merge_size": 2, "inner_trans": {}, "num_self_layers": 0},
    {"merge_size": 4}, {"merge_size": 2, "interaction": {"to_head": False}}, {"norm": "post"},
    {"norm": "hybrid_star"}], ids=["K=1", "K=2", "K=2 InnerTrans", "K=4", "interaction", "post", "hybrid_star"])
def test_matching_a_candidate_with_the_history_is_learned(settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    config = TowerConfig.model_validate({"num_queries": 4, "head": {"hidden": [32]}, **settings})
    assert matching_loss(build_tower(config, InputWidths({"item": 32}, {}, {}, 0), num_tasks=1, max_events=21)) < 0.35
