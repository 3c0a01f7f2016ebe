"""How many of a step's microbatches each worker of a machine is to compute, so that all have done soonest. No torch.

It is decided from the seconds that a microbatch took each of them, which all workers know alike, by sums, products and
comparisons alone, so that all decide the same. Bits don't depend on it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

FIRST_STEPS = 10
"""Steps at the start in which nothing moves: what is computed for the first time takes as long as it likes."""

SHARE = 0.05
"""Of a step's seconds in the estimate, once that is of many."""

JUMP = 2.0
"""A worker that became so many times slower or faster is believed at once."""

MOST = 16.0
"""Times that an estimate changes at most in one step: a process that was halted is no slow one."""

GAIN, GAIN_S = 0.05, 0.002
"""Of a step's seconds, and in seconds: what moving must promise."""

STEADY_STEPS = 10
"""Steps in a row in which it must, where no worker's seconds jumped."""

BACK_STEPS, CALM_STEPS, MOST_DOUBTS = 10, 100, 32
"""Two jumps within so many steps were noise: from then on twice as many steps in a row must say so, at most so many;
half as many again after so many steps without any."""

LOOK_STEPS, LOOK_SHARE = 50, 0.01
"""Steps at least between two looks at a worker that computes nothing, and which share of the time they may take."""


def soonest(seconds: Sequence[float], microbatches: int, least: Sequence[int] = ()) -> list[int]:
    """How many of the microbatches each worker takes, of which each takes it so many seconds, so that the last one is
    done as early as whole microbatches allow. least: what each takes at least.

    >>> soonest([1.0, 4.0], 16), soonest([1.0, 40.0], 16), soonest([1.0, 1.0, 1.0], 8)
    ([13, 3], [16, 0], [3, 3, 2])
    """
    counts = list(least) or [0] * len(seconds)
    ends = [((count + 1) * each, worker) for worker, (count, each) in enumerate(zip(counts, seconds, strict=True))]
    heapq.heapify(ends)
    for _ in range(microbatches - sum(counts)):  # the next one to whoever would be done with it first
        worker = ends[0][1]
        counts[worker] += 1
        heapq.heapreplace(ends, ((counts[worker] + 1) * seconds[worker], worker))
    return counts


def ranges_of(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbours of these sizes, (start, stop).

    >>> ranges_of([13, 3])
    [(0, 13), (13, 16)]
    """
    return list(pairwise(accumulate(counts, initial=0)))


class Balance:
    """Of the workers of one machine, which take these `counts` at first. fits: whether there is memory for others."""

    def __init__(self, counts: Sequence[int], fits: Callable[[Sequence[int]], bool] = lambda counts: True):
        self._counts, self._fits = list(counts), fits
        self.seconds = [0.0] * len(counts)
        """What a microbatch is taken to need at each; 0 where that is not known yet."""
        self._age = 0  # steps in the estimate since it was begun anew
        self._steps = 0  # that were measured
        self._steady = 0
        self._unseen = [0] * len(counts)  # steps since each worker computed anything
        self._doubts, self._needed, self._calm = 0, 1, BACK_STEPS

    def decide(self, seconds: Sequence[float]) -> list[int]:
        """How many microbatches each takes in the next step that can be decided of, after one in which each of them
        took so many seconds; 0 where it computed none.
        """
        if any(seconds) and len(seconds) > 1:
            self._steps += 1
            jumped = self._learn(seconds)
            self._unseen = [0 if s else unseen + 1 for s, unseen in zip(seconds, self._unseen, strict=True)]
            if self._steps > FIRST_STEPS and all(self.seconds):
                self._move(at_once=jumped or self._steps == FIRST_STEPS + 1)
                return self._with_a_look()
        return self._counts

    def _learn(self, seconds: Sequence[float]) -> bool:
        """Takes a step's seconds into the estimate; whether they are so different that they replace it."""
        known = [worker for worker, taken in enumerate(seconds) if taken]
        looked, doubtful = False, False
        for worker in known:
            before, now = self.seconds[worker], seconds[worker]
            if not before:
                self.seconds[worker] = now
            elif not self._counts[worker]:  # a look, of which there are few: what was slow by chance is seen again soon
                self.seconds[worker], looked = min(now, JUMP * before), True
            elif _jumps(now, before):
                doubtful = True
        self._doubts = self._doubts + 1 if doubtful else 0
        jumped = self._doubts >= self._needed
        self._mind(jumped, doubtful)
        self._age = 1 if jumped else self._age + 1
        share = 1.0 if jumped else max(SHARE, 1 / self._age)
        for worker in known:
            before, now = self.seconds[worker], _bounded(seconds[worker], self.seconds[worker])
            if jumped or not _jumps(now, before):
                self.seconds[worker] += share * (now - before)
        return jumped or looked

    def _mind(self, jumped: bool, doubtful: bool) -> None:
        """Believes jumps later where they come and go."""
        if jumped and self._steps > FIRST_STEPS + 1:
            if self._calm < BACK_STEPS:
                self._needed = min(2 * self._needed, MOST_DOUBTS)
            self._calm, self._doubts = 0, 0
        elif not doubtful:
            self._calm += 1
            if self._calm % CALM_STEPS == 0:
                self._needed = max(1, self._needed // 2)

    def _move(self, *, at_once: bool) -> None:
        """Takes other counts where they promise enough."""
        now_s = self._end_s(self._counts)
        enough_s = now_s - max(GAIN * now_s, GAIN_S)
        promising, best = False, self._counts
        if sum(self._counts) < enough_s * sum([1 / each for each in self.seconds]):  # else not even parts of them would
            best = soonest(self.seconds, sum(self._counts))
            promising = self._end_s(best) < enough_s
        self._steady = self._steady + 1 if promising else 0
        if promising and (at_once or self._steady >= STEADY_STEPS) and self._fits(best):
            self._counts, self._steady = best, 0

    def _with_a_look(self) -> list[int]:
        """The counts, or for one step such that somebody who computes nothing takes one microbatch."""
        if all(self._counts):
            return self._counts
        looks, end_s = [0] * len(self._counts), self._end_s(self._counts)
        for worker, count in enumerate(self._counts):
            wait = max(LOOK_STEPS, (self.seconds[worker] - end_s) / (LOOK_SHARE * end_s))
            if not count and self._unseen[worker] >= wait:
                looks[worker], self._unseen[worker] = 1, 0
        looked = soonest(self.seconds, sum(self._counts), looks) if any(looks) else self._counts
        return looked if self._fits(looked) else self._counts

    def _end_s(self, counts: Sequence[int]) -> float:
        return max([count * seconds for count, seconds in zip(counts, self.seconds, strict=True)])


def _jumps(now: float, before: float) -> bool:
    return now > JUMP * before or before > JUMP * now


def _bounded(now: float, before: float) -> float:
    return min(max(now, before / MOST), before * MOST)
