"""The canonical tree: in which order the microbatches' gradients are added.

Floating-point addition is commutative but not associative, so the order of a sum must come from the recipe (the
number of microbatches M), never from the team. Over microbatches [a, b) the tree splits at a plus the largest power
of two below b - a: ``node(a, b) = node(a, m) + node(m, b)``; a leaf is one microbatch. All of this is pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from instep.ranges import equal_ranges
from instep.rules.work import Pieces, Work

T = TypeVar("T")
Node = tuple[int, int]
"""The microbatches [start, stop) that a node of the tree covers."""


def split(start: int, stop: int) -> int:
    """Where node [start, stop), of two microbatches or more, is cut."""
    return start + (1 << ((stop - start - 1).bit_length() - 1))


def tree_sum(leaves: Sequence[T], add: Callable[[T, T], T]) -> T:
    """The sum of one leaf or more in tree order: the definition that everything faster is compared with."""
    if len(leaves) == 1:
        return leaves[0]
    middle = split(0, len(leaves))
    return add(tree_sum(leaves[:middle], add), tree_sum(leaves[middle:], add))


def worker_ranges(count: int, workers: int) -> list[Node]:
    """`count` pieces of work as `workers` contiguous ranges whose sizes differ by at most one."""
    # Any ranges give the same bits; contiguous ones of equal size give few nodes a worker, and so few bytes to move.
    return equal_ranges(count, workers)


def maximal_nodes(start: int, stop: int, microbatches: int) -> list[Node]:
    """The largest nodes of the tree over [0, microbatches) that lie inside [start, stop), from left to right.

    One where ranges are equal powers of two, at most ``2 log2(microbatches)``.
    """
    return list(_maximal_nodes(start, stop, microbatches))


@lru_cache(maxsize=16_384)  # of large virtual teams, which ask for the same in every step
def _maximal_nodes(start: int, stop: int, microbatches: int) -> tuple[Node, ...]:
    def inside(node: Node) -> list[Node]:
        if start <= node[0] and node[1] <= stop:
            return [node]
        if node[1] <= start or stop <= node[0]:
            return []
        middle = split(*node)
        return inside((node[0], middle)) + inside((middle, node[1]))

    return tuple(inside((0, microbatches))) if start < stop else ()


def nodes_of(work: Work, pieces: Pieces) -> list[Node]:
    """The tree nodes that a contribution has a vector for: many only where they are merged in tree order."""
    if pieces.in_tree_order:
        return maximal_nodes(work.start, work.stop, pieces.microbatches)
    return [(work.start, work.stop)]


@dataclass(frozen=True)
class Leaf:
    """What to do with the gradient of one microbatch when a node is folded left to right on a stack of buffers.

    `add`: add it to the top of the stack (it is the right child of what lies there), else push it.
    `merges`: how often the top is then popped and added to the one below.
    """

    add: bool
    merges: int


def fold_plan(start: int, stop: int) -> list[Leaf]:
    """The leaves of node [start, stop) in order. A stack of ``log2(stop - start) + 1`` buffers is enough."""

    def fold(node: Node, merges: int) -> list[Leaf]:
        if node[1] - node[0] == 1:
            return [Leaf(add=False, merges=merges)]
        middle = split(*node)
        left = fold((node[0], middle), 0)
        if node[1] - middle == 1:  # a right child that is a leaf needs no buffer of its own
            return [*left, Leaf(add=True, merges=merges)]
        return left + fold((middle, node[1]), merges + 1)

    return fold((start, stop), 0)


def merge_plan(nodes: Sequence[Node], microbatches: int, into: Sequence[Node] = ()) -> list[tuple[int, int]]:
    """In-place additions (into, from), indices into `nodes`, after which nodes[0] holds the sum of all.

    `nodes` are the maximal nodes of all workers, from left to right; together they cover [0, microbatches). Or they
    cover the nodes `into` alone: then the first one in each of these holds its sum.
    """
    index = {node: i for i, node in enumerate(nodes)}
    plan: list[tuple[int, int]] = []

    def merge(node: Node) -> int:
        if node in index:
            return index[node]
        middle = split(*node)
        left, right = merge((node[0], middle)), merge((middle, node[1]))
        plan.append((left, right))
        return left

    for node in into or [(0, microbatches)]:
        merge(node)
    return plan
