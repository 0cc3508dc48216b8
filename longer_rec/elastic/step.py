"""The joint between one sparse lookup and the towers of many logical workers.

TorchRec's fused optimizer updates a table inside backward, so a backward per worker would update it several times a
step. The lookup is therefore cut off from the towers: each worker gets leaves that hold its slice, and when all
workers are done their gradients go back through the lookup together.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from longer_rec.batch import RequestBatch

Lookup = Mapping[str, Tensor]


def split_lookup(lookup: Lookup, batches: Sequence[RequestBatch]) -> list[dict[str, Tensor]]:
    """Each worker's slice of the concatenated lookup, as leaves that collect gradients.

    Keys are ``history.<feature>`` (T x E), ``candidates.<feature>`` (C x E) and ``users.<feature>`` (B x E).
    """
    sizes = {
        "history": [batch.num_events for batch in batches],
        "candidates": [batch.num_candidates for batch in batches],
        "users": [batch.num_requests for batch in batches],
    }
    # Contiguous: pooled features are columns of one tensor, and a reduction's order of additions follows the strides.
    slices = {key: value.detach().contiguous().split(sizes[key.partition(".")[0]]) for key, value in lookup.items()}
    return [{key: parts[worker].requires_grad_() for key, parts in slices.items()} for worker in range(len(batches))]


def take_leaf_gradients(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a worker's backward left in its leaves; zeros where the tower did not look."""
    return {key: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for key, leaf in leaves.items()}


def backward_through_lookup(lookup: Lookup, gradients: Sequence[Mapping[str, Tensor]]) -> None:
    """One backward through the lookup with all own workers' gradients in logical order: one fused update a step."""
    torch.autograd.backward(list(lookup.values()), [torch.cat([own[key] for own in gradients]) for key in lookup])


def flatten_gradients(parameters: Sequence[nn.Parameter], extra: Sequence[Tensor]) -> Tensor:
    """All gradients and then the ``extra`` scalars in one fp32 vector; the parameters' gradients are cleared."""
    parts = [(torch.zeros_like(each) if each.grad is None else each.grad).flatten() for each in parameters]
    for each in parameters:
        each.grad = None
    return torch.cat([*parts, torch.stack([scalar.detach().float() for scalar in extra])])


def unflatten_gradients(vector: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Hand the reduced vector's parts to the parameters as gradients; what follows them is returned."""
    sizes = [each.numel() for each in parameters]
    *parts, extra = vector.split([*sizes, vector.numel() - sum(sizes)])
    for each, part in zip(parameters, parts, strict=True):
        each.grad = part.view_as(each)
    return extra
