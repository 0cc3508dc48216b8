"""The one linear map of the towers: PyTorch's own, except under bf16 autocast on a CPU.

oneDNN compiles a kernel for each new shape of a bf16 matmul, and with jagged batches every step brings new shapes: the
tower of configs/first.yaml took 67 ms a step on batches it had not seen and 34 ms on those it had (fp32: 41 ms; one
core of an AMD Zen 5, torch 2.13, November 2026). So rows are rounded up to a grid of few sizes here, which the copy to
bf16 does at no further cost.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """``nn.Linear`` by way of ``linear``."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``; with bf16 operands on a CPU the same numbers from matmuls of recurring shapes.

    Operands are bf16 under autocast, or where ``lay_out_for_inference`` made the weights so; then the output is fp32.
    """
    if input.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return _RoundedLinear.apply(input, weight, bias)
    if weight.dtype == torch.bfloat16:
        output = F.linear(_rounded(input, weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
        return _cut(output, input).float()
    return F.linear(input, weight, bias)


def batched(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of one request or group of them, whose shapes no grid holds: fp32 under autocast on a CPU."""
    if left.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return left.float() @ right.float()
    return left @ right


def lay_out_for_inference(module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """The weights of ``module``'s linear maps in ``dtype``, stored input by input, as matmuls of few rows read best.

    64 candidates through a layer's four maps at X = 256: 0.65 ms, else 0.87 (a Xeon core, torch 2.13, December 2026).
    """
    for each in module.modules():
        if isinstance(each, Linear):
            each.weight.data = each.weight.data.to(dtype).T.contiguous().T


def for_attention(value: Tensor) -> Tensor:
    """Queries, keys and values as ``attend`` is to have them: its matmuls, too, are fp32 on a CPU."""
    return value.float() if value.device.type == "cpu" and value.dtype == torch.bfloat16 else value


def round_rows(num_rows: int) -> int:
    """The next size of the grid: 16 sizes an octave, multiples of 16, at most 1/16 above from 256 rows on."""
    step = 1 << max(4, num_rows.bit_length() - 5)
    return -(-num_rows // step) * step


class _RoundedLinear(torch.autograd.Function):
    """Operands in autocast's type, rows behind the last are zeros, and no result of theirs is read."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu")
        rows, cast = _rounded(input, dtype), weight.to(dtype)
        output = rows @ cast.T if bias is None else torch.addmm(bias.to(dtype), rows, cast.T)
        ctx.save_for_backward(rows, cast)
        ctx.input_dtype, ctx.weight_dtype = input.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _cut(output, input)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, = grads
        rows, weight = ctx.saved_tensors
        grad_rows = _rounded(grad, weight.dtype)
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        return (_cut(grad_rows @ weight, grad).to(ctx.input_dtype) if needs_input else None,
                (grad_rows.T @ rows).to(ctx.weight_dtype) if needs_weight else None,
                grad.flatten(0, -2).sum(0, dtype=ctx.bias_dtype) if needs_bias else None)


def _rounded(input: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of ``input`` as a matrix of a size of the grid."""
    rows = input.reshape(-1, input.shape[-1])
    size = round_rows(rows.shape[0])
    if size == rows.shape[0]:
        return rows.to(dtype).contiguous()
    rounded = torch.empty(size, rows.shape[1], dtype=dtype, device=rows.device)
    rounded[:rows.shape[0]] = rows
    rounded[rows.shape[0]:] = 0.0
    return rounded


def _cut(output: Tensor, like: Tensor) -> Tensor:
    """The rows of ``output`` that ``like`` has, shaped as its."""
    num_rows = like.numel() // max(like.shape[-1], 1)
    return output[:num_rows].view(*like.shape[:-1], output.shape[-1])
