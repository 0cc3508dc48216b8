"""Mixed precision of the tower's matmuls."""

from contextlib import AbstractContextManager

import torch

from longer_rec.job import Precision


def precision_context(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Autocast for one forward: bf16 needs no loss scaling, parameters and optimizer state stay fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
