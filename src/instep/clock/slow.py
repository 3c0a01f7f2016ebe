"""Workers that are slow by command: ``--slow 1:4x,5%:4x``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from instep.errors import RecipeError, shown

_SPEC = re.compile(r"(?P<number>\d{1,18})|(?P<percent>\d+\.?\d*|\.\d+)\s*%")


_MOST = 1_000_000
"""Times as long: a second's work then takes more than a week."""


@dataclass(frozen=True)
class Slow:
    """Worker number `worker`, or the share `share` of the team, takes `factor` times as long. `text`: as written."""

    factor: float
    worker: int | None
    share: float
    text: str

    def of(self, workers: int) -> range:
        """Which of so many workers are meant. A share is rounded to whole workers and means the last ones."""
        if self.worker is not None:
            return range(self.worker, min(self.worker + 1, workers))
        return range(workers - math.floor(self.share * workers + 0.5), workers)


def parse_slow(text: str) -> tuple[Slow, ...]:
    """What is written as ``WORKER:FACTORx`` or ``PERCENT%:FACTORx``, several with commas between.

    "1:4x": worker 1 takes 4 times as long for its computation; "5%:4x": so does a twentieth of the team, the workers
    with the highest numbers. Whether there are such workers is seen by `slow_factors`. Raises RecipeError.
    """
    return tuple(_parse_one(part.strip()) for part in text.split(","))


def _parse_one(part: str) -> Slow:
    who, _, times = (word.strip() for word in part.partition(":"))
    match = _SPEC.fullmatch(who)
    if not match or not times:
        raise RecipeError(
            f"{shown(part)} does not say who is slow; write '1:4x' (worker 1) or '5%:4x' (that share of them)."
        )
    try:
        factor = float(times.removesuffix("x"))
    except ValueError:
        factor = math.nan
    if not 1 <= factor <= _MOST:
        raise RecipeError(
            f"{shown(times)} in {shown(part)} is no factor by which a worker is slow; write a number from 1 to "
            f"{_MOST}, as in '{who}:4x'."
        )
    if match["number"] is not None:
        return Slow(factor, int(match["number"]), 0.0, part)
    share = float(match["percent"]) / 100
    if not 0 < share <= 1:
        raise RecipeError(
            f"{shown(who)} in {shown(part)} is no share of the workers; write one above 0 % and up to 100 %."
        )
    return Slow(factor, None, share, part)


def slow_factors(slow: tuple[Slow, ...], workers: int) -> NDArray[np.float64]:
    """How many times as long each worker takes. [W] float64.

    Raises RecipeError where a part names no worker of the team, or two parts name the same one.
    """
    factors = np.ones(workers)
    named: dict[int, str] = {}
    for part in slow:
        meant = part.of(workers)
        if not meant:
            team = f"a team of {workers} (workers 0 to {workers - 1})" if workers > 1 else "a team of worker 0 alone"
            raise RecipeError(
                f"{shown(part.text)} names no worker of {team}; name one that is there, or a larger share."
            )
        for worker in meant:
            if worker in named:
                raise RecipeError(
                    f"worker {worker} is named by both {shown(named[worker])} and {shown(part.text)}; name it once."
                )
            named[worker] = part.text
            factors[worker] = part.factor
    return factors
