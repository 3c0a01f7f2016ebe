"""Workers of several hosts that lose others in the midst of a step keep what they have computed of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from instep.clock.network import gather_bytes, reduce_bytes
from instep.engines.between_steps import BetweenSteps
from instep.engines.seat import Seat
from instep.engines.sharding import Sharded
from instep.engines.step_facts import StepFacts
from instep.engines.total import Total
from instep.engines.trial import Trial
from instep.recipe import Recipe, Team
from instep.reduce.layout import BLOCK
from instep.reduce.reduction import Reduction
from instep.reduce.tree import worker_ranges
from instep.team.session import Session
from instep.worker.replica import Replica
from instep.worker.updates import Updates
from support import workloads
from support.agents import train_on
from support.deaths import Deaths, Hooks, after, all_of, before
from support.harness import Outcome, told, train_here
from support.kinds import quick

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("agents_meet_here")]

STEPS, MICROBATCHES = 6, 8


@pytest.fixture(autouse=True)
def _blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model has many, so that each worker adds some."""
    monkeypatch.setitem(BLOCK, "cpu", 64)


def run_on(
    agents: Sequence[int], workers: int, folder: Path, hooks: Hooks, recipe: Recipe, *, come: bool = False
) -> Outcome:
    """come: whether successors take part, of others than worker 0 too, without whom its host may have nobody."""
    deaths, init = Deaths(folder), Session.__init__

    def noted(session: Session, assignment: Any, number: int, *others: Any) -> None:
        deaths.born(number, assignment.incarnation)
        while assignment.incarnation and number and not come:
            time.sleep(0.1)  # until it is ended
        init(session, assignment, number, *others)

    folder.mkdir()
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(Session, "__init__", noted))
        for owner, methods in hooks(deaths).items():
            patches.enter_context(mock.patch.multiple(owner, **methods))
        team = Team(workers=workers, lease_s=60.0, restarts=9, checkpoint_every=100, keep=0)
        return train_on(agents, recipe, team, folder / "run")[0]


def made(name: str = "gpt", **changes: Any) -> Recipe:
    fields = {"steps": STEPS, "evaluate_every": 0, "batch": 24, "microbatches": MICROBATCHES, **changes}
    return workloads.ALL[name](**fields)


def computed(run: Outcome, version: int) -> list[int]:
    """Microbatches of an update that the tape tells were computed, as often."""
    spans = [event["microbatches"] for event in told(run, "computed") if event["version"] == version]
    return sorted(microbatch for start, stop in spans for microbatch in range(start, stop))


def came_through(run: Outcome, folder: Path, dead: Collection[int], name: str = "gpt") -> None:
    """One digest, all updates told of once, no checkpoint loaded; nothing computed twice but what the `dead` had."""
    assert run.digest == train_here(made(name), Team(), folder / "alone").digest
    assert [event["version"] for event in told(run, "merged")] == list(range(1, STEPS + 1))
    assert [event["version"] for event in told(run, "run_started")] == [0]
    for version in range(STEPS):
        more = Counter(computed(run, version))
        more.subtract(range(MICROBATCHES))
        assert {microbatch for microbatch, count in more.items() if count} <= set(dead), (version, more)
        assert set(more.values()) <= {-1, 0, 1}, "what the dead have told last may be lost"
    nbytes, teams = 4 * Replica(made(name), "cpu").size, [len(event["contributions"]) for event in told(run, "merged")]
    least = sum(reduce_bytes(workers, nbytes, workers) + gather_bytes(workers, nbytes) for workers in teams)
    assert run.result["bytes_sent"] >= least, "not of the last group alone"


def early(deaths: Deaths) -> dict[Any, dict[str, Any]]:
    """Has gradients travel early in every step after the first."""
    return {Trial: {"next": lambda self: True}}


MOMENTS: dict[str, Callable[[int], Hooks]] = {
    "before it computes": lambda worker: before(Seat, "compute", worker),
    "having computed": lambda worker: after(Seat, "compute", worker),
    "before it adds its cut": lambda worker: before(Total, "add", worker, calls=4),
    "having added its cut": lambda worker: after(Total, "add", worker, calls=4),
    "before it tells": lambda worker: before(StepFacts, "gather", worker, calls=5),
    "having heard of all": lambda worker: after(StepFacts, "gather", worker, calls=5),
    "before it has the sum": lambda worker: before(Total, "wait", worker, calls=4),
    "before its update": lambda worker: before(Updates, "make", worker, 3),
}
TEAMS = [((1, 1), 2), ((1, 1), 4), ((1, 1, 1), 3), ((1, 1, 1, 1), 4)]
CASES = [*product(MOMENTS, TEAMS, [0, 1])]
QUICK = [
    ("before it computes", ((1, 1, 1), 3), 1),
    ("having added its cut", ((1, 1), 4), 1),
]


def range_of(worker: int, workers: int) -> range:
    return range(*worker_ranges(MICROBATCHES, workers)[worker])


@pytest.mark.parametrize("case", quick(CASES, *QUICK), ids=str)
def test_whenever_a_worker_dies_in_a_step_only_its_microbatches_are_computed_again(
    case: tuple[str, tuple[Sequence[int], int], int], tmp_path: Path
) -> None:
    moment, (agents, workers), who = case
    run = run_on(agents, workers, tmp_path / "it", MOMENTS[moment](who), made())
    came_through(run, tmp_path, range_of(who, workers))


EARLY = [*product(["having computed", "having added its cut", "before it tells"], TEAMS)]


@pytest.mark.slow
@pytest.mark.parametrize("case", EARLY, ids=str)
def test_gradients_that_have_begun_to_travel_are_kept(
    case: tuple[str, tuple[Sequence[int], int]], tmp_path: Path
) -> None:
    moment, (agents, workers) = case
    run = run_on(agents, workers, tmp_path / "it", all_of(MOMENTS[moment](1), early), made())
    came_through(run, tmp_path, range_of(1, workers))


@pytest.mark.slow
@pytest.mark.parametrize("team", TEAMS[1:], ids=str)
def test_what_microbatches_left_in_buffers_is_kept(team: tuple[Sequence[int], int], tmp_path: Path) -> None:
    agents, workers = team
    run = run_on(agents, workers, tmp_path / "it", MOMENTS["having added its cut"](1), made("convnet"))
    came_through(run, tmp_path, range_of(1, workers), "convnet")


@pytest.mark.slow
@pytest.mark.parametrize("team", TEAMS[1:], ids=str)
def test_a_second_death_while_the_step_is_done_again_costs_no_more_than_its_own(
    team: tuple[Sequence[int], int], tmp_path: Path
) -> None:
    """Before the second has computed what lacked, and after."""
    agents, workers = team
    last = workers - 1
    for name, second in (("before", before), ("after", after)):
        hooks = all_of(MOMENTS["having added its cut"](1), second(Seat, "compute", last, calls=5))
        run = run_on(agents, workers, tmp_path / name, hooks, made())
        came_through(run, tmp_path / name, {*range_of(1, workers), *range_of(last, workers)})


@pytest.mark.slow
def test_who_dies_while_it_adds_what_a_host_shares_costs_that_host_its_part_and_others_nothing(tmp_path: Path) -> None:
    run = run_on((1, 1), 4, tmp_path / "it", before(Reduction, "add", 3, calls=7), made())
    came_through(run, tmp_path, {*range_of(2, 4), *range_of(3, 4)})


@pytest.mark.parametrize(
    "second", [pytest.param(None, marks=pytest.mark.slow), 3], ids=["one is lost", "one of each host is lost"]
)
def test_who_is_left_of_a_host_has_the_optimizers_state_of_who_is_lost(second: int | None, tmp_path: Path) -> None:
    """No other host gives it to them, and successors have it from them."""
    hooks = MOMENTS["before it computes"](1)
    if second is not None:
        hooks = all_of(hooks, MOMENTS["before it adds its cut"](second))
    run = run_on((1, 1), 4, tmp_path / "it", hooks, made(), come=second is None)
    lost = {1} if second is None else {1, second}
    came_through(run, tmp_path, {microbatch for worker in lost for microbatch in range_of(worker, 4)})
    given = [number for event in told(run, "regrouped") for number in event["given"]]
    assert set(given) <= lost
    assert len(given) == len(set(given))


@pytest.mark.slow
def test_a_host_one_of_whose_workers_dies_in_an_update_is_given_all_by_another(tmp_path: Path) -> None:
    run = run_on((1, 1), 4, tmp_path / "it", before(Sharded, "update", 3), made())
    came_through(run, tmp_path, range_of(3, 4))
    assert 2 in told(run, "regrouped")[0]["given"]


@pytest.mark.slow
@pytest.mark.parametrize("agents", [(1, 1), (1, 1, 1)], ids=str)
def test_who_is_alone_after_all_others_are_lost_goes_on_with_what_they_shared(
    agents: Sequence[int], tmp_path: Path
) -> None:
    """The others die one after the other, and no successor comes before the end."""
    others = [before(Seat, "compute", 1, 2), before(Total, "add", 2, calls=4), after(Seat, "load_ahead", 3, 4)]
    run = run_on(agents, 4, tmp_path / "it", all_of(*others), made())
    assert run.digest == train_here(made(), Team(), tmp_path / "alone").digest
    assert [event["version"] for event in told(run, "merged")] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_checksums_that_the_first_worker_took_along_are_told_by_another(tmp_path: Path) -> None:
    run = run_on((1, 1), 4, tmp_path / "it", before(BetweenSteps, "checksums", 0, calls=4), made(checksum_every=1))
    assert run.digest == train_here(made(checksum_every=1), Team(), tmp_path / "alone").digest
    assert [event["version"] for event in told(run, "checksummed")] == list(range(1, STEPS + 1))
    assert told(run, "regrouped")[0]["workers"] == [1, 2, 3]
