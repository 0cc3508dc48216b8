"""Activation recomputation: parts of the tower keep their inputs alone and run again during backward.

The result is bitwise that of keeping everything: the same kernels run on the same inputs, with the same dropout.
Selectively, what the linear maps gave is kept, too, and all but them runs again.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from longer_rec.errors import ConfigError
from longer_rec.model.longer import LongerTower
from longer_rec.model.tower import AnyTower


def apply_recompute(tower: AnyTower, parts: Sequence[str], keep_matmuls: bool = False) -> None:
    """Recompute the named parts of the tower, in place; ``ConfigError`` for a part it does not have."""
    known = tower.parts() if isinstance(tower, LongerTower) else {}
    for part in parts:
        if part not in known:
            raise ConfigError(f"train.recompute names {part!r}, which this model does not have; "
                              f"{'its parts are ' + ', '.join(known) if known else 'leave train.recompute empty'}")
        for module, method in known[part]:
            _recompute(module, method, _selective if keep_matmuls else noop_context_fn)


def _recompute(module: nn.Module, method: str, contexts: Callable[[], Any]) -> None:
    original: Callable[..., Any] = getattr(module, method)

    @wraps(original)
    def recomputed(*arguments: Any) -> Any:
        # Outside training nothing is kept anyway.
        if not module.training:
            return original(*arguments)
        return checkpoint(original, *arguments, use_reentrant=False, context_fn=contexts)

    setattr(module, method, recomputed)


def _selective() -> Any:
    # Attention's batched matmuls write into buffers that others write into after them: they run again.
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default, torch.ops.aten.addmm.default])
