"""In which types a run computes, and the scale that keeps fp16 gradients from vanishing."""

from contextlib import AbstractContextManager

import torch

from longer_rec.errors import ConfigError
from longer_rec.job import TrainConfig
from longer_rec.model.precision import check_precision, mixed_precision
from longer_rec.model.tower import AnyTower

_FIRST_SCALE, _GROWTH_STEPS = 2.0 ** 16, 2000


def precision_context(config: TrainConfig, tower: AnyTower, device: torch.device) -> AbstractContextManager[None]:
    """For one forward pass: parameters and optimizer state stay fp32."""
    return mixed_precision(tower, config.default_precision, config.part_precisions, device)


def check_train_precision(config: TrainConfig, tower: AnyTower, device: torch.device) -> None:
    """``ConfigError`` for what the model or the device does not have."""
    check_precision(tower, config.default_precision, config.part_precisions, device)
    if config.tf32 and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise ConfigError("train.tf32 needs a GPU of compute capability 8.0 or newer, and this is none; drop it")


class LossScale:
    """The factor of the loss under fp16: halved after a step that overflowed, doubled after 2,000 that did not.

    Always 1 without fp16. A power of two, so that scaling rounds nothing. Every rank sees the same steps overflow, so
    that all have the same scale.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.dynamic = "fp16" in (config.default_precision, *config.part_precisions.values())
        self.value = _FIRST_SCALE if self.dynamic else 1.0
        self.good_steps = 0

    def update(self, finite: bool) -> None:
        if not self.dynamic:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.good_steps == _GROWTH_STEPS:
            self.value, self.good_steps = self.value * 2, 0
