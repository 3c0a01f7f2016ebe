"""Standing in: what a worker in lockstep does in the place of another of its machine that has died, until a successor
takes it.

A step is a few parts between barriers, and each part of a worker hangs on the recipe and on shared memory alone. So
whoever waits at a barrier for a worker that has died does what that worker lacked before it, and the step ends with the
same bits. Of what the worker had begun to change in place `Undo` tells how far it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from instep.engines.division import Division
from instep.engines.merged_events import Last
from instep.engines.seat import Seat
from instep.engines.sharding import Placement
from instep.engines.undo import PiecesDone, SeatLost, Undo
from instep.reduce.buffers import Left
from instep.reduce.reduction import Reduction
from instep.transport.group import Pending
from instep.transport.shared_memory import Fact, SharedMemoryGroup, Vacancies
from instep.worker.gradients import Gradients

JOINING, JOINED, COMPUTING, ADDING, ADDED, UPDATING = range(6)
"""How far a worker is in a step: it has nothing in the group's memory yet, has what it begins with there, may compute,
has begun to add its cut, has added it, or has begun to make its part of the update."""

_STAGES = 6

Part = Callable[["Vacant"], Fact | None]


@dataclass(frozen=True)
class Handed:
    """What the successor of a worker goes on with, after a step and before all else that is due then.

    division: as it follows the workers' speed. place: of the group. progress: `Progress` by field. watch: as in a
    checkpoint; so are `model`, where it is not shared, and `training`. totals, word: what the step gave. usual,
    evaluated: of the engine. updates: that the tape may not tell of yet.
    """

    division: Division
    place: tuple[int, int]
    progress: dict[str, Any]
    watch: Any
    totals: dict[str, int]
    word: int
    usual: tuple[list[int], bool]
    evaluated: int
    updates: Last
    model: dict[str, Any]
    training: dict[str, Any]


class Successors(Vacancies, Protocol):
    """Vacancies, and who is to take them."""

    @property
    def told(self) -> int:
        """Up to which version the tape tells of updates, where the place of worker 0 is held here."""

    def ready(self, worker: int) -> bool:
        """Whether the successor of a worker whose place is held here can take it."""

    def hand_over(self, worker: int, state: Handed) -> None:
        """Gives it to its successor: it is not held here any more."""


class OthersParts(Protocol):
    """What a worker's step tells of where it is, so that others' parts can be done there."""

    @property
    def holds(self) -> Collection[int]:
        """The workers whose places this one holds."""

    @property
    def possible(self) -> bool:
        """Whether this is more than nothing."""

    def note(self, step: int, stage: int) -> PiecesDone | None:
        """How far this worker is in a step; what it is to tell how far it is in this stage, if others are to know."""

    def until_told(self, what: Callable[[int], Fact]) -> None:
        """At the next ones, between two steps, all tell a fact or share bytes: this, by worker."""

    def owes(self, duty: Callable[[], None]) -> None:
        """Worker 0 does this before the next one."""

    def until_loaded(self, step: int) -> None:
        """At the next one all tell what they have loaded of the first step."""

    def until_rows(self, step: int, totals: dict[str, int]) -> None:
        """At the next barrier all have computed their microbatches."""

    def until_facts(self, step: int, totals: dict[str, int], usual: tuple[list[int], bool], *, last: bool) -> None:
        """At the next one all have added their cuts, and tell what they know. last: nothing is loaded ahead."""

    def until_left(self, step: int, totals: dict[str, int], changed: list[int]) -> None:
        """At the next one all tell what their microbatches left in these buffers."""

    def until_settled(self) -> None:
        """At the next one all have made their part of the update, if any is made."""

    def until_stopped(self) -> None:
        """At the next ones all tell that they stop."""

    def update(self, step: int, norm: float, touched: Sequence[bool]) -> float | None:
        """This worker's part of an update, as `Placement.update`."""

    def settle(self) -> None:
        """As `Placement.settle`."""

    def between(self, state: Callable[[], Handed]) -> None:
        """Between two steps: gives places to successors that are there. `state()` is what they need."""


class Alone:
    """Where nobody can stand in for another."""

    holds: Collection[int] = ()
    possible = False

    def __init__(self, placement: Placement):
        self._placement = placement

    def note(self, step: int, stage: int) -> PiecesDone | None:
        return None

    def until_told(self, what: Callable[[int], Fact]) -> None:
        pass

    def owes(self, duty: Callable[[], None]) -> None:
        pass

    def until_loaded(self, step: int) -> None:
        pass

    def until_rows(self, step: int, totals: dict[str, int]) -> None:
        pass

    def until_facts(self, step: int, totals: dict[str, int], usual: tuple[list[int], bool], *, last: bool) -> None:
        pass

    def until_left(self, step: int, totals: dict[str, int], changed: list[int]) -> None:
        pass

    def until_settled(self) -> None:
        pass

    def until_stopped(self) -> None:
        pass

    def update(self, step: int, norm: float, touched: Sequence[bool]) -> float | None:
        return self._placement.update(step, norm, touched)

    def settle(self) -> None:
        self._placement.settle()

    def between(self, state: Callable[[], Handed]) -> None:
        pass


class Vacant:
    """The place of a worker that has died, at the one that stands in for it."""

    def __init__(self, seat: Seat):
        self.seat, self.loaded, self.computed = seat, -1, -1
        self.handle: SharedMemoryGroup
        self.rows: Pending
        self.left: Left = [], []


class StandIn:
    """One worker's side. `make_seat(worker)` gives the seat of another; `told(worker, version, microbatches)` is called
    when this one first does its part; `stop_wanted` is for worker 0's, and so is `leads`, before anything is done in
    its place.
    """

    possible = True

    def __init__(
        self,
        own: int,
        division: Division,
        gradients: Gradients,
        placement: Placement,
        group: SharedMemoryGroup,
        successors: Successors,
        make_seat: Callable[[int], Seat],
        told: Callable[[int, int, range | None], None],
        stop_wanted: Callable[[], bool],
        leads: Callable[[], None],
        undo: Undo,
    ):
        self._own, self._division, self._gradients, self._placement = own, division, gradients, placement
        self._group, self._successors, self._make_seat, self._told = group, successors, make_seat, told
        self._stop_wanted, self._leads, self._undo = stop_wanted, leads, undo
        undo.attach(group.spare[placement.state_bytes :], (group.common, group.spare))
        self._vacant: dict[int, Vacant] = {}
        self._part: Part | None = None
        self._owed: tuple[Callable[[], None], int] = (lambda: None), -1  # and before which barrier
        group.stand_in(successors, self._do)

    @property
    def holds(self) -> Collection[int]:
        return self._successors.held() if self._successors.changes() else ()

    def note(self, step: int, stage: int) -> PiecesDone | None:
        return self._note(self._own, step, stage)

    def _note(self, worker: int, step: int, stage: int) -> PiecesDone:
        at = _STAGES * step + stage
        self._group.stages[worker] = at
        return self._undo.track(worker, at)

    def until_told(self, what: Callable[[int], Fact]) -> None:
        self._part = lambda vacant: what(vacant.seat.worker)

    def owes(self, duty: Callable[[], None]) -> None:
        self._owed = duty, sum(self._group.place) + 1

    def until_loaded(self, step: int) -> None:
        self._part = partial(self._load, step)

    def until_rows(self, step: int, totals: dict[str, int]) -> None:
        self._part = partial(self._rows, step, totals)

    def until_facts(self, step: int, totals: dict[str, int], usual: tuple[list[int], bool], *, last: bool) -> None:
        self._part = partial(self._facts, step, totals, usual, last)

    def until_left(self, step: int, totals: dict[str, int], changed: list[int]) -> None:
        self._part = partial(self._buffers, step, totals, changed)

    def until_settled(self) -> None:
        self._part = lambda vacant: torch.empty(0)

    def until_stopped(self) -> None:
        self._part = lambda vacant: torch.zeros(2, dtype=torch.int64)  # it has nothing that is sound, nor saved

    def update(self, step: int, norm: float, touched: Sequence[bool]) -> float | None:
        rate = self._placement.update(step, norm, touched, self.note(step, UPDATING))
        self._part = partial(self._update, step, norm, touched)
        return rate

    def settle(self) -> None:
        self._placement.settle()

    def between(self, state: Callable[[], Handed]) -> None:
        self._part = None
        for worker in [each for each in self.holds if self._successors.ready(each)]:
            self._placement.give_back(worker)
            self._vacant.pop(worker, None)
            self._successors.hand_over(worker, state())

    # What others lack

    def _do(self, worker: int, length: int | None) -> Fact | None:
        """Before the barrier at which this one is. length: of the bytes that it is to give, if it has told that."""
        if not self._group.stages[worker]:
            self._placement.attach_for(worker)
            self._note(worker, int(self._group.stages[self._own]) // _STAGES, JOINED)
        if self._part is None:
            raise SeatLost(worker, "all did more than a step")
        if worker not in self._vacant:
            self._vacant[worker] = Vacant(self._make_seat(worker))
            self._told(worker, *self._before(worker))
        if worker == 0:
            self._leads()
            duty, barrier = self._owed
            if sum(self._group.place) == barrier and int(self._group.stages[0]) % _STAGES != COMPUTING:
                duty()
        found = self._part(self._vacant[worker])
        if isinstance(found, bytes) and length not in (None, len(found)):
            raise SeatLost(worker, "it told the others something else than it would tell now")
        return found

    def _before(self, worker: int) -> tuple[int, range | None]:
        """In which step it died, and which microbatches may have been computed already."""
        step, stage = divmod(int(self._group.stages[worker]), _STAGES)
        return step, range(*self._reduction.ranges[worker]) if stage == COMPUTING else None

    @property
    def _reduction(self) -> Reduction:
        return self._division.now

    def _stage(self, worker: int, step: int) -> int:
        """How far a worker was in this step; -1 before it."""
        return int(self._group.stages[worker]) - _STAGES * step

    def _load(self, step: int, vacant: Vacant) -> Tensor:
        vacant.seat.load(step, vacant.seat.own)
        vacant.loaded = step
        return vacant.seat.facts.packed(None, stop=False)

    def _rows(self, step: int, totals: dict[str, int], vacant: Vacant) -> None:
        worker = vacant.seat.worker
        self._note(worker, step, COMPUTING)
        vacant.handle = self._group.as_rank(worker)
        self._compute(step, totals, vacant, vacant.handle.rows)
        vacant.rows = vacant.handle.exchange(self._reduction.pieces[0])

    def _add(self, step: int, vacant: Vacant) -> Tensor:
        """Adds what is lacking of the worker's cut, whose rows all have written; the norms of its blocks."""
        worker, reduction, rows = vacant.seat.worker, self._reduction, vacant.rows.wait()
        tracked = self._note(worker, step, ADDING)
        (part,) = reduction.add(worker, rows, home=vacant.rows.home, tracked=tracked)
        vacant.handle.assemble(part, reduction.pieces[0], shared=self._placement.shared)
        self._note(worker, step, ADDED)
        return reduction.norms(part)

    def _compute(self, step: int, totals: dict[str, int], vacant: Vacant, rows: Sequence[Tensor]) -> None:
        seat, reduction, buffers = vacant.seat, self._reduction, self._gradients.buffers
        seat.facts.take(reduction.ranges)
        if vacant.loaded != step:
            seat.load(step, seat.own)
        seat.check_loaded()
        own = buffers.swap()
        nodes, own_nodes = reduction.nodes_of(seat.worker), reduction.nodes_of(self._own)
        self._gradients.assign(nodes, rows[: len(nodes)])
        try:
            seat.compute(step, totals)
        finally:
            self._gradients.assign(own_nodes, self._group.rows[: len(own_nodes)])
            vacant.left = buffers.swap(own)
        vacant.computed = step

    def _compute_aside(self, step: int, totals: dict[str, int], vacant: Vacant) -> None:
        """Once more, where the rows are there and others may be adding them: for what is known beside."""
        if vacant.computed != step:
            count = len(self._reduction.nodes_of(vacant.seat.worker))
            rows = [torch.zeros_like(row) for row in self._group.as_rank(vacant.seat.worker).rows[:count]]
            self._compute(step, totals, vacant, rows)

    def _facts(
        self, step: int, totals: dict[str, int], usual: tuple[list[int], bool], last: bool, vacant: Vacant
    ) -> Tensor:
        seat = vacant.seat
        if vacant.computed != step:  # else this worker does all of it
            self._compute_aside(step, totals, vacant)
            vacant.handle = self._group.as_rank(seat.worker, again=True)
            vacant.rows = vacant.handle.exchange(self._reduction.pieces[0])
        if not last:
            seat.load_ahead(step + 1)
            vacant.loaded = step + 1
        if self._stage(seat.worker, step) < ADDED:
            norms = self._add(step, vacant).numpy()
        else:
            norms = self._reduction.norms(self._group.sum_of(seat.worker, self._reduction.pieces[0])).numpy()
        with self._left_by(vacant):
            left = seat.post_left(*usual)
        left.own["norms"][: len(norms)] = norms
        return seat.facts.packed(left, stop=seat.worker == 0 and self._stop_wanted())

    def _buffers(self, step: int, totals: dict[str, int], changed: list[int], vacant: Vacant) -> Tensor:
        self._compute_aside(step, totals, vacant)
        with self._left_by(vacant):
            return vacant.seat.post_left(changed, False).raw

    @contextmanager
    def _left_by(self, vacant: Vacant) -> Iterator[None]:
        own = self._gradients.buffers.swap(vacant.left)
        try:
            yield
        finally:
            self._gradients.buffers.swap(own)

    def _update(self, step: int, norm: float, touched: Sequence[bool], vacant: Vacant) -> Tensor:
        worker = vacant.seat.worker
        self._placement.update_for(worker, step, norm, touched, self._note(worker, step, UPDATING))
        return torch.empty(0)
