"""A tensor's digest: the same however it is cut, another for any change, and replicas that part are found."""

import pytest
import torch

from longer_rec.errors import RankLost
from longer_rec.runtime.digest import block_digest, combined_digest, join_digests, local_digests


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_digests_of_shards_add_up_to_that_of_the_tensor(dtype: torch.dtype) -> None:
    table = (torch.randn(70_001, 12, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    whole = block_digest(table)
    assert block_digest(table[:1000]) + block_digest(table[1000:], (1000, 0)) == whole
    assert block_digest(table[:, :4]) + block_digest(table[:, 4:], (0, 4)) == whole
    assert block_digest(table[:, 0]) + block_digest(table[:0]) == block_digest(table[:, :1])
    assert block_digest(table.T.contiguous().T) == whole


def test_any_flipped_bit_and_any_swap_gives_another_digest() -> None:
    table = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    seen = {int(block_digest(table))}
    for row in range(50):
        for bit in range(32):
            bits = table.clone().view(torch.int32)
            bits[row, bit % 7] ^= (1 << bit) if bit < 31 else -(1 << 31)
            seen.add(int(block_digest(bits.view(torch.float32))))
    for row in range(49):
        swapped = table.clone()
        swapped[[row, row + 1]] = table[[row + 1, row]]
        seen.add(int(block_digest(swapped)))
    assert len(seen) == 1 + 50 * 32 + 49


def test_zero_and_minus_zero_differ_and_nan_equals_itself() -> None:
    zero, nan = torch.zeros(3), torch.full((3,), float("nan"))
    assert block_digest(zero) != block_digest(-zero)
    assert block_digest(nan) == block_digest(nan.clone())


def test_replicas_that_part_are_named() -> None:
    state = {"tower.weight": torch.ones(3, 2), "step": torch.tensor(4.0)}
    mine = local_digests(state)
    assert list(join_digests([mine, mine])) == ["step", "tower.weight"]
    state["tower.weight"][1, 1] = 1.0 + 2**-23
    with pytest.raises(RankLost, match=r"rank 2 holds other values of the replicated 'tower.weight'"):
        join_digests([mine, mine, local_digests(state)])


def test_combined_digest_depends_on_each() -> None:
    digests = {"a": "00000000000000ff", "b": "0000000000000001"}
    assert combined_digest(digests) != combined_digest({**digests, "b": "0000000000000002"})
    assert combined_digest(digests) != combined_digest({"a": digests["b"], "b": digests["a"]})
