"""States of users are taken apart, put together and carried to another time without changing what they score."""

from dataclasses import replace

import pytest
import torch

from longer_rec.config import Config, build_config
from longer_rec.model.linear import lay_out_for_inference
from longer_rec.model.longer import LongerTower
from longer_rec.model.state import join_states, split_state, state_bytes, tensors_of
from longer_rec.model.tower import AnyTower, AnyTowerConfig, build_tower
from tests.reference.towers import DAY_S, WIDTHS, make_candidates, make_user, randomise

HISTORIES, CANDIDATES = [0, 1, 7, 8, 15, 3], [2, 1, 9, 0, 7, 1]
LONGER = {"kind": "longer", "width": 8, "num_queries": 3, "merge_size": 2, "num_cls_tokens": 1, "interaction": {}}
TOWERS = {"longer": LONGER, "uniform": {**LONGER, "sampling": "uniform"}, "count": {"kind": "count"},
          "hybrid": {**LONGER, "norm": "hybrid"}, "two tokens": {**LONGER, "interaction": {"placement": "token"}},
          "phd": {**LONGER, "phd": {"copies": 2}},
          "phd window": {**LONGER, "phd": {"copies": 2, "window": 2, "chunk": 2}},
          **{kind: {"kind": kind} for kind in
            ("no_sequence", "din", "sum_pooling", "hstu", "twin", "sim_hard", "sasrec")}}


class Model(Config):
    model: AnyTowerConfig


def build(name: str) -> AnyTower:
    torch.manual_seed(0)
    tower = build_tower(build_config(Model, {"model": TOWERS[name]}, name).model, WIDTHS, 1, max_events=20)
    randomise(tower, std=0.05)
    return tower.float().eval().requires_grad_(False)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_split_and_joined_states_are_bitwise_those_encoded_together(name: str) -> None:
    tower = build(name)
    user, candidates = make_user(HISTORIES, dtype=torch.float32), make_candidates(CANDIDATES, dtype=torch.float32)
    whole = tower.encode(user)
    parts = split_state(whole)
    assert len(parts) == len(HISTORIES)
    assert torch.equal(tower.score(join_states(parts), candidates), tower.score(whole, candidates))
    backwards = join_states(parts[::-1])
    turned = make_candidates([1], dtype=torch.float32)
    rows = torch.tensor([len(HISTORIES)])
    every = replace(turned, length_B=torch.ones(len(HISTORIES), dtype=torch.int64),
                    embedding={key: value.expand(rows.item(), -1) for key, value in turned.embedding.items()},
                    id={key: value.expand(rows.item()) for key, value in turned.id.items()},
                    dense_CF=turned.dense_CF.expand(rows.item(), -1))
    torch.testing.assert_close(tower.score(backwards, every), tower.score(whole, every).flip(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["longer", "uniform", "phd", "phd window", "hybrid", "two tokens"])
@torch.no_grad()
def test_weights_laid_out_for_inference_give_the_same_and_in_bf16_nearly_so(name: str) -> None:
    user, candidates = make_user(HISTORIES, dtype=torch.float32), make_candidates(CANDIDATES, dtype=torch.float32)
    tower = build(name)
    as_trained = tower.score(tower.encode(user), candidates)
    lay_out_for_inference(tower)
    torch.testing.assert_close(tower.score(tower.encode(user), candidates), as_trained, rtol=0, atol=1e-5)
    lay_out_for_inference(tower, torch.bfloat16)
    state = tower.encode(user)
    assert {tensor.dtype for tensor in tensors_of(state)} == {torch.float32, torch.int64}
    difference = (tower.score(state, candidates) - as_trained).abs().max()
    assert 0 < difference < 3 * 2 ** -8 * as_trained.abs().max(), "three roundings of the logit itself to bf16"


@torch.no_grad()
def test_a_part_owns_its_memory_and_counts_it_exactly() -> None:
    parts = split_state(build("longer").encode(make_user(HISTORIES, dtype=torch.float32)))
    for part in parts:
        assert state_bytes(part) == sum(tensor.nbytes for tensor in tensors_of(part))


@torch.no_grad()
def test_a_state_at_another_time_is_bitwise_a_fresh_one_or_none() -> None:
    tower = build("longer")
    assert isinstance(tower, LongerTower)
    user = make_user([15], dtype=torch.float32)
    state, reused = tower.encode(user), 0
    for later in (0, 1, 60, 3600, DAY_S, 30 * DAY_S):
        moved = replace(user, age_T=user.age_T + later)
        retimed, fresh = tower.retime(state, user.age_T, moved), tower.encode(moved)
        if retimed is not None:
            reused += 1
            assert state_bytes(retimed) == state_bytes(fresh)
            for one, other in zip(split_state(retimed), split_state(fresh), strict=True):
                candidates = make_candidates([9], dtype=torch.float32)
                assert torch.equal(tower.score(one, candidates), tower.score(other, candidates))
    assert 2 <= reused < 6, "ages of days keep their bucket for minutes, not for a month"
    assert tower.retime(state, user.age_T, replace(user, age_T=user.age_T + 30 * DAY_S)) is None
