"""Which worker updates which parameter, where each updates a share of them (ZeRO stage 1, Rajbhandari et al., 2020)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def owners(sizes: Sequence[int], workers: int) -> list[int]:
    """The worker that each of the parameters, of so many elements, belongs to.

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
