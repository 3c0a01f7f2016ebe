"""How far a worker in lockstep is with what it changes in place, so that whoever stands in for it can go on from there.

Such work is done in pieces. Before anything of a piece is changed, what lies there is copied, or what is to lie there
is ready, in memory that all share; then a mark says that the piece is begun, and one at its end that it is done.

That needs no fences. Nobody reads a worker's marks and copies before it has died, and its end is known only after all
that it has stored: what counts is that a process ends between two of its instructions, with what those before have
stored, and that these calls come one after the other. (Of threads that compute with it none is left at a mark.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from instep.reduce.layout import ALIGN_BYTES, padded

_WORKS = 1 << 32
"""More than twice the pieces of any work."""

_ENTRY = 3
"""Words on a span in a room, after one on how many there are."""


class SeatLost(Exception):
    """What a worker that died was `doing` cannot be done again in its place. `worker`: its rank in the group."""

    def __init__(self, worker: int, doing: str):
        super().__init__(f"worker {worker} died while {doing}")
        self.worker, self.doing = worker, doing


class SharedSpan(NamedTuple):
    """Bytes of what all share: `space` 0 is `Group.common`, and 1 what the ranks have to spare."""

    space: int
    start: int
    length: int


def room_of(spans: int, nbytes: int) -> int:
    """How many bytes it takes to keep so many spans, of `nbytes` in all."""
    return padded(8 * (1 + _ENTRY * spans)) + nbytes + ALIGN_BYTES * spans


class Undo:
    """The rooms and marks of so many workers, each with `room` bytes. `nbytes`: of all, at first 0."""

    def __init__(self, workers: int, room: int):
        self._workers, self._room = workers, padded(room)
        self.nbytes = workers * (self._room + ALIGN_BYTES)

    def attach(self, memory: Tensor, spaces: Sequence[Tensor]) -> None:
        """Takes the memory ([nbytes], uint8) into use, and what spans are of."""
        self._rooms = memory[: self._workers * self._room].view(self._workers, self._room)
        marks = memory[self._workers * self._room :][: self._workers * ALIGN_BYTES]
        self._marks = marks.numpy().view(np.int64).reshape(self._workers, -1)[:, :1]
        self._spaces = [space.numpy() for space in spaces]

    def track(self, worker: int, work: int) -> PiecesDone:
        """The pieces of a worker's present `work`, by whoever does it; its number is larger than that of any before."""
        return PiecesDone(self._marks[worker], self._rooms[worker], self._spaces, work)


class PiecesDone:
    """A `Tracked` that can also take back what was changed."""

    def __init__(self, mark: NDArray[np.int64], room: Tensor, spaces: Sequence[NDArray[np.uint8]], work: int):
        self._mark, self.room, self._spaces, self._work = mark, room, spaces, work * _WORKS
        of_work = int(mark[0]) - self._work
        self.done, self.begun = (of_work // 2, of_work % 2 == 1) if of_work > 0 else (0, False)

    def begin(self, piece: int) -> None:
        self._mark[0] = self._work + 2 * piece + 1

    def end(self, piece: int) -> None:
        self._mark[0] = self._work + 2 * piece + 2

    def keep(self, spans: Sequence[SharedSpan]) -> None:
        """Copies what lies there, before it is changed."""
        room = self.room.numpy()
        words = np.array([len(spans), *(word for span in spans for word in span)], np.int64)
        room[: words.nbytes] = words.view(np.uint8)
        at = padded(words.nbytes)
        for space, start, length in spans:
            room[at : at + length] = self._spaces[space][start : start + length]
            at = padded(at + length)

    def put_back(self) -> None:
        """Has all lie there again that `keep` has copied. It may be done again and again."""
        room = self.room.numpy()
        count = int(room[:8].view(np.int64)[0])
        words = room[8 : 8 + 8 * _ENTRY * count].view(np.int64).reshape(count, _ENTRY)
        at = padded(8 + words.nbytes)
        for space, start, length in words.tolist():
            self._spaces[space][start : start + length] = room[at : at + length]
            at = padded(at + length)
