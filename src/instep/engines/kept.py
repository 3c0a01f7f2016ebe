"""What a worker in lockstep over several machines has of a step that was not committed, when the others of its group
are lost.

Its rows lie where the group had them. Some of it may have been added there already: what the workers of a machine share
into what their machine comes to, and that into the whole. So of each part of the gradient a machine has either the rows
of its workers, or the sum over them, or the whole: one of these is enough, and which it is the workers' marks tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from instep.reduce.buffers import Left
from instep.reduce.reduction import Reduction
from instep.reduce.tree import Node, maximal_nodes
from instep.transport.distributed import DistributedGroup
from instep.transport.group import Group, Solo
from instep.transport.shared_memory import SharedMemoryGroup
from instep.worker.gradients import Computed

HERE, WHOLE, PUT, UPDATE = range(4)
"""Works on the pieces of a gradient, one after the other: adding the rows of a machine, adding up the whole, and
putting in place what others have added up of it. At last the update, which may scale it."""

_COUNT_BITS, _BEGUN_AT, _STEP_AT = 4, 12, 16

Span = tuple[int, int]
"""Elements of the gradient."""


class Marks:
    """How far a worker is in adding a step's gradient. `all`: the marks of its machine's workers, [n] int64, at first
    0, of which it writes number `own` alone. What it stored last, before it died, tells of all that it did before.
    """

    def __init__(self, all_: NDArray[np.int64], own: int):
        self.all, self._own, self._value = all_, own, 0

    def put(self, begun: bool) -> None:
        """As `begin` and `end` of `PUT`."""
        (self.begin if begun else self.end)(PUT)

    def step(self, step: int) -> None:
        """It begins that step."""
        self._store((step + 1) << _STEP_AT)

    def begin(self, work: int) -> None:
        """It begins to change the next piece."""
        self._store(self._value | 1 << (_BEGUN_AT + work))

    def end(self, work: int) -> None:
        """That piece is whole."""
        self._store((self._value & ~(1 << (_BEGUN_AT + work))) + (1 << (_COUNT_BITS * work)))

    def torn(self, step: int) -> bool:
        """Whether a worker of the machine may have changed what they share of version `step`."""
        return any(Mark.of(int(value), step).later for value in self.all)

    def _store(self, value: int) -> None:
        self._value = value
        self.all[self._own] = value


class Mark(NamedTuple):
    """What one told. done: by work, pieces. begun: whether it was changing the next one. later: the step was
    committed, as far as it knew."""

    done: list[int]
    begun: list[bool]
    later: bool

    @classmethod
    def of(cls, value: int, step: int) -> Mark:
        """In that step; nothing is done of it where the mark is of another."""
        later = value >> _STEP_AT > step + 1
        value = value if value >> _STEP_AT == step + 1 else 0
        done = [value >> (_COUNT_BITS * work) & ((1 << _COUNT_BITS) - 1) for work in (HERE, WHOLE, PUT)]
        begun = [bool(value >> (_BEGUN_AT + work) & 1) for work in (HERE, WHOLE, PUT, UPDATE)]
        return cls(done, begun, later or begun[UPDATE])


class Vector(NamedTuple):
    """That of a node of the tree, [width] float32, of which only these `spans` are good."""

    node: Node
    values: Tensor
    spans: list[Span]


@dataclass
class GroupMemory:
    """A machine's memory, after its workers have left it. rows: by worker; marks: theirs.

    reduction: by which the step's gradient was added; at: the index of the machine's first worker in it.
    """

    reduction: Reduction
    at: int
    rows: Sequence[Sequence[Tensor]]
    marks: NDArray[np.int64]

    def settled(self, rank: int, step: int) -> tuple[list[Vector], list[Vector], list[Vector]] | None:
        """What lies there: the nodes of worker `rank`, what the machine comes to, and the whole. None where one of its
        workers died while it changed what they share.
        """
        reduction, here = self.reduction, range(self.at, self.at + len(self.rows))
        several, shares = len(reduction.levels) > 1, reduction.shares
        marks = {each: Mark.of(int(self.marks[each - self.at]), step) for each in here}
        if any(mark.begun[HERE] or mark.begun[WHOLE] or mark.later for mark in marks.values()):
            return None
        raw, added, whole = list[Span](), list[Span](), list[Span]()
        machine = shares.machine_of(rank)
        for number, cuts in enumerate(reduction.pieces):
            for owner, cut in enumerate(cuts):
                helper = shares.helper(machine, owner) if several else owner if owner in here else rank
                mark = marks[helper]
                own = WHOLE if helper == owner else PUT
                if number < mark.done[own]:
                    whole.append((cut.start, cut.stop))
                elif own == PUT and number == mark.done[PUT] and mark.begun[PUT]:
                    continue  # nobody knows which
                else:
                    (added if several and number < mark.done[HERE] else raw).append((cut.start, cut.stop))
        nodes = reduction.nodes_of(rank)
        own_rows = zip(nodes, self.rows[rank - self.at], strict=False)
        of_machine = maximal_nodes(reduction.ranges[here[0]][0], reduction.ranges[here[-1]][1], reduction.microbatches)
        sums = [Vector(node, self._first_in(node), added) for node in of_machine] if added else []
        total = Vector((0, reduction.microbatches), self.rows[0][0], whole)
        return [Vector(node, row, raw) for node, row in own_rows], sums, [total] if whole else []

    def _first_in(self, whole: Node) -> Tensor:
        """Where the sum of a node is put together: the row of the first of those in it."""
        return next(
            row
            for worker, rows in enumerate(self.rows, self.at)
            for node, row in zip(self.reduction.nodes_of(worker), rows, strict=False)
            if whole[0] <= node[0] and node[1] <= whole[1]
        )


@dataclass
class KeptOfStep:
    """What a worker has of a step. computed: of its microbatches, `held`, in order; left: by microbatch, what it left
    in buffers and whether it had samples. memory: of the group that it was in as worker `rank`, until that is settled.

    own, sums, whole: the vectors that are good.
    """

    step: int
    held: list[Node]
    computed: Computed
    left: Mapping[int, tuple[list[Tensor | None], bool]]
    memory: GroupMemory | None = None
    rank: int = 0
    own: list[Vector] = field(default_factory=list)
    sums: list[Vector] = field(default_factory=list)
    whole: list[Vector] = field(default_factory=list)

    def settle(self) -> bool:
        """Finds what its group's memory holds, once all of its machine have left it. Whether it has anything then."""
        if self.memory is not None:
            found, self.memory = self.memory.settled(self.rank, self.step), None
            if found is None:
                self.held = []
            else:
                self.own, self.sums, self.whole = found
        return bool(self.held)


def left_by(microbatches: Sequence[int], left: Left) -> dict[int, tuple[list[Tensor | None], bool]]:
    """By microbatch."""
    return dict(zip(microbatches, zip(*left, strict=True), strict=True))


def together(one: Computed, other: Computed, changed: Sequence[bool], ends: Mapping[int, Any]) -> Computed:
    """What the microbatches of both came to; changed, ends: of both."""
    touched = [a or b for a, b in zip(one.touched, other.touched, strict=True)]
    ended = one.ended if other.ended is None else other.ended if one.ended is None else one.ended | other.ended
    return Computed({**one.sums, **other.sums}, touched, changed, ended, ends)


def marks_in(group: Group, own: int, *, seen: bool) -> Marks:
    """Those of a worker, number `own` of its machine; with `seen`, where the others of it see them."""
    memory = _memory_of(group)
    marks = Marks(memory.stages, own) if seen and isinstance(memory, SharedMemoryGroup) else Marks(np.zeros(1, int), 0)
    if isinstance(group, DistributedGroup):
        group.puts = marks.put
    return marks


def kept_of(
    group: Group,
    reduction: Reduction,
    worker: int,
    here: range,
    step: int,
    computed: Computed,
    marks: Marks,
    left: Left,
) -> KeptOfStep | None:
    """What worker `worker` has of a step that it has computed, and whose gradient is added by `reduction`; `here`: the
    workers of its machine. None where its rows lie in no memory.
    """
    memory = _memory_of(group)
    if memory is None:
        return None
    rows = memory.of_each if isinstance(memory, SharedMemoryGroup) else [memory.rows]
    own = reduction.ranges[worker]
    held, by_microbatch = [own] if own[0] < own[1] else [], left_by(range(*own), left)
    return KeptOfStep(step, held, computed, by_microbatch, GroupMemory(reduction, here.start, rows, marks.all), worker)


def rows_in(group: Group, most: int) -> int:
    """For how many nodes a worker has rows; `most` where it shares them with none, and makes more when need be."""
    memory = _memory_of(group)
    return len(memory.rows) if isinstance(memory, SharedMemoryGroup) else most if memory is not None else 0


def _memory_of(group: Group) -> SharedMemoryGroup | Solo | None:
    own = group.machine if isinstance(group, DistributedGroup) else group
    return own if isinstance(own, SharedMemoryGroup | Solo) else None
