"""The sum of a step's gradients, in pieces that travel while backward still computes others.

Each piece is exchanged, added level by level and put together again: begun as soon as it can be, whenever there is a
moment to look. What others send of any piece is taken from the beginning of the step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from instep.reduce.reduction import Reduction
from instep.transport.group import Group, Pending


class Total:
    """One worker's side of it. shared: see `Group.assemble`."""

    def __init__(self, reduction: Reduction, worker: int, group: Group, *, shared: bool):
        self._reduction, self._worker, self._group, self._shared = reduction, worker, group, shared
        self._rows: list[Pending] = []  # by piece, at the first of two levels
        self._sums: list[Pending] = []
        self._whole: list[Pending] = []
        self._norms: list[Tensor] = []
        self._finished = 0

    def begin(self) -> None:
        """Begins a step."""
        self._rows, self._sums, self._whole, self._norms = [], [], [], []
        self._finished = 0
        self._group.expect(self._reduction.pieces, shared=self._shared)

    def reached(self, done: int) -> None:
        """The first `done` pieces of this worker's rows are written. Begins what can be begun."""
        while self._finished < done:
            if len(self._group.levels) > 1:
                self._rows.append(self._group.exchange(self._reduction.pieces[self._finished]))
            self._finished += 1
        while self._go_on(waits=False):
            pass

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
        elif not waits or put == len(self._reduction.pieces):
            return False
        elif exchanged < self._finished:
            self._exchange(exchanged)
        else:
            self._assemble(put)
        return True

    def _exchange(self, piece: int) -> None:
        place, sums = self._reduction.pieces[piece], None
        if len(self._group.levels) > 1:
            rows = self._rows[piece]
            sums = self._reduction.add(self._worker, rows.wait(), home=rows.home)
        self._sums.append(self._group.exchange(place, sums))

    def _assemble(self, piece: int) -> None:
        sums, level = self._sums[piece], len(self._group.levels) - 1
        (part,) = self._reduction.add(self._worker, sums.wait(), level, sums.home)
        self._whole.append(self._group.assemble(part, self._reduction.pieces[piece], shared=self._shared))
        self._norms.append(self._reduction.norms(part))
