"""The linear map under bf16 autocast on a CPU: rounded to a grid of shapes, and PyTorch's numbers all the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longer_rec.model.linear import Linear, batched, linear, round_rows

_EPS = 2.0 ** -8  # half a step of bf16


def _bf16(value: Tensor) -> Tensor:
    """The operand as a bf16 matmul sees it, in a type that adds nothing to the error."""
    return value.detach().bfloat16().double().requires_grad_()


@pytest.mark.parametrize("shape", [(37, 24), (256, 24), (300, 24), (11, 3, 24), (1, 24), (0, 24)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_values_and_gradients_are_those_of_the_bf16_operands(shape: tuple[int, ...], has_bias: bool) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(shape), torch.randn(40, 24) / 5, torch.randn(40)][:2 + has_bias]
    for leaf in leaves:
        leaf.requires_grad_()
    upstream = torch.randn(*shape[:-1], 40)
    with torch.autocast("cpu", torch.bfloat16):
        output = linear(*leaves)
    output.backward(upstream.to(output.dtype))
    exact = [_bf16(leaf) for leaf in leaves]
    expected = F.linear(*exact)
    expected.backward(_bf16(upstream))
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), expected, rtol=2 * _EPS, atol=_EPS)
    for leaf, reference in zip(leaves, exact, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=2 * _EPS, atol=shape[0] ** 0.5 * _EPS)


def test_without_autocast_it_is_pytorchs_own_bitwise() -> None:
    module = Linear(24, 40)
    input = torch.randn(37, 24)
    assert torch.equal(module(input), F.linear(input, module.weight, module.bias))


def test_jagged_batches_bring_few_shapes() -> None:
    """oneDNN compiles a kernel for each: 200 batches of 4,000 to 8,000 rows may cost 17 kernels a matmul."""
    seen: set[tuple[torch.Size, ...]] = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                seen.add((function, *(each.shape for each in args if isinstance(each, Tensor))))
            return function(*args, **(kwargs or {}))

    module = Linear(4, 4)
    with Record(), torch.autocast("cpu", torch.bfloat16):
        for rows in torch.linspace(4000, 8000, 200).long().tolist():
            module(torch.zeros(rows, 4, requires_grad=True)).sum().backward()
    assert len(seen) <= 3 * 17


def test_the_grid_wastes_a_sixteenth_at_most() -> None:
    for rows in [1, 16, 17, 255, 256, 257, 4097, 10**6 + 1]:
        assert rows <= round_rows(rows) <= max(rows * 17 / 16, rows + 15)


def test_batched_matmuls_are_fp32_under_autocast_and_pass_gradients() -> None:
    left, right = torch.randn(3, 5, 4, requires_grad=True), torch.randn(3, 4, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = batched(left, right)
    assert torch.equal(output, left @ right)
    output.sum().backward()
    torch.testing.assert_close(left.grad, right.detach().sum(2).unsqueeze(1).expand_as(left))
