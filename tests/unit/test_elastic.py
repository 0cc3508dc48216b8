"""The reduction tree and the assignment of logical workers to processes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longer_rec.config import Config, build_config
from longer_rec.elastic.assignment import ElasticConfig, assign_workers, resolve_num_workers
from longer_rec.elastic.reduce import SubtreeStack, finish_tree, subtree_roots
from longer_rec.errors import ConfigError


class Holder(Config):
    elastic: ElasticConfig


def tree_sum_ref(vectors: list[torch.Tensor]) -> torch.Tensor:
    """The same sum with every worker's vector in one place."""
    return finish_tree({(0, worker): vector for worker, vector in enumerate(vectors)}, len(vectors))


def gradients(num_workers: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_workers)
    return [torch.randn(257, generator=generator) * 10.0 ** (worker % 5) for worker in range(num_workers)]


@given(st.integers(1, 40), st.integers(1, 40))
def test_every_worker_has_exactly_one_process(num_workers: int, num_processes: int) -> None:
    if num_processes > num_workers:
        with pytest.raises(ConfigError, match="start at most"):
            resolve_num_workers(ElasticConfig(num_workers=num_workers), num_processes)
        return
    owned = assign_workers(None, num_processes, num_workers)
    assert [worker for workers in owned for worker in workers] == list(range(num_workers))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5, 6, 8, 13])
def test_sum_is_bitwise_the_same_for_every_number_of_processes(num_workers: int) -> None:
    vectors = gradients(num_workers)
    expected = tree_sum_ref(vectors)
    for num_processes in range(1, num_workers + 1):
        roots = {}
        for workers in assign_workers(None, num_processes, num_workers):
            stack = SubtreeStack()
            for worker in workers:
                stack.push(worker, vectors[worker])
            assert list(stack.roots) == subtree_roots(workers)
            roots |= stack.roots
        assert torch.equal(finish_tree(roots, num_workers), expected)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_sum_is_bitwise_the_same_for_all_shares(shares: list[int]) -> None:
    vectors = gradients(sum(shares))
    roots = {}
    for workers, share in zip(assign_workers(tuple(shares), len(shares), sum(shares)), shares, strict=True):
        assert len(workers) == share
        stack = SubtreeStack()
        for worker in workers:
            stack.push(worker, vectors[worker])
        roots |= stack.roots
    assert torch.equal(finish_tree(roots, sum(shares)), tree_sum_ref(vectors))


@pytest.mark.parametrize(("settings", "message"), [
    ({"num_workers": 16, "shares": [6, 4]}, r"elastic: shares=\[6, 4\] add up to 10, not to num_workers=16; change"),
    ({"shares": [1, 1]}, r"add up to 2, not to num_workers=None"),
    ({"num_workers": 6, "shares": [6, 0]}, r"shares=\[6, 0\]: every process needs 1 worker or more; start fewer"),
    ({"num_workers": 6, "shares": []}, r"shares=\[\]: every process needs 1 worker or more"),
])
def test_shares_that_are_none_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(Holder, {"elastic": settings}, "job.yaml")


def test_shares_for_other_processes_are_refused() -> None:
    config = ElasticConfig(num_workers=8, shares=(5, 3))
    assert resolve_num_workers(config, 2) == 8
    with pytest.raises(ConfigError, match=r"elastic.shares=\[5, 3\] is for 2 processes, there are 3; start 2, or give"):
        resolve_num_workers(config, 3)


def test_tree_sum_is_the_sum_and_the_naive_order_has_other_bits() -> None:
    vectors = gradients(8)
    stacked = torch.stack(vectors).double().sum(0)
    torch.testing.assert_close(tree_sum_ref(vectors).double(), stacked, rtol=1e-5, atol=1e-2)
    naive = vectors[0]
    for vector in vectors[1:]:
        naive = naive + vector
    assert not torch.equal(naive, tree_sum_ref(vectors))


def test_stack_holds_at_most_log2_vectors_of_a_process_with_all_workers() -> None:
    stack = SubtreeStack()
    for worker in range(64):
        stack.push(worker, torch.ones(1))
        assert len(stack.roots) <= 6 + 1
    assert stack.nodes == [(6, 0)]
