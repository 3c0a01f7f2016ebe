"""The sum of a step's gradients. Between machines it may travel in pieces while backward still computes others.

Each piece is exchanged, added level by level and put together again: begun as soon as it can be, whenever there is a
moment to look. What others send of any piece is taken from the beginning of the step. Where this does not pay, see
`instep.engines.trial`, the whole is one piece, which nobody awaits before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from instep.engines.kept import HERE, WHOLE, Marks
from instep.reduce.by_block import Tracked
from instep.reduce.reduction import Reduction
from instep.transport.group import Group, PeerLost, Pending
from instep.worker.gradients import Gradients

PIECES: Sequence[int] = (1, 2, 2, 1)
"""Shares of the gradient that travel between machines one after the other, the last parameters' first, while backward
computes the next. Measured: a small one begins early, another small one is what is left when nothing is computed any
more, and more than four take more time than they save."""

LEAST_BLOCKS = 2
"""Of the smallest piece, for each worker: less does not pay."""


def in_pieces(whole: Reduction, microbatches: int, device: str) -> Reduction:
    """The same reduction in pieces, where it can travel in some."""
    layout, pieces = whole.layout, PIECES
    if device != "cpu" or layout.blocks * min(pieces) // sum(pieces) < LEAST_BLOCKS * whole.workers:
        pieces = (1,)
    return Reduction(layout, microbatches, whole.levels, pieces)


class Total:
    """One worker's side of it. late, early: the reductions for steps whose gradients travel so; None where none does.
    shared: see `Group.assemble`. `adds(done)` is called before and after the last of a cut is added up; it gives what
    others are to know of that, if they are. marks: where it notes how far it is."""

    def __init__(
        self,
        late: Reduction,
        early: Reduction | None,
        worker: int,
        group: Group,
        gradients: Gradients,
        marks: Marks,
        adds: Callable[[bool], Tracked | None] = lambda done: None,
        *,
        shared: bool,
    ):
        self.reduction = late
        """That of the present step."""
        self._late, self._early, self._adds = late, early, adds
        self._worker, self._group, self._gradients, self._shared = worker, group, gradients, shared
        self._rows: list[Pending] = []  # by piece, at the first of two levels
        self._sums: list[Pending] = []
        self._whole: list[Pending] = []
        self._norms: list[Tensor] = []
        self._finished = 0
        self._marks = marks
        self._lost: PeerLost | None = None  # while it computed, which others need all the same
        gradients.tell((), self.reached)

    def take(self, late: Reduction, early: Reduction | None) -> None:
        """From the next step on, gradients are added so: of other ranges."""
        self._late, self._early = late, early

    def begin(self, *, early: bool) -> None:
        """Begins a step. All workers say the same."""
        self._rows, self._sums, self._whole, self._norms = [], [], [], []
        self._finished, self._lost = 0, None
        reduction = self._early if early and self._early is not None else self._late
        if reduction is not self.reduction:
            self.reduction = reduction
            self._gradients.tell(_spans(reduction) if len(reduction.pieces) > 1 else (), self.reached)
        if early:
            self._group.expect(reduction.pieces, shared=self._shared)

    def reached(self, done: int) -> None:
        """The first `done` pieces of this worker's rows are written. Begins what can be begun."""
        if self._lost is not None:
            return
        try:
            while self._finished < done:
                if len(self._group.levels) > 1:
                    self._rows.append(self._group.exchange(self.reduction.pieces[self._finished]))
                self._finished += 1
            while self._go_on(waits=False):
                pass
        except PeerLost as lost:
            self._lost = lost

    def computed(self) -> None:
        """All of this worker's rows is written. Raises PeerLost where others were lost before, too."""
        if self._finished < len(self.reduction.pieces):
            self.reached(len(self.reduction.pieces))
        if self._lost is not None:
            raise self._lost

    def add(self) -> Tensor:
        """Goes on until this worker has added its cuts of all pieces; the norms of their blocks, by piece."""
        while self._go_on(waits=True):
            pass
        norms: Tensor = torch.cat(self._norms)
        return norms

    def wait(self) -> Tensor:
        """The whole sum; not before a gather that followed `add`."""
        whole = [pending.wait()[0] for pending in self._whole][-1]
        if len(self._group.levels) > 1:
            self._group.meet()  # what came to others of the machine
        self._rows, self._sums, self._whole = [], [], []  # and with them what the group holds for them
        return whole

    def _go_on(self, *, waits: bool) -> bool:
        """Begins what is next, if it `waits` or need not wait for it: to exchange a piece before all else, since others
        wait for that. Whether it has begun anything.
        """
        exchanged, put = len(self._sums), len(self._whole)
        if exchanged < self._finished and (len(self._group.levels) == 1 or self._rows[exchanged].ready()):
            self._exchange(exchanged)
        elif put < exchanged and self._sums[put].ready():
            self._assemble(put)
        elif not waits or put == len(self.reduction.pieces):
            return False
        elif exchanged < self._finished:
            self._exchange(exchanged)
        else:
            self._assemble(put)
        return True

    def _exchange(self, piece: int) -> None:
        place, sums = self.reduction.pieces[piece], None
        if len(self._group.levels) > 1:
            came = self._rows[piece].wait()
            self._marks.begin(HERE)
            sums = self.reduction.add(self._worker, came, home=self._rows[piece].home)
            self._marks.end(HERE)
        self._sums.append(self._group.exchange(place, sums))

    def _assemble(self, piece: int) -> None:
        sums, level = self._sums[piece], len(self._group.levels) - 1
        rows = sums.wait()
        tracked = self._adds(False)
        self._marks.begin(WHOLE)
        (part,) = self.reduction.add(self._worker, rows, level, sums.home, tracked)
        try:
            self._whole.append(self._group.assemble(part, self.reduction.pieces[piece], shared=self._shared))
        finally:
            self._marks.end(WHOLE)  # it is in its place, whoever is lost
        self._adds(True)
        self._norms.append(self.reduction.norms(part))


def _spans(reduction: Reduction) -> list[slice]:
    """Where its pieces lie, in elements."""
    return [slice(min(cut.start for cut in cuts), max(cut.stop for cut in cuts)) for cuts in reduction.pieces]
