"""The event loop: what happens next in virtual time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import Any

_CALLS = 16
"""Calls that a span of the calendar is to hold, about."""

_LOOK = 4096
"""Calls after which the length of spans is looked at anew."""

_Call = tuple[float, int, Callable[[Any], None], Any]


class Loop:
    """Calls in order of virtual time; of those at one time, the one asked for first comes first.

    A calendar (Brown 1988): calls lie unsorted in spans of time, and a span becomes a heap when its time comes. With
    10,000 workers this takes a third of the time that one heap of all calls takes, most of whose steps miss the cache.
    """

    __slots__ = (
        "_cancelled", "_count", "_later", "_new", "_now", "_span", "_spans", "_spans_per_s", "_stopped", "now_s",
    )  # fmt: skip

    def __init__(self) -> None:
        self.now_s = 0.0
        """Seconds since the start."""
        self._now: list[_Call] = []  # the calls of the present span, the first one last
        self._new: list[_Call] = []  # a heap: those that were asked for since it began
        self._later: dict[int, list[_Call]] = {}
        self._spans: list[int] = []  # a heap: the keys of `_later`
        self._span = -1
        self._spans_per_s = 1.0
        self._count = 0  # breaks ties, and names a call
        self._cancelled: set[int] = set()
        self._stopped = False

    def at(self, time_s: float, call: Callable[[Any], None], argument: Any) -> int:
        """Asks for ``call(argument)`` at `time_s`, now or later. What comes back names it for `cancel`."""
        self._count = count = self._count + 1
        self._put((time_s, count, call, argument))
        return count

    def cancel(self, token: int) -> None:
        """Takes back a call that has not happened yet."""
        self._cancelled.add(token)

    def stop(self) -> None:
        """Lets `run` return after the present call."""
        self._stopped = True

    def run(self) -> None:
        """Makes the calls, with the time set to theirs, until none is left or one of them stops the loop."""
        self._stopped = False
        while (self._now or self._new or self._spans) and not self._stopped:
            from_s = self.now_s
            self._some(_LOOK)
            if self.now_s > from_s:
                self._fit(_LOOK / (self.now_s - from_s) / _CALLS)

    def _some(self, calls: int) -> None:
        """Makes so many calls, or all."""
        now, new, cancelled = self._now, self._new, self._cancelled
        for _ in range(calls):
            if new and (not now or new[0] < now[-1]):
                time_s, count, call, argument = heappop(new)
            elif now:
                time_s, count, call, argument = now.pop()
            elif self._spans:
                self._span = heappop(self._spans)
                self._now = now = self._later.pop(self._span)
                now.sort(reverse=True)
                time_s, count, call, argument = now.pop()
            else:
                return
            if cancelled and count in cancelled:
                cancelled.remove(count)
                continue
            self.now_s = time_s
            call(argument)
            if self._stopped:
                return

    def _put(self, call: _Call) -> None:
        span = int(call[0] * self._spans_per_s)
        if span <= self._span:
            heappush(self._new, call)
        elif span in self._later:
            self._later[span].append(call)
        else:
            self._later[span] = [call]
            heappush(self._spans, span)

    def _fit(self, spans_per_s: float) -> None:
        """Lays the calendar out anew where its spans are far too long or too short."""
        if 0.25 < self._spans_per_s / spans_per_s < 4:
            return
        calls = [*self._now, *self._new, *(call for span in self._later.values() for call in span)]
        self._now, self._new, self._later, self._spans = [], [], {}, []
        self._span, self._spans_per_s = int(self.now_s * spans_per_s), spans_per_s
        for call in calls:
            self._put(call)


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's search for garbage in cycles: where there is none, it takes a quarter of a large run's time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
