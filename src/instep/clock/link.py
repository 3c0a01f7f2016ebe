"""A link that simultaneous transfers share equally."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from instep.clock.loop import Loop


class Link:
    """Processor sharing, exactly: each of n transfers under way gets an n-th of the bandwidth.

    Virtual finish times (as in fair queueing: Demers, Keshav and Shenker, SIGCOMM 1989) make that O(log n) a transfer.
    `_served` is how many bytes a transfer has got that was there from the beginning of the present busy period; one
    that starts at `_served` = v with b bytes is over when `_served` reaches v + b, whoever else comes or goes.

    `done(argument)` is called when all bytes of a transfer have passed.
    """

    __slots__ = (
        "_count", "_done", "_exact", "_gone", "_heap", "_loop", "_number", "_rate", "_seen_s", "_served", "_wake",
    )  # fmt: skip

    def __init__(self, loop: Loop, bandwidth_bytes_per_s: float, done: Callable[[Any], None]):
        self._loop, self._rate, self._done = loop, bandwidth_bytes_per_s, done
        self._heap: list[tuple[float, int, Any]] = []  # by the value of `_served` at their end
        self._number = 0  # how many are under way
        self._served = 0.0
        self._seen_s = 0.0  # the time that `_served` belongs to
        self._gone: set[int] = set()
        self._count = 0
        self._wake = 0  # the call asked of the loop, 0 for none
        self._exact = False  # whether that call comes exactly when the next transfer ends, or may come too early

    def send(self, size_bytes: float, argument: Any) -> int:
        """Starts a transfer. What comes back names it for `cancel`."""
        now_s = self._loop.now_s
        if self._number:
            self._served += (now_s - self._seen_s) * self._rate / self._number
        else:
            self._served = 0.0
        self._seen_s = now_s
        end = self._served + size_bytes
        self._count = count = self._count + 1
        first = not self._number or end < self._heap[0][0]
        heappush(self._heap, (end, count, argument))
        self._number += 1
        if first:
            self._ask()
        else:
            self._exact = False  # with one more to share with, the next end is later: look again at the wake
        return count

    def cancel(self, token: int) -> None:
        """Breaks off a transfer that is under way; the others get its share."""
        now_s = self._loop.now_s
        self._served += (now_s - self._seen_s) * self._rate / self._number
        self._seen_s = now_s
        self._gone.add(token)
        self._number -= 1
        self._forget()
        self._ask()

    def _forget(self) -> None:
        """Takes broken off transfers from the head of the heap."""
        while self._gone and self._heap and self._heap[0][1] in self._gone:
            self._gone.remove(heappop(self._heap)[1])

    def _ask(self) -> None:
        """Has the loop wake the link when the next transfer ends, if none starts before."""
        if self._wake:
            self._loop.cancel(self._wake)
            self._wake = 0
        if self._number:
            left_s = max(0.0, self._heap[0][0] - self._served) * self._number / self._rate
            self._wake = self._loop.at(self._loop.now_s + left_s, self._look, None)
            self._exact = True

    def _look(self, _: None) -> None:
        """Ends the transfers that are over."""
        self._wake = 0
        now_s, heap = self._loop.now_s, self._heap
        if self._exact:
            self._served = heap[0][0]  # without the rounding
        else:
            self._served += (now_s - self._seen_s) * self._rate / self._number
        self._seen_s = now_s
        over: list[Any] = []
        while heap and heap[0][0] <= self._served:
            over.append(heappop(heap)[2])
            self._number -= 1
            if self._gone:
                self._forget()
        self._ask()
        for argument in over:
            self._done(argument)
