"""A plan's simulations: first timing alone, then real gradients in a race, then further seeds of the best."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from instep.clock.units import duration_s
from instep.errors import InstepError, RecipeError
from instep.offline.cluster import Cluster
from instep.offline.simulation import VirtualRun
from instep.planning.asked import Computation, PlanAsked
from instep.planning.course import Course, CourseTimes, order_of, timing
from instep.planning.found import By, ToTarget, Way
from instep.planning.race import Entrant, Outcome, SoFar, race, reached_at
from instep.recipe import Recipe, Team
from instep.record import checkpoint
from instep.reduce.written import FirstWrite
from instep.rules.presets import text_of
from instep.rules.rule import UpdateRule
from instep.team_checks import check_team
from instep.worker.replica import Replica

if TYPE_CHECKING:
    from instep.team.child import Tell

POINTS = 50
"""Evaluations of a run: as fine as that is the time to the target."""

_FINALISTS, _NEAR = 3, 1.25
"""So many at most, that cost no more than so many times the best, are computed with the other seeds."""

_FIRST_SEED = 0.75
"""The share of the budget for the race, where there are other seeds."""


def compute(recipe: Recipe, asked: PlanAsked, tell: Tell) -> Computation:
    """All of it. Raises InstepError where the recipe cannot be run at all."""
    return _Computing(recipe, asked, tell).run()


def entrant(label: str, curve: str, found: CourseTimes, rule: UpdateRule, recipe: Recipe, by: By) -> Entrant:
    """A way as it goes into the race."""
    cost, every = found.seconds if by == "time" else found.bytes, recipe.evaluate_every + rule.stride
    return Entrant(label, curve, cost, every, text_of(rule))


class _Computing:
    def __init__(self, recipe: Recipe, asked: PlanAsked, tell: Tell):
        self._asked, self._tell = asked, tell
        self._began_s = time.process_time()
        recipe = replace(recipe, evaluate_every=max(1, recipe.steps // POINTS))
        self._replica = Replica(recipe, "cpu")
        if self._replica.data.held_out is None:
            raise RecipeError(
                "a plan's target is of the held-out objective, and the recipe's data have nothing held out; give a "
                "pair (training, held out)."
            )
        self._recipe = recipe
        self._measured_s = self._measured()
        self._ways: list[Way] = []
        self._timed = 0
        self._curves: dict[int, str] = {}  # by place, of those that can be timed
        self._courses: dict[tuple[int, str], Course] = {}  # by seed and curve

    def run(self) -> Computation:
        asked, steps = self._asked, self._recipe.steps
        self._ways = [
            Way(text, workers, asked.described.fastest(workers)) for workers in asked.workers for text in asked.rules
        ]
        first = asked.seeds[0]
        timings = {place: self._time(place, first) for place in range(len(self._ways))}
        known = {place: found for place, found in timings.items() if found is not None}
        if not known:
            raise RecipeError(f"there is no way to train on this cluster: {self._ways[0].why}")
        self._curves = {place: self._curve(place, first) for place in known}
        everything = steps * len(set(self._curves.values()))
        allowed = math.floor(asked.share * everything * (1 if len(asked.seeds) == 1 else _FIRST_SEED))
        outcome = self._race(known, asked.by, allowed)
        spent, places, whole = outcome.spent, list(known), math.floor(asked.share * everything)
        if outcome.best is None and allowed < whole:  # there is nobody to compute with other seeds
            outcome = self._race(known, asked.by, whole - spent)
            spent, allowed = spent + outcome.spent, whole
        for place, ranked in zip(places, outcome.ranking, strict=True):
            way, predicted = self._ways[place], ranked.predicted
            way.state, way.predicted = ranked.state, None if predicted == math.inf else predicted
        if all(self._failed(place) for place in known):
            raise RecipeError(f"no way can be computed: {self._failed(places[0])}")
        other: By = "bytes" if asked.by == "time" else "time"
        spent += self._race(known, other, allowed - spent).spent
        self._note(known, first)
        finalists = self._finalists()
        rivals = [places[outcome.ranking.index(each)] for each in outcome.rivals]
        rivals = self._unsettled(rivals, finalists, first)
        spent += self._other_seeds(finalists, whole - spent)
        return Computation(
            self._ways, outcome, finalists, rivals, spent, whole, everything, self._timed, self._checkpoint_s(),
            time.process_time() - self._began_s,
        )  # fmt: skip

    def _measured(self) -> tuple[float, float]:
        """Seconds of a microbatch and of an update, where one of them is not described."""
        if self._asked.described.microbatch and self._asked.described.update:
            return 0.0, 0.0
        written: set[str] = set()
        while True:
            try:
                recipe = self._shared(self._recipe.seed)
                return VirtualRun(recipe, Cluster(workers=1), False, None, lambda event: None, written).measured()
            except FirstWrite as found:
                written |= set(found.names)

    def _shared(self, seed: int) -> Recipe:
        """The recipe with a seed; with its own, the data are those that were built already."""
        recipe, data = replace(self._recipe, seed=seed), self._replica.data
        return replace(recipe, data=lambda: data) if seed == self._recipe.seed else recipe

    def _of(self, place: int, seed: int) -> tuple[Recipe, Cluster]:
        way = self._ways[place]
        recipe = replace(self._shared(seed), rule=self._asked.rules[way.rule])
        return recipe, self._asked.described.cluster(way.members, *self._measured_s, seed)

    def _time(self, place: int, seed: int) -> CourseTimes | None:
        """What a way takes by timing alone; None where it cannot be."""
        way = self._ways[place]
        self._tell({"kind": "planning", "what": f"timing {way.label}"})
        try:
            recipe, cluster = self._of(place, seed)
            check_team(recipe, Team(workers=way.workers))
            found = timing(recipe, cluster, self._replica)
        except RecipeError as error:
            way.state, way.why = "refused", error.message
            return None
        self._timed += 1
        run = found.found
        way.seconds_all, way.bytes_all = run.wall_s, run.bytes_sent
        way.idle_share, way.staleness = float(run.idle_share.mean()), run.staleness_mean
        return found

    def _curve(self, place: int, seed: int) -> str:
        return order_of(*self._of(place, seed)) or f"{place}"

    def _race(self, known: Mapping[int, CourseTimes], by: By, budget: int) -> Outcome:
        entrants = []
        at: dict[str, int] = {}
        steps = self._recipe.steps
        for place, found in known.items():
            curve = self._curves[place]
            if curve not in at or found.seconds(steps) < known[at[curve]].seconds(steps):
                at[curve] = place
            rule = self._asked.rules[self._ways[place].rule]
            entrants.append(entrant(self._ways[place].label, curve, found, rule, self._recipe, by))
        return race(
            entrants, lambda curve, step: self._computed(at[curve], curve, self._asked.seeds[0], step),
            target=self._asked.target, steps=steps, budget=max(0, budget),
            known={curve: course.step for (_, curve), course in self._courses.items()},
        )  # fmt: skip

    def _computed(self, place: int, curve: str, seed: int, step: int) -> SoFar:
        way = self._ways[place]
        self._tell(
            {"kind": "planning", "what": f"{way.label}, global batch {step} of {self._recipe.steps}, seed {seed}"}
        )
        if (seed, curve) not in self._courses:
            try:
                self._courses[seed, curve] = Course(*self._of(place, seed))
            except InstepError as error:
                way.why = error.message
                return SoFar(self._recipe.steps, (), True, 0)
        course = self._courses[seed, curve]
        before = course.step
        course.to(step)
        way.computed += course.step - before
        if course.failed:
            way.why = course.failed
        return SoFar(course.step, tuple(course.points), course.ended, course.step - before)

    def _failed(self, place: int) -> str:
        way = self._ways[place]
        return way.why if way.lowest is None and not way.computed else ""

    def _note(self, known: Mapping[int, CourseTimes], seed: int) -> None:
        """What the first seed came to."""
        for place, found in known.items():
            course = self._courses.get((seed, self._curves[place]))
            if course is None or not course.points:
                continue
            self._ways[place].lowest = min(objective for _, objective in course.points)
            if reached := self._reached(course, found, seed):
                self._ways[place].reached.append(reached)
                self._ways[place].state = "reached"  # be it in the race for the other cost

    def _reached(self, course: Course, found: CourseTimes, seed: int) -> ToTarget | None:
        step = reached_at(course.points, self._asked.target)
        if step is None:
            return None
        objective = next(point.objective for point in course.points if point.step == step)
        return ToTarget(seed, step, found.seconds(step), found.bytes(step), objective)

    def _cost(self, place: int) -> float:
        """What a way has taken to the target; infinite if it was not seen to reach it."""
        cost = self._ways[place].cost(self._asked.by)
        return math.inf if cost is None else cost.mean

    def _finalists(self) -> list[int]:
        """Who reached the target at about the least cost, in either race."""
        costs = sorted((self._cost(place), place) for place, way in enumerate(self._ways) if way.reached)
        return [place for cost, place in costs if cost <= _NEAR * costs[0][0]][:_FINALISTS]

    def _unsettled(self, rivals: Sequence[int], finalists: Sequence[int], seed: int) -> list[int]:
        """Those of the race that may be the best even after the race for the other cost."""
        least, found = min(map(self._cost, finalists), default=math.inf), list[int]()
        for place in rivals:
            way, course = self._ways[place], self._courses.get((seed, self._curves[place]))
            if way.reached:
                continue
            if course is not None and course.ended:
                way.state = "never"
            elif finalists and way.predicted is not None and way.predicted >= least:
                way.state = "behind"
            else:
                found.append(place)
        return found

    def _other_seeds(self, finalists: Sequence[int], budget: int) -> int:
        """Computes them with the other seeds as far as the budget goes; how much of it was used."""
        spent = 0
        for seed in self._asked.seeds[1:]:
            found = {place: self._time(place, seed) for place in finalists}
            for place in finalists:
                clock = found[place]
                assert clock is not None
                spent += self._to_target(place, clock, seed, budget - spent)
            for key in [key for key in self._courses if key[0] == seed]:
                del self._courses[key]
        return spent

    def _to_target(self, place: int, clock: CourseTimes, seed: int, budget: int) -> int:
        """Computes a way with another seed to the target, if the budget suffices; how much of it was used."""
        curve, spent, step = self._curves[place], 0, 0
        every = self._recipe.evaluate_every + self._asked.rules[self._ways[place].rule].stride
        while spent + every <= budget:
            computed = self._computed(place, curve, seed, step + 1)
            step, spent = computed.step, spent + computed.work
            course = self._courses.get((seed, curve))
            if course is not None and (reached := self._reached(course, clock, seed)):
                self._ways[place].reached.append(reached)
                break
            if computed.ended:
                break
        return spent

    def _checkpoint_s(self) -> float:
        """Seconds of a checkpoint, measured where it is not described."""
        if text := self._asked.described.checkpoint:
            return duration_s(text, "'cluster.checkpoint'")
        with tempfile.TemporaryDirectory(prefix="instep-plan-", ignore_cleanup_errors=True) as folder:
            began = time.monotonic()
            checkpoint.save(
                Path(folder), version=1, model_state=self._replica.saved_state(), training_state={}, meta={}, keep=1,
                fingerprint=self._recipe.fingerprint(),
            )  # fmt: skip
            return time.monotonic() - began
