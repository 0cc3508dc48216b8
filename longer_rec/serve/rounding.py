"""Keys and values of a kept state in fewer bits."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from longer_rec.model.state import UserState, map_state

CacheType = Literal["float32", "bfloat16", "int8"]
_SCALE_BYTES = 4


def round_layers(state: UserState, dtype: CacheType) -> UserState:
    """``state`` with the keys and values of its layers in ``dtype``.

    int8: 127 equal steps to the largest of each event and head, whose fp32 size stands behind the row's values.
    """
    def rounded(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return _to_int8(tensor) if dtype == "int8" else tensor.to(getattr(torch, dtype))

    return replace(state, layers=map_state(state.layers, rounded))


def restore_layers(state: UserState) -> UserState:
    """``round_layers`` back to fp32."""
    def restored(tensor: Tensor) -> Tensor:
        return _from_int8(tensor) if tensor.dtype == torch.int8 else tensor.to(
            torch.float32 if tensor.is_floating_point() else tensor.dtype)

    return replace(state, layers=map_state(state.layers, restored))


def _to_int8(rows_SHE: Tensor) -> Tensor:
    rows_HSE = rows_SHE.transpose(0, 1)  # keys and values lie head by head (``state.split_state``)
    step = rows_HSE.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return torch.cat([(rows_HSE / step).round_().to(torch.int8), step.view(torch.int8)], dim=-1).transpose(0, 1)


def _from_int8(packed: Tensor) -> Tensor:
    values, step = packed.transpose(0, 1).split([packed.shape[-1] - _SCALE_BYTES, _SCALE_BYTES], dim=-1)
    return (values * step.contiguous().view(torch.float32)).transpose(0, 1)
