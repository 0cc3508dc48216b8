"""FLOPs: the paper's check values, and a counted run."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longer_rec.model.flops import tower_flops
from longer_rec.model.layers import CausalLayer
from longer_rec.model.norms import layer_norms
from longer_rec.model.own_attention import own_mask
from longer_rec.model.sampling import Queries
from longer_rec.model.tower import TowerConfig, build_tower
from tests.reference.longer import sees
from tests.reference.towers import WIDTHS, make_candidates, make_user

# Equal lengths, so that grouped attention pads nothing; more events than positions, so that the cut is counted too.
HISTORIES, CANDIDATES, MAX_EVENTS = [64, 64, 70], [9, 9, 9], 64


@pytest.mark.parametrize(("merge_size", "papers"), [(1, 587e6), (4, 336e6), (8, 470e6)])
def test_our_layer_costs_what_the_paper_says_of_its_own(merge_size: int, papers: float) -> None:
    """Every token a query, L = 2048, d = 32, counted by torch: 24 L K d^2 + 4 L^2 d / K (section on token merge)."""
    num_tokens, width = 2048 // merge_size, 32 * merge_size
    layer = CausalLayer(width, merge_size, 4, 0.0, "layer", 0.0, layer_norms("pre", 0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        length_B = torch.tensor([num_tokens])
        layer.encode(torch.randn(num_tokens, width), length_B, Queries(length_B))
    formula = 24 * 2048 * merge_size * 32**2 + 4 * 2048**2 * 32 / merge_size
    assert counter.get_total_flops() == pytest.approx(formula, rel=0.01)
    assert formula == pytest.approx(papers, rel=0.002)


def test_pairs_of_parallel_hidden_decoding_are_those_of_its_mask() -> None:
    for t, R, wanted in ((6, 3, 81), (6, 1, 21), (1, 4, 10), (9, 2, 99), (6 * 3, 1, 171)):
        pairs = [(place, copy) for place in range(t) for copy in range(1, R + 1)]
        assert sum(sees(query, key, [], 0) for query in pairs for key in pairs) == wanted
        assert sum(len(rows) for rows in own_mask(t, R).seen) == wanted
        assert t * (t + 1) // 2 + (R - 1) * t * (t - 1) // 2 + t * (R * (R + 1) // 2 - 1) == wanted  # docs/phd.md


def test_our_layer_has_as_many_parameters_as_the_papers_up_to_its_biases() -> None:
    # The paper's: 12 d^2 + 13 d, biases and two norms included. Ours has no bias on q, k, v and the output projection,
    # 4 d fewer, and a gain on own values, d more.
    layer = CausalLayer(32, 2, 4, 0.0, "layer", 2.0, layer_norms("pre", 0))
    assert sum(each.numel() for each in layer.parameters()) == 12 * 32**2 + (13 - 3) * 32


CONFIGS = {
    "plain": {},
    "no merge": {"merge_size": 1, "num_heads": 2},
    "merge 4 with InnerTrans": {"merge_size": 4, "inner_trans": {"num_layers": 2, "num_heads": 2}, "num_queries": 7},
    "interaction token": {"interaction": {"context": ["item"]}},
    "interaction added": {"interaction": {"placement": "added"}, "num_self_layers": 3},
    "interaction in the head": {"interaction": {"placement": "none"}, "num_self_layers": 0},
    "cls tokens and mean": {"num_cls_tokens": 2, "pooling": "globals+mean", "head": {"hidden": [16]}},
    "uniform": {"sampling": "uniform", "num_self_layers": 2},
    "recent and uniform, mean": {"sampling": "recent_uniform", "pooling": "globals+mean", "merge_size": 8},
    "learnable": {"sampling": "learnable", "pooling": "candidate", "num_cls_tokens": 1},
    "all": {"sampling": "all", "num_queries": 50, "num_self_layers": 2},
    "candidate pooled": {"pooling": "candidate", "num_self_layers": 0},
    "two copies": {"phd": {}, "num_self_layers": 2},
    "three copies of two tokens": {"phd": {"copies": 3}, "interaction": {}},
    "copies, cross layer alone": {"phd": {"copies": 3}, "num_self_layers": 0},
    "window": {"phd": {"window": 4, "chunk": 8}, "num_self_layers": 2},
    "window, three copies": {"phd": {"copies": 3, "window": 5, "chunk": 4}, "interaction": {}, "sampling": "uniform"},
    "window, cross layer alone": {"phd": {"copies": 3, "window": 5, "chunk": 4}, "num_self_layers": 0},
    "projection MLP": {"projection_hidden": 24, "user_token": False, "num_cls_tokens": 1},
    "post norm": {"norm": "post"},
    "hybrid norm, starred": {"norm": "hybrid_star", "num_self_layers": 2},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("width", [8, 32])
def test_flops_equal_a_counted_run(name: str, width: int) -> None:
    config = TowerConfig.model_validate({"width": width, "num_queries": 8, **CONFIGS[name]})
    tower = build_tower(config, WIDTHS, num_tasks=2, max_events=MAX_EVENTS)
    user, candidates = make_user(HISTORIES, dtype=torch.float32), make_candidates(CANDIDATES, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower.score(tower.encode(user), candidates)
    flops = tower_flops(config, WIDTHS, 2, [min(length, MAX_EVENTS) for length in HISTORIES], CANDIDATES)
    assert flops.total == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert all(part >= 0 for part in dataclasses.astuple(flops))
    assert min(flops.input, flops.cross, flops.head) > 0


def test_flops_of_an_empty_batch_are_zero_up_to_the_shared_projection() -> None:
    config = TowerConfig()
    flops = tower_flops(config, WIDTHS, 1, [], [])
    assert flops.cross == flops.head == flops.self_layers == flops.merge == 0
    assert flops.input == 2 * (WIDTHS.event["quantity"] + config.age_width) * config.width
