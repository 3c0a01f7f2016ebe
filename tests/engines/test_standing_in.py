"""Workers in lockstep that die are stood in for: the step ends, with the bits of a run to which nothing happened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from instep.engines import piecewise, shared_state
from instep.engines.balance import Balance
from instep.engines.seat import Seat
from instep.engines.standing_in import _STAGES, ADDING, UPDATING, StandIn
from instep.engines.undo import _WORKS, PiecesDone
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


@pytest.fixture(autouse=True)
def _several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker's part of an update is of several."""
    monkeypatch.setattr(piecewise, "PIECE", 500)


def in_piece(name: str, stage: int, worker: int, *, later: bool) -> Hooks:
    """In step 3, where the worker notes that the first piece of its work in a `stage` is begun, or done; later: not
    before it has.
    """

    def hooks(deaths: Deaths) -> dict[Any, dict[str, Any]]:
        whole = getattr(PiecesDone, name)

        def dying(self: PiecesDone, piece: int) -> None:
            here = (self._work, piece) == ((_STAGES * 3 + stage) * _WORKS, 0)
            if here and not later:
                deaths.at(worker, name)
            whole(self, piece)
            if here:
                deaths.at(worker, name)

        return {PiecesDone: {name: dying}}

    return hooks


MOMENTS: dict[str, Callable[[int], Hooks]] = {
    "before it computes": lambda worker: before(Seat, "compute", worker),
    "having computed": lambda worker: after(Seat, "compute", worker),
    "having written its rows": lambda worker: before(Seat, "load_ahead", worker, 4),
    "waiting for others' rows": lambda worker: before(StandIn, "until_rows", worker),
    "having told what it knows": lambda worker: before(StandIn, "until_left", worker),
    "with a sum that it does not know of": lambda worker: in_piece("begin", ADDING, worker, later=False),
    "with a sum to copy": lambda worker: in_piece("begin", ADDING, worker, later=True),
    "having copied a sum": lambda worker: in_piece("end", ADDING, worker, later=False),
    "having added its cut": lambda worker: after(Reduction, "add", worker, calls=4),
    "keeping weights before their update": lambda worker: in_piece("begin", UPDATING, worker, later=False),
    "before it updates a piece": lambda worker: in_piece("begin", UPDATING, worker, later=True),
    "in the midst of an update": lambda worker: before(torch, "_fused_adamw_", worker, calls=25),
    "having updated a piece": lambda worker: in_piece("end", UPDATING, worker, later=False),
    "before it updates the next piece": lambda worker: in_piece("end", UPDATING, worker, later=True),
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


MOMENTS_OF_TWO = [(worker, each) for each in MOMENTS for worker in (0, 1) if worker or "sum" not in each]
"""Those of two workers, of which the second one adds the only block."""

QUICK = {
    (0, "before it computes"),
    (1, "having written its rows"),
    (1, "having copied a sum"),
    (0, "in the midst of an update"),
    (0, "between two steps"),
}


def marked(worker: int, moment: str) -> Any:
    return pytest.param(worker, moment, marks=() if (worker, moment) in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(("worker", "moment"), [marked(worker, moment) for worker, moment in MOMENTS_OF_TWO])
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


@pytest.mark.slow
@pytest.mark.parametrize("workers", [3, 5])
@pytest.mark.parametrize("moment", [moment for moment in MOMENTS if "piece" in moment or "sum" in moment])
def test_who_stands_in_for_a_worker_that_died_in_a_piece_may_die_in_the_same_one(
    moment: str, workers: int, tmp_path: Path, undisturbed: Callable[[Recipe], Outcome]
) -> None:
    last = workers - 1  # which adds the only block
    outcome = run(gpt(), workers, tmp_path / "it", both(MOMENTS[moment], last, 0), restarts=3)
    assert outcome.digest == undisturbed(gpt()).digest
    assert [event["version"] for event in told(outcome, "run_started")] == [0]
    dead = {last} if moment == "with a sum to copy" else {0, last}  # who stands in need not put it together again
    assert {event["worker"] for event in told(outcome, "stood_in")} == dead
    assert outcome.result["restarts"] == len(dead)


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
    hooks = all_of(MOMENTS["before it computes"](1), standing_in, building, waiting_for_successors)
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


def test_where_a_worker_kept_what_others_do_not_see_the_team_goes_back_to_its_last_checkpoint(
    tmp_path: Path, undisturbed: Callable[[Recipe], Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_state, "_COPIES", 0)  # no optimizer is known to keep as much as does not fit
    doing = "it kept state of its optimizer where others do not see it"
    outcome = run(gpt(), 2, tmp_path / "it", MOMENTS["in the midst of an update"](1), checkpoint_every=2)
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
