"""The sum of a step's gradients, in pieces that travel while backward still computes others.

Each piece is exchanged, added level by level and put together again. All ranks begin what goes between them in one
order, which hangs on the number of pieces alone: the exchange of the first, then by turns the exchange of one and the
putting together of the one before. What is next is begun as soon as it can be, whenever there is a moment to look.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from instep.reduce.reduction import Reduction
from instep.transport.group import Group, Pending

Begin = tuple[Callable[[], bool], Callable[[], None]]
"""What may be begun: whether that would have to wait, and the beginning."""


class Total:
    """One worker's side of it. shared: see `Group.assemble`."""

    def __init__(self, reduction: Reduction, worker: int, group: Group, *, shared: bool):
        self._reduction, self._worker, self._group, self._shared = reduction, worker, group, shared
        pieces = range(len(reduction.pieces))
        self._order: list[Begin] = []
        for piece in [*pieces, len(pieces)]:
            if piece in pieces:
                self._order.append((partial(self._written, piece), partial(self._exchange, piece)))
            if piece:
                self._order.append((partial(self._exchanged, piece - 1), partial(self._assemble, piece - 1)))
        self._rows: list[Pending] = []  # by piece, at the first of two levels
        self._sums: list[Pending] = []
        self._whole: list[Pending] = []
        self._norms: list[Tensor] = []
        self._finished = self._begun = 0

    def begin(self) -> None:
        """Begins a step."""
        self._rows, self._sums, self._whole, self._norms = [], [], [], []
        self._finished = self._begun = 0

    def reached(self, done: int) -> None:
        """The first `done` pieces of this worker's rows are written. Begins what can be begun."""
        while self._finished < done:
            if len(self._group.levels) > 1:
                self._rows.append(self._group.exchange(self._reduction.pieces[self._finished]))
            self._finished += 1
        while self._begun < len(self._order) and self._order[self._begun][0]():
            self._next()

    def add(self) -> Tensor:
        """Goes on until this worker has added its cuts of all pieces; the norms of their blocks, by piece."""
        while self._begun < len(self._order):
            self._next()
        norms: Tensor = torch.cat(self._norms)
        return norms

    def wait(self) -> Tensor:
        """The whole sum; not before a gather that followed `add`."""
        whole = [pending.wait()[0] for pending in self._whole][-1]
        if len(self._group.levels) > 1:
            self._group.meet()  # what came to others of the machine
        self._rows, self._sums, self._whole = [], [], []  # and with them what the group holds for them
        return whole

    def _next(self) -> None:
        begin = self._order[self._begun][1]
        self._begun += 1
        begin()

    def _written(self, piece: int) -> bool:
        return self._finished > piece and (len(self._group.levels) == 1 or self._rows[piece].ready())

    def _exchange(self, piece: int) -> None:
        place, sums = self._reduction.pieces[piece], None
        if len(self._group.levels) > 1:
            rows = self._rows[piece]
            sums = self._reduction.add(self._worker, rows.wait(), home=rows.home)
        self._sums.append(self._group.exchange(place, sums))

    def _exchanged(self, piece: int) -> bool:
        return self._sums[piece].ready()

    def _assemble(self, piece: int) -> None:
        sums, level = self._sums[piece], len(self._group.levels) - 1
        (part,) = self._reduction.add(self._worker, sums.wait(), level, sums.home)
        self._whole.append(self._group.assemble(part, self._reduction.pieces[piece], shared=self._shared))
        self._norms.append(self._reduction.norms(part))
