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
    """remembered: how many of the last updates can be told of again."""

    def __init__(self, remembered: int):
        self._last: deque[tuple[tuple[int, Update, Sequence[Node], float], float]]
        self._last = deque(maxlen=min(remembered, REMEMBERED))

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

    def remember(self, step: int, update: Update, ranges: Sequence[Node], train_s: float, t_s: float) -> None:
        """Keeps what was not told, of the run's time `t_s`; it is cheap, for no event is made of it yet."""
        self._last.append(((step, update, ranges, train_s), t_s))

    def remembered(self) -> list[MergedEvent]:
        """The events of the last updates, in order."""
        return [replace(self.of(*update), t_s=t_s) for update, t_s in self._last]
