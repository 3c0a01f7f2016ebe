"""Workers in lockstep that die are stood in for: the step ends, with the bits of a run to which nothing happened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from instep.engines.balance import Balance
from instep.engines.seat import Seat
from instep.engines.sharding import Sharded
from instep.engines.standing_in import StandIn
from instep.recipe import Recipe
from instep.reduce.reduction import Reduction
from instep.team.session import Session
from support import workloads
from support.deaths import (
    STEPS,
    Deaths,
    Hooks,
    after,
    all_of,
    before,
    came_through,
    computed_again,
    run,
    told,
    waiting_for_successors,
)
from support.harness import Outcome

pytestmark = pytest.mark.processes

MOMENTS: dict[str, Callable[[int], Hooks]] = {
    "before it computes": lambda worker: before(Seat, "compute", worker),
    "having computed": lambda worker: after(Seat, "compute", worker),
    "having written its rows": lambda worker: before(Seat, "load_ahead", worker, 4),
    "waiting for others' rows": lambda worker: before(StandIn, "until_rows", worker),
    "having told what it knows": lambda worker: before(StandIn, "until_left", worker),
    "before its part of the update": lambda worker: before(StandIn, "until_settled", worker, calls=4),
    "between two steps": lambda worker: before(StandIn, "between", worker, calls=4),
}
"""In every one of which another stands in for it."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Outcome]:
    known: dict[str, Outcome] = {}

    def of(recipe: Recipe) -> Outcome:
        if recipe.fingerprint() not in known:
            known[recipe.fingerprint()] = run(recipe, 2, tmp_path_factory.mktemp("undisturbed") / "run")
        return known[recipe.fingerprint()]

    return of


def gpt(**changes: Any) -> Recipe:
    return workloads.gpt(**{"steps": STEPS, "evaluate_every": 0, **changes})


QUICK = {(0, "before it computes"), (1, "having written its rows"), (0, "between two steps")}


def marked(worker: int, moment: str) -> Any:
    return pytest.param(worker, moment, marks=() if (worker, moment) in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(("worker", "moment"), [marked(worker, moment) for moment in MOMENTS for worker in (0, 1)])
def test_a_worker_that_dies_at_any_moment_of_a_step_is_stood_in_for(
    worker: int, moment: str, tmp_path: Path, undisturbed: Callable[[Recipe], Outcome]
) -> None:
    outcome = run(gpt(), 2, tmp_path / "it", MOMENTS[moment](worker))
    came_through(outcome, undisturbed(gpt()), 1)


def both(hooks: Callable[[int], Hooks], one: int, other: int) -> Hooks:
    """The same death of two workers."""

    def made(deaths: Deaths) -> dict[Any, dict[str, Any]]:
        ((owner, methods),) = hooks(one)(deaths).items()
        with mock.patch.multiple(owner, **methods):
            return hooks(other)(deaths)

    return made


@pytest.mark.parametrize("shard", ["optimizer", pytest.param("none", marks=pytest.mark.slow)])
def test_two_of_three_that_die_at_once_are_stood_in_for_with_what_batches_leave_in_buffers(
    shard: str, tmp_path: Path, undisturbed: Callable[[Recipe], Outcome]
) -> None:
    recipe = workloads.convnet(steps=STEPS, evaluate_every=0)
    outcome = run(recipe, 3, tmp_path / "it", both(MOMENTS["before it computes"], 0, 2), shard=shard)
    came_through(outcome, undisturbed(recipe), 2)
    assert computed_again(outcome) == 2 + 3, "no more than theirs"
    computed = [(event["version"], *event["microbatches"]) for event in told(outcome, "computed")]
    assert len(set(computed)) == 3 * STEPS
    assert len(computed) <= 3 * STEPS + 2, "what the dead have told, and nothing else, was computed twice"


def checksums(outcome: Outcome) -> dict[tuple[int, int], Any]:
    """Of what each worker contributed to each step, where they are told."""
    return {(event["worker"], event["version"]): event.get("checksum") for event in told(outcome, "pushed")}


def test_what_is_computed_in_anothers_place_has_the_checksums_that_the_other_would_have_told(tmp_path: Path) -> None:
    recipe = gpt(checksum_every=2)
    outcome = run(recipe, 2, tmp_path / "it", MOMENTS["before it computes"](1))
    other = run(recipe, 2, tmp_path / "other")
    came_through(outcome, other, 1)
    assert checksums(outcome) == checksums(other)
    assert checksums(outcome)[1, 3], "in the step in which it died"


def test_a_successor_goes_on_with_ranges_that_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[[Recipe], Outcome]
) -> None:
    counts = [[2, 6], [6, 2], [0, 8]]

    def moving(self: Balance, seconds: Sequence[float]) -> list[int]:
        self._steps += 1
        return counts[self._steps % 3]

    monkeypatch.setattr(Balance, "decide", moving)
    outcome = run(gpt(), 2, tmp_path / "it", all_of(MOMENTS["before it computes"](1), waiting_for_successors))
    came_through(outcome, undisturbed(gpt()), 1)
    assert [event["worker"] for event in told(outcome, "took_place")] == [1]
    moved = {event["version"]: event["ranges"] for event in told(outcome, "ranges_moved")}
    assert moved == {at: [[0, first := counts[(at - 1) % 3][0]], [first, 8]] for at in range(2, STEPS)}
    own = {event["version"]: event["microbatches"] for event in told(outcome, "computed") if event["worker"] == 1}
    assert own == {0: [4, 8], 1: [4, 8], **{version: ranges[1] for version, ranges in moved.items()}}


def test_who_stands_in_for_another_may_die_of_it_and_so_may_a_successor(
    tmp_path: Path, undisturbed: Callable[[Recipe], Outcome]
) -> None:
    standing_in = before(StandIn, "_facts", 0)
    building = before_a_successor_is_ready(1)
    hooks = all_of(MOMENTS["before it computes"](1), standing_in, building)
    outcome = run(gpt(), 3, tmp_path / "it", hooks, restarts=3)
    assert outcome.digest == undisturbed(gpt()).digest
    assert [event["version"] for event in told(outcome, "run_started")] == [0]
    assert outcome.result["restarts"] == 3
    assert outcome.result["stood_in"] == 2, "a successor had no place yet"
    assert {(event["worker"], event["by_worker"]) for event in told(outcome, "stood_in")} >= {(1, 0), (0, 2)}


def before_a_successor_is_ready(worker: int) -> Hooks:
    def hooks(deaths: Deaths) -> dict[Any, dict[str, Any]]:
        whole = Session.ready

        def dying(self: Session, *args: Any) -> Any:
            deaths.at(worker, "ready", incarnation=1)
            return whole(self, *args)

        return {Session: {"ready": dying}}

    return hooks


NOT_STOOD_IN = {
    "it added its part of the gradient": after(Reduction, "add", 1, calls=4),
    "it updated its part of the weights": before(Sharded, "update", 1),
}
"""Where nobody can tell how far it was."""


@pytest.mark.parametrize(
    "doing", [pytest.param(key, marks=pytest.mark.slow if "gradient" in key else ()) for key in NOT_STOOD_IN]
)
def test_where_a_worker_may_have_changed_something_by_half_the_team_goes_back_to_its_last_checkpoint(
    doing: str, tmp_path: Path, undisturbed: Callable[[Recipe], Outcome]
) -> None:
    recipe = gpt(evaluate_every=4)
    outcome = run(recipe, 2, tmp_path / "it", NOT_STOOD_IN[doing], checkpoint_every=2)
    assert outcome.digest == undisturbed(gpt()).digest
    assert [event["version"] for event in told(outcome, "run_started")] == [0, 2]
    assert [event["why"] for event in told(outcome, "warned") if doing in event["why"]]
    assert outcome.result["restarts"] == 1
    assert "stood_in" not in outcome.result


def test_with_audits_nobody_stands_in_and_the_team_goes_back_to_its_last_checkpoint(
    tmp_path: Path, undisturbed: Callable[[Recipe], Outcome]
) -> None:
    dies = MOMENTS["before it computes"](1)
    outcome = run(gpt(), 2, tmp_path / "it", dies, checkpoint_every=2, audit="100%")
    assert outcome.digest == undisturbed(gpt()).digest
    assert [event["version"] for event in told(outcome, "run_started")] == [0, 2]
    assert outcome.result["restarts"] == 1
    assert "stood_in" not in outcome.result
