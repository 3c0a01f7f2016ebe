"""Who trains, on the virtual clock. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from instep.clock.network import Network
from instep.clock.slow import parse_slow, slow_factors
from instep.clock.times import RecordedTimes, WorkerTimes
from instep.clock.units import number
from instep.errors import RecipeError, shown
from instep.recipe import MOST_WORKERS


@dataclass(frozen=True)
class Cluster:
    """Who trains, on the virtual clock.

    times: None measures a microbatch of the recipe on this machine, and gives every worker that time; `slow` then
    says who takes longer. `merge_s`: of an update at the server; None measures it. `collective`: rules in lockstep
    run on all-reduce instead of a server. `batched`: gradients of many workers are computed at once, many times faster
    for small models, with other bits than those of a real run; rules without local steps only.

    Raises RecipeError for what cannot be.
    """

    workers: int
    times: WorkerTimes | RecordedTimes | None = None
    network: Network | None = None
    merge_s: float | None = None
    collective: bool = True
    slow: str = ""
    batched: bool = False

    def __post_init__(self) -> None:
        if type(self.workers) is not int or not 1 <= self.workers <= MOST_WORKERS:
            raise RecipeError(
                f"'cluster.workers' is {_shown(self.workers)}; it must be a whole number from 1 to {MOST_WORKERS}."
            )
        if not isinstance(self.times, WorkerTimes | RecordedTimes | None):
            raise RecipeError(
                f"'cluster.times' is {shown(self.times)}; give instep.clock.times.WorkerTimes, or None to measure them."
            )
        if self.merge_s is not None and not 0 <= number(self.merge_s) < math.inf:
            raise RecipeError(f"'cluster.merge_s' is {_shown(self.merge_s)}; it must be a finite time from 0, or None.")
        if self.slow:
            slow_factors(parse_slow(self.slow), self.workers)
        if self.slow and isinstance(self.times, WorkerTimes) and self.times.slow != parse_slow(self.slow):
            raise RecipeError(
                f"'cluster.slow' is {shown(self.slow)}, and 'cluster.times' name other workers as slow, or none; where "
                f"times are given, say it there: WorkerTimes.from_text(..., slow=parse_slow({self.slow!r}))."
            )


def _shown(value: Any) -> str:
    """Its value for a message; of very large whole numbers, which Python does not write down, about how large."""
    return f"{number(value):g}" if isinstance(value, int) and abs(value) >= 1 << 64 else repr(value)
