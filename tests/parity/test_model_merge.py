"""Packed token merge against the loop over requests."""

import pytest
import torch

from longer_rec.model.merge import InnerTransConfig, TokenMerge
from tests.reference.attention import merge_ref
from tests.reference.towers import randomise

LENGTHS = torch.tensor([0, 1, 7, 8, 4, 0, 3])


def _merge(merge_size: int, inner: InnerTransConfig | None) -> TokenMerge:
    torch.manual_seed(0)
    merge = TokenMerge(4, merge_size, inner).double()
    randomise(merge)
    return merge


@pytest.mark.parametrize("merge_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("inner", [None, InnerTransConfig(), InnerTransConfig(num_layers=2, num_heads=2)])
def test_merge_equals_reference(merge_size: int, inner: InnerTransConfig | None) -> None:
    merge = _merge(merge_size, inner)
    event_TD = torch.randn(int(LENGTHS.sum()), 4, dtype=torch.float64, requires_grad=True)
    given, given_length_B = merge(event_TD, LENGTHS)
    wanted, wanted_length_B = merge_ref(merge, event_TD, LENGTHS)
    assert torch.equal(given_length_B, wanted_length_B)
    torch.testing.assert_close(given, wanted, rtol=1e-10, atol=1e-10)
    inputs = [event_TD, *merge.parameters()]
    weight = torch.randn(wanted.shape, dtype=torch.float64)
    for left, right in zip(torch.autograd.grad((given * weight).sum(), inputs),
                           torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)
        assert left.abs().max() > 0


def test_groups_end_at_the_newest_event_and_pad_at_the_old_end() -> None:
    merged, length_B = TokenMerge(1, 2, None)(torch.tensor([[1.0], [2.0], [3.0], [9.0]]), torch.tensor([3, 1]))
    assert torch.equal(merged, torch.tensor([[0.0, 1.0], [2.0, 3.0], [0.0, 9.0]]))
    assert length_B.tolist() == [2, 1]


def test_inner_trans_starts_as_identity() -> None:
    event_TD = torch.randn(9, 4)
    plain, _ = TokenMerge(4, 4, None)(event_TD, torch.tensor([9]))
    with_inner, _ = TokenMerge(4, 4, InnerTransConfig())(event_TD, torch.tensor([9]))
    assert torch.equal(plain, with_inner)


def test_a_new_event_leaves_no_group_aligned_to_the_oldest() -> None:
    event_TD = torch.randn(6, 4, dtype=torch.float64)
    merge = _merge(2, InnerTransConfig())
    whole, _ = merge(event_TD, torch.tensor([6]))
    shorter, _ = merge(event_TD[1:], torch.tensor([5]))
    assert torch.equal(whole[1:], shorter[1:])
    assert not torch.equal(whole[0], shorter[0])
