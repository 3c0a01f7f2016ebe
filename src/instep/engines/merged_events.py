"""What the tape tells of the updates of a team in lockstep."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from msgspec.structs import replace

from instep.record.events import MergedContribution, MergedEvent
from instep.reduce.tree import Node
from instep.worker.updates import Update

REMEMBERED = 1000
"""Updates at most that a worker remembers."""


class MergedEvents:
    """ranges: the microbatches of each worker. remembered: how many of the last updates can be told of again."""

    def __init__(self, ranges: Sequence[Node], remembered: int):
        self._ranges = ranges
        self._last: deque[tuple[int, Update, float, float]] = deque(maxlen=min(remembered, REMEMBERED))

    def of(self, step: int, update: Update, train_s: float) -> MergedEvent:
        """The event of an update from version `step`."""
        contributions = [
            MergedContribution(worker=worker, version=step, microbatches=list(bounds))
            for worker, bounds in enumerate(self._ranges)
        ]
        return MergedEvent(
            version=step + 1, step=step + 1, contributions=contributions, weights=[1.0] * len(self._ranges),
            staleness=[0] * len(self._ranges), train_s=round(train_s, 6), **update.facts(),
        )  # fmt: skip

    def remember(self, step: int, update: Update, train_s: float, t_s: float) -> None:
        """Keeps what was not told, of the run's time `t_s`; it is cheap, for no event is made of it yet."""
        self._last.append((step, update, train_s, t_s))

    def remembered(self) -> list[MergedEvent]:
        """The events of the last updates, in order."""
        return [replace(self.of(step, update, train_s), t_s=t_s) for step, update, train_s, t_s in self._last]
