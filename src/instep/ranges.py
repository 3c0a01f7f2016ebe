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
