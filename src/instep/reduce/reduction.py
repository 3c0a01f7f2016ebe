"""The reduction: the tree nodes of all workers into the gradient of the whole batch, each worker adding one cut."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from instep.reduce.by_block import Tracked, add_by_block, room_for
from instep.reduce.layout import Layout
from instep.reduce.levels import Levels, Shares, cut, levels_of
from instep.reduce.tree import Node, maximal_nodes, merge_plan, worker_ranges


@dataclass(frozen=True)
class _Adding:
    """What one worker adds at one level: the plan, in indices into the rows that it gets, and where sums are then."""

    plan: list[tuple[int, int]]
    sums: list[int]

    def with_sum_at(self, home: int) -> _Adding:
        """The same additions, but what comes to lie in the row `home` stays there. a + b is b + a, to the bit."""
        at: dict[int, int] = {}
        plan = []
        for into, source in self.plan:
            left, right = at.get(into, into), at.get(source, source)
            if right == home:
                left, right = right, left
            plan.append((left, right))
            at[into] = left
        return _Adding(plan, [at.get(each, each) for each in self.sums])


class Reduction:
    """Who owns which nodes, and the adding of one worker's cut.

    levels: as in `instep.reduce.levels`; a number stands for so many workers that add all at once. At each level a
    worker adds the rows of one cut: of every worker's nodes, and then of every machine's sums. The bytes that a worker
    moves are those of a reduce-scatter and an all-gather of the gradient. The vector may be cut into `pieces` first,
    each of which is added for itself: they come in backward's order, the last parameters first.
    """

    def __init__(
        self,
        layout: Layout,
        microbatches: int,
        levels: Levels | int,
        pieces: Sequence[int] = (1,),
        ranges: Sequence[Node] | None = None,
    ):
        self.layout, self.microbatches, self._pieces = layout, microbatches, pieces
        self.levels = levels_of([1] * levels) if isinstance(levels, int) else levels
        self.shares = Shares(self.levels)
        self.workers = len(self.shares.order)
        self.ranges = list(ranges or worker_ranges(microbatches, self.workers))
        self._own = [maximal_nodes(start, stop, microbatches) for start, stop in self.ranges]
        self.nodes: list[Node] = [node for nodes in self._own for node in nodes]
        self.plan = merge_plan(self.nodes, microbatches)
        ends = [layout.blocks * sum(pieces[place:]) // sum(pieces) for place in range(len(pieces) + 1)]
        parts = [range(start, end) for end, start in itertools.pairwise(ends)]
        self.cuts = [[part[cut.start : cut.stop] for cut in cut(len(part), self.shares)] for part in parts]
        """The blocks of the sum that each worker comes to have, by piece."""
        self.pieces = [
            [slice(blocks.start * layout.block, blocks.stop * layout.block) for blocks in cuts] for cuts in self.cuts
        ]
        """The same in elements."""
        rows = self._own
        self._teams = [[index for index, team in enumerate(teams) for _ in team] for teams in self.levels]
        self._adding: list[list[_Adding]] = []  # by level and set of ranks
        for teams in self.levels:
            known = [(team, [node for rank in team for node in rows[rank]]) for team in teams]
            spans = [(self.ranges[team.start][0], self.ranges[team.stop - 1][1]) for team in teams]
            sums = [maximal_nodes(*span, microbatches) for span in spans]
            self._adding.append([
                _Adding(merge_plan(nodes, microbatches, into), [_first_in(nodes, node) for node in into])
                for (_, nodes), into in zip(known, sums, strict=True)
            ])  # fmt: skip
            # Of each set only one worker sends the sums of a cut on, so its first stands for it.
            rows = [sums[i] if rank == team.start else [] for i, team in enumerate(teams) for rank in team]

    def with_ranges(self, ranges: Sequence[Node]) -> Reduction:
        """The same of other ranges."""
        return Reduction(self.layout, self.microbatches, self.levels, self._pieces, ranges)

    def slots_of(self, worker: int) -> range:
        """The indices of the worker's nodes among all."""
        first = sum(len(nodes) for nodes in self._own[:worker])
        return range(first, first + len(self._own[worker]))

    def nodes_of(self, worker: int) -> list[Node]:
        """The worker's maximal nodes, from left to right."""
        return self._own[worker]

    @property
    def rows(self) -> list[int]:
        """How many nodes each worker has."""
        return [len(nodes) for nodes in self._own]

    @property
    def sums(self) -> list[int]:
        """How many nodes the sum of each machine has, at the first of two levels."""
        return [len(adding.sums) for adding in self._adding[0]]

    def blocks_of(self, worker: int) -> int:
        """How many blocks of the sum the worker comes to have."""
        return sum(len(cuts[worker]) for cuts in self.cuts)

    @property
    def room_bytes(self) -> int:
        """How many bytes `add` needs in `Tracked.room` at most, whatever the ranges are."""
        return room_for(self.microbatches, self.layout.block)

    def add(
        self, worker: int, rows: Sequence[Tensor], level: int = 0, home: int = 0, tracked: Tracked | None = None
    ) -> list[Tensor]:
        """Adds what the worker gets at a level in tree order, in place; the sums, one at the last level.

        rows: the same cut, of whole blocks, of all nodes that add there; float32. home: the row that a sum is to lie
        in, if it has part in it. tracked: how much of this is done; where there is one sum alone.
        """
        adding = self._adding[level][self._teams[level][worker]]
        if home:
            adding = adding.with_sum_at(home)
        if tracked is not None and adding.plan:
            (into,) = adding.sums
            add_by_block(rows, adding.plan, into, self.layout.block, tracked)
        elif adding.plan:
            # Block by block for the cache's sake: each element is added by the plan, wherever the blocks begin.
            for parts in zip(*(row.view(-1, self.layout.block).unbind(0) for row in rows), strict=True):
                for into, source in adding.plan:
                    parts[into].add_(parts[source])
        return [rows[index] for index in adding.sums]

    def norms(self, part: Tensor) -> Tensor:
        """The L2 norm of each block of a cut, float32: the parts of the gradient's norm.

        Their order does not depend on the team either.
        """
        return _block_norms(part, self.layout.block)


def _first_in(nodes: Sequence[Node], whole: Node) -> int:
    """The index of the first of `nodes` that lies in `whole`."""
    return next(index for index, node in enumerate(nodes) if whole[0] <= node[0] and node[1] <= whole[1])


def norm_of(flat: Tensor, layout: Layout) -> float:
    """The L2 norm of a whole flat gradient, added up from its blocks as the norms of slices are."""
    return total_norm(_block_norms(flat, layout.block).tolist())


def _block_norms(flat: Tensor, block: int) -> Tensor:
    blocks = flat.view(-1, block)
    if flat.is_cpu:
        norms: Tensor = torch.linalg.vector_norm(blocks, dim=1)
        return norms
    # One at a time: how a GPU adds up a row depends on how many rows there are, and so on the team.
    return torch.stack([torch.linalg.vector_norm(each) for each in blocks.unbind(0)])


def clip(flat: Tensor, norm: float, largest: float | None) -> None:
    """Scales a flat gradient of L2 norm `norm` to `largest`, as torch.nn.utils.clip_grad_norm_; None leaves it."""
    factor = clip_factor(norm, largest)
    if factor is not None:
        flat.mul_(factor)


def clip_factor(norm: float, largest: float | None) -> float | None:
    """By what `clip` scales; None where it leaves all as it is."""
    # One factor for the whole, from a norm that all workers have alike: slices clipped by their own would differ.
    return largest / (norm + 1e-6) if largest is not None and norm > largest else None


def total_norm(norms: Iterable[float]) -> float:
    """The norm of the whole from those of all blocks, float32 each, whose squares are exact."""
    return math.sqrt(math.fsum([norm * norm for norm in norms]))  # fsum rounds once, so it has no order
