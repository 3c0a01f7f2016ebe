"""Weights that go to a host once: its workers share memory, where one of them puts what comes for all to read.

The server says where each version is to lie, and who is sent it. It has nothing put where a worker may still read: that
is so until its contribution has come, or a process in its place asks for work. Of each place both ends count how often
it was filled. Should the worker that is sent weights die, those who wait for them are sent them too.
"""

from __future__ import annotations

import numpy as np
import torch

from instep.rules import UpdateRule
from instep.transport.memory import Region, attach, mark, reserve


def shared_by_hosts(rule: UpdateRule) -> bool:
    """Whether all workers have the same weights of a version, which come whole."""
    return not rule.narrow and rule.fragments == 1


class SharedWeights:
    """The memory, as each worker of a host maps it. rows: a place for each of them ([size_bytes] uint8)."""

    def __init__(self, descriptor: int, workers: int, size_bytes: int):
        regions = {
            "weights": Region((workers, size_bytes), "uint8", reserve=False),
            "fills": Region((workers,), "int64"),
        }
        reserve(descriptor, regions)  # the same at all of them, which changes nothing of what is there
        arrays = attach(descriptor, regions)
        self.rows = list(torch.from_numpy(arrays["weights"]))
        self._fills = arrays["fills"].view(np.int64)

    def filled(self, place: int, fill: int) -> None:
        """What lies there is whole: others may read it."""
        mark(self._fills, place, fill)

    def has(self, place: int, fill: int) -> bool:
        """Whether it is whole."""
        return int(self._fills[place]) == fill


class HostPlaces:
    """The same memory, as the server knows it from what it has sent. workers: how many the host has."""

    def __init__(self, workers: int):
        self._fills = [0] * workers
        self._sent_to: dict[int, int] = {}  # who is to fill a place
        self._place: dict[int, int] = {}  # where the weights lie that a worker was told of last

    def give(self, worker: int, beside: int | None) -> tuple[int, int]:
        """Where a worker's weights are to lie, and how often that place is filled by then. beside: another worker who
        has them, or will, if there is one; else they lie where nobody reads.
        """
        if beside is None:
            read = {place for other, place in self._place.items() if other != worker}
            place = next(place for place in range(len(self._fills)) if place not in read)
            self._fills[place] += 1
            self._sent_to[place] = worker
        else:
            place = self._place[beside]
        self._place[worker] = place
        return place, self._fills[place]

    def left(self, worker: int) -> tuple[int, int, list[int]]:
        """The worker's process is gone: which place it may not have filled, how often that was to be, and which others
        may wait for that. Nothing else comes there before another process has the worker's place.
        """
        place = self._place.get(worker, -1)
        if self._sent_to.get(place) != worker:
            return place, 0, []
        del self._sent_to[place]
        return place, self._fills[place], [each for each, at in self._place.items() if at == place and each != worker]
