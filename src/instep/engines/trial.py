"""Whether gradients travel between machines early or late: what is faster there is found out by trying both.

Early they go in pieces while backward still computes others, and all are awaited from the step's beginning: that hides
a slow link. Late they go all at once when backward has ended: that is less to do, and so faster where a link is fast
beside the processors. No bit hangs on it.
"""

from __future__ import annotations

import statistics

TRIED = 12
"""Steps that a trial takes, by turns late and early."""

EVERY = 1000
"""Steps from one trial to the next: links change."""


class Trial:
    """Of one worker, by whose steps all go. The first step is late."""

    def __init__(self) -> None:
        self._step = 0  # that was told of last
        self._took_s: dict[bool, list[float]] = {False: [], True: []}
        self._early = False

    def ended(self, *, early: bool, took_s: float) -> None:
        """A step has taken so many seconds. Nothing is kept of those that are of no trial."""
        if 0 < self._step % EVERY < TRIED:
            self._took_s[early].append(took_s)

    def next(self) -> bool:
        """Whether the next step is to be early. It is told in the step before, whose own time is not known yet."""
        self._step += 1
        place = self._step % EVERY
        if place < TRIED:
            return place % 2 == 1
        if place == TRIED:
            late, early = (statistics.median(self._took_s[way]) for way in (False, True))
            self._early = early < late
            self._took_s = {False: [], True: []}
        return self._early
