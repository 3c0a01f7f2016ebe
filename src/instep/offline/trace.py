"""What a run on the virtual clock notes of its workers where somebody looks on, or where they may fail."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from msgspec import UNSET

from instep.clock.link import Link
from instep.clock.loop import Loop
from instep.record import events
from instep.record.blocks import BlockTape
from instep.record.event_kinds import GraceEndedEvent
from instep.rules.actions import Drop, Merge
from instep.rules.work import Pieces


class EventListener:
    """Makes an event of all that a tape would hold, and hands it to `on_event`."""

    def __init__(self, pieces: Pieces, on_event: Callable[[events.Event], None]):
        self._work, self._on_event = pieces.work, on_event

    def joined(self, t_s: float, worker: int) -> None:
        self._on_event(events.JoinedEvent(t_s=t_s, clock="virtual", worker=worker))

    def left(self, t_s: float, worker: int, why: str) -> None:
        self._on_event(events.LeftEvent(t_s=t_s, clock="virtual", worker=worker, why=why))

    def released(self, t_s: float, worker: int, version: int, piece: int) -> None:
        self._on_event(events.ReleasedEvent(t_s=t_s, clock="virtual", worker=worker, version=version, piece=piece))

    def pushed(
        self, t_s: float, worker: int, version: int, piece: int, from_s: float, to_s: float, seq: int, items: int,
        size_bytes: int, ahead: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        covers = self._work(piece).covers()
        self._on_event(
            events.ComputedEvent(
                t_s=t_s, clock="virtual", worker=worker, version=version, piece=piece, from_s=from_s, to_s=to_s,
                ahead=UNSET if ahead is None else list(ahead), **covers,
            )
        )  # fmt: skip
        self._on_event(
            events.PushedToServerEvent(
                t_s=t_s, clock="virtual", seq=seq, worker=worker, version=version, piece=piece, items=items,
                bytes=size_bytes, **covers,
            )
        )  # fmt: skip

    def merged(self, t_s: float, action: Merge) -> None:
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

    def dropped(self, t_s: float, action: Drop) -> None:
        seq, worker, piece, base, items = action.contribution
        self._on_event(
            events.DroppedEvent(
                t_s=t_s, clock="virtual", seq=seq, worker=worker, piece=piece, version=base, items=items,
                why=action.why,
            )
        )  # fmt: skip

    def grace_ended(self, t_s: float, version: int, waiting: int) -> None:
        self._on_event(GraceEndedEvent(t_s=t_s, clock="virtual", version=version, waiting=waiting))


Listener = EventListener | BlockTape
"""Who hears of what a tape would hold, in its order, by the same methods."""


class Notes:
    """What each worker has in hand, and where its next event waits. Lists by worker: [W].

    `listener` hears of it, if it is not None.
    """

    def __init__(self, workers: int, listener: Listener | None):
        self.listener = listener
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

    def released(self, worker: int, piece: int, version: int, t_s: float) -> None:
        """It has work."""
        self.piece[worker], self._base[worker] = piece, version
        if self.listener is not None:
            self.listener.released(t_s, worker, version, piece)

    def computes(self, worker: int, from_s: float, to_s: float) -> None:
        """It computes, if nothing comes in between."""
        self.from_s[worker], self.to_s[worker] = from_s, to_s

    def pushed(
        self, worker: int, t_s: float, seq: int, items: int, size_bytes: int, ahead: tuple[float, float] | None
    ) -> None:  # fmt: skip
        """The server heard of its contribution."""
        if self.listener is not None:
            self.listener.pushed(
                t_s, worker, self._base[worker], self.piece[worker], self.from_s[worker], self.to_s[worker], seq,
                items, size_bytes, ahead,
            )  # fmt: skip
