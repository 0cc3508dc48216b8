"""Sum of the logical workers' gradients in one fixed order, whoever holds them.

The order is a binary tree over the W workers: node (level, index) is the sum of its children (level - 1, 2 index)
and (level - 1, 2 index + 1). A process adds up the complete subtrees inside its own contiguous workers; the rest of
the tree is finished on slices of the vector, one slice a process, and gathered. Additions are element-wise and their
operands are fixed by the tree, so the bits do not depend on the number of processes; the traffic is that of an
ordinary all-reduce.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Node = tuple[int, int]


class SubtreeStack:
    """Adds equal neighbours as they come, like a binary counter: at most log2 W vectors are held at a time."""

    def __init__(self) -> None:
        self._entries: list[tuple[Node, Tensor | None]] = []

    def push(self, worker: int, vector: Tensor | None) -> None:
        """Workers are pushed in ascending order; None counts nodes without adding anything."""
        level, index = 0, worker
        while self._entries and self._entries[-1][0] == (level, index - 1) and index % 2 == 1:
            left = self._entries.pop()[1]
            vector = None if left is None or vector is None else left + vector
            level, index = level + 1, index // 2
        self._entries.append(((level, index), vector))

    @property
    def nodes(self) -> list[Node]:
        return [node for node, _ in self._entries]

    @property
    def roots(self) -> dict[Node, Tensor]:
        return {node: vector for node, vector in self._entries if vector is not None}


def subtree_roots(workers: range) -> list[Node]:
    """The nodes that a process holding these workers ends with."""
    stack = SubtreeStack()
    for worker in workers:
        stack.push(worker, None)
    return stack.nodes


def finish_tree(roots: Mapping[Node, Tensor], num_workers: int) -> Tensor:
    """The sum over all workers from the roots of disjoint subtrees that cover them."""
    def total(level: int, index: int) -> Tensor:
        if (level, index) in roots:
            return roots[level, index]
        left = total(level - 1, 2 * index)
        has_right = (2 * index + 1) << (level - 1) < num_workers
        return left + total(level - 1, 2 * index + 1) if has_right else left

    return total((num_workers - 1).bit_length(), 0)


def tree_all_reduce(stack: SubtreeStack, assignment: Sequence[range]) -> Tensor:
    """The sum over the W workers of all processes, bitwise the same on each of them and for every assignment.

    ``stack`` holds this process' workers. Raises what the process group raises when a peer is gone.
    """
    size, num_workers = len(assignment), assignment[-1].stop
    if size == 1:
        return finish_tree(stack.roots, num_workers)
    rank = dist.get_rank()
    nodes = [subtree_roots(workers) for workers in assignment]
    roots = torch.stack(list(stack.roots.values()))
    length = roots.shape[1]
    width = -(-length // size)
    sliced = torch.nn.functional.pad(roots, (0, width * size - length)).unflatten(1, (size, width))
    received = roots.new_empty(sum(map(len, nodes)) * width)
    dist.all_to_all_single(received, sliced.transpose(0, 1).contiguous().flatten(),
                           output_split_sizes=[len(own) * width for own in nodes],
                           input_split_sizes=[len(nodes[rank]) * width] * size)
    everyone = [node for own in nodes for node in own]
    slice_sum = finish_tree(dict(zip(everyone, received.view(-1, width), strict=True)), num_workers)
    gathered = slice_sum.new_empty(width * size)
    dist.all_gather_into_tensor(gathered, slice_sum.contiguous())
    return gathered[:length]
