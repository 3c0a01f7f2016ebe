"""Who dies as a team on one machine begins costs the others no new start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from instep.engines.lockstep import Lockstep
from instep.engines.sharding import Sharded
from instep.engines.shared_state import SharedState
from instep.recipe import Team
from instep.team.session import Session
from support import workloads
from support.deaths import STEPS, Hooks, before, run
from support.harness import Outcome, stopping_at, told, train_here

pytestmark = pytest.mark.processes

RECIPE = workloads.gpt(steps=STEPS, evaluate_every=0)
READY = {
    "as it builds": lambda worker: before(Session, "build", worker, calls=1),
    "before it is ready": lambda worker: before(Session, "ready", worker, calls=1),
}
BEGUN = {
    "taking the group into use": lambda worker: before(Sharded, "attach", worker, calls=1),
    "with half of its state there": lambda worker: before(SharedState, "keep", worker, calls=1),
    "in the group": lambda worker: before(Lockstep, "run", worker, calls=1),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_here(RECIPE, Team(), tmp_path_factory.mktemp("undisturbed") / "run").digest


def params(names: Any, *quick: str) -> list[Any]:
    found = [(name, worker) for name in names for worker in (0, 1)]
    return [
        pytest.param(
            *each, id=f"{each[0]} {each[1]}", marks=() if f"{each[0]} {each[1]}" in quick else pytest.mark.slow
        )
        for each in found
    ]


def pids(outcome: Outcome, worker: int) -> list[int]:
    return [event["pid"] for event in told(outcome, "joined") if event["worker"] == worker]


def once_each(outcome: Outcome, first: int = 0) -> None:
    """One start, each step once, and one process alone that came for another."""
    assert [event["version"] for event in told(outcome, "run_started")][-1:] == [first]
    assert [event["version"] for event in told(outcome, "merged")] == list(range(1, STEPS + 1))
    assert outcome.result["restarts"] == 1


@pytest.mark.parametrize(("name", "worker"), params(READY, "before it is ready 0", "as it builds 1"))
def test_one_that_dies_before_all_are_ready_has_a_successor_that_begins_with_them(
    name: str, worker: int, tmp_path: Path, undisturbed: str
) -> None:
    hooks: Hooks = READY[name](worker)
    outcome = run(RECIPE, 2, tmp_path / "it", hooks)
    assert outcome.digest == undisturbed
    once_each(outcome)
    assert (len(pids(outcome, worker)), len(pids(outcome, 1 - worker))) == (2, 1)
    assert "stood_in" not in outcome.result


@pytest.mark.parametrize(
    ("name", "worker"), params(BEGUN, "taking the group into use 0", "with half of its state there 1")
)
def test_one_that_dies_before_it_is_in_the_first_group_is_stood_in_for(
    name: str, worker: int, tmp_path: Path, undisturbed: str
) -> None:
    outcome = run(RECIPE, 2, tmp_path / "it", BEGUN[name](worker))
    assert outcome.digest == undisturbed
    once_each(outcome)
    assert outcome.result["stood_in"] == 1
    assert len(pids(outcome, 1 - worker)) == 1
    assert not told(outcome, "warned")


@pytest.mark.parametrize("worker", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_what_a_checkpoint_holds_of_its_share_is_there_though_it_dies_as_all_resume(
    worker: int, tmp_path: Path, undisturbed: str
) -> None:
    stopped = run(RECIPE, 3, tmp_path / "it", client=stopping_at(3))
    assert stopped.result["versions"] == 4
    outcome = run(RECIPE, 3, tmp_path / "it", BEGUN["with half of its state there"](worker), resume=True)
    assert outcome.digest == undisturbed
    assert (outcome.result["restarts"], outcome.result["stood_in"]) == (1, 1)
    assert [event["version"] for event in outcome.events if event["kind"] == "merged"][-4:] == [5, 6, 7, 8]
