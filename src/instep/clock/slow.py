"""Workers that are slow by command: ``--slow 1:4x,5%:4x``, or in some steps alone: ``--slow 1:4x@100..200``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from instep.errors import RecipeError, shown

_SPEC = re.compile(r"(?P<number>\d{1,18})|(?P<percent>\d+\.?\d*|\.\d+)\s*%")


_MOST = 1_000_000
"""Times as long: a second's work then takes more than a week."""


_STEPS = re.compile(r"(?P<first>\d{1,18})\s*\.\.\s*(?P<stop>\d{1,18})")


@dataclass(frozen=True)
class Slow:
    """Worker number `worker`, or the share `share` of the team, takes `factor` times as long. `text`: as written.
    steps: in which, (first, stop); None for all.
    """

    factor: float
    worker: int | None
    share: float
    text: str
    steps: tuple[int, int] | None = None

    def of(self, workers: int) -> range:
        """Which of so many workers are meant. A share is rounded to whole workers and means the last ones."""
        if self.worker is not None:
            return range(self.worker, min(self.worker + 1, workers))
        return range(workers - math.floor(self.share * workers + 0.5), workers)


def parse_slow(text: str) -> tuple[Slow, ...]:
    """What is written as ``WORKER:FACTORx`` or ``PERCENT%:FACTORx``, several with commas between, each with or without
    ``@FIRST..STOP``.

    "1:4x": worker 1 takes 4 times as long for its computation; "5%:4x": so does a twentieth of the team, the workers
    with the highest numbers; "1:4x@100..200": worker 1 from step 100, counted from 0, up to and without step 200.
    Whether there are such workers is seen by `slow_factors` and `slowness`. Raises RecipeError.
    """
    return tuple(_parse_one(part.strip()) for part in text.split(","))


def _parse_one(part: str) -> Slow:
    written, at, span = (word.strip() for word in part.partition("@"))
    who, _, times = (word.strip() for word in written.partition(":"))
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
    steps = _steps(span, part, written) if at else None
    if match["number"] is not None:
        return Slow(factor, int(match["number"]), 0.0, part, steps)
    share = float(match["percent"]) / 100
    if not 0 < share <= 1:
        raise RecipeError(
            f"{shown(who)} in {shown(part)} is no share of the workers; write one above 0 % and up to 100 %."
        )
    return Slow(factor, None, share, part, steps)


def _steps(span: str, part: str, written: str) -> tuple[int, int]:
    match = _STEPS.fullmatch(span)
    steps = (int(match["first"]), int(match["stop"])) if match else (0, 0)
    if steps[0] >= steps[1]:
        raise RecipeError(
            f"{shown(span)} in {shown(part)} are no steps; write the first and the one after the last, as in "
            f"'{written}@100..200'."
        )
    return steps


def slow_factors(slow: tuple[Slow, ...], workers: int) -> NDArray[np.float64]:
    """How many times as long each worker takes in all steps. [W] float64.

    Raises RecipeError where a part names no worker of the team, two parts name the same one, or one names steps.
    """
    for part in slow:
        if part.steps is not None:
            raise RecipeError(
                f"{shown(part.text)} names steps, which workers on a virtual clock are not slow by; leave "
                f"'@{part.steps[0]}..{part.steps[1]}' out."
            )
    return np.array([factor(0) for factor in map(slowness(slow, workers), range(workers))])


def slowness(slow: tuple[Slow, ...], workers: int) -> Callable[[int], Callable[[int], float]]:
    """By worker, what gives of a step how many times as long it takes.

    Raises RecipeError where a part names no worker of the team, or two parts name the same one in the same steps.
    """
    named: dict[int, list[Slow]] = {}
    for part in slow:
        meant = part.of(workers)
        if not meant:
            team = f"a team of {workers} (workers 0 to {workers - 1})" if workers > 1 else "a team of worker 0 alone"
            raise RecipeError(
                f"{shown(part.text)} names no worker of {team}; name one that is there, or a larger share."
            )
        for worker in meant:
            for other in named.setdefault(worker, []):
                if other.steps is None or part.steps is None or _meet(other.steps, part.steps):
                    same = " in the same steps" if other.steps or part.steps else ""
                    raise RecipeError(
                        f"worker {worker} is named by both {shown(other.text)} and {shown(part.text)}{same}; name it "
                        f"once."
                    )
            named[worker].append(part)
    return lambda worker: _by_step(named.get(worker, []))


def _by_step(parts: list[Slow]) -> Callable[[int], float]:
    """What gives the factor in a step, of one worker's parts."""

    def factor(step: int) -> float:
        for part in parts:
            if part.steps is None or part.steps[0] <= step < part.steps[1]:
                return part.factor
        return 1.0

    return factor


def _meet(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return max(one[0], other[0]) < min(one[1], other[1])
