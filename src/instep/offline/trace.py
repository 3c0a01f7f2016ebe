"""What a run on the virtual clock notes of its workers where somebody looks on, or where they may fail."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

from instep.clock.link import Link
from instep.clock.loop import Loop
from instep.rules.actions import Drop, Merge

OnEvent = Callable[[str, dict[str, Any]], None]
"""Called with an event's kind and its other fields, as they stand on a tape."""


class Notes:
    """What each worker has in hand, and where its next event waits. Lists by worker: [W].

    `on_event` gets what a tape would hold, if it is not None.
    """

    def __init__(self, workers: int, on_event: OnEvent | None):
        self._on_event = on_event
        self.piece, self._base = [-1] * workers, [0] * workers
        self.from_s, self.to_s = array("d", bytes(8 * workers)), array("d", bytes(8 * workers))
        self._holder: list[Loop | Link | None] = [None] * workers  # where the next event waits, and
        self._token = [0] * workers  # its name there

    def waits(self, worker: int, holder: Loop | Link, token: int) -> None:
        """The worker's next event waits there."""
        self._holder[worker], self._token[worker] = holder, token

    def arrived(self, worker: int) -> None:
        """What the worker sent is there, and safe whatever becomes of it."""
        self._holder[worker] = None

    def cancel(self, worker: int) -> None:
        """Takes back the worker's next event."""
        holder = self._holder[worker]
        if holder is not None:
            holder.cancel(self._token[worker])
            self._holder[worker] = None

    def joined(self, worker: int, t_s: float) -> None:
        """It is there."""
        self._tell("joined", t_s, worker=worker)

    def left(self, worker: int, t_s: float) -> None:
        """The server heard that it is gone."""
        self._tell("left", t_s, worker=worker, why="it failed")

    def released(self, worker: int, piece: int, version: int, t_s: float) -> None:
        """It has work."""
        self.piece[worker], self._base[worker] = piece, version
        self._tell("released", t_s, worker=worker, version=version, piece=piece)

    def computes(self, worker: int, from_s: float, to_s: float) -> None:
        """It computes, if nothing comes in between."""
        self.from_s[worker], self.to_s[worker] = from_s, to_s

    def pushed(self, worker: int, t_s: float, seq: int, items: int, size_bytes: int) -> None:
        """The server heard of its contribution."""
        if self._on_event is not None:
            where = {"worker": worker, "version": self._base[worker], "piece": self.piece[worker]}
            self._tell("computed", t_s, **where, from_s=self.from_s[worker], to_s=self.to_s[worker])
            self._tell("pushed", t_s, **where, seq=seq, items=items, bytes=size_bytes)

    def merged(self, action: Merge, t_s: float) -> None:
        """An update is made."""
        if self._on_event is not None:
            self._tell("merged", t_s, **action.facts())

    def dropped(self, action: Drop, t_s: float) -> None:
        """A contribution came too late."""
        if self._on_event is not None:
            self._tell("dropped", t_s, **action.contribution.facts(), why=action.why)

    def _tell(self, kind: str, t_s: float, **fields: Any) -> None:
        if self._on_event is not None:
            self._on_event(kind, {"t_s": t_s, "clock": "virtual", **fields})
