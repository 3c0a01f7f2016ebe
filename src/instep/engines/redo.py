"""A step that is done again by who is left of a group: each keeps what it has computed of it, and only what nobody has
is computed.

For that step the ranges are such that each worker's holds what it has; what lacks is its neighbours', and theirs who
have nothing and stand between. Where the sum over several nodes is known, or the whole, it takes the place of one of
them, and the others are -0.0: x + -0.0 is x, to the bit, whatever x is. So nothing else need know of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from instep.engines.kept import KeptOfStep, Span, Vector, left_by, rows_in, together
from instep.ranges import equal_ranges
from instep.reduce.buffers import Buffers
from instep.reduce.reduction import Reduction
from instep.reduce.tree import Node, maximal_nodes, split
from instep.transport.group import Group
from instep.transport.memory import rows_to_spare
from instep.worker.gradients import Computed

NOTHING = -0.0
"""What changes no sum."""


class ToldOfStep(NamedTuple):
    """What a worker tells the others that it has. held: microbatches of which it knows all; own, sums, whole: nodes of
    the tree with where their vectors are good, see `KeptOfStep`. rows: for how many nodes it has memory.
    """

    held: list[Node]
    own: list[tuple[Node, list[Span]]]
    sums: list[tuple[Node, list[Span]]]
    whole: list[tuple[Node, list[Span]]]
    rows: int


class Claim(NamedTuple):
    """In some span the sum over a node is known to one, `rank`; `kind`: which field of `ToldOfStep` that is of."""

    node: Node
    rank: int
    kind: str


class CannotKeep(Exception):
    """What the workers have does not fit together."""


def ranges_of(held: Sequence[Sequence[Node]], microbatches: int) -> list[Node]:
    """Of each worker, with what it has in it. Raises CannotKeep where these are not in the order of workers.

    >>> ranges_of([[(0, 4)], [(8, 12)]], 16)
    [(0, 6), (6, 16)]
    >>> ranges_of([[(0, 4)], [], [(10, 16)]], 16)
    [(0, 6), (6, 8), (8, 16)]
    """
    starts, stops = [0] * len(held), [0] * len(held)
    end, before = 0, -1
    for rank, own in enumerate([*held, [(microbatches, microbatches)]]):
        if not own:
            continue
        if own[0][0] < end:
            raise CannotKeep("what workers have is not in their order")
        those = range(max(before, 0), min(rank + 1, len(held)))
        for each, (start, stop) in zip(those, equal_ranges(own[0][0] - end, len(those)), strict=True):
            if each != before:
                starts[each] = end + start
            stops[each] = end + stop
        end, before = own[-1][1], rank
        if rank < len(held):
            stops[rank] = end
    return list(zip(starts, stops, strict=True))


def _good(spans: Sequence[Span], span: Span) -> bool:
    return any(start <= span[0] and span[1] <= stop for start, stop in spans)


def _inside(node: Node, whole: Node) -> bool:
    return whole[0] <= node[0] and node[1] <= whole[1]


class RedoPlan:
    """Who computes what, and whose vectors are taken; the same at all, of what all have told."""

    def __init__(self, told: Sequence[ToldOfStep], microbatches: int, width: int):
        self.told, self.microbatches = told, microbatches
        self.ranges = ranges_of([each.held for each in told], microbatches)
        for (start, stop), each in zip(self.ranges, told, strict=True):
            if len(maximal_nodes(start, stop, microbatches)) > each.rows:
                raise CannotKeep("there is no memory for so many nodes")
        lists = [spans for each in told for kind in (each.own, each.sums, each.whole) for _, spans in kind]
        ends = sorted({0, width, *(end for spans in lists for span in spans for end in span)})
        self.spans = list(pairwise(ends))
        self.claims = [self._claims(span) for span in self.spans]

    def lacking(self, rank: int) -> list[Node]:
        """Microbatches that the worker is to compute."""
        at, stop = self.ranges[rank]
        found = []
        for first, end in [*self.told[rank].held, (stop, stop)]:
            if at < first:
                found.append((at, first))
            at = end
        return found

    def first_in(self, claim: Claim) -> Node:
        """The node in the place of which it is taken."""
        return next(node for node, _ in self.told[claim.rank].own if _inside(node, claim.node))

    def _claims(self, span: Span) -> list[Claim]:
        """What is taken in a span in place of nodes of workers."""
        for rank, each in enumerate(self.told):
            for node, spans in each.whole:
                if each.own and _good(spans, span):
                    return [Claim(node, rank, "whole")]
        found: list[Claim] = []
        for each in self.told:
            for node, spans in each.own:
                if not _good(spans, span) and not any(_inside(node, claim.node) for claim in found):
                    found.append(self._sum_over(node, span))
        return found

    def _sum_over(self, node: Node, span: Span) -> Claim:
        for rank, each in enumerate(self.told):
            for whole, spans in each.sums:
                if _inside(node, whole) and _good(spans, span) and any(_inside(own, whole) for own, _ in each.own):
                    return Claim(whole, rank, "sums")
        raise CannotKeep("nobody has all of a part of the gradient")


class Redo:
    """One worker's part of it. kept: what it has, None where that is nothing."""

    def __init__(self, plan: RedoPlan, rank: int, kept: KeptOfStep | None, step: int, width: int):
        self.step, self.kept, self.ranges, self._plan, self._rank = step, kept, plan.ranges, plan, rank
        self.lacking = plan.lacking(rank)
        """Microbatches that this worker computes, in runs."""
        self.nodes = [node for start, stop in self.lacking for node in maximal_nodes(start, stop, plan.microbatches)]
        self.vectors = [torch.zeros(width) for _ in self.nodes]
        """Where these are folded."""

    @property
    def told(self) -> list[list[int]]:
        """The microbatches that each worker keeps, from and to."""
        return [[each.held[0][0], each.held[-1][1]] if each.held else [0, 0] for each in self._plan.told]

    @property
    def holds(self) -> bool:
        """Whether this worker has any microbatches."""
        return self.ranges[self._rank][0] < self.ranges[self._rank][1]

    @property
    def microbatches(self) -> list[int]:
        """Those that this worker computes."""
        return [microbatch for start, stop in self.lacking for microbatch in range(start, stop)]

    def complete(self, computed: Computed, buffers: Buffers) -> Computed:
        """What all microbatches of this worker's range came to, those that it has computed now, and before."""
        self._now, self._left = computed, left_by(self.microbatches, buffers.swap())
        left = {**(self.kept.left if self.kept is not None else {}), **self._left}
        every = [left[microbatch] for microbatch in range(*self.ranges[self._rank])]
        buffers.swap(([each for each, _ in every], [filled for _, filled in every]))
        if self.kept is None:
            return computed
        ends = buffers.ends() if self.step == 0 else {}
        self._now = together(self.kept.computed, computed, buffers.changed(), ends)
        return self._now

    def fill(self, nodes: Sequence[Node], rows: Sequence[Tensor]) -> None:
        """Writes the vectors of this worker's nodes into the first rows, once all of `vectors` are computed."""
        kept = self.kept.own if self.kept is not None else []
        parts = {vector.node: vector.values for vector in kept} | dict(zip(self.nodes, self.vectors, strict=True))
        for span, claims in zip(self._plan.spans, self._plan.claims, strict=True):
            here = slice(*span)
            values = {node: self._value(node, whole, claims, here) for node, whole in parts.items()}
            for node, row in zip(nodes, rows, strict=False):
                found = _sum_of(node, values)
                row[here] = NOTHING if found is None else found

    def _value(self, node: Node, values: Tensor, claims: Sequence[Claim], here: slice) -> Tensor | None:
        """What a node is taken for in a span; None where that is nothing."""
        claim = next((each for each in claims if _inside(node, each.node)), None)
        if claim is None:
            return values[here]
        if claim.rank != self._rank or self._plan.first_in(claim) != node:
            return None
        assert self.kept is not None, "it has told that it has it"
        those = self.kept.whole if claim.kind == "whole" else self.kept.sums
        return next(vector.values[here] for vector in those if vector.node == claim.node)

    def keeps(self) -> KeptOfStep:
        """What this worker has, now that it has computed what lacked."""
        width = len(self.vectors[0]) if self.vectors else 0
        own = [Vector(node, values, [(0, width)]) for node, values in zip(self.nodes, self.vectors, strict=True)]
        held = [self.ranges[self._rank]] if self.holds else []
        if self.kept is None:
            return KeptOfStep(self.step, held, self._now, self._left, own=own)
        kept, left = self.kept, {**self.kept.left, **self._left}
        own = sorted([*kept.own, *own], key=lambda vector: vector.node)
        return KeptOfStep(self.step, held, self._now, left, own=own, sums=kept.sums, whole=kept.whole)


def _sum_of(node: Node, values: Mapping[Node, Tensor | None]) -> Tensor | None:
    """In tree order, of those of these nodes that lie in it."""
    if node in values:
        return values[node]
    middle = split(*node)
    left, right = _sum_of((node[0], middle), values), _sum_of((middle, node[1]), values)
    return right if left is None else left if right is None else left + right


def _spans_of(vectors: Sequence[Vector]) -> list[tuple[Node, list[Span]]]:
    return [(vector.node, vector.spans) for vector in vectors]


def redo_of(
    kept: KeptOfStep | None, group: Group, rank: int, step: int, reduction: Reduction, here: Sequence[int]
) -> Redo | None:
    """How `step` is done by the group, where its workers have some of it already: all call it. reduction: how they add
    gradients; here: who shares this one's memory.
    """
    if kept is not None and (kept.step != step or not kept.settle()):
        kept = None
    width, microbatches = reduction.layout.size, reduction.microbatches
    rows = len(reduction.nodes_of(rank)) + rows_to_spare(width, 2 * len(here))  # some are needed to fold beside
    own = ToldOfStep([], [], [], [], min(rows, rows_in(group, microbatches)))
    if kept is not None:
        fields = _spans_of(kept.own), _spans_of(kept.sums), _spans_of(kept.whole)
        own = ToldOfStep(kept.held, *fields, own.rows)
    told = [msgspec.msgpack.decode(each, type=ToldOfStep) for each in group.share(msgspec.msgpack.encode(own))]
    if not any(each.held for each in told):
        return None
    try:
        return Redo(RedoPlan(told, microbatches, width), rank, kept, step, width)
    except CannotKeep:  # what only the workers of one machine know is torn, or there is too little memory: at all alike
        return None
