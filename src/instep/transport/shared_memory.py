"""A group whose ranks are processes of one machine: memory that they share is read in place, and nothing is moved."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from instep.reduce.layout import padded
from instep.transport.group import (
    LEFT,
    BrokenOff,
    PeerLost,
    PeerRaised,
    Pending,
    Piece,
    Sizes,
    Views,
    Waiting,
    as_bytes,
    put,
)
from instep.transport.memory import Region, attach, mark, wait_for

ROOM = 1 << 20
"""Bytes of a part of what is shared."""

Fact = Tensor | bytes


def regions(sizes: Sizes) -> dict[str, Region]:
    """What a file for a team of these sizes must hold, see `instep.transport.memory.reserve`."""
    size = len(sizes.rows)
    fact_bytes = padded(sizes.fact_bytes)
    return {
        "turns": Region((2, size), "int64"),
        "interrupts": Region((size,), "int64"),
        "begun": Region((size,), "int64"),
        "stages": Region((size,), "int64"),
        "facts": Region((4, size, fact_bytes), "uint8", reserve=False),
        "rows": Region((sum(sizes.rows), sizes.width), "float32"),
        "common": Region((sizes.common_bytes,), "uint8"),
        "rooms": Region((size, ROOM), "uint8", reserve=False),
        "spare": Region((sizes.spare_bytes,), "uint8", reserve=False),
        "more_rows": Region((sum(_more(sizes)), sizes.width), "float32", reserve=False),
    }


def _more(sizes: Sizes) -> list[int]:
    """How many rows each rank may come to write beyond its first ones."""
    return [max(0, sizes.most_rows - rows) for rows in sizes.rows]


class Vacancies(Protocol):
    """Which ranks have died and are this one's to stand in for, as whoever started the ranks says."""

    def changes(self) -> int:
        """How often that has changed, for any rank."""

    def held(self) -> Collection[int]:
        """Those that are this one's, at present."""


class SharedMemoryGroup:
    """One rank of it. `descriptor` is of a file that was reserved for the `regions` of these sizes, all of it 0.

    There is no time limit: who waits is not at fault, and whoever started the ranks ends them all when one dies, or has
    another stand in for it, see `stand_in`. So PeerLost is raised only where `broken_off` says so.
    """

    def __init__(
        self,
        descriptor: int,
        sizes: Sizes,
        rank: int,
        waiting: Waiting = lambda flag: None,
        broken_off: BrokenOff = lambda: False,
    ):
        self.rank, self.size, self.levels = rank, len(sizes.rows), sizes.levels
        self._waiting, self._broken_off = waiting, broken_off
        arrays = attach(descriptor, regions(sizes))
        self._turns = arrays["turns"].view(np.int64)
        """[2, W] how often each rank came to a gather, before an interrupt and after it. Marks only rise."""
        self._interrupts = arrays["interrupts"].view(np.int64)
        """[W] how often each rank has interrupted the others."""
        self._begun = arrays["begun"].view(np.int64)
        """[W] how many pieces each rank has written, since it joined."""
        # Two of them by turns, since the last ones are still read; and two for what comes after an interrupt.
        self._facts = torch.from_numpy(arrays["facts"])
        first, more = iter(torch.from_numpy(arrays["rows"])), iter(torch.from_numpy(arrays["more_rows"]))
        self.of_each: list[list[Tensor]] = [
            [*islice(first, rows), *islice(more, others)] for rows, others in zip(sizes.rows, _more(sizes), strict=True)
        ]
        """By rank, all rows that it may write."""
        self.stages = arrays["stages"].view(np.int64)
        """[W] how far each rank says it is, in whatever words the ranks have for it; at first 0."""
        self._homes: list[Tensor] = [rows[0] for rows in self.of_each]
        self.rows = self.of_each[rank]
        self.arrange(sizes.rows)
        self.common = torch.from_numpy(arrays["common"])
        self.spare = torch.from_numpy(arrays["spare"])
        """[spare_bytes] uint8, as `common`, of pages that come when they are first written."""
        self._rooms = arrays["rooms"]
        self._turn, self._interrupted, self._pieces = 0, 0, 0
        self._vacancies: Vacancies | None = None
        self._part: Callable[[int, int | None], Fact | None] = lambda rank, length: None

    def stand_in(self, vacancies: Vacancies, part: Callable[[int, int | None], Fact | None]) -> None:
        """From now on, does the part of ranks that have died too, wherever this one waits for them.

        `part(rank, length)` does what such a rank lacks before the barrier at which this one is; its fact, if that is a
        gather; its bytes, if that is the first of what `share` does, or a later one: then it has said how many.
        """
        self._vacancies, self._part = vacancies, part

    def as_rank(self, rank: int, *, again: bool = False) -> SharedMemoryGroup:
        """The same memory as a rank that has died had it, for `exchange` and `assemble` alone. again: its last piece is
        written, and is exchanged once more.
        """
        other = copy.copy(self)
        other.rank, other.rows, other._vacancies = rank, self.of_each[rank], None
        other._pieces = int(self._begun[rank]) - again
        return other

    def sum_of(self, rank: int, piece: Piece) -> Tensor:
        """What a rank has assembled of a piece: it lies at the first rank, whether it is one for all or not."""
        return self._homes[0][piece[rank]]

    @property
    def place(self) -> tuple[int, int]:
        """How many gathers and pieces there were, for who takes the place of a rank between two steps."""
        return self._turn, self._pieces

    def take_place(self, turn: int, pieces: int) -> None:
        """Goes on where a rank was that has died."""
        self._turn, self._pieces = turn, pieces

    def gather(self, fact: Tensor) -> Tensor:
        return self._gather(fact, lambda rank: self._part(rank, None))

    def _gather(self, fact: Tensor, part: Callable[[int], Fact | None]) -> Tensor:
        self._turn += 1
        anew = min(self._interrupted, 1)
        facts, turns = self._facts[self._turn % 2 + 2 * anew], self._turns[anew]
        facts[self.rank, : fact.nbytes] = as_bytes(fact)
        mark(turns, self.rank, self._turn)
        self._wait(turns, self._turn, part, facts)
        return facts[:, : fact.nbytes].view(fact.dtype)

    def meet(self) -> None:
        self.gather(torch.empty(0))

    def arrange(self, rows: Sequence[int], sums: Sequence[int] = ()) -> None:
        self._all = [row for own, count in zip(self.of_each, rows, strict=True) for row in own[:count]]

    def expect(self, pieces: Sequence[Piece], *, shared: bool) -> None:
        pass

    def exchange(self, piece: Piece, sums: Sequence[Tensor] | None = None) -> Pending:
        self._pieces += 1
        mark(self._begun, self.rank, self._pieces)
        return _Rows(self, self._pieces, [row[piece[self.rank]] for row in self._all])

    def assemble(self, own: Tensor, piece: Piece, *, shared: bool) -> Pending:
        for home in self._homes[:1] if shared else self._homes:
            put(own, home[piece[self.rank]])
        return Views([self._homes[0 if shared else self.rank]])

    def share(self, blob: bytes, to: int | None = None) -> list[bytes]:
        others = dict[int, bytes]()  # of those that this one stands in for

        def of(rank: int, length: int | None = None) -> bytes:
            others[rank] = others[rank] if rank in others else bytes(self._part(rank, length) or b"")
            return others[rank]

        own = torch.tensor([len(blob)])
        lengths = self._gather(own, lambda rank: torch.tensor([len(of(rank))])).flatten().tolist()
        reads, found = to in (None, self.rank), [bytearray() for _ in lengths]
        for start in range(0, max(lengths), ROOM):
            self._put(self.rank, blob[start : start + ROOM])
            there = partial(lambda at, rank: self._put(rank, of(rank, lengths[rank])[at : at + ROOM]), start)
            self._gather(torch.empty(0), there)
            for rank, length in enumerate(lengths) if reads else ():
                found[rank] += self._rooms[rank, : max(0, length - start)].tobytes()
            self._gather(torch.empty(0), lambda rank: None)  # and read
        return [bytes(each) for each in found] if reads else []

    def _put(self, rank: int, part: bytes) -> None:
        self._rooms[rank, : len(part)] = np.frombuffer(part, np.uint8)

    def interrupt(self) -> None:
        self._interrupted += 1
        self._turn = 0  # the ranks have none in common
        self._interrupts[self.rank] = self._interrupted

    def close(self) -> None:
        self.rows, self._all, self._homes, self.of_each = [], [], [], []
        self.common = self.spare = self._facts = torch.empty(0)
        nothing = np.zeros(0, np.int64)
        self._turns = self._interrupts = self._begun = self._rooms = self.stages = nothing

    def _wait(
        self,
        marks: NDArray[np.int64],
        value: int,
        part: Callable[[int], Fact | None],
        facts: Tensor | None = None,
    ) -> None:
        came: bool | None = None
        while came is None:
            changes = self._do_others_parts(marks, value, part, facts)
            self._waiting(True)
            came = wait_for(marks, value, self._interrupts, self._interrupted + 1, partial(self._changed, changes))
            self._waiting(False)
            if came is None and self._broken_off():
                raise PeerLost(LEFT)
        if not came:
            raise PeerRaised("another worker has raised.")

    def _changed(self, since: int) -> bool:
        return self._changes() != since or self._broken_off()

    def _changes(self) -> int:
        return 0 if self._vacancies is None else self._vacancies.changes()

    def _do_others_parts(
        self, marks: NDArray[np.int64], value: int, part: Callable[[int], Fact | None], facts: Tensor | None
    ) -> int:
        """Of all that have died and are this rank's. The changes of the vacancies that it has seen."""
        changes = self._changes()
        if changes and self._vacancies is not None:
            for rank in sorted(self._vacancies.held()):
                if int(marks[rank]) < value:
                    fact = part(rank)
                    if facts is not None and isinstance(fact, Tensor):
                        facts[rank, : fact.nbytes] = as_bytes(fact)
                    mark(marks, rank, value)
        return changes


class _Rows:
    """A Pending of the rows of all: there once each rank has written its piece number `count`."""

    home = 0

    def __init__(self, group: SharedMemoryGroup, count: int, rows: list[Tensor]):
        self._group, self._count, self._rows = group, count, rows

    def ready(self) -> bool:
        return int(self._group._begun.min()) >= self._count

    def wait(self) -> list[Tensor]:
        self._group._wait(self._group._begun, self._count, lambda rank: self._group._part(rank, None))
        return self._rows
