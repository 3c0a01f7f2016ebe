"""The times that workers had in a run, to be lived through again under another rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from instep.errors import RecordError


@dataclass(frozen=True)
class RecordedTimes:
    """Seconds a microbatch, by worker, in the order in which they were measured; worn out, a list starts anew."""

    by_worker: tuple[tuple[float, ...], ...]
    failures: None = None

    @classmethod
    def of(cls, found: Mapping[int, Sequence[float]], workers: int) -> RecordedTimes:
        """From times by worker. Raises RecordError where a worker has none."""
        missing = [worker for worker in range(workers) if not found.get(worker)]
        if missing:
            raise RecordError(
                f"the tape has no time of worker {missing[0]}, who pushed nothing in that run; its arrivals under "
                f"another rule cannot be told."
            )
        return cls(tuple(tuple(found[worker]) for worker in range(workers)))

    def draws(self, workers: int) -> Callable[[int], float]:
        """A function from a worker to the seconds a microbatch of its next contribution."""
        series = [itertools.cycle(times) for times in self.by_worker[:workers]]
        return lambda worker: next(series[worker])

    def uptimes(self, worker: int) -> Iterator[float]:
        """Nothing: nobody fails."""
        return iter(())
