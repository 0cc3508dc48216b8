"""Update rules: tables inside the backward pass, everything else by AdamW, one schedule for both.

FBGEMM updates a table during its backward pass, with the learning rate that was set before it. A schedule
therefore sets the rate of a step *before* that step's backward.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pydantic
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from longer_rec.config import Config
from longer_rec.errors import ConfigError
from longer_rec.sparse.tables import SparseConfig


class DenseOptimizerConfig(Config):
    """AdamW for the tower; norms, biases and other vectors do not decay."""

    lr: float = pydantic.Field(default=2e-3, gt=0.0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = pydantic.Field(default=1e-8, gt=0.0)
    weight_decay: float = pydantic.Field(default=0.01, ge=0.0)


def warmup_cosine(step: int, num_steps: int, warmup_steps: int, final_factor: float = 0.0) -> float:
    """Factor on the learning rates at a global step, counted from 0.

    Rises linearly to 1 over ``warmup_steps`` (step 0 already moves), then falls as half a cosine to
    ``final_factor`` at ``num_steps``, and stays there.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return final_factor + (1.0 - final_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _table_rule(config: SparseConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Optimizer class and arguments; FBGEMM recognises the class and runs its own fused kernel."""
    if config.weight_decay and config.optimizer != "rowwise_adagrad":
        # FBGEMM's other kernels take the argument and ignore it.
        raise ConfigError(f"sparse.weight_decay={config.weight_decay} has no effect with {config.optimizer}; "
                          "use rowwise_adagrad, or 0")
    if config.optimizer == "sgd":
        return torch.optim.SGD, {"lr": config.lr}
    if config.optimizer == "adagrad":
        return torch.optim.Adagrad, {"lr": config.lr, "eps": config.eps}
    return RowWiseAdagrad, {"lr": config.lr, "eps": config.eps, "weight_decay": config.weight_decay}


def apply_table_optimizer(parameters: Iterable[nn.Parameter], config: SparseConfig) -> None:
    """Mark table parameters, still unsharded, to be updated inside every backward pass.

    Each backward is one update: gradients of several batches must be looked up, and sent back, as one batch.
    """
    rule, arguments = _table_rule(config)
    apply_optimizer_in_backward(rule, parameters, arguments)


def decay_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices first, which decay, then vectors (norms, the gains of queries and keys, biases)."""
    matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class RankerOptimizer:
    """The fused table optimizer, AdamW for the tower, and the rule of replicated tables, as one.

    A step: ``set_lr_factor`` (before the backward that uses it), the backward passes, ``step``, ``zero_grad``.
    ``tower`` holds what the caller must have reduced over ranks before ``step``; replicated tables TorchRec reduces
    itself. ``fused_dense`` takes AdamW's root with torch's own kernel, where MKL's depends on the processor.
    """

    def __init__(self, model: DistributedModelParallel, sparse: SparseConfig, dense: DenseOptimizerConfig,
                 fused_dense: bool = False) -> None:
        self._fused = model.fused_optimizer
        parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
        replicated = {name: value for name, value in parameters.items() if ".embedding_bags." in f".{name}"}
        self.tower: dict[str, nn.Parameter] = {
            name: value for name, value in parameters.items() if name not in replicated and value.requires_grad}
        self._parts: list[tuple[KeyedOptimizer, float]] = [(self._fused, sparse.lr)]
        if self.tower:
            self._parts.append((KeyedOptimizerWrapper(
                self.tower, lambda named: torch.optim.AdamW(decay_groups(named, dense.weight_decay), lr=dense.lr,
                                                            betas=dense.betas, eps=dense.eps,
                                                            fused=fused_dense or None),
                pass_params_dict=True), dense.lr))
        self._replicated = replicated
        if replicated:
            rule, arguments = _table_rule(sparse)
            self._parts.append((KeyedOptimizerWrapper(replicated, lambda values: rule(values, **arguments)), sparse.lr))
        self._init_state()
        self.combined = CombinedOptimizer([part for part, _ in self._parts])

    def set_lr_factor(self, factor: float) -> None:
        """Scale the configured learning rates from the next backward on."""
        for part, lr in self._parts:
            for group in part.param_groups:
                group["lr"] = lr * factor
        # Of a fused optimizer this clears nothing: it hands the rate to the kernels.
        self._fused.zero_grad()

    def learning_rates(self) -> dict[str, float]:
        """The rates in use, for the log."""
        names = ["sparse", "dense"] if self.tower else ["sparse"]
        return {name: part.param_groups[0]["lr"]
                for name, (part, _) in zip(names, self._parts, strict=False) if part.param_groups}

    def step(self) -> None:
        """Update the tower; the tables were updated by the backward pass."""
        for parameter in self._replicated.values():
            if parameter.grad is not None:
                # TorchRec averages replicas over the ranks; every other gradient here is a sum.
                parameter.grad.mul_(dist.get_world_size())
        for part, _ in self._parts[1:]:
            part.step()

    def zero_grad(self) -> None:
        for part, _ in self._parts[1:]:
            part.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _init_state(self) -> None:
        """Make the lazy state of torch's optimizers, as it is before a first step.

        State that does not exist is left out of a checkpoint, and dropped without a word when one is loaded.
        TorchRec's ``init_state`` takes a step to make it: that moves weights and counts.
        """
        for part, _ in self._parts[1:]:
            saved = [(parameter, parameter.detach().clone()) for parameter in part.params.values()]
            part.init_state()
            for parameter, value in saved:
                parameter.copy_(value)
                parameter.grad = None
            for state in part.state.values():
                for tensor in state.values():
                    tensor.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Optimizer tensors by "<parameter>/<state>"; sharded ones as ShardedTensor. Learning rates are not state."""
        return {f"{key}/{name}": value for key, states in self.combined.state_dict()["state"].items()
                for name, value in states.items() if isinstance(value, torch.Tensor)}
