"""The reduction: the tree nodes of all workers into the gradient of the whole batch, each worker adding one slice."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from instep.reduce.layout import Layout
from instep.reduce.tree import Node, maximal_nodes, merge_plan, worker_ranges


class Reduction:
    """Who owns which nodes, and the adding of one worker's slice.

    `slots[i]` is the flat vector ([layout.size], float32) of node i, visible to all workers. The sum of a slice is
    left in the *first* slot of every worker, its home, so that afterwards each worker reads the whole gradient from
    a vector that only it uses, and an optimizer may change it in place; or in slot 0 alone. The bytes that a worker
    moves are those of a reduce-scatter and an all-gather; of the gradient, or else of the weights.
    """

    def __init__(self, layout: Layout, microbatches: int, workers: int):
        self.layout = layout
        self.workers = workers
        self.ranges = worker_ranges(microbatches, workers)
        self._own = [maximal_nodes(start, stop, microbatches) for start, stop in self.ranges]
        self.nodes: list[Node] = [node for nodes in self._own for node in nodes]
        self.plan = merge_plan(self.nodes, microbatches)

    def slots_of(self, worker: int) -> range:
        """The indices of the worker's nodes; the first one is its home."""
        first = sum(len(nodes) for nodes in self._own[:worker])
        return range(first, first + len(self._own[worker]))

    def nodes_of(self, worker: int) -> list[Node]:
        """The worker's maximal nodes, from left to right."""
        return self._own[worker]

    def add_slice(self, worker: int, slots: Sequence[Tensor], *, to_all: bool = True) -> Tensor:
        """Adds the worker's blocks of all slots in tree order, in place; into every worker's home or slot 0 alone.

        Returns the L2 norm of each of these blocks ([blocks of the slice], float32): the parts of the gradient's norm,
        whose order does not depend on the team either.
        """
        homes = [self.slots_of(other)[0] for other in range(1, self.workers)] if to_all else []
        own = self.layout.slice_of(worker, self.workers)
        blocks = [slot.view(-1, self.layout.block)[own.start : own.stop] for slot in slots]
        if self.plan or homes:
            # Block by block for the cache's sake: each element is added by the plan, wherever the blocks begin.
            for parts in zip(*(rows.unbind(0) for rows in blocks), strict=True):
                for into, source in self.plan:
                    parts[into].add_(parts[source])
                for home in homes:
                    parts[home].copy_(parts[0])
        norms: Tensor = torch.linalg.vector_norm(blocks[0], dim=1)
        return norms


def norm_of(flat: Tensor, layout: Layout) -> float:
    """The L2 norm of a whole flat gradient, added up from its blocks as the norms of slices are."""
    norms = torch.linalg.vector_norm(flat.view(-1, layout.block), dim=1)
    return total_norm(norms.cpu().numpy())


def clip(flat: Tensor, norm: float, largest: float | None) -> None:
    """Scales a flat gradient of L2 norm `norm` to `largest`, as torch.nn.utils.clip_grad_norm_; None leaves it."""
    # One factor for the whole, from a norm that all workers have alike: slices clipped by their own would differ.
    if largest is not None and norm > largest:
        flat.mul_(largest / (norm + 1e-6))


def total_norm(norms: NDArray[np.float32]) -> float:
    """The norm of the whole from those of all blocks."""
    return math.sqrt(math.fsum(np.square(norms, dtype=np.float64)))  # fsum rounds once, so it has no order
