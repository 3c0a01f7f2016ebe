"""Intervals of time, and what is left of some of them without others."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import pairwise

from instep.report.history import Strip


class Spans:
    """Intervals [from, to) of seconds, by rising begin, with a version each. They do not overlap."""

    def __init__(self) -> None:
        self.begins, self.ends, self.versions = array("d"), array("d"), array("q")

    @classmethod
    def of(cls, flat: Iterable[float], versions: Iterable[int]) -> Spans:
        """Of a flat array from, to, from, to, ..., in any order."""
        found = cls()
        numbers = iter(flat)
        for begin, end, version in sorted(zip(numbers, numbers, versions, strict=False)):
            found.add(begin, end, version)
        return found

    def add(self, begin: float, end: float, version: int) -> None:
        """Adds one that begins after the others have ended; what overlaps with them is cut off."""
        begin = max(begin, self.ends[-1]) if self.ends else begin
        if end > begin:
            self.begins.append(begin)
            self.ends.append(end)
            self.versions.append(version)

    def __iter__(self) -> Iterator[tuple[float, float, int]]:
        return zip(self.begins, self.ends, self.versions, strict=True)

    def without(self, others: Spans) -> Spans:
        """What none of the `others` covers."""
        if not others.begins:
            return self
        left = Spans()
        for begin, end, version in self:
            first, stop = bisect_left(others.ends, begin), bisect_left(others.begins, end)
            edges = [begin, *(edge for at in range(first, stop) for edge in (others.begins[at], others.ends[at])), end]
            for since, until in list(pairwise(edges))[::2]:
                left.add(since, until, version)
        return left

    def flat(self) -> tuple[array[float], array[int]]:
        """from, to, from, to, ...; and the versions."""
        return array("d", (edge for begin, end, _ in self for edge in (begin, end))), self.versions


def tell_evaluations(strip: Strip, evaluations: Spans) -> None:
    """Tells in `strip` where its worker did nothing but evaluate, or wait for the server's evaluation."""
    if not evaluations.begins:
        return
    there = Spans.of(strip.there, [0] * (len(strip.there) // 2))
    computing = Spans.of(strip.computing, strip.computing_version)
    absent = _between(there, evaluations.begins[0], evaluations.ends[-1])
    strip.evaluating, strip.evaluating_version = evaluations.without(computing).without(absent).flat()
    communicating = Spans.of(strip.communicating, strip.communicating_version)
    strip.communicating, strip.communicating_version = communicating.without(evaluations).flat()


def _between(spans: Spans, begin: float, end: float) -> Spans:
    """What none of `spans` covers from `begin` to `end`."""
    whole = Spans()
    whole.add(begin, end, 0)
    return whole.without(spans)
