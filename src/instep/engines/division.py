"""Who computes which microbatches of a step in lockstep, as it follows the workers' speed from step to step.

The ranges of a step are known when its samples are loaded, in the step before, and so come of what the step before that
took. All workers decide them alike, from numbers that they tell each other anyway.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from instep.clock.network import gather_bytes, reduce_bytes
from instep.engines.balance import Balance, ranges_of
from instep.reduce.reduction import Reduction
from instep.reduce.tree import Node, maximal_nodes

KEPT = 8
"""Reductions that are remembered, since ranges that were left are often taken again."""


Ways = tuple[Reduction, Reduction | None]


def most_nodes(microbatches: int) -> int:
    """How many nodes of the tree a range has at most: two of each size, and no more than there are microbatches."""
    return min(microbatches, max(1, 2 * ((microbatches - 1).bit_length() - 1)))


class Division:
    """Whose microbatches are which: at first as in `first`. early: the same for gradients that travel early, None where
    none do. machines: how many workers each has. What moves stays on its machine.
    """

    def __init__(self, first: Reduction, early: Reduction | None, machines: Sequence[int]):
        self.ways: Ways = first, early
        """Of the present step, for gradients that travel late, and early."""
        self.seconds: list[float] = []
        """What a microbatch was taken to need at each worker when that was decided; empty where nothing was."""
        self._next: tuple[Ways, list[float]] = self.ways, []
        self._later, self._first, self._machines = self._next, self.ways, machines
        self._known = {tuple(first.ranges): self.ways}
        self._balances: list[Balance] = []
        self._counts = [stop - start for start, stop in first.ranges]
        self.moved = False
        """Whether ranges have moved in the present step, to follow the workers' speed."""
        self.moves = 0
        """How often ranges have moved."""
        self.bytes_sent = 0
        """That have passed between the workers, see `count`."""

    @property
    def now(self) -> Reduction:
        """Of the present step."""
        return self.ways[0]

    @property
    def next(self) -> Reduction:
        """Of the step after the present one."""
        return self._next[0][0]

    def beside(self, worker: int) -> range:
        """The microbatches of all workers of its machine, whichever of them has which."""
        start = 0
        for workers in self._machines:
            if worker < start + workers:
                break
            start += workers
        here = self._first[0].ranges[start : start + workers]
        return range(here[0][0], here[-1][1])

    def follow(self, rows: Sequence[int]) -> None:
        """Has the ranges follow the workers' speed. rows: for how many nodes each has memory."""
        start = 0
        for workers in self._machines:
            here = self._first[0].ranges[start : start + workers]
            fits = partial(self._fits, here[0][0], rows[start : start + workers])
            self._balances.append(Balance([stop - start for start, stop in here], fits))
            start += workers

    def once(self, ranges: Sequence[Node]) -> None:
        """Has the first step have these ranges alone."""
        self.ways = self.now.with_ranges(ranges), None
        self._next = self.ways, []

    def begin(self) -> bool:
        """The next step begins. Whether its ranges are others than those of the last one."""
        before, (self.ways, self.seconds), self._next = self.ways, self._next, self._later
        self.moved = self.ways is not before and bool(self.seconds)
        self.moves += self.moved
        return self.ways is not before

    def decide(self, seconds: Sequence[float]) -> None:
        """Decides the ranges of the step after the next, where each worker took so many seconds for a microbatch of
        this one; 0 where that is not known.
        """
        counts, start = list[int](), 0
        for workers, balance in zip(self._machines, self._balances, strict=True) if self._balances else ():
            counts += balance.decide(seconds[start : start + workers])
            start += workers
        if counts and counts != self._counts:
            self._counts = counts
            self._later = self._of(ranges_of(counts)), [s for balance in self._balances for s in balance.seconds]

    def count(self, size: int) -> None:
        """Counts the bytes of the present step, for a gradient of so many elements: a reduce-scatter of all nodes, and
        an all-gather.

        With one node a worker it is ``2 (W - 1)`` times the gradient, as with a ring all-reduce. The all-gather is of
        the sum or, where they are shared, of the weights.
        """
        workers = self.now.workers
        self.bytes_sent += reduce_bytes(workers, 4 * size, len(self.now.nodes)) + gather_bytes(workers, 4 * size)

    def told(self) -> dict[str, Any]:
        """What `result.json` says of it; nothing where no range may move."""
        return {"moves": self.moves, "ranges": [list(each) for each in self.now.ranges]} if self._balances else {}

    def _of(self, ranges: Sequence[Node]) -> Ways:
        key, (late, early) = tuple(ranges), self._first
        found = self._known.pop(key, None) or (late.with_ranges(ranges), early and early.with_ranges(ranges))
        self._known[key] = found
        if len(self._known) > KEPT:
            del self._known[next(iter(self._known))]
        return found

    def _fits(self, first: int, rows: Sequence[int], counts: Sequence[int]) -> bool:
        ranges = [(first + start, first + stop) for start, stop in ranges_of(counts)]
        nodes = [maximal_nodes(*bounds, self.now.microbatches) for bounds in ranges]
        return all(len(own) <= most for own, most in zip(nodes, rows, strict=True))


class Stopwatch:
    """Measures what a microbatch takes. `advance` is called after each; then so is the one given."""

    def __init__(self, advance: Callable[[], None]):
        self._advance = advance
        self.begin()

    def begin(self) -> None:
        """A step begins."""
        self._ends_s = [time.monotonic()]

    def advance(self) -> None:
        """A microbatch is done."""
        self._ends_s.append(time.monotonic())
        self._advance()

    def seconds(self, filled: Collection[bool]) -> float:
        """Of a microbatch of this step, the median of those with samples (`filled`); 0 where there are none.

        The median, since a system gives other processes a turn now and then, and that is no slowness of a worker.
        """
        ends = zip(filled, self._ends_s[:-1], self._ends_s[1:], strict=False)
        taken = [after - before for has_samples, before, after in ends if has_samples]
        return statistics.median(taken) if taken else 0.0
