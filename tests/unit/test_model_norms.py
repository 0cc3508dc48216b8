"""Norm placements: what they start from, what they cache, which of their weights decay, and gradients at the edges."""

import math
from typing import get_args

import pytest
import torch
from torch import nn

from longer_rec.model.layers import CausalLayer
from longer_rec.model.longer import LongerTower
from longer_rec.model.norms import HeadNorm, NormPlace, layer_norms
from longer_rec.model.tower import TowerConfig, build_tower
from longer_rec.sparse.optimizers import decay_groups
from tests.reference.towers import WIDTHS, leaves, make_candidates, make_user

PLACES = get_args(NormPlace)


def build(place: str, **settings: object) -> LongerTower:
    torch.manual_seed(0)
    config = TowerConfig.model_validate({"width": 16, "num_self_layers": 3, "norm": place, **settings})
    tower = build_tower(config, WIDTHS, num_tasks=1, max_events=100)
    assert isinstance(tower, LongerTower)
    return tower


@pytest.mark.parametrize("gamma", [1.0, 4.0])
@pytest.mark.parametrize("num_heads", [2, 8])
@torch.no_grad()
def test_logits_start_on_the_scale_of_pre_norm_at_the_same_gamma(gamma: float, num_heads: int) -> None:
    """Of tokens that no norm changes: mean 0 and variance 1 in each head. What remains is the noise in W_q, W_k."""
    width, num_tokens = 64, 50
    token = torch.randn(num_tokens, num_heads, width // num_heads, generator=torch.Generator().manual_seed(3))
    token = nn.functional.layer_norm(token, token.shape[-1:]).flatten(1)
    scores = {}
    for place in ("pre", "hybrid", "hybrid_star"):
        torch.manual_seed(0)
        layer = CausalLayer(width, num_heads, 4, 0.0, "layer", gamma, layer_norms(place, 0))
        query, key = (nn.functional.linear(layer.attention_norm(token), weight).unflatten(-1, (num_heads, -1))
                      for weight in layer.qkv.weight.split(width)[:2])
        query, key = layer.query_norm(query), layer.key_norm(key)
        scores[place] = torch.einsum("qhe,she->hqs", query, key) / math.sqrt(width // num_heads)
    same = float(scores["pre"].diagonal(dim1=1, dim2=2).mean())
    assert same == pytest.approx(gamma**2 * math.sqrt(width // num_heads), rel=0.1)
    for place in ("hybrid", "hybrid_star"):
        assert (scores[place] - scores["pre"]).abs().mean() < 0.05 * same
        assert scores[place].std() == pytest.approx(float(scores["pre"].std()), rel=0.1)


@pytest.mark.parametrize("place", ["hybrid", "hybrid_star"])
def test_cached_keys_and_values_are_the_normed_ones(place: str) -> None:
    tower = build(place, matcher_gamma=3.0)
    for cache in tower.encode(make_user([7, 0, 20], dtype=torch.float32)).layers:
        for rows, gain in ((cache.key_SHE, 3.0), (cache.value_SHE, 1.0)):
            size = rows.square().mean(-1).sqrt()
            torch.testing.assert_close(size, torch.full_like(size, gain), rtol=1e-3, atol=0)


def test_a_head_norm_computes_in_fp32_whatever_it_is_given() -> None:
    norm = HeadNorm(8, gain=2.0)
    rows = (300 * torch.randn(20, 4, 8)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(norm(rows), norm(rows.float()).bfloat16())
    assert norm.double()(rows.double()).dtype == torch.float64


@pytest.mark.parametrize("place", PLACES)
def test_norm_weights_and_biases_do_not_decay_and_matrices_do(place: str) -> None:
    tower = build(place, norm_kind="layer")
    decaying, resting = decay_groups(dict(tower.named_parameters()), 0.1)
    norms = [parameter for module in tower.modules() if isinstance(module, (nn.LayerNorm, nn.RMSNorm))
             for parameter in module.parameters()]
    # Two a LayerNorm: pre 2 a layer, post 2, hybrid 1; one a head norm, 3 a layer; two of the final norm.
    assert len(norms) == {"pre": 18, "post": 18, "hybrid": 22, "hybrid_star": 24}[place]
    resting_ids = {id(parameter) for parameter in resting["params"]}
    assert (decaying["weight_decay"], resting["weight_decay"]) == (0.1, 0.0)
    assert all(id(parameter) in resting_ids for parameter in norms)
    assert all(id(value) in resting_ids for name, value in tower.named_parameters() if name.endswith("bias"))
    assert not any(id(module.weight) in resting_ids for module in tower.modules() if isinstance(module, nn.Linear))


def test_each_norm_starts_as_it_wants_to_unless_told() -> None:
    for place in PLACES:
        wanted = "megatron" if place.startswith("hybrid") else "plain"
        other = "plain" if wanted == "megatron" else "megatron"
        start, same, told = (build(place, layer_init=init).state_dict() for init in (None, wanted, other))
        assert all(torch.equal(start[name], value) for name, value in same.items())
        assert not torch.equal(start["layers.0.proj.weight"], told["layers.0.proj.weight"])


@pytest.mark.parametrize("gamma", [2.0, 0.0])
@torch.no_grad()
def test_megatron_start_has_the_papers_deviations_and_leaves_the_matcher(gamma: float) -> None:
    tower = build("hybrid", width=64, matcher_gamma=gamma)
    X = tower.config.merged_width
    std = 1 / math.sqrt(2.5 * X)
    for layer in tower.causal_layers:
        query, key, value = layer.qkv.weight.split(X)
        for weight in (value, layer.up.weight):
            assert weight.std() == pytest.approx(std, rel=0.03)
            assert weight.abs().max() <= 3 * std
        for weight in (layer.proj.weight, layer.down.weight):
            assert weight.std() == pytest.approx(std / math.sqrt(2 * 4), rel=0.03)
        assert not layer.up.bias.any()
        assert not layer.down.bias.any()
        for weight, norm in ((query, layer.query_norm), (key, layer.key_norm)):
            assert weight.diagonal().mean() == pytest.approx(gamma, abs=0.02)
            assert (weight - gamma * torch.eye(X)).std() == pytest.approx(0.02 if gamma else std, rel=0.05)
            assert torch.equal(norm.weight, torch.full((64,), gamma or 1.0))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("gamma", [2.0, 0.0])
def test_empty_histories_and_padded_groups_have_gradients_like_whole_ones(place: str, gamma: float) -> None:
    """Seven of eight slots of the only group are zeros, or there is no event; head norms divide by what is there."""
    merge_size = 8

    def largest(lengths: list[int]) -> float:
        tower = build(place, merge_size=merge_size, matcher_gamma=gamma, num_queries=10)
        user, candidates = make_user(lengths, dtype=torch.float32), make_candidates([2], dtype=torch.float32)
        logits = tower.score(tower.encode(user), candidates)
        grads = torch.autograd.grad(logits.sum(), [*leaves(user, candidates), *tower.parameters()], allow_unused=True)
        found = [grad for grad in grads if grad is not None]
        assert all(torch.isfinite(grad).all() for grad in (logits, *found))
        return max(float(grad.norm()) for grad in found)

    whole = largest([8 * merge_size])
    assert whole > 0
    for lengths in ([0], [1], [merge_size + 1]):
        assert largest(lengths) < 3 * whole


def test_a_row_of_zeros_stays_one_and_its_gradient_grows_by_the_gain_over_the_root_of_eps() -> None:
    norm, rows = HeadNorm(8, gain=2.0), torch.zeros(3, 8, requires_grad=True)
    out = norm(rows)
    assert not out.any()
    out.sum().backward()
    torch.testing.assert_close(rows.grad, torch.full((3, 8), 2.0 * 1e3))
