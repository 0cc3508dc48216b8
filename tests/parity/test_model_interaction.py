"""Match statistics by runs against counting event by event, and by hand."""

from dataclasses import replace

import pytest
import torch

from longer_rec.model.inputs import CandidateSide, UserSide
from longer_rec.model.interaction import (
    Interaction,
    InteractionConfig,
    candidate_statistics,
    group_matches,
    matched_rows,
    num_statistics,
)
from tests.reference.longer import one_candidate, one_request, statistics_ref
from tests.reference.towers import DAY_S, make_candidates, make_user

FIELDS = ("item", "category")
CONFIG = InteractionConfig(windows=(2, 5, 1000))


@pytest.mark.parametrize(("histories", "counts"), [([0, 1, 17, 40, 0, 5], [2, 1, 9, 3, 0, 1]), ([0], [3]), ([30], [1]),
                                                   ([4, 4], [0, 2])])
def test_statistics_equal_reference(histories: list[int], counts: list[int]) -> None:
    user, candidates = make_user(histories), make_candidates(counts)
    module = Interaction(CONFIG, FIELDS, num_statistics(CONFIG, len(FIELDS)))
    runs = group_matches(CONFIG, FIELDS, user, torch.float64)
    given = matched_rows(FIELDS, runs, candidates)
    row = 0
    for request, count in enumerate(counts):
        for _ in range(count):
            wanted, totals = statistics_ref(module, one_request(user, request, 10**6), one_candidate(candidates, row))
            torch.testing.assert_close(given[:, row:row + 1], wanted, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(runs.user_BF[request], totals[0], rtol=1e-12, atol=1e-12)
            row += 1
    assert sum(histories) < 10 or (given[..., 0] > 0).any()


def _by_hand() -> tuple[UserSide, CandidateSide]:
    """Item 5 bought twice in a basket 4 weeks ago and once a week ago; item 3 never; item 0 is unknown."""
    user = make_user([4])
    week = 7 * DAY_S
    user = replace(user, age_T=torch.tensor([4 * week, 4 * week, 2 * week, week]),
                   event_id={"item": torch.tensor([5, 5, 0, 5]), "category": torch.tensor([1, 1, 2, 1])})
    candidates = make_candidates([3])
    return user, replace(candidates, id={"item": torch.tensor([5, 3, 0]), "category": torch.tensor([1, 2, 4])})


def test_statistics_by_hand() -> None:
    user, candidates = _by_hand()
    config = InteractionConfig(decays=(1.0,), windows=(1, 1000))
    raw = matched_rows(("item",), group_matches(config, ("item",), user, torch.float64), candidates)[0]
    e = torch.e
    # newest age, oldest age, newest basket, oldest basket, newest position, baskets, decayed, windows, decayed baskets
    wanted = [1.0, 4.0, 0.0, 2.0, 0.0, 2.0, 2 * e**-4 + e**-1, 1.0, 3.0, e**-4 + e**-1]
    torch.testing.assert_close(raw[0], torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    assert torch.equal(raw[1:], torch.zeros_like(raw[1:]))


def test_described_statistics_are_finite_small_and_counted() -> None:
    user, candidates = make_user([0, 1, 500, 3000]), make_candidates([3, 3, 40, 40])
    features = candidate_statistics(CONFIG, FIELDS, group_matches(CONFIG, FIELDS, user), candidates)
    assert features.shape == (86, num_statistics(CONFIG, 2))
    assert features.abs().max() < 8
    assert features.std(0).gt(0).sum() > features.shape[1] // 2


def test_statistics_of_one_request_do_not_depend_on_the_others() -> None:
    user, candidates = make_user([6, 11, 3]), make_candidates([2, 4, 1])
    together = candidate_statistics(CONFIG, FIELDS, group_matches(CONFIG, FIELDS, user), candidates)[2:6]
    ids = {name: value[2:6] for name, value in candidates.id.items()}
    alone = candidate_statistics(CONFIG, FIELDS, group_matches(CONFIG, FIELDS, one_request(user, 1, 100)),
                                 replace(candidates, id=ids, length_B=torch.tensor([4])))
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)
