"""What the tower promises: who sees whom, what is cached, what survives low precision and determinism checks."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longer_rec.model.inputs import CandidateSide, UserSide
from longer_rec.model.longer import LongerTower
from longer_rec.model.state import UserState
from longer_rec.model.tower import AnyTower, CountConfig, NoSequenceConfig, TowerConfig, build_tower
from tests.reference.longer import one_candidate, one_request
from tests.reference.towers import DAY_S, WIDTHS, leaves, make_candidates, make_user, randomise, replace_candidate

HISTORIES, CANDIDATES = [0, 1, 7, 8, 30, 3], [2, 1, 9, 0, 70, 1]
FULL = {"width": 8, "num_queries": 3, "merge_size": 2, "inner_trans": {"num_heads": 2}, "num_cls_tokens": 1,
        "interaction": {"context": ["item"]}, "pooling": "globals+mean"}
WINDOW = {"copies": 3, "window": 3, "chunk": 4}
CONFIGS = {"longer": FULL, "merge 4": {**FULL, "merge_size": 4}, "plain": {"width": 8, "num_queries": 3},
           "uniform": {**FULL, "sampling": "uniform"},
           "recent and uniform": {"width": 8, "merge_size": 1, "sampling": "recent_uniform", "num_queries": 4},
           "learnable": {**FULL, "sampling": "learnable", "pooling": "candidate"},
           "all": {"width": 8, "sampling": "all"}, "post": {**FULL, "norm": "post"},
           "hybrid": {**FULL, "norm": "hybrid", "sampling": "uniform"},
           "hybrid_star": {**FULL, "merge_size": 4, "norm": "hybrid_star", "num_self_layers": 2},
           "copies": {"width": 8, "num_queries": 3, "phd": {"copies": 3}, "interaction": {}},
           "counted": {**FULL, "count_matches": True, "num_heads": 4, "norm": "hybrid"},
           "window": {**FULL, "phd": WINDOW, "merge_size": 1, "inner_trans": None, "num_queries": 6}}


def build(settings: dict[str, object], dtype: torch.dtype = torch.float32) -> LongerTower:
    torch.manual_seed(0)
    tower = build_tower(TowerConfig.model_validate(settings), WIDTHS, num_tasks=1, max_events=20)
    assert isinstance(tower, LongerTower)
    randomise(tower, std=0.05)
    return tower.to(dtype).eval()


def run(tower: AnyTower, user: UserSide, candidates: CandidateSide) -> Tensor:
    return tower.score(tower.encode(user), candidates)


def floats(histories: list[int] = HISTORIES, counts: list[int] = CANDIDATES) -> tuple[UserSide, CandidateSide]:
    return make_user(histories, dtype=torch.float32), make_candidates(counts, dtype=torch.float32)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_batch_without_requests_is_evaluated(name: str) -> None:
    """A rank joins the others' last batch of an evaluation with one."""
    assert run(build(CONFIGS[name]), *floats([], [])).shape == (0, 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_replacing_another_candidate_changes_nothing_bitwise(name: str) -> None:
    tower = build(CONFIGS[name])
    user, candidates = floats()
    before = run(tower, user, candidates)
    for row in (0, 4, 50, 82):
        after = run(tower, user, replace_candidate(candidates, row))
        others = torch.arange(len(before)) != row
        assert torch.equal(before[others], after[others])
        assert not torch.equal(before[row], after[row])


@pytest.mark.parametrize("name", CONFIGS)
def test_adding_a_candidate_changes_nothing_beyond_rounding(name: str) -> None:
    tower = build(CONFIGS[name])
    user, candidates = floats()
    before = run(tower, user, candidates)
    more = CandidateSide(
        {key: torch.cat([value, value[:1]]) for key, value in candidates.embedding.items()},
        {key: torch.cat([value, value[:1]]) for key, value in candidates.id.items()},
        torch.cat([candidates.dense_CF, candidates.dense_CF[:1]]), candidates.length_B + torch.tensor([0] * 5 + [1]))
    torch.testing.assert_close(run(tower, user, more)[:-1], before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_candidate_alone_scores_as_in_its_list(name: str) -> None:
    tower = build(CONFIGS[name])
    user, candidates = floats()
    together = run(tower, user, candidates)
    rows = torch.repeat_interleave(candidates.length_B).tolist()
    for row in (0, 2, 3, 11, 60, 82):
        alone = run(tower, one_request(user, rows[row], 20), one_candidate(candidates, row))
        torch.testing.assert_close(together[row:row + 1], alone, rtol=0, atol=1e-6)


def tensors_of(state: UserState) -> Iterator[Tensor]:
    yield state.head_BF
    for layer in state.layers:
        for cache in (layer, layer.window):
            if cache is not None:
                yield from (cache.key_SHE, cache.value_SHE, cache.length_B)
    if state.matches is not None:
        yield from (state.matches.id, state.matches.length_JB, state.matches.statistic, state.matches.user_BF)


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_state_scores_like_a_fresh_one_and_is_left_alone(name: str) -> None:
    tower = build(CONFIGS[name])
    user, candidates = floats()
    state = tower.encode(user)
    kept = [tensor.clone() for tensor in tensors_of(state)]
    first = tower.score(state, candidates)
    tower.score(state, replace_candidate(candidates, 4))
    assert torch.equal(tower.score(state, candidates), first)
    assert torch.equal(run(tower, user, candidates), first)
    assert all(torch.equal(left, right) for left, right in zip(kept, tensors_of(state), strict=True))


@pytest.mark.parametrize("phd", [{"copies": 2}, {"copies": 4, "copy_embedding": False}, WINDOW])
def test_hidden_copies_leave_the_users_cache_as_it_was_and_add_a_window_at_most(phd: dict[str, object]) -> None:
    settings = {**FULL, "num_queries": 5, "num_self_layers": 2}
    plain, copies = build(settings), build({**settings, "phd": phd})
    copies.load_state_dict(plain.state_dict(), strict=False)
    user, candidates = floats()
    wanted, given = plain.encode(user), copies.encode(user)
    for left, right in zip(wanted.layers, given.layers, strict=True):
        assert torch.equal(left.key_SHE, right.key_SHE)
        assert torch.equal(left.value_SHE, right.value_SHE)
        assert torch.equal(left.length_B, right.length_B)
        assert (right.window is not None) == ("window" in phd)
        if right.window is not None:
            # Merged tokens: 0, 1, 4, 4, 10, 2; two hidden tokens each in a chunk of 4; a window of 3.
            assert right.window.length_B.tolist() == [0, 2, 3, 3, 3, 3]
            assert right.window.key_SHE.shape[0] == right.window.value_SHE.shape[0] == 14
    assert torch.equal(wanted.head_BF, given.head_BF)
    assert not torch.allclose(plain.score(wanted, candidates), copies.score(given, candidates))


def test_the_chunk_counts_from_the_newest_event_however_long_the_history() -> None:
    """What training and serving cut differently must not shift it."""
    tower = build({**FULL, "num_queries": 4, "phd": WINDOW, "merge_size": 1, "inner_trans": None})
    user, _ = floats([15], [1])
    whole, cut = (tower.encode(each).layers[0].window for each in (user, one_request(user, 0, 12)))
    assert whole is not None
    assert cut is not None
    torch.testing.assert_close(whole.key_SHE, cut.key_SHE, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampling", [{}, {"sampling": "uniform"}, {"sampling": "recent_uniform", "num_queries": 4},
                                      {"sampling": "all", "num_queries": 50}, {"num_queries": 4, "phd": WINDOW}])
def test_an_event_never_sees_a_newer_one_or_a_user_global(sampling: dict[str, object]) -> None:
    tower = build({**FULL, "merge_size": 1, "inner_trans": None, **sampling})
    user, _ = floats([9], [1])
    newest = {name: value.detach().clone() for name, value in user.event_embedding.items()}
    for value in newest.values():
        value[-1] += 1.0
    changed = replace(user, event_embedding=newest,
                      user_embedding={name: value.detach() + 1.0 for name, value in user.user_embedding.items()})
    for before, after in zip(tower.encode(user).layers, tower.encode(changed).layers, strict=True):
        num_events = int(before.length_B[0]) - 2
        assert torch.equal(before.key_SHE[:num_events - 1], after.key_SHE[:num_events - 1])
        assert torch.equal(before.value_SHE[:num_events - 1], after.value_SHE[:num_events - 1])
        assert not torch.equal(before.key_SHE[num_events - 1:], after.key_SHE[num_events - 1:])
        if before.window is not None and after.window is not None:
            # One hidden token of the position before, two of the newest.
            assert torch.equal(before.window.key_SHE[:1], after.window.key_SHE[:1])
            assert not torch.equal(before.window.key_SHE[1:], after.window.key_SHE[1:])


def test_only_the_newest_max_events_count() -> None:
    tower = build(FULL)
    user, candidates = floats([35], [4])
    logits = run(tower, user, candidates)
    assert torch.equal(run(tower, one_request(user, 0, 20), candidates), logits)
    assert not torch.equal(run(tower, one_request(user, 0, 18), candidates), logits)


def test_a_merged_event_reaches_the_logit_however_old() -> None:
    tower = build({**FULL, "pooling": "globals", "interaction": None}, torch.float64)
    user, candidates = make_user([20]), make_candidates([2])
    grad = torch.autograd.grad(run(tower, user, candidates).sum(), user.event_embedding["item"])[0]
    assert (grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_autocast_stays_close_to_fp32(name: str) -> None:
    tower = build(CONFIGS[name])
    user, candidates = floats()
    exact = run(tower, user, candidates)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = run(tower, user, candidates)
    low.float().sum().backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves(user, candidates) if leaf.grad is not None)
    error = (low.float() - exact).abs()
    assert error.mean() < 0.05 * exact.std() + 0.02
    assert 0 < error.max() < 0.5


@pytest.mark.parametrize("name", CONFIGS)
def test_runs_under_deterministic_algorithms_and_repeats_bitwise(name: str) -> None:
    tower = build(CONFIGS[name])
    user, candidates = floats()
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            logits = run(tower, user, candidates)
            grads = torch.autograd.grad(logits.square().sum(), [*tower.parameters()], allow_unused=True)
            results.append([logits, *(grad for grad in grads if grad is not None)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


def test_dropout_follows_the_global_generator_and_stops_in_eval() -> None:
    settings = {**FULL, "dropout": 0.3, "head": {"dropout": 0.2}}
    tower = build(settings).train()
    user, candidates = floats()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(run(tower, user, candidates))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    tower.eval()
    assert torch.equal(run(tower, user, candidates), run(tower, user, candidates))


def test_no_request_at_all_gives_no_logit() -> None:
    for config in (TowerConfig.model_validate(FULL), NoSequenceConfig(), CountConfig()):
        tower = build_tower(config, WIDTHS, num_tasks=3, max_events=5)
        user, candidates = floats([], [])
        assert run(tower, user, candidates).shape == (0, 3)


def test_no_sequence_ignores_the_history() -> None:
    torch.manual_seed(0)
    tower = build_tower(NoSequenceConfig(), WIDTHS, num_tasks=1, max_events=20)
    user, candidates = floats([4, 6], [3, 2])
    other = replace(make_user([9, 0], seed=8, dtype=torch.float32), user_embedding=user.user_embedding,
                    dense_BF=user.dense_BF)
    assert torch.equal(run(tower, user, candidates), run(tower, other, candidates))
    assert run(tower, user, candidates).std() > 0


def test_count_tower_counts_matches_among_the_newest_events() -> None:
    user, candidates = floats([5], [3])
    user = replace(user, event_id={"item": torch.tensor([2, 2, 3, 2, 0]), "category": torch.tensor([1, 1, 4, 1, 1])},
                   age_T=torch.tensor([50, 40, 30, 20, 10]) * DAY_S)
    candidates = replace(candidates, id={"item": torch.tensor([2, 3, 0]), "category": torch.tensor([1, 4, 5])})
    config = CountConfig(weights={"category": 0.1})
    logits = run(build_tower(config, WIDTHS, 2, max_events=5), user, candidates)
    torch.testing.assert_close(logits, torch.tensor([[3.4], [1.1], [0.0]]).expand(3, 2))
    newest = run(build_tower(config, WIDTHS, 1, max_events=2), user, candidates)
    torch.testing.assert_close(newest, torch.tensor([[1.2], [0.0], [0.0]]))
    assert not list(build_tower(config, WIDTHS, 2, max_events=5).parameters())
