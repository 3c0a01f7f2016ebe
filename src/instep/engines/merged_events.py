"""What the tape tells of the updates of a team in lockstep."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from instep.record.event_kinds import RangesMovedEvent
from instep.record.events import ChecksummedEvent, Event, MergedContribution, MergedEvent, WarnedEvent
from instep.reduce.tree import Node
from instep.worker.updates import Update

REMEMBERED = 1000
"""Updates at most that a worker remembers."""

HANDED_S = 2.0
"""Seconds for which the tape may not tell of updates, and two at least it may not: events are sent after a tenth of a
second, but no sooner than after the next step."""

_Ranges = Sequence[tuple[int, Node]]
"""The microbatches of each worker, after its number."""

_Kept = tuple[tuple[int, Update, _Ranges, float], float]
"""As `MergedEvents.of` takes them, and when they were made."""

_Said = RangesMovedEvent | ChecksummedEvent
"""What is told besides, of the versions between updates."""


Last = tuple[list[_Kept], list[_Said]]
"""The last updates, and what is told besides."""


class MergedEvents:
    """remembered: how many of the last updates can be told of again. `emit(event)` writes to the tape; `clock()` is
    seconds since the run's start. numbers: of the workers on the tape, in the order of ranges.
    """

    def __init__(
        self, remembered: int, emit: Callable[[Event], None], clock: Callable[[], float], numbers: Sequence[int]
    ):
        self._emit, self._clock, self._numbers = emit, clock, numbers
        self._known: tuple[Sequence[Node], _Ranges] = (), ()
        self._told = 0  # up to which version
        self._last: deque[_Kept] = deque(maxlen=remembered)
        self._said: deque[_Said] = deque(maxlen=remembered)

    def made(self, step: int, update: Update, ranges: Sequence[Node], train_s: float, *, tell: bool) -> None:
        """Keeps an update, which is cheap, for no event is made of it yet; or, with `tell`, tells of it."""
        if self._known[0] is not ranges:
            self._known = ranges, list(zip(self._numbers, ranges, strict=True))
        self._last.append(((step, update, self._known[1], train_s), self._clock()))
        if tell:
            self.tell(step, update, self._known[1], train_s)

    def renumber(self, numbers: Sequence[int]) -> None:
        """From the next update on, ranges are of these workers."""
        self._numbers, self._known = numbers, ((), ())

    def say(self, event: _Said, *, tell: bool) -> None:
        """Keeps what is told besides; or, with `tell`, tells it."""
        if tell:
            self._emit(event)
        else:
            self._said.append(event)

    def tell(self, step: int, update: Update, ranges: _Ranges, train_s: float) -> None:
        """Tells of an update, see `of`, and of what is to be said of it; not again: it came to the same."""
        if step < self._told:
            return
        if why := update.verdict.why:
            self._emit(WarnedEvent(why=why, version=step + 1))
        self._emit(self.of(step, update, ranges, train_s))
        for why in update.doubts:
            self._emit(WarnedEvent(why=why, version=step + 1))
        self._told = step + 1

    def of(self, step: int, update: Update, ranges: _Ranges, train_s: float) -> MergedEvent:
        """The event of an update from version `step`."""
        contributions = [
            MergedContribution(worker=worker, version=step, microbatches=[start, stop])
            for worker, (start, stop) in ranges
            if start < stop
        ]
        return MergedEvent(
            version=step + 1, step=step + 1, contributions=contributions, weights=[1.0] * len(contributions),
            staleness=[0] * len(contributions), train_s=round(train_s, 6), **update.facts(),
        )  # fmt: skip

    def catch_up(self, version: int, more: Sequence[MergedEvent] = ()) -> None:
        """Tells, in the place of another, of those of the last updates that came after `version` and were not told, and
        what was said since. more: of updates that others remember.
        """
        self._said = deque((event for event in self._said if event.version >= version), self._said.maxlen)
        for update, _ in list(self._last):
            if update[0] >= max(version, self._told):
                self._say_until(update[0])
                self.tell(*update)
        for event in more:
            if event.version > max(version, self._told):
                self._emit(event)
                self._told = event.version
        self._say_until(max(self._told, version))

    def _say_until(self, version: int) -> None:
        while self._said and self._said[0].version <= version:
            self._emit(self._said.popleft())

    def last(self) -> Last:
        """Those of the last updates that the tape may not tell of yet, and what was said between them."""
        last, since_s = list(self._last), self._clock() - HANDED_S
        last = [each for place, each in enumerate(last, 2 - len(last)) if place >= 0 or each[1] >= since_s]
        return last, [event for event in self._said if last and event.version >= last[0][0][0]]

    def take(self, last: Last) -> None:
        """Remembers them too, which others have made."""
        self._last.extend(last[0])
        self._said.extend(last[1])

    def remembered(self) -> list[MergedEvent]:
        """The events of the last updates, in order."""
        return [replace(self.of(*update), t_s=t_s) for update, t_s in self._last]
