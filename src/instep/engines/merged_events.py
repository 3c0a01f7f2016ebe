"""What the tape tells of the updates of a team in lockstep."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from instep.record.events import Event, MergedContribution, MergedEvent, WarnedEvent
from instep.reduce.tree import Node
from instep.worker.updates import Update

REMEMBERED = 1000
"""Updates at most that a worker remembers."""


class MergedEvents:
    """remembered: how many of the last updates can be told of again. `emit(event)` writes to the tape; `clock()` is
    seconds since the run's start.
    """

    def __init__(self, remembered: int, emit: Callable[[Event], None], clock: Callable[[], float]):
        self._emit, self._clock = emit, clock
        self._told = 0  # up to which version
        self._last: deque[tuple[tuple[int, Update, Sequence[Node], float], float]]
        self._last = deque(maxlen=min(remembered, REMEMBERED))

    def tell(self, step: int, update: Update, ranges: Sequence[Node], train_s: float) -> None:
        """Tells of an update, see `of`, and of what is to be said of it."""
        if why := update.verdict.why:
            self._emit(WarnedEvent(why=why, version=step + 1))
        self._emit(self.of(step, update, ranges, train_s))
        for why in update.doubts:
            self._emit(WarnedEvent(why=why, version=step + 1))
        self._told = step + 1

    def of(self, step: int, update: Update, ranges: Sequence[Node], train_s: float) -> MergedEvent:
        """The event of an update from version `step`. ranges: the microbatches of each worker."""
        contributions = [
            MergedContribution(worker=worker, version=step, microbatches=[start, stop])
            for worker, (start, stop) in enumerate(ranges)
            if start < stop
        ]
        return MergedEvent(
            version=step + 1, step=step + 1, contributions=contributions, weights=[1.0] * len(contributions),
            staleness=[0] * len(contributions), train_s=round(train_s, 6), **update.facts(),
        )  # fmt: skip

    def remember(self, step: int, update: Update, ranges: Sequence[Node], train_s: float) -> None:
        """Keeps what another tells; it is cheap, for no event is made of it yet."""
        self._last.append(((step, update, ranges, train_s), self._clock()))

    def catch_up(self, version: int) -> None:
        """Tells, in the place of another, of those of the last updates that came after `version` and were not told."""
        for update, _ in self._last:
            if update[0] >= max(version, self._told):
                self.tell(*update)

    def remembered(self) -> list[MergedEvent]:
        """The events of the last updates, in order."""
        return [replace(self.of(*update), t_s=t_s) for update, t_s in self._last]
