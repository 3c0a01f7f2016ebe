"""Which of several ways reaches a target at the lowest cost, with no more work than is allowed. Pure.

What a way costs until so many steps are made is known beforehand, from a simulation without gradients. How far the
objective is then is not: each step of it has to be computed. The race is computed in rungs, after each of which the
better half goes on (successive halving: Jamieson and Talwalkar, AISTATS 2016, arXiv:1502.07943); what is left of the
work then goes to whoever may still be the cheapest. Two things are exact: nobody is computed beyond the cost at which
another one has reached the target, and ways whose updates are the same, bit for bit, are computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

SLOWEST = 4.0
"""A way that takes so many times as long for all steps as the fastest one is not computed: it would need a quarter of
its steps."""

ONE_RULE = 1.25
"""Of one rule, numbers of workers that take so many times as long as the best one are not computed."""

RUNGS = 2
"""The first takes half of the work."""

_CHUNKS = 20
"""Parts of a run, in which those that may still be the cheapest are computed on."""

ALIKE = 0.25
"""Two curves are alike where the multiple of steps that one needs varies by less than about so much."""

_LONGEST = 50.0
"""Of the logarithm of how many times as many steps are extrapolated to, so that it stays a number."""

State = Literal["reached", "beaten", "slower", "behind", "open", "never"]
"""reached: the target. beaten: it costs more without having reached it. slower: by timing alone. behind: in predicted
cost. open: the work did not suffice. never: it ended before."""


class CurvePoint(NamedTuple):
    """The held-out objective after so many steps."""

    step: int
    objective: float


class SoFar(NamedTuple):
    """How far a run is computed. points: by rising step. ended: there is no more to compute. work: steps just made."""

    step: int
    points: tuple[CurvePoint, ...]
    ended: bool
    work: int


@dataclass(frozen=True, eq=False)
class Entrant:
    """A way to train. curve: those of one curve have the same objective after the same steps. cost: until so many
    steps are made; it never falls. every: the steps until a curve's next point, at most. rule: what those have in
    common that differ in their workers alone.
    """

    label: str
    curve: str
    cost: Callable[[int], float]
    every: int = 1
    rule: str = ""


@dataclass
class Ranked:
    """How an entrant ended. step: at which it reached the target. cost: until then. predicted: where it did not reach
    it, from its curve beside the leading one's; None where nothing of it was computed.
    """

    entrant: Entrant
    state: State = "open"
    step: int | None = None
    cost: float | None = None
    predicted: float | None = None


@dataclass
class Outcome:
    """best: whoever reached the target at the lowest cost; None where nobody did. rivals: those that the work did not
    suffice to tell from it, or from each other.
    """

    ranking: list[Ranked]
    spent: int
    best: Ranked | None = None
    rivals: list[Ranked] = field(default_factory=list)

    @property
    def decided(self) -> bool:
        """Whether there is one best, and nobody who may be better."""
        return self.best is not None and not self.rivals


Compute = Callable[[str, int], SoFar]
"""Computes a curve on to its first point at or after a step, or to its end."""


def race(
    entrants: Sequence[Entrant],
    compute: Compute,
    *,
    target: float,
    steps: int,
    budget: int,
    known: Mapping[str, int] | None = None,
) -> Outcome:
    """compute: is asked for no more than `budget` steps in all, beside those that are known. known: by curve, how far
    it is computed already, which costs nothing.
    """
    return _Race(entrants, compute, target, steps, budget, known or {}).run()


def slower_by_timing(entrants: Sequence[Entrant], steps: int) -> set[int]:
    """Places of those that need not be computed: of one curve all but the cheapest, and who is far slower."""
    costs = [entrant.cost(steps) for entrant in entrants]
    out = {place for place, cost in enumerate(costs) if cost > SLOWEST * min(costs)}
    for place, one in enumerate(entrants):
        for other_place, other in enumerate(entrants):
            if one.rule and one.rule == other.rule and costs[place] > ONE_RULE * costs[other_place]:
                out.add(place)
            if one.curve == other.curve and (costs[other_place], other_place) < (costs[place], place):
                out.add(place)
    return out


def reached_at(points: Sequence[CurvePoint], target: float) -> int | None:
    """The step of the first point at or below the target."""
    return next((point.step for point in points if point.objective <= target), None)


def steps_to(points: Sequence[CurvePoint], level: float) -> float:
    """The steps until the lowest objective so far is `level`, between points as a straight line; infinite if it never
    is.
    """
    before: CurvePoint | None = None
    for point in points:
        if point.objective <= level:
            if before is None or before.objective <= level:
                return float(point.step)
            share = (before.objective - level) / (before.objective - point.objective)
            return before.step + share * (point.step - before.step)
        if math.isfinite(point.objective) and (before is None or point.objective < before.objective):
            before = point
    return math.inf


def extrapolated(points: Sequence[CurvePoint], target: float, *, times: float = 1.0) -> float:
    """The steps at which a curve reaches `target`, if it goes on to fall as it did lately with the logarithm of steps,
    or so many `times` as fast.
    """
    last = points[-1].step
    late = [point for point in points if 2 * point.step >= last and math.isfinite(point.objective)]
    if len(late) < 2:
        late = [point for point in points[-2:] if math.isfinite(point.objective)]
    if len(late) < 2:
        return math.inf
    slope = _slope([math.log(point.step) for point in late], [point.objective for point in late])
    over = min(point.objective for point in late) - target
    if over <= 0:
        return float(last)
    return last * math.exp(min(_LONGEST, over / (-times * slope))) if slope < 0 else math.inf


def likeness(points: Sequence[CurvePoint], other: Sequence[CurvePoint]) -> tuple[float, float]:
    """How many times as many steps as `other` a curve needs to the levels of its later half: at the last of them, and
    how much that varies from level to level, as the difference of logarithms.
    """
    logs = []
    lowest = math.inf
    for point in points:
        if point.objective < lowest:
            lowest = point.objective
            there = steps_to(other, lowest)
            if not math.isfinite(there):
                return 1.0, math.inf
            if 2 * point.step >= points[-1].step and lowest <= other[0].objective:
                logs.append(math.log(point.step / there))
    if len(logs) < 2:
        return 1.0, math.inf
    return math.exp(logs[-1]), max(logs) - min(logs)


def predicted(
    points: Sequence[CurvePoint], others: Sequence[Sequence[CurvePoint]], target: float
) -> tuple[float, float]:
    """In how few steps a curve may reach `target`, and in how many it is expected to.

    That is told by the curve most like it of those that were computed further, or else by how it falls itself.
    """
    if not points:
        return 0.0, 0.0
    step = float(points[-1].step)
    found = []
    for other in others:
        if other and other[-1].step > 1.2 * step:
            times, varies = likeness(points, other)
            if varies <= ALIKE:
                goal = steps_to(other, target)
                goal = goal if math.isfinite(goal) else extrapolated(other, target)
                found.append((varies, max(step, times * goal), max(step, times * math.exp(-varies) * goal)))
    if found:
        _, likely, least = min(found)
        return least, likely
    return max(step, extrapolated(points, target, times=2.0)), max(step, extrapolated(points, target))


def _slope(at: Sequence[float], values: Sequence[float]) -> float:
    """Of the line nearest to the values, by least squares."""
    middle, mean = math.fsum(at) / len(at), math.fsum(values) / len(values)
    spread = math.fsum((each - middle) ** 2 for each in at)
    return math.fsum((x - middle) * (y - mean) for x, y in zip(at, values, strict=True)) / spread if spread else 0.0


class _Race:
    def __init__(
        self, entrants: Sequence[Entrant], compute: Compute, target: float, steps: int, budget: int,
        known: Mapping[str, int],
    ):  # fmt: skip
        self._compute, self._target, self._steps, self._budget, self._known = compute, target, steps, budget, known
        self._ranking = [Ranked(entrant) for entrant in entrants]
        self._curves: dict[str, SoFar] = {}
        self._spent = 0
        self._best: Ranked | None = None

    def run(self) -> Outcome:
        out = slower_by_timing([ranked.entrant for ranked in self._ranking], self._steps)
        for place in out:
            self._ranking[place].state = "slower"
        self._halve([ranked for place, ranked in enumerate(self._ranking) if place not in out])
        self._look_on()
        return self._outcome()

    @property
    def _bound(self) -> float:
        """What the best one cost; infinite until one has reached the target."""
        return math.inf if self._best is None or self._best.cost is None else self._best.cost

    def _halve(self, going: list[Ranked]) -> None:
        """Rungs: the first takes half of the work for all, each further one half as much for half as many."""
        each = self._budget / 2 / max(1, len(going))
        for rung in range(RUNGS):
            for ranked in sorted(going, key=lambda one: one.entrant.cost(self._steps)):
                self._on(ranked, max(1, round(each * (rung + 1))))
            going = sorted(self._unsettled(going), key=self._expected)[: -(-len(going) // 2)]

    def _look_on(self) -> None:
        """The rest of the work, for whoever may be the cheapest."""
        while open_ := list(filter(self._affords, self._unsettled(self._ranking))):
            some = [ranked for ranked in open_ if self._least(ranked) < self._bound]
            ranked = min(some, key=self._expected) if some else min(open_, key=self._least)
            self._on(ranked, self._step_of(ranked) + max(1, self._steps // _CHUNKS))

    def _unsettled(self, ranking: Sequence[Ranked]) -> list[Ranked]:
        """Those that have neither reached the target nor been beaten."""
        for ranked in ranking:
            if ranked.state == "open" and ranked.entrant.cost(self._step_of(ranked) + 1) >= self._bound:
                ranked.state = "beaten"
        return [ranked for ranked in ranking if ranked.state == "open"]

    def _on(self, ranked: Ranked, step: int) -> None:
        """Computes on to `step`, but no further than where it would be beaten."""
        entrant = ranked.entrant
        while ranked.state == "open" and self._step_of(ranked) < min(step, self._steps):
            if not self._unsettled([ranked]) or not self._affords(ranked):
                return
            computed = self._compute(entrant.curve, self._step_of(ranked) + 1)
            self._curves[entrant.curve] = computed
            self._spent += computed.work
            self._note(ranked, computed)

    def _note(self, ranked: Ranked, computed: SoFar) -> None:
        reached = reached_at(computed.points, self._target)
        if reached is not None:
            ranked.state, ranked.step, ranked.cost = "reached", reached, ranked.entrant.cost(reached)
            if ranked.cost < self._bound:
                self._best = ranked
        elif computed.ended:
            ranked.state = "never"

    def _affords(self, ranked: Ranked) -> bool:
        """Whether the work suffices for its next point, if it has one."""
        step = self._step_of(ranked)
        if step < self._known.get(ranked.entrant.curve, 0):
            return True
        left = self._steps - step
        return self._spent + min(ranked.entrant.every, left) <= self._budget

    def _step_of(self, ranked: Ranked) -> int:
        computed = self._curves.get(ranked.entrant.curve)
        return 0 if computed is None else computed.step

    # What is expected

    def _predicted(self, ranked: Ranked) -> tuple[float, float]:
        """The fewest steps to the target, and how many are expected; none where nothing of it is computed."""
        own = self._curves.get(ranked.entrant.curve)
        others = [each.points for curve, each in self._curves.items() if curve != ranked.entrant.curve]
        return predicted(own.points if own else (), others, self._target)

    def _cost(self, entrant: Entrant, steps: float) -> float:
        if not math.isfinite(steps):
            return math.inf
        return entrant.cost(math.ceil(steps)) * max(1.0, steps / self._steps)

    def _expected(self, ranked: Ranked) -> float:
        return self._cost(ranked.entrant, self._predicted(ranked)[1])

    def _least(self, ranked: Ranked) -> float:
        return self._cost(ranked.entrant, self._predicted(ranked)[0])

    def _outcome(self) -> Outcome:
        open_ = self._unsettled(self._ranking)
        for ranked in open_:
            ranked.predicted = self._expected(ranked)
        if self._best is None:  # between the favourite and who may be better
            bound = min(map(self._expected, open_), default=math.inf)
            rivals = [ranked for ranked in open_ if self._least(ranked) <= bound < math.inf]
        else:
            rivals = [ranked for ranked in open_ if self._expected(ranked) < self._bound]
        for ranked in open_:
            ranked.state = "open" if ranked in rivals else "behind"
        return Outcome(self._ranking, self._spent, self._best, sorted(rivals, key=self._expected))
