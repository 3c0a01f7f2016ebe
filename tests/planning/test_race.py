"""Who reaches a target at the least cost, with no more work than is allowed, beside trying all."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instep.planning.checkpoints import interval_s, lost_share
from instep.planning.found import Planned, PlanWork, ToTarget, Way, choose, pareto
from instep.planning.planning import command
from instep.planning.race import CurvePoint, Entrant, Outcome, SoFar, race, reached_at, slower_by_timing, steps_to

pytestmark = pytest.mark.pure

STEPS = 40
TARGET = 1.0

speeds = st.floats(0.5, 1.5)
curves = st.tuples(st.floats(2.0, 5.0), st.floats(0.1, 1.5), st.floats(0.0, 0.3), st.integers(0, 10), st.integers(1, 5))
fields = st.lists(st.tuples(speeds, curves), min_size=1, max_size=8)


def points_of(start: float, rate: float, noise: float, late: int, every: int) -> list[CurvePoint]:
    """A curve that falls with the logarithm of steps, late, and not evenly."""
    steps = [*range(every, STEPS, every), STEPS]
    wave = [noise * math.sin(7.0 * step) for step in steps]
    return [
        CurvePoint(s, start - rate * math.log(1 + max(0, s - late)) + more) for s, more in zip(steps, wave, strict=True)
    ]


class Known:
    """Curves that are known already, and what was asked of them."""

    def __init__(self, drawn: list[tuple[float, tuple[float, float, float, int, int]]]):
        self.points = {str(place): points_of(*curve) for place, (_, curve) in enumerate(drawn)}
        self.entrants = [
            Entrant(str(place), str(place), lambda step, speed=speed: step / speed, curve[-1])  # type: ignore[misc]
            for place, (speed, curve) in enumerate(drawn)
        ]
        self.asked: dict[str, int] = {}

    def compute(self, curve: str, step: int) -> SoFar:
        before = self.asked.get(curve, 0)
        points = self.points[curve]
        self.asked[curve] = now = max(before, next(point.step for point in points if point.step >= step))
        return SoFar(now, tuple(point for point in points if point.step <= now), now == STEPS, now - before)

    def race(self, budget: int) -> Outcome:
        return race(self.entrants, self.compute, target=TARGET, steps=STEPS, budget=budget)

    def truth(self) -> list[float]:
        """By trying all: what each costs."""
        found = []
        for entrant in self.entrants:
            step = reached_at(self.points[entrant.curve], TARGET)
            found.append(math.inf if step is None else entrant.cost(step))
        return found


@given(fields, st.integers(0, 8 * STEPS))
@settings(max_examples=300, deadline=None)
def test_no_more_is_computed_than_the_budget_allows(drawn: list, budget: int) -> None:
    known = Known(drawn)
    outcome = known.race(budget)
    assert outcome.spent == sum(known.asked.values()) <= budget


@given(fields)
@settings(max_examples=300, deadline=None)
def test_with_the_work_of_trying_all_it_finds_what_trying_all_finds(drawn: list) -> None:
    known = Known(drawn)
    outcome, truth = known.race(STEPS * len(drawn)), known.truth()
    slower = slower_by_timing(known.entrants, STEPS)
    best = min(cost for place, cost in enumerate(truth) if place not in slower)
    assert (math.inf if outcome.best is None else outcome.best.cost) == best
    assert outcome.rivals == []


@given(fields, st.integers(0, 8 * STEPS))
@settings(max_examples=300, deadline=None)
def test_what_it_says_of_each_way_is_so(drawn: list, budget: int) -> None:
    known = Known(drawn)
    outcome, truth = known.race(budget), known.truth()
    for ranked, cost in zip(outcome.ranking, truth, strict=True):
        if ranked.state == "reached":
            assert ranked.cost == cost
        elif ranked.state == "beaten":
            assert outcome.best is not None
            assert outcome.best.cost is not None
            assert cost >= outcome.best.cost
        elif ranked.state == "never":
            assert cost == math.inf
    assert {rival.state for rival in outcome.rivals} <= {"open"}
    assert outcome.decided == (outcome.best is not None and not outcome.rivals)


def test_ways_whose_updates_are_the_same_are_computed_once_and_the_cheapest_of_them_alone() -> None:
    known = Known([(1.0, (3.0, 1.0, 0.0, 0, 2))])
    points = known.entrants[0]
    slow, quick = Entrant("slow", "0", lambda step: 3.0 * step), Entrant("quick", "0", lambda step: 0.5 * step)
    found = race([slow, points, quick], known.compute, target=TARGET, steps=STEPS, budget=3 * STEPS)
    assert [each.state for each in found.ranking] == ["slower", "slower", "reached"]
    assert found.spent == reached_at(known.points["0"], TARGET)


def test_of_one_rule_numbers_of_workers_that_are_slower_are_not_computed_and_of_others_they_are() -> None:
    known = Known([(1.0, (3.0, 1.0, 0.0, 0, 2)), (0.7, (3.0, 1.1, 0.0, 0, 2)), (0.7, (3.0, 1.1, 0.0, 0, 2))])
    rules = ("diloco:2", "diloco:2", "asynchronous")
    entrants = [dataclasses.replace(each, rule=rule) for each, rule in zip(known.entrants, rules, strict=True)]
    assert slower_by_timing(entrants, STEPS) == {1}


def test_what_is_far_slower_by_timing_alone_is_not_computed() -> None:
    known = Known([(1.0, (3.0, 1.0, 0.0, 0, 2)), (0.2, (1.1, 1.0, 0.0, 0, 2))])
    known.race(2 * STEPS)
    assert "1" not in known.asked


def test_a_budget_that_nothing_reaches_the_target_in_is_undecided_between_those_that_may() -> None:
    known = Known([(1.0, (4.0, 1.0, 0.0, 0, 2)), (1.0, (4.0, 1.01, 0.0, 0, 2))])
    found = known.race(12)
    assert found.best is None
    assert not found.decided
    assert {rival.entrant.label for rival in found.rivals} == {"0", "1"}


def test_what_another_race_has_computed_costs_nothing() -> None:
    known = Known([(1.0, (4.0, 1.0, 0.0, 0, 2)), (1.0, (4.0, 1.01, 0.0, 0, 2))])
    first = known.race(12)
    again = race(known.entrants, known.compute, target=TARGET, steps=STEPS, budget=0, known=dict(known.asked))
    assert again.spent == 0
    assert [each.predicted for each in again.ranking] == [each.predicted for each in first.ranking]
    assert all(each.predicted and each.predicted > 12 for each in again.ranking)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12), st.floats(0, 10))
def test_the_steps_to_a_level_are_those_that_a_search_point_by_point_finds(values: list[float], level: float) -> None:
    points = [CurvePoint(3 * place + 3, value) for place, value in enumerate(values)]
    found, lowest = steps_to(points, level), math.inf
    for place, point in enumerate(points):
        if point.objective <= level:
            before = [each for each in points[:place] if each.objective == lowest]
            assert (before[0].step if before else point.step) <= found <= point.step
            return
        lowest = min(lowest, point.objective)
    assert found == math.inf


ways = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), max_size=7)


@given(ways)
def test_the_front_is_whatever_no_other_way_beats_in_all_three(drawn: list[tuple[int, int, int]]) -> None:
    given_ = [Way(str(place), 1, (0,), reached=[ToTarget(0, 1, *figures)]) for place, figures in enumerate(drawn)]
    front = pareto(given_, "time")
    for way, own in zip(given_, drawn, strict=True):
        beaten = False
        for other in drawn:
            no_worse = other[0] <= own[0] and other[1] <= own[1] and other[2] <= own[2]
            beaten = beaten or (no_worse and (other[0] < own[0] or other[1] < own[1] or other[2] < own[2]))
        assert (way in front) == (not beaten)
    assert [way.reached[0].seconds for way in front] == sorted(way.reached[0].seconds for way in front)


def of(label: str, **seconds: float) -> Way:
    return Way(label, 1, (0,), reached=[ToTarget(int(seed[1:]), 1, cost, 1, 1.0) for seed, cost in seconds.items()])


def test_the_pick_is_the_cheapest_over_the_seeds_that_all_have_and_undecided_where_a_seed_says_otherwise() -> None:
    one, other, third = of("one", s0=1.0, s1=1.2), of("other", s0=1.1, s1=1.1), of("third", s0=3.0, s1=3.0, s2=0.1)
    assert choose([one, third], "time") == (one, ())
    assert choose([third, one, other], "time")[1] == (other,)
    assert choose([], "time") == (None, ())
    assert choose([of("a", s0=1.0), of("b", s1=1.0)], "time")[0] is None


@pytest.mark.parametrize(
    ("reached", "told"),
    [
        ({"s0": 1.0, "s1": 3.0, "s2": 2.0}, "2.0 s (1.0 s to 3.0 s over 3 seeds)"),
        ({"s0": 1.0, "s2": 3.0}, "2.0 s (1.0 s to 3.0 s over 2 of 3 seeds)"),
        ({"s0": 1.0}, "1.0 s (with 1 of 3 seeds)"),
    ],
)
def test_the_verdict_tells_how_many_seeds_reached_the_target(reached: dict[str, float], told: str) -> None:
    way = of("one", **reached)
    found = Planned(
        "tiny", "", {}, 1.0, "time", (0, 1, 2), (way,), way, (), (way,), None, "", PlanWork(9, 9, 9, 1, 1.0)
    )
    assert told in found.verdict


def test_the_command_gives_the_recipe_as_the_plan_had_it() -> None:
    found = command(["my recipes/a.toml", "--recipe.steps=60"], of("diloco:2,outer_lr=0.5"), None)
    assert found == "instep train 'my recipes/a.toml' --recipe.steps=60 --rule diloco:2,outer_lr=0.5 --workers 1"


@pytest.mark.parametrize(("checkpoint_s", "mean_s"), [(1.0, 3600.0), (5.0, 600.0), (0.1, 86400.0)])
def test_the_interval_of_checkpoints_costs_about_the_least_of_all_intervals(checkpoint_s: float, mean_s: float) -> None:
    best = min(lost_share(1.01**n, checkpoint_s, mean_s) for n in range(-500, 1500))
    assert lost_share(interval_s(checkpoint_s, mean_s), checkpoint_s, mean_s) == pytest.approx(best, rel=0.01)


def test_a_checkpoint_that_takes_longer_than_the_run_lasts_is_made_as_often_as_it_fails() -> None:
    assert interval_s(100.0, 40.0) == 40.0
