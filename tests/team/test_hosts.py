"""Agents of several hosts: the same bits as on one, whatever happens to workers and hosts."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from instep.errors import RecipeError, WorkerError
from instep.objectives.language import NextToken
from instep.recipe import Recipe, Team
from instep.team import follower, meeting
from instep.team.agreement import TOO_LATE
from instep.team.place import Place
from support import workloads
from support.agents import Followers, Told, train_on
from support.harness import Client, stopping_at, train_here
from support.kinds import quick

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("agents_meet_here")]


TEAMS = [((1, 1), 3), ((1, 1, 1), 2), ((1, 1), 2), ((2, 1), 5), ((1, 1, 1), 5), ((1, 1, 1), 8)]


CASES = [(name, *team) for name, team in product(workloads.ALL, TEAMS)]


@pytest.mark.parametrize("case", quick(CASES, ("gpt", *TEAMS[0]), ("convnet", *TEAMS[1]), ("gpt", *TEAMS[3])), ids=str)
def test_hosts_give_the_bits_of_one_machine(case: tuple[str, tuple[int, ...], int], tmp_path: Path) -> None:
    name, agents, workers = case
    recipe = dataclasses.replace(workloads.ALL[name](), steps=3)
    run, told = train_on(agents, recipe, Team(workers=workers, checkpoint_every=1, keep=0), tmp_path / "run")
    assert run.digests == train_here(recipe, Team(checkpoint_every=1, keep=0), tmp_path / "alone").digests
    assert [each.result for each in told] == [run.result] * (sum(agents) - 1), "all agents have the result"


class Held(NextToken):
    """Waits, after so many microbatches of a process, until there is a file."""

    def until(self, file: Path, after: int = 13) -> Held:
        object.__setattr__(self, "_waits", (file, after))
        object.__setattr__(self, "_done", 0)
        return self

    def __call__(self, model: Any, batch: Any) -> Any:
        file, after = self._waits
        object.__setattr__(self, "_done", self._done + 1)
        while self._done > after and not file.exists():
            time.sleep(0.005)
        return super().__call__(model, batch)


def long(**changes: Any) -> Recipe:
    return workloads.gpt(**{"steps": 8, **changes})


def team(**changes: Any) -> Team:
    return Team(**{"workers": 3, "checkpoint_every": 2, "keep": 0, "lease_s": 60.0, **changes})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of `long` without hosts."""
    return train_here(long(), Team(), tmp_path_factory.mktemp("alone") / "run").digest


class Hold:
    """A recipe as `long`, whose workers of host 1 wait in step 5 until somebody has left; at version 4 `act` is
    called, and `then` when somebody has left.
    """

    def __init__(self, folder: Path, act: Callable[[], None], then: Callable[[], None] = lambda: None):
        file = self._file = folder / "somebody has left"
        self._act, self._then = act, then
        self.recipe = long(objective=Held().until(file))
        self.client = Client(self._see)
        self.pids: dict[int, int] = {}

    def _see(self, event: dict[str, Any]) -> None:
        if event["kind"] == "joined":
            self.pids[event["worker"]] = event["pid"]
        if event["kind"] == "checkpointed" and event["version"] == 4 and not self._file.exists():
            self._act()
        if event["kind"] == "left" and not self._file.exists():
            self._file.touch()
            self._then()


def left(events: list[dict[str, Any]]) -> list[str]:
    return [event["why"] for event in events if event["kind"] == "left"]


def test_without_a_worker_of_another_host_that_is_killed_the_others_go_on(tmp_path: Path, alone: str) -> None:
    hold = Hold(tmp_path, lambda: os.kill(hold.pids[1], signal.SIGKILL))
    run, told = train_on((1, 1), hold.recipe, team(), tmp_path / "run", client=hold.client)
    assert run.digest == alone == told[0].result["digest"]
    assert run.result["restarts"] == 1
    why, *later = left(run.events)
    assert set(later) <= {TOO_LATE}, "its successor may be there after the end"
    assert "worker 1 on host 1" in why
    assert "SIGKILL" in why
    assert [event["version"] for event in run.events if event["kind"] == "run_started"] == [0]


@pytest.mark.parametrize("number", quick([signal.SIGKILL, signal.SIGSTOP], signal.SIGKILL))
def test_without_a_host_that_is_lost_the_others_go_on(number: int, tmp_path: Path, alone: str) -> None:
    hold = Hold(tmp_path, lambda: followers.kill(1, number))
    who = team(lease_s=5.0)  # that of a host which is stopped is waited for
    followers = Followers(hold.recipe, who, (1, 1), tmp_path)
    run, _ = train_on((1, 1), hold.recipe, who, tmp_path / "run", client=hold.client, followers=followers, told_s=0.0)
    assert run.digest == alone
    assert "host 1" in left(run.events)[0]
    joined = [event["worker"] for event in run.events if event["kind"] == "joined"]
    assert joined.count(0) == 1, "its process went on"
    assert sorted(joined) in ([0, 1, 1, 2, 2], [0, 1, 2]), "the first host has all, unless the run ends before"


@pytest.mark.slow
def test_a_host_that_is_waited_for_comes_back(tmp_path: Path, alone: str) -> None:
    who = team(when_lost="wait")
    hold = Hold(tmp_path, lambda: followers.kill(1), lambda: followers.start_again(1))
    followers = Followers(hold.recipe, who, (1, 1), tmp_path, again=[1])
    run, told = train_on((1, 1), hold.recipe, who, tmp_path / "run", client=hold.client, followers=followers)
    assert told[0].error == ""
    assert run.digest == alone == told[0].result["digest"]
    assert run.result["restarts"] == 1


def test_a_stop_is_asked_for_by_any_host_and_saves(tmp_path: Path) -> None:
    recipe = long(steps=5000)

    def stop(event: dict[str, Any]) -> None:
        if event["kind"] == "checkpointed" and event["version"] == 2:
            followers.kill(1, signal.SIGTERM)

    followers = Followers(recipe, team(), (1, 1), tmp_path)
    run, told = train_on((1, 1), recipe, team(), tmp_path / "run", client=Client(stop), followers=followers)
    assert run.result["interrupted"]
    assert told[0].result == run.result
    version = run.result["versions"]
    later = stopping_at(version + 1)
    alone = train_here(recipe, Team(checkpoint_every=version), tmp_path / "alone", client=later)
    assert run.digest == alone.digests[version]


def test_what_raises_on_another_host_is_told_by_the_first(tmp_path: Path) -> None:
    class Broken(workloads.Sentences):
        def __getitem__(self, index: int) -> list[int]:
            if os.getppid() != parent and index > 20:
                raise ValueError("a torn page")
            return super().__getitem__(index)

    parent = os.getpid()
    data = workloads.Data(Broken(40), collate=workloads.padded)
    with pytest.raises(Exception, match="torn page") as error:
        train_on((1, 1), long(data=lambda: data), team(), tmp_path / "run")
    print(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch", 16), ("steps", 7), pytest.param("evaluate_every", 3, marks=pytest.mark.slow)],  # two in no fingerprint
)
def test_another_recipe_is_refused_by_its_field_and_host(
    field: str, value: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    followers = Followers(long(**{field: value}), team(), (1, 1), tmp_path)
    told: list[Told] = []
    end = followers.end
    monkeypatch.setattr(followers, "end", lambda: (told.extend(followers.told()), end()))
    with pytest.raises(RecipeError, match=rf"host 1 .* another recipe: recipe\.{field} is .* here and {value} there"):
        train_on((1, 1), long(), team(), tmp_path / "run", followers=followers)
    assert "the run failed, as agent 0 says on host 0" in told[0].error, "it ends too, and does not look for agent 0"


def test_who_does_not_come_is_named(tmp_path: Path) -> None:
    followers = Followers(long(), team(), (1, 1), tmp_path)
    followers.kill(1)
    with pytest.raises(WorkerError, match=r"no word came within 1 s from host 1"):
        train_on((1, 1), long(), team(join_timeout_s=1.0), tmp_path / "run", followers=followers)


def test_an_agent_that_looks_for_the_first_ends_as_soon_as_torchruns_store_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(place: Place) -> None:
        raise WorkerError("the torchrun that all meet at has ended.")

    monkeypatch.setattr(follower, "SAY_S", 600.0)
    monkeypatch.setattr(meeting, "check_open", gone)
    followers = Followers(long(), team(), (1, 1), tmp_path)
    (told,) = followers.told()
    followers.end()
    assert told.error == "WorkerError: the torchrun that all meet at has ended."


def test_an_agent_whose_first_is_lost_gives_up(tmp_path: Path) -> None:
    followers = Followers(long(), team(join_timeout_s=1.0), (1, 1), tmp_path)
    (told,) = followers.told()
    followers.end()
    assert "no answer came from agent 0 within 1 s" in told.error
