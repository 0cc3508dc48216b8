"""Grouped attention and the own-token merge against their explicit twins, forward and gradients, in fp64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longer_rec.errors import ConfigError
from longer_rec.model import attention_plan, own_attention
from longer_rec.model.attention import attend, join
from longer_rec.model.attention_flex import plan_ranges
from longer_rec.model.attention_plan import plan_attention
from longer_rec.model.own_attention import OwnMask, attend_and_merge, merge_own, own_mask
from tests.reference.attention import attend_ref, merge_own_ref
from tests.reference.longer import sees

# Keys and queries of each request: none of either, one, equal, few of many, many of few.
CAUSAL = ([5, 0, 1, 9, 4, 9, 3], [2, 0, 1, 9, 4, 3, 0])
FULL = ([5, 0, 1, 9, 4, 0, 7], [2, 3, 8, 1, 30, 0, 0])


def _agree(fast: Callable[..., tuple[Tensor, ...]], slow: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> None:
    given, wanted = fast(*inputs), slow(*inputs)
    generator = torch.Generator().manual_seed(5)
    losses = []
    for left, right in zip(given, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)
        weight = torch.randn(right.shape, generator=generator, dtype=right.dtype)
        finite = torch.isfinite(right.detach())
        assert finite.any()
        losses.append(((left[finite] * weight[finite]).sum(), (right[finite] * weight[finite]).sum()))
    for left, right in zip(torch.autograd.grad(sum(loss[0] for loss in losses), inputs),
                           torch.autograd.grad(sum(loss[1] for loss in losses), inputs), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)
        assert left.abs().max() > 0


@pytest.mark.parametrize("group_cost", [0, 40, 10**9], ids=["alone", "some together", "all together"])
@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("mask", ["causal", "full", "positions", "windows"])
def test_attention_equals_reference(monkeypatch: pytest.MonkeyPatch, mask: str, num_heads: int, group_cost: int
                                    ) -> None:
    monkeypatch.setattr(attention_plan, "GROUP_COST", group_cost)
    causal = mask == "causal"
    keys, queries = (torch.tensor(lengths) for lengths in (FULL if mask == "full" else CAUSAL))
    position_Q = first_Q = None
    if mask in ("positions", "windows"):
        position_Q = torch.tensor([4, 1, 0, *range(9), 0, 0, 3, 2, 8, 3, 7])
    if mask == "windows":
        first_Q = torch.tensor([3, 0, 0, *(max(i - 2, 0) for i in range(9)), 0, 0, 1, 2, 1, 3, 0])
    torch.manual_seed(0)
    inputs = [torch.randn(int(length.sum()), num_heads, 4, dtype=torch.float64, requires_grad=True)
              for length in (queries, keys, keys)]
    plan = plan_attention(queries, keys, num_heads, causal, position_Q, first_Q)
    assert {0: len(plan.groups) > 3, 40: 1 < len(plan.groups) < 5, 10**9: len(plan.groups) == 1}[group_cost]
    _agree(lambda q, k, v: attend(q, k, v, plan),
           lambda q, k, v: attend_ref(q, k, v, queries, keys, causal, position_Q, first_Q), *inputs)


@pytest.mark.parametrize("mask", ["causal", "full", "positions", "windows"])
def test_attention_without_padding_equals_reference(mask: str) -> None:
    """Forward alone: on a CPU ``flex_attention`` has no backward. More than a block of queries and of keys."""
    torch.manual_seed(0)
    lengths = [(3, 5), (0, 4), (200, 300), (2, 0), (40, 40), (1, 130)] if mask == "full" else [
        (3, 5), (0, 4), (200, 300), (40, 40), (1, 130)]
    queries, keys = torch.tensor(lengths).T
    position_Q = first_Q = None
    if mask in ("positions", "windows"):
        position_Q = torch.cat([torch.arange(count) + 2 for count in queries.tolist()])
        position_Q = torch.minimum(position_Q, keys.repeat_interleave(queries) - 1)
    if mask == "windows":
        first_Q = (position_Q - 140).clamp(min=0)
    query, key, value = (torch.randn(int(length.sum()), 2, 16) for length in (queries, keys, keys))
    wanted = attend_ref(query, key, value, queries, keys, mask == "causal", position_Q, first_Q)
    found = attend(query, key, value, plan_ranges(queries, keys, mask == "causal", position_Q, first_Q))
    torch.testing.assert_close(found[0], wanted[0].nan_to_num(0.0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-5)


def test_a_cpu_refuses_attention_that_it_cannot_train() -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        attention_plan.use_attention("flex", torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_attention_without_padding_has_the_gradients_of_the_groups() -> None:
    torch.manual_seed(0)
    queries, keys = torch.tensor([[3, 5], [0, 4], [200, 300], [40, 40]], device="cuda").T
    inputs = [torch.randn(int(length.sum()), 2, 32, device="cuda", requires_grad=True)
              for length in (queries, keys, keys)]
    found = []
    for plan in (plan_ranges(queries, keys, True), plan_attention(queries, keys, 2, True)):
        output, log_sum = attend(*inputs, plan)
        found.append(torch.autograd.grad((output * output.detach().cos()).sum() + log_sum.sum(), inputs))
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=2e-3, atol=2e-3)


def test_queries_without_keys_give_zero_and_minus_infinity() -> None:
    plan = plan_attention(torch.tensor([2, 1]), torch.tensor([0, 1]), 2, causal=False)
    output, log_sum = attend(torch.randn(3, 2, 4), torch.randn(1, 2, 4), torch.randn(1, 2, 4), plan)
    assert torch.equal(output[:2], torch.zeros(2, 2, 4))
    assert (log_sum[:2] == -math.inf).all()
    assert torch.isfinite(log_sum[2]).all()


def test_nothing_to_attend_at_all() -> None:
    plan = plan_attention(torch.tensor([0, 0]), torch.tensor([0, 3]), 2, causal=False)
    empty, keys = torch.randn(0, 2, 4, requires_grad=True), torch.randn(3, 2, 4, requires_grad=True)
    output, log_sum = attend(empty, keys, keys, plan)
    (output.sum() + log_sum.sum()).backward()
    assert output.shape == (0, 2, 4)
    assert keys.grad is not None
    assert torch.equal(keys.grad, torch.zeros(3, 2, 4))


def test_large_scores_neither_overflow_nor_lose_the_log_sum() -> None:
    query = torch.full((2, 1, 4), 40.0)
    key = torch.cat([torch.full((1, 1, 4), 40.0), torch.full((1, 1, 4), -40.0)])
    output, log_sum = attend(query, key, key, plan_attention(torch.tensor([2]), torch.tensor([2]), 1, causal=False))
    assert torch.equal(output, key[:1].expand(2, 1, 4))
    assert torch.equal(log_sum, torch.full((2, 1), 3200.0))


@pytest.mark.parametrize("mask", [own_mask(1), own_mask(2), own_mask(3), own_mask(2, 3), own_mask(1, 2, True),
                                  own_mask(2, 3, True)], ids=lambda mask: str(mask.seen))
@pytest.mark.parametrize("unseen_history", [False, True])
def test_own_tokens_equal_reference(mask: OwnMask, unseen_history: bool) -> None:
    torch.manual_seed(0)
    C, H, E, num_queries, num_keys = 5, 2, 4, len(mask.seen), 1 + mask.seen[-1][-1]
    shared = torch.randn(C * num_queries, H, E, dtype=torch.float64, requires_grad=True)
    log_sum = torch.randn(C * num_queries, H, dtype=torch.float64)
    if unseen_history:
        log_sum[:num_queries] = -math.inf
    log_sum.requires_grad_()
    qkv = [torch.randn(C, rows, H, E, dtype=torch.float64, requires_grad=True)
           for rows in (num_queries, num_keys, num_keys)]
    _agree(lambda *inputs: (merge_own(*inputs, mask),), lambda *inputs: (merge_own_ref(*inputs, mask),), shared,
           log_sum, *qkv)


@pytest.mark.parametrize("mask", [own_mask(1), own_mask(2), own_mask(2, 3), own_mask(1, 2, True)],
                         ids=lambda mask: str(mask.seen))
@pytest.mark.parametrize(("num_candidates", "num_keys"), [(5, 7), (1, 1), (4, 0), (0, 3)])
@pytest.mark.parametrize("scores", [1, 1 << 20], ids=["candidate by candidate", "at once"])
def test_one_softmax_over_keys_and_own_tokens_equals_reference(monkeypatch: pytest.MonkeyPatch, mask: OwnMask,
                                                               num_candidates: int, num_keys: int, scores: int) -> None:
    monkeypatch.setattr(own_attention, "_SCORES", scores)
    torch.manual_seed(0)
    H, E, Q, G = 2, 4, len(mask.seen), 1 + mask.seen[-1][-1]
    query, own_key, own_value = (3 * torch.randn(num_candidates, rows, H, E, dtype=torch.float64) for rows in (Q, G, G))
    key, value = (torch.randn(num_keys, H, E, dtype=torch.float64) for _ in range(2))
    given = attend_and_merge(query, key, value, own_key, own_value, mask)
    rows = query.flatten(0, 1)
    shared = torch.zeros_like(rows), torch.full(rows.shape[:2], -math.inf, dtype=rows.dtype)
    if num_keys:
        shared = attend_ref(rows, key, value, torch.tensor([len(rows)]), torch.tensor([num_keys]), causal=False)
    wanted = merge_own_ref(*shared, query, own_key, own_value, mask), shared[1].view(num_candidates, Q, H)
    torch.testing.assert_close(given, wanted, rtol=1e-12, atol=1e-12)


def test_own_masks_are_those_of_the_definition() -> None:
    assert own_mask(3).seen == ((0,), (0, 1), (0, 1, 2))
    assert own_mask(2, 2).seen == ((0,), (0, 1), (0, 2), (0, 1, 3))
    assert own_mask(2, 3, last_copy_alone=True).seen == own_mask(2, 3).seen[-2:]
    for num_tokens, copies in ((1, 1), (1, 3), (2, 3), (6, 3), (5, 4)):
        pairs = [(place, copy) for copy in range(1, copies + 1) for place in range(num_tokens)]
        assert own_mask(num_tokens, copies).seen == tuple(
            tuple(sorted(row for row, key in enumerate(pairs) if sees(query, key, [], 0))) for query in pairs)
        assert [own_mask(num_tokens, copies, last).num_hidden for last in (False, True)] == [
            (copies - 1) * num_tokens, num_tokens * (copies > 1)]


def test_joined_sets_of_keys_are_one_softmax_and_none_at_all_is_nothing() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(rows, 2, 4, dtype=torch.float64, requires_grad=True) for rows in (3, 7, 7)]
    lengths = torch.tensor([2, 1, 0]), torch.tensor([3, 0, 0]), torch.tensor([4, 0, 0])
    sides = [plan_attention(lengths[0], each, 2, causal=False) for each in lengths[1:]]

    def fast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        parts = [attend(query, key[rows], value[rows], plan) for rows, plan in zip((slice(3), slice(3, 7)), sides,
                                                                                   strict=True)]
        output, log_sum = join(parts[0], parts[1])
        assert torch.equal(output[2], torch.zeros(2, 4))
        assert (log_sum[2] < -1e300).all()
        return output[:2], log_sum[:2]

    def slow(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return attend_ref(query[:2], key, value, torch.tensor([2]), torch.tensor([7]), causal=False)

    _agree(fast, slow, *inputs)


def test_shared_and_own_keys_are_one_softmax() -> None:
    torch.manual_seed(0)
    E, keys = 4, torch.randn(6, 1, 4, dtype=torch.float64)
    values, query = torch.randn(6, 1, E, dtype=torch.float64), torch.randn(1, 1, E, dtype=torch.float64)
    plan = plan_attention(torch.tensor([1]), torch.tensor([5]), 1, causal=False)
    output, log_sum = attend(query, keys[:5], values[:5], plan)
    joined = merge_own(output, log_sum, query.unsqueeze(0), keys[5:].unsqueeze(0), values[5:].unsqueeze(0),
                       own_mask(1))
    whole, _ = attend_ref(query, keys, values, torch.tensor([1]), torch.tensor([6]), causal=False)
    torch.testing.assert_close(joined[0], whole, rtol=1e-12, atol=1e-12)
