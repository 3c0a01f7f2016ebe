"""In which rounds the nodes of many workers are added, and which worker adds what: all of this is pure.

Where several machines have several workers each, a machine's workers first add their nodes in memory that they share;
then only what the machine comes to travels, and of it a worker's cut goes to one worker of each other machine. So a
machine sends what one worker would.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction

from instep.ranges import equal_ranges

Levels = tuple[tuple[range, ...], ...]
"""Innermost first, the sets of ranks that add with each other; ranks of a machine are neighbours. The last is all."""


def levels_of(machines: Sequence[int]) -> Levels:
    """The levels of machines that have so many workers: two where several have several, else one."""
    bounds = itertools.accumulate(machines, initial=0)
    teams = tuple(range(start, stop) for start, stop in itertools.pairwise(bounds))
    everybody = (range(sum(machines)),)
    return (teams, everybody) if len(teams) > 1 and max(machines) > 1 else (everybody,)


def machine_of(rank: int, machines: Sequence[int]) -> range:
    """The ranks of this one's machine, where machines have so many workers."""
    bounds = itertools.pairwise(itertools.accumulate(machines, initial=0))
    return next(range(start, stop) for start, stop in bounds if start <= rank < stop)


class Shares:
    """Who adds which rank's cut on its way to that rank.

    Cuts lie one after the other in an `order` of their own, in which the neighbours that one worker adds for the rest
    are one run: ranks in the order of where they stand in their machine.
    """

    def __init__(self, levels: Levels):
        self.levels = levels
        self.machines = levels[0] if len(levels) > 1 else tuple(range(rank, rank + 1) for rank in levels[0][0])
        """The ranks that reach one memory; of one level each for itself."""
        self._place = {
            rank: Fraction(2 * place + 1, 2 * len(machine))
            for machine in levels[0]
            for place, rank in enumerate(machine)
        }
        self.order = sorted(self._place, key=lambda rank: (self._place[rank], rank))
        """The ranks as their cuts lie in the vector."""

    def machine_of(self, rank: int) -> int:
        """The index of the rank's machine."""
        return next(index for index, machine in enumerate(self.machines) if rank in machine)

    def helper(self, machine: int, rank: int) -> int:
        """The one worker of a machine that adds the cut of `rank` there, and exchanges with it; itself on its own."""
        ranks = self.machines[machine]
        return ranks[int(self._place[rank] * len(ranks))]

    def helped(self, helper: int) -> list[int]:
        """The ranks whose cuts `helper` adds on its machine, itself among them, in the order of their cuts."""
        machine = self.machine_of(helper)
        return [rank for rank in self.order if self.helper(machine, rank) == helper]

    def region(self, piece: Sequence[slice], rank: int) -> slice:
        """All that `rank` adds at the first of two levels; piece[r]: the cut of rank r."""
        helped = self.helped(rank)
        return slice(piece[helped[0]].start, piece[helped[-1]].stop)


def cut(count: int, shares: Shares) -> list[range]:
    """`count` blocks, or elements, in cuts by rank, whose sizes differ by at most one."""
    found = dict(zip(shares.order, equal_ranges(count, len(shares.order)), strict=True))
    return [range(*found[rank]) for rank in range(len(shares.order))]
