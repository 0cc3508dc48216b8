"""Mixed precision by part of the tower: which parts' matmuls run in halves.

Parameters, gradients and optimizer state stay fp32: this is autocast. ``tower.parts()`` names the parts.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from longer_rec.errors import ConfigError
from longer_rec.model.longer import LongerTower
from longer_rec.model.state import LayerCache
from longer_rec.model.tower import AnyTower

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: Final[Mapping[str, torch.dtype]] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(tower: AnyTower, default: Precision, parts: Mapping[str, Precision], device: torch.device) -> None:
    """``ConfigError`` for a part that the tower does not have, and for a type that the device does not."""
    known = tower.parts() if isinstance(tower, LongerTower) else {}
    for part in parts:
        if part not in known:
            raise ConfigError(f"train.precision names {part!r}, which this model does not have; its parts are default"
                              f"{''.join(', ' + name for name in known)}")
    if device.type == "cpu" and "fp16" in (default, *parts.values()):
        raise ConfigError("train.precision=fp16 needs a GPU: a CPU computes in it more slowly than in fp32; use bf16")
    if device.type == "cuda" and "bf16" in (default, *parts.values()) and not torch.cuda.is_bf16_supported(False):
        raise ConfigError(f"train.precision=bf16 is not in {torch.cuda.get_device_name(device)}; use fp16, or fp32")


@contextmanager
def mixed_precision(tower: AnyTower, default: Precision, parts: Mapping[str, Precision],
                    device: torch.device) -> Iterator[None]:
    """Forward passes of ``tower`` in here run in ``default``, those of the ``parts`` in their own type.

    What a part in halves hands on is rounded up again where ``default`` is fp32; an fp32 part gets what it is given in
    fp32. Keys and values stay in the type of the layer that made them.
    """
    replaced: list[tuple[nn.Module, str, Any]] = []
    known = tower.parts() if isinstance(tower, LongerTower) else {}
    for part, precision in parts.items():
        for module, method in known[part] if precision != default else ():
            replaced.append((module, method, vars(module).get(method)))
            setattr(module, method, _in_precision(getattr(module, method), precision, default, device.type))
    try:
        with torch.autocast(device.type, dtype=DTYPES[default], enabled=default != "fp32"):
            yield
    finally:
        for module, method, before in replaced:
            delattr(module, method) if before is None else setattr(module, method, before)


def _in_precision(function: Callable[..., Any], precision: Precision, default: Precision,
                  device_type: str) -> Callable[..., Any]:
    @wraps(function)
    def within(*arguments: Any) -> Any:
        if precision == "fp32":
            arguments = _to_fp32(arguments)
        with torch.autocast(device_type, dtype=DTYPES[precision], enabled=precision != "fp32"):
            result = function(*arguments)
        return _to_fp32(result) if default == "fp32" else result

    return within


def _to_fp32(value: Any) -> Any:
    """Tensors of halves in fp32, wherever in tuples, dicts and dataclasses they are; keys and values as they are."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
    if isinstance(value, LayerCache):
        return value
    if isinstance(value, tuple | list):
        return type(value)(_to_fp32(each) for each in value)
    if isinstance(value, dict):
        return {key: _to_fp32(each) for key, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: _to_fp32(getattr(value, each.name)) for each in fields(value) if each.init})
    return value
