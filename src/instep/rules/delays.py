"""Pieces that are given out again: how long they wait, and which of them updates wait for."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from typing import Any

from instep.rules.actions import Contribution


class Delays:
    """What a ledger knows of pieces that were given out and came back: dropped, or lost with their worker.

    One that was dropped came too late once. When it is given out again, from version `base`, no update above
    base + `limit` is made before it has arrived; so it is not too late again.
    """

    __slots__ = ("_awaited", "_first", "_late", "_limit", "longest")

    def __init__(self, limit: int | None):
        self._limit = limit
        self._first: dict[int, int] = {}  # by piece: the version it was given out at, at first
        self._late: dict[int, int] = {}  # those of them that were dropped as too old, and the worker that was too late
        self._awaited: dict[int, int] = {}  # by base: how many late ones are being computed from it
        self.longest = 0
        """The most versions that one of them was merged after the one it was first given out at."""

    def returned(self, piece: int, base: int) -> None:
        """A piece that was given out at version `base` is to be given out again."""
        self._first.setdefault(piece, base)

    def late(self, piece: int, worker: int) -> None:
        """What the worker made of it came too late to merge."""
        self._late[piece] = worker

    def late_by(self, piece: int) -> int:
        """The worker that was too late with a piece which is to be given out again; -1 if none was."""
        return self._late.get(piece, -1)

    def take_another(self, worker: int, returned: list[int], *, more: bool) -> int:
        """Takes the first piece out of `returned`, a heap, that the worker has not been too late with. Where there is
        none: -1 if there is `more` work than these, else the first.
        """
        too_late = list[int]()
        while returned and self.late_by(returned[0]) == worker:
            too_late.append(heapq.heappop(returned))
        piece = heapq.heappop(returned) if returned else -1 if more else too_late.pop(0)
        for each in too_late:
            heapq.heappush(returned, each)
        return piece

    def started(self, piece: int, base: int) -> None:
        """A worker computes a piece from version `base`."""
        if piece in self._late:
            self._awaited[base] = self._awaited.get(base, 0) + 1

    def stopped(self, piece: int, base: int) -> None:
        """It is there, or its worker is gone."""
        if piece in self._late:
            self._awaited[base] -= 1
            if not self._awaited[base]:
                del self._awaited[base]

    def hold(self, version: int) -> bool:
        """Whether the update after `version` waits: with it, a piece that is awaited would be too old."""
        return bool(self._awaited) and self._limit is not None and version - self._limit in self._awaited

    def merged(self, contributions: Iterable[Contribution], version: int) -> None:
        """These were merged into weights of `version`."""
        if not self._first:
            return
        for contribution in contributions:
            first = self._first.pop(contribution.piece, None)
            if first is not None:
                self._late.pop(contribution.piece, None)
                self.longest = max(self.longest, version - first)

    def nobody_computes(self) -> None:
        """All workers are gone."""
        self._awaited = {}

    def state(self) -> dict[str, Any]:
        """Plain values that JSON can hold; what is computed is not in it."""
        return {
            "first": [list(each) for each in sorted(self._first.items())],
            "late": [list(each) for each in sorted(self._late.items())],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` gave, before anything is started."""
        self._first, self._late = dict(state["first"]), dict(state["late"])
