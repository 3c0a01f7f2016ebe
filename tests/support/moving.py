"""Ranges that move every step, at random: a stand-in for what follows the workers' speed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence


class AtRandom:
    """In place of `instep.engines.balance.Balance`: other counts after every step, some of them 0."""

    def __init__(self, counts: Sequence[int], fits: Callable[[Sequence[int]], bool]):
        self._counts, self._fits, self._draw = list(counts), fits, random.Random(7)
        self.seconds = [1.0] * len(counts)

    def decide(self, seconds: Sequence[float]) -> list[int]:
        while True:
            total, workers = sum(self._counts), len(self._counts)
            ends = sorted(self._draw.choices(range(total + 1), k=workers - 1))
            found = [stop - start for start, stop in zip([0, *ends], [*ends, total], strict=True)]
            assert self._fits(found), "small models always have room"
            if found != self._counts or total == 1 or workers == 1:
                self._counts = found
                return found
