"""Ten clusters, twelve rules and a recipe, for the choice of `instep plan` beside the truth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instep.planning.computing import POINTS, entrant
from instep.planning.course import Course, CourseTimes, order_of, timing
from instep.planning.described import Description
from instep.planning.race import CurvePoint, Entrant, Outcome, SoFar, race, reached_at
from instep.recipe import Recipe, parse
from instep.recipe_files import read
from instep.rules.presets import parse as parse_rule
from instep.worker.replica import Replica

RECIPE = Path(__file__).parents[2] / "benchmarks" / "gpt-100k.toml"
TARGET = 2.75
SHARE = 0.25

RULES = (
    "synchronous", "backup_workers:1", "bounded_staleness:1", "bounded_staleness:4", "softsync:2", "softsync:4",
    "asynchronous", "delay_compensated:0.04", "local_sgd:4", "post_local_sgd:4,after=10", "diloco:5", "async_diloco:5",
)  # fmt: skip

CLUSTERS = {
    "4 alike, 10 Gb/s": Description(workers=4, microbatch="100ms", bandwidth="10Gb/s", latency="100us", update="1ms"),
    "4, one 4 times slower": Description(
        workers=4, microbatch="lognormal:100ms,20ms", slow="3:4x", bandwidth="10Gb/s", latency="100us", update="1ms"
    ),
    "4 that vary much": Description(
        workers=4, microbatch="lognormal:100ms,80ms", bandwidth="1Gb/s", latency="1ms", update="1ms"
    ),
    "4 unlike, 20 Mb/s": Description(
        workers=4, microbatch="lognormal:20ms,10ms", persistence=0.8, bandwidth="20Mb/s", latency="5ms", update="1ms"
    ),
    "4, two of half the speed, 100 Mb/s": Description(
        workers=4, microbatch="lognormal:100ms,30ms", slow="50%:2x", bandwidth="100Mb/s", latency="1ms", update="1ms"
    ),
    "2 that sleep, one 4 times slower": Description(workers=2, microbatch="25ms", slow="1:4x", update="0"),
    "4 far apart, 10 Mb/s": Description(
        workers=4, microbatch="lognormal:100ms,30ms", bandwidth="10Mb/s", latency="30ms", update="1ms"
    ),
    "4 that fail": Description(
        workers=4, microbatch="lognormal:100ms,30ms", failures="20s", restart="2s", bandwidth="1Gb/s", latency="1ms",
        update="1ms",
    ),
    "3 of three speeds, 200 Mb/s": Description(
        workers=3, microbatch="lognormal:60ms,15ms", speeds=(1.0, 0.5, 0.25), bandwidth="200Mb/s", latency="1ms",
        update="2ms",
    ),
    "4 that sleep, one 3 times slower": Description(workers=4, microbatch="25ms", slow="3:3x", update="0"),
}  # fmt: skip


@dataclass(frozen=True)
class Truth:
    """All that one way comes to. points: of its whole run."""

    rule: str
    found: CourseTimes
    curve: str
    points: tuple[CurvePoint, ...]
    failed: str

    def reached(self, target: float) -> int | None:
        """The step at which it is."""
        return reached_at(self.points, target)

    def seconds(self, target: float) -> float:
        """Until the target; infinite if it is never reached."""
        step = self.reached(target)
        return math.inf if step is None else self.found.seconds(step)


class Truths:
    """Runs in full, each curve once."""

    def __init__(self, **changed: Any) -> None:
        table = read(RECIPE) | changed
        recipe, _ = parse(table)
        recipe = dataclasses.replace(recipe, evaluate_every=max(1, recipe.steps // POINTS))
        self.replica = Replica(recipe, "cpu")
        data = self.replica.data
        self.recipe: Recipe = dataclasses.replace(recipe, data=lambda: data)
        self._known: dict[str, tuple[tuple[CurvePoint, ...], str]] = {}

    def of(self, rule: str, described: Description, name: str) -> Truth:
        """One way on the cluster `name`, with the recipe's seed."""
        recipe = dataclasses.replace(self.recipe, rule=parse_rule(rule))
        cluster = described.cluster(described.fastest(described.workers), 0.0, 0.0, recipe.seed)
        curve = order_of(recipe, cluster) or f"{name}: {rule}"
        if curve not in self._known:
            course = Course(recipe, cluster)
            course.to(recipe.steps)
            self._known[curve] = tuple(course.points), course.failed
        return Truth(rule, timing(recipe, cluster, self.replica), curve, *self._known[curve])

    def raced(self, truths: Sequence[Truth], target: float = TARGET) -> Outcome:
        """What a plan with one seed comes to, whose gradients are known already."""
        entrants: list[Entrant] = []
        for truth in truths:
            rule = parse_rule(truth.rule)
            entrants.append(entrant(truth.rule, truth.curve, truth.found, rule, self.recipe, "time"))
        points = {truth.curve: truth.points for truth in truths}
        at: dict[str, int] = {}

        def compute(curve: str, step: int) -> SoFar:
            last = points[curve][-1].step if points[curve] else self.recipe.steps
            before = at.get(curve, 0)
            at[curve] = max(before, next((point.step for point in points[curve] if point.step >= step), last))
            known = tuple(point for point in points[curve] if point.step <= at[curve])
            return SoFar(at[curve], known, at[curve] >= last, at[curve] - before)

        steps = self.recipe.steps
        return race(entrants, compute, target=target, steps=steps, budget=math.floor(SHARE * steps * len(points)))
