"""Cutting up as equally as may be: a count into contiguous ranges, or what has sizes among workers."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise


def equal_ranges(count: int, parts: int) -> list[tuple[int, int]]:
    """[0, count) as `parts` neighbours (start, stop), whose sizes differ by at most one."""
    return list(pairwise(part * count // parts for part in range(parts + 1)))


def owners(sizes: Sequence[int], workers: int) -> list[int]:
    """The worker that each of the parameters, of so many elements, belongs to where each updates a share of them (ZeRO
    stage 1, Rajbhandari et al., 2020).

    The largest first, each goes to the worker that has the least so far; the first one wins a tie. So no worker has
    more than the even share and one parameter.
    """
    loads = [(0, worker) for worker in range(workers)]
    found = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        load, worker = loads[0]
        found[index] = worker
        heapq.heapreplace(loads, (load + sizes[index], worker))
    return found


def share_out(workers: int, agents: Sequence[int]) -> list[int]:
    """How many of the workers each host has, by its agents, of which each takes an equal part; the first take them all
    where there are more agents than workers.

    >>> share_out(5, [1, 1]), share_out(2, [1, 1, 1]), share_out(8, [2, 0, 1])
    ([2, 3], [1, 1, 0], [5, 0, 3])
    """
    parts = min(workers, sum(agents))
    sizes = [stop - start for start, stop in equal_ranges(workers, parts)]
    ends = [min(sum(agents[: host + 1]), parts) for host in range(len(agents))]
    return [sum(sizes[start:stop]) for start, stop in pairwise([0, *ends])]


def fill(workers: int, rooms: Sequence[int]) -> list[int]:
    """How many of the workers each host has, by the room that it has: as equally as there is room for, the first ones
    more. There is room for all.

    >>> fill(8, [2, 8]), fill(8, [8, 8]), fill(5, [1, 8, 8]), fill(1, [4, 4])
    ([2, 6], [4, 4], [1, 2, 2], [1, 0])
    """
    found = [0] * len(rooms)
    while (left := workers - sum(found)) > 0:
        able = [host for host, room in enumerate(rooms) if found[host] < room]
        each = max(1, min([left // len(able), *(rooms[host] - found[host] for host in able)]))
        for host in able[:left]:
            found[host] += each
    return found
