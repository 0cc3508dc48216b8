"""The joint between one sparse lookup and the towers of many logical workers.

TorchRec's fused optimizer updates a table inside backward, so a backward per worker would update it several times a
step. The lookup is therefore cut off from the towers: each worker gets leaves that are its slice, and when all workers
are done their gradients go back through the lookup together. A worker's embeddings are read for the last time in its
own backward, so its gradients take their place: of all workers' embeddings and gradients there is one copy.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from longer_rec.batch import RequestBatch
from longer_rec.sparse.lookup import split_rows

Rows = dict[str, Tensor]


def cut_lookup(lookup: Rows) -> tuple[Rows, dict[str, GradientEdge]]:
    """The looked-up rows cut off from the tables, in the lookup's own memory, and the way back to the tables.

    Contiguous: pooled features are columns of one tensor, and a reduction's order of additions follows the strides.
    """
    return ({key: value.detach().contiguous() for key, value in lookup.items()},
            {key: get_gradient_edge(value) for key, value in lookup.items()})


def worker_leaves(rows: Rows, batches: Sequence[RequestBatch]) -> list[Rows]:
    """Each worker's slice of the lookup, as leaves that collect gradients."""
    return [{key: part.requires_grad_() for key, part in own.items()} for own in split_rows(rows, batches)]


@torch.no_grad()
def keep_gradients(leaves: Rows, loss_scale: float = 1.0) -> Tensor:
    """Overwrite a worker's embeddings with what its backward left over ``loss_scale`` (zeros where it did not look).

    Returns the sum of the gradients' squares, a scalar.
    """
    squares = []
    for leaf in leaves.values():
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.div_(loss_scale)
        squares.append(gradient.square().sum())
        leaf.grad = None
        leaf.copy_(gradient)
    return torch.stack(squares).sum()


def backward_through_lookup(edges: Mapping[str, GradientEdge], gradients: Rows) -> None:
    """One backward through the lookup with all own workers' gradients in logical order: one fused update a step."""
    torch.autograd.backward(list(edges.values()), [gradients[key] for key in edges])


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
