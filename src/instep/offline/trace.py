"""What a run on the virtual clock notes of its workers where somebody looks on, or where they may fail."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from instep.clock.link import Link
from instep.clock.loop import Loop
from instep.record import events
from instep.rules.actions import Drop, Merge
from instep.rules.work import Pieces

OnEvent = Callable[[events.Event], None]


class Notes:
    """What each worker has in hand, and where its next event waits. Lists by worker: [W].

    `on_event` gets what a tape would hold, if it is not None.
    """

    def __init__(self, pieces: Pieces, on_event: OnEvent | None):
        workers = pieces.workers
        self._work, self._on_event = pieces.work, on_event
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
        if self._on_event is not None:
            self._on_event(events.JoinedEvent(t_s=t_s, clock="virtual", worker=worker))

    def left(self, worker: int, t_s: float) -> None:
        """The server heard that it is gone."""
        if self._on_event is not None:
            self._on_event(events.LeftEvent(t_s=t_s, clock="virtual", worker=worker, why="it failed"))

    def released(self, worker: int, piece: int, version: int, t_s: float) -> None:
        """It has work."""
        self.piece[worker], self._base[worker] = piece, version
        if self._on_event is not None:
            self._on_event(events.ReleasedEvent(t_s=t_s, clock="virtual", worker=worker, version=version, piece=piece))

    def computes(self, worker: int, from_s: float, to_s: float) -> None:
        """It computes, if nothing comes in between."""
        self.from_s[worker], self.to_s[worker] = from_s, to_s

    def pushed(self, worker: int, t_s: float, seq: int, items: int, size_bytes: int) -> None:
        """The server heard of its contribution."""
        if self._on_event is None:
            return
        piece, version = self.piece[worker], self._base[worker]
        _, batch, local_steps, start, stop = self._work(piece)
        covered = [start, stop]
        self._on_event(
            events.ComputedEvent(
                t_s=t_s, clock="virtual", worker=worker, version=version, piece=piece, from_s=self.from_s[worker],
                to_s=self.to_s[worker], batch=batch, local_steps=local_steps, microbatches=covered,
            )
        )  # fmt: skip
        self._on_event(
            events.PushedToServerEvent(
                t_s=t_s, clock="virtual", seq=seq, worker=worker, version=version, piece=piece, batch=batch,
                local_steps=local_steps, microbatches=covered, items=items, bytes=size_bytes,
            )
        )  # fmt: skip

    def merged(self, action: Merge, t_s: float) -> None:
        """An update is made."""
        if self._on_event is not None:
            merged = [
                events.MergedContribution(seq=seq, worker=worker, version=base, piece=piece, items=items)
                for seq, worker, piece, base, items in action.contributions
            ]
            self._on_event(
                events.MergedOnClockEvent(
                    t_s=t_s, clock="virtual", version=action.version, contributions=merged,
                    weights=list(action.weights), staleness=list(action.staleness),
                )
            )  # fmt: skip

    def dropped(self, action: Drop, t_s: float) -> None:
        """A contribution came too late."""
        if self._on_event is not None:
            seq, worker, piece, base, items = action.contribution
            self._on_event(
                events.DroppedEvent(
                    t_s=t_s, clock="virtual", seq=seq, worker=worker, piece=piece, version=base, items=items,
                    why=action.why,
                )
            )  # fmt: skip
