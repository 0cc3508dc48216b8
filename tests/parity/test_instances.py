"""Instance tokens in any tower, and the bottleneck that makes them, against their slow twins."""

from dataclasses import replace

import pydantic
import pytest
import torch
from torch import Tensor

from longer_rec.errors import ConfigError
from longer_rec.model.compressor import CompressConfig, Compressor
from longer_rec.model.inputs import CandidateSide, InstanceWidths, UserSide, all_ages
from longer_rec.model.instances import InstanceTokens, InstanceTokensConfig
from longer_rec.model.longer import LongerTower
from longer_rec.model.state import join_states, split_state
from longer_rec.model.tower import AnyTower, AnyTowerConfig, build_tower
from tests.reference.instances import READING, compressor_ref, instances_ref, make_instances
from tests.reference.towers import WIDTHS, make_candidates, make_user, randomise, replace_candidate

# Empty, one, not divisible by K, more than the queries; empty histories beside tokens and the other way round.
HISTORIES, TOKENS, CANDIDATES = [0, 3, 2, 5, 1], [4, 0, 1, 9, 3], [2, 1, 3, 1, 0]
AGGREGATORS = [{"aggregator": "din"}, {"aggregator": "transformer", "num_layers": 2}, {"aggregator": "transformer"},
               {"aggregator": "longer", "num_layers": 2, "merge_size": 2, "num_queries": 2}]
TOWERS = [{"kind": "longer", "width": 4, "num_queries": 2}, {"kind": "longer", "width": 4, "num_queries": 2,
                                                             "interaction": {"hidden": [6, 5]}},
          {"kind": "transformer", "width": 4}, {"kind": "din", "width": 4}, {"kind": "sum_pooling"},
          {"kind": "no_sequence", "interaction": {"hidden": [6, 5]}}]


def make_batch() -> tuple[UserSide, CandidateSide]:
    return replace(make_user(HISTORIES), instances=make_instances(TOKENS)), make_candidates(CANDIDATES)


def assert_gradients_agree(given: Tensor, wanted: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-9)
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2)).double()
    fast, slow = (torch.autograd.grad((each * weight).sum(), inputs, allow_unused=True, materialize_grads=True)
                  for each in (given, wanted))
    for left, right in zip(fast, slow, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-9)
    assert sum(bool((each != 0).any()) for each in slow) > len(inputs) - 4


@pytest.mark.parametrize("settings", AGGREGATORS)
def test_tokens_equal_their_reference_in_values_and_gradients(settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    config = InstanceTokensConfig.model_validate({"width": 8, "num_heads": 2, "out_width": 3, **settings})
    module = InstanceTokens(config, READING, num_statistics=2).double()
    randomise(module)
    user, candidates = make_batch()
    assert user.instances is not None
    statistics_CF = torch.randn(sum(CANDIDATES), 2).double().requires_grad_()
    inputs = [*user.instances.embedding.values(), *user.user_embedding.values(), *candidates.embedding.values(),
              statistics_CF, *module.parameters()]
    assert_gradients_agree(module.score(module.encode(user), candidates, [statistics_CF]),
                           instances_ref(module, user, candidates, statistics_CF), inputs)


def build_config(settings: dict[str, object]) -> AnyTowerConfig:
    return pydantic.TypeAdapter(AnyTowerConfig).validate_python(settings)


def build(settings: dict[str, object], **more: object) -> AnyTower:
    torch.manual_seed(0)
    tower = build_tower(build_config({**settings, **more}), READING if "instances" in more else WIDTHS, 2, 11).double()
    randomise(tower)
    return tower.eval()


@pytest.mark.parametrize("settings", TOWERS)
def test_every_tower_reads_its_user_s_tokens_and_nobody_else_s(settings: dict[str, object]) -> None:
    tower = build(settings, instances={"width": 8, "num_heads": 2})
    user, candidates = make_batch()
    assert user.instances is not None
    logits = tower.score(tower.encode(user), candidates)
    changed_NI = user.instances.vector_NI.clone()
    changed_NI[0] += 1.0  # of request 0, which has candidates 0 and 1
    changed = replace(user, instances=replace(user.instances, vector_NI=changed_NI))
    other = tower.score(tower.encode(changed), candidates)
    assert ((other - logits).abs().amax(1) > 1e-9).tolist() == [True, True, False, False, False, False, False]
    moved = tower.score(tower.encode(user), replace_candidate(candidates, 3))
    assert torch.equal((moved - logits).abs().amax(1) > 1e-12, torch.arange(7) == 3)


@pytest.mark.parametrize("settings", TOWERS)
def test_states_taken_apart_and_joined_give_the_same_logits(settings: dict[str, object]) -> None:
    tower = build(settings, instances={"width": 8, "num_heads": 2, "aggregator": "longer", "num_layers": 2})
    user, candidates = make_batch()
    state = tower.encode(user)
    again = tower.score(join_states(split_state(state)), candidates)
    torch.testing.assert_close(again, tower.score(state, candidates), rtol=1e-12, atol=1e-12)


def test_no_gradient_enters_a_stored_vector() -> None:
    tower = build(TOWERS[0], instances={"width": 8, "num_heads": 2})
    user, candidates = make_batch()
    assert user.instances is not None
    user.instances.vector_NI.requires_grad_()
    tower.score(tower.encode(user), candidates).sum().backward()
    assert user.instances.vector_NI.grad is None
    assert all(value.grad is not None and bool((value.grad != 0).any()) for value in user.instances.embedding.values())


def test_model_and_data_must_agree_on_tokens() -> None:
    with pytest.raises(ConfigError, match=r"data.instances has no reader"):
        build_tower(build_config(TOWERS[0]), READING, 1, 11)
    with pytest.raises(ConfigError, match=r"model.instances has nothing to read"):
        build_tower(build_config({**TOWERS[0], "instances": {}}), WIDTHS, 1, 11)


def make_compressor() -> Compressor:
    torch.manual_seed(0)
    compressor = Compressor(CompressConfig(order="user", dim=8, num_heads=2)).double()
    randomise(compressor)
    return compressor


# Two users; the second's requests 2 and 3 are at one time, so neither sees the other. Logged candidates come first.
NUM_CANDIDATES = torch.tensor([3, 2, 2, 3, 2])
PAST_ROWS = torch.tensor([0, 1, 0, 1, 0, 1, 3, 5, 7, 8])
PAST = replace(make_instances([0, 2, 0, 0, 8], widths=replace(READING, instance=InstanceWidths(8, 1, 9))),
               row_N=PAST_ROWS)


@pytest.mark.parametrize("from_store", [False, True])
def test_source_transformer_equals_its_reference_in_values_and_gradients(from_store: bool) -> None:
    compressor = make_compressor()
    hidden_CI = torch.randn(12, 8).double().requires_grad_()
    past = replace(PAST, row_N=None) if from_store else PAST
    assert_gradients_agree(compressor(hidden_CI, past, NUM_CANDIDATES),
                           compressor_ref(compressor, hidden_CI, past, NUM_CANDIDATES),
                           [hidden_CI, *compressor.parameters()])


def test_a_past_of_the_batch_equals_the_same_past_from_a_store() -> None:
    compressor = make_compressor()
    hidden_CI = torch.randn(12, 8).double()
    stored = replace(PAST, row_N=None, vector_NI=torch.sigmoid(hidden_CI)[PAST_ROWS])
    assert torch.equal(compressor(hidden_CI, PAST, NUM_CANDIDATES), compressor(hidden_CI, stored, NUM_CANDIDATES))


def test_the_bottleneck_is_all_that_the_rest_of_the_head_reads() -> None:
    tower = build(TOWERS[0], compress={"dim": 8})
    found: list[Tensor] = []
    tower.head.compressor.register_forward_hook(lambda _, __, output: found.append(output))
    user, candidates = replace(make_user(HISTORIES)), make_candidates(CANDIDATES)
    logits = tower.score(tower.encode(user), candidates)
    assert found[0].shape == (7, 8)
    assert bool(((found[0] > 0) & (found[0] < 1)).all())
    hidden = tower.head.rest[0](found[0])
    for linear in tower.head.rest[1:]:
        hidden = linear(torch.nn.functional.silu(hidden))
    assert torch.equal(hidden, logits)


@pytest.mark.parametrize("later_s", [1, 60, 40 * 86400])
def test_a_state_holds_at_a_later_time_until_an_instance_changes_its_age_bucket(later_s: int) -> None:
    tower = build(TOWERS[1], instances={"width": 8, "num_heads": 2})
    assert isinstance(tower, LongerTower)
    user = replace(make_user([3]), instances=make_instances([4]))
    assert user.instances is not None
    # Events so old that nothing of the time asked moves them to another bucket: only instances decide.
    user = replace(user, age_T=user.age_T + 20 * 365 * 86400)
    ages, = all_ages(user)
    later = replace(user, age_T=user.age_T + later_s,
                    instances=replace(user.instances, age_N=user.instances.age_N + later_s))
    fresh, kept = tower.encode(later), tower.retime(tower.encode(user), ages, later)
    assert (kept is None) == (later_s > 86400)
    if kept is not None:
        candidates = make_candidates([3])
        assert torch.equal(tower.score(kept, candidates), tower.score(fresh, candidates))
