"""Who dies as a team on one machine changes its number in place costs nobody a step, whenever that is."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from instep.engines.between_steps import BetweenSteps
from instep.engines.lockstep import Lockstep
from instep.engines.sharding import Sharded
from instep.engines.shared_state import SharedState
from instep.recipe import Team
from instep.record import checkpoint
from instep.team import process, regrouped
from instep.team.asking import resized
from support.deaths import Hooks, after, all_of, before, run
from support.harness import Client, Outcome, told, train_here
from support.paced import Paced, check_in_place, pid_of
from support.regression import squares
from support.threads import meanwhile

pytestmark = pytest.mark.processes


@pytest.fixture(autouse=True)
def no_checkpoint_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Any:
        raise AssertionError(f"{path} was loaded")

    monkeypatch.setattr(checkpoint, "load", refuse)


def suffered(hooks: Hooks, number: int, wanted: int, folder: Path, *, last: int | None = None) -> tuple[Outcome, Paced]:
    """A run of so many workers who are to be `wanted`, and come to be `last`, with what befalls them meanwhile."""
    paced, client = Paced(folder), Client()
    count = wanted if last is None else last

    def whole() -> bool:
        groups, merged = told(client, "regrouped"), told(client, "merged")
        if not groups or len(groups[-1]["workers"]) != count or merged[-1]["version"] <= groups[-1]["version"]:
            return False
        later = client.events[client.events.index(groups[-1]) :]
        lost = {event["worker"] for event in later if event["kind"] == "left"} & {*groups[-1]["workers"]}
        return lost <= {event["worker"] for event in later if event["kind"] == "took_place"}

    def act() -> None:
        paced.until(lambda: bool(told(client, "merged")), "a step")
        resized(folder / "team" / "run", wanted)
        paced.until(whole, "the team that was asked for")

    with meanwhile(act, paced.go_on):
        team = {"restarts": 3, "checkpoint_every": paced.steps}
        return run(paced.recipe, number, folder / "team", hooks, client, **team), paced


TELLS = "told to leave its group"
LEFT = "having left it"
LOOKS = "before it is in the next"
TOLD = "having told what it has"
ATTACHES = "taking that into use"
HALF = "with half of its state there"
IN = "in it"

MOMENTS = {
    TELLS: lambda worker, groups: before(BetweenSteps, "part", worker, calls=1),
    LEFT: lambda worker, groups: before(process, "wait_for_others", worker, calls=1),
    LOOKS: lambda worker, groups: before(regrouped, "_group", worker, calls=1),
    TOLD: lambda worker, groups: after(regrouped, "_held", worker, calls=1),
    ATTACHES: lambda worker, groups: before(Sharded, "attach", worker, calls=groups),
    HALF: lambda worker, groups: before(SharedState, "keep", worker, calls=groups),
    IN: lambda worker, groups: before(Lockstep, "run", worker, calls=groups),
}
QUICK = {(TELLS, 1, 3), (LEFT, 0, 3), (TOLD, 0, 3), (HALF, 1, 3), (LEFT, 1, 2)}


def cases() -> list[Any]:
    found = []
    for wanted, start in ((3, 2), (2, 3)):
        for moment in MOMENTS:
            for worker in (0, 1):
                slow = (moment, worker, wanted) not in QUICK
                marks = pytest.mark.slow if slow else ()
                found.append(pytest.param(moment, worker, start, wanted, id=f"{moment} {worker} {wanted}", marks=marks))
    return found


@pytest.mark.parametrize(("moment", "worker", "start", "wanted"), cases())
def test_the_others_go_on_and_the_change_comes_about(
    moment: str, worker: int, start: int, wanted: int, tmp_path: Path
) -> None:
    made, paced = suffered(MOMENTS[moment](worker, 2), start, wanted, tmp_path)
    check_in_place(made, paced, tmp_path / "alone")
    assert (made.result["restarts"], made.result["workers"]) == (1, wanted)
    lost = [event["worker"] for event in told(made, "left") if "SIGKILL" in event["why"]]
    assert lost == [worker]
    assert not told(made, "warned")


@pytest.mark.parametrize("moment", [pytest.param(TELLS, marks=pytest.mark.slow), LEFT])
def test_who_dies_that_was_to_leave_is_missed_by_nobody(moment: str, tmp_path: Path) -> None:
    made, paced = suffered(MOMENTS[moment](2, 2), 3, 2, tmp_path)
    check_in_place(made, paced, tmp_path / "alone")
    assert made.result["workers"] == 2
    assert made.result["restarts"] == (moment == TELLS)


@pytest.mark.parametrize("moment", [pytest.param(LOOKS, marks=pytest.mark.slow), TOLD, ATTACHES])
def test_a_newcomer_that_dies_in_its_first_group_leaves_the_others_as_they_were(moment: str, tmp_path: Path) -> None:
    made, paced = suffered(MOMENTS[moment](2, 1), 2, 3, tmp_path, last=2)
    check_in_place(made, paced, tmp_path / "alone")
    assert [(each["before"], each["workers"]) for each in told(made, "resized")] == [(2, 3), (3, 2)]
    assert (made.result["restarts"], made.result["workers"]) == (0, 2)


def test_all_but_one_may_die_before_the_next_group_is_formed(tmp_path: Path) -> None:
    dies = all_of(MOMENTS[LOOKS](0, 2), before(process, "wait_for_others", 1, calls=2))
    made, paced = suffered(dies, 3, 4, tmp_path)
    check_in_place(made, paced, tmp_path / "alone")
    assert (made.result["restarts"], made.result["workers"]) == (2, 4)


def test_one_that_came_to_be_alone_and_dies_has_a_successor_that_goes_on_from_memory(tmp_path: Path) -> None:
    path, paced, client, remember = tmp_path / "run", Paced(tmp_path), Client(), 3

    def act() -> None:
        paced.until(lambda: bool(told(client, "merged")), "a step")
        resized(path, 1)
        paced.until(lambda: bool(told(client, "regrouped")), "one")
        alone_since = told(client, "regrouped")[0]["version"]
        paced.until(lambda: told(client, "merged")[-1]["version"] > alone_since + remember, "some steps of its own")
        os.kill(pid_of(client, 0), signal.SIGKILL)
        paced.until(lambda: len(told(client, "run_started")) == 2, "its successor")

    with meanwhile(act, paced.go_on):
        team = Team(workers=2, restarts=1, remember=remember, checkpoint_every=paced.steps)
        made = train_here(paced.recipe, team, path, client=client)
    once = [event["version"] for event in told(made, "merged")]
    assert made.digest == train_here(replace(paced.recipe, objective=squares), Team(), tmp_path / "alone").digest
    assert sorted({*once}) == list(range(1, paced.steps + 1))
    assert len(once) - len({*once}) <= remember
    _, again = told(made, "run_started")
    assert (again["remembered"], again["team"]["workers"]) == (True, 1)
    assert again["version"] > 0


def test_one_that_is_alone_and_dies_as_another_comes_is_remembered_by_both(tmp_path: Path) -> None:
    paced, client = Paced(tmp_path), Client()

    def act() -> None:
        paced.until(lambda: len(told(client, "merged")) > 3, "a step")
        resized(tmp_path / "team" / "run", 2)
        paced.until(lambda: len(told(client, "run_started")) == 2, "both")

    dies = MOMENTS[TOLD](0, 2)
    with meanwhile(act, paced.go_on):
        team = {"restarts": 1, "remember": 2, "checkpoint_every": paced.steps}
        made = run(paced.recipe, 1, tmp_path / "team", dies, client, **team)
    assert made.digest == train_here(replace(paced.recipe, objective=squares), Team(), tmp_path / "alone").digest
    again = told(made, "run_started")[1]
    assert (again["remembered"], again["team"]["workers"]) == (True, 2)
    assert again["version"] > 0
    assert made.result["restarts"] == 1
