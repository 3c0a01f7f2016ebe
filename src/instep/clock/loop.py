"""The event loop: what happens next in virtual time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import Any


class Loop:
    """Calls in order of virtual time; of those at one time, the one asked for first comes first."""

    __slots__ = ("_cancelled", "_count", "_heap", "_stopped", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        """Seconds since the start."""
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._count = 0  # breaks ties, and names a call
        self._cancelled: set[int] = set()
        self._stopped = False

    def at(self, time_s: float, call: Callable[[Any], None], argument: Any) -> int:
        """Asks for ``call(argument)`` at `time_s`, now or later. What comes back names it for `cancel`."""
        self._count = count = self._count + 1
        heappush(self._heap, (time_s, count, call, argument))
        return count

    def cancel(self, token: int) -> None:
        """Takes back a call that has not happened yet."""
        self._cancelled.add(token)

    def stop(self) -> None:
        """Lets `run` return after the present call."""
        self._stopped = True

    def run(self) -> None:
        """Makes the calls, with the time set to theirs, until none is left or one of them stops the loop."""
        heap, cancelled = self._heap, self._cancelled
        self._stopped = False
        while heap and not self._stopped:
            time_s, count, call, argument = heappop(heap)
            if cancelled and count in cancelled:
                cancelled.remove(count)
                continue
            self.now_s = time_s
            call(argument)


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
