"""Agents of several hosts: the same bits as on one, whatever happens to workers and hosts."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instep.errors import RecipeError, WorkerError
from instep.recipe import Recipe, Team
from instep.team import hosts
from support import workloads
from support.agents import Followers, meet_here, train_on
from support.harness import Client, act_on, stopping_at, train_here
from support.kinds import quick

pytestmark = pytest.mark.processes


@pytest.fixture(autouse=True)
def _meeting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meet_here(monkeypatch, tmp_path)
    monkeypatch.setattr(hosts, "FAREWELL_S", 1.0)


TEAMS = [((1, 1), 3), ((1, 1, 1), 2), ((1, 1), 2), ((2, 1), 5), ((1, 1, 1), 5), ((1, 1, 1), 8)]


@pytest.mark.parametrize("case", quick(TEAMS, *TEAMS[:2]))
@pytest.mark.parametrize("name", quick(list(workloads.ALL), "gpt", "convnet"))
def test_hosts_give_the_bits_of_one_machine(name: str, case: tuple[tuple[int, ...], int], tmp_path: Path) -> None:
    agents, workers = case
    recipe = dataclasses.replace(workloads.ALL[name](), steps=3)
    alone = train_here(recipe, Team(checkpoint_every=1, keep=0), tmp_path / "alone")
    run, told = train_on(agents, recipe, Team(workers=workers, checkpoint_every=1, keep=0), tmp_path / "run")
    assert run.digests == alone.digests
    assert [each.result for each in told] == [run.result] * (sum(agents) - 1), "all agents have the result"


def long(**changes: Any) -> Recipe:
    return workloads.gpt(**{"steps": 8, **changes})


def team(**changes: Any) -> Team:
    return Team(**{"workers": 3, "checkpoint_every": 2, "keep": 0, "lease_s": 1.5, "give_up_s": 2.0, **changes})


def at_version(version: int, act: Callable[[], None]) -> Client:
    """A client that acts once the version is saved."""
    done: list[bool] = []

    def see(event: dict[str, Any]) -> None:
        if event["kind"] == "checkpointed" and event["version"] >= version and not done:
            done.append(True)
            act()

    return Client(see)


def left(events: list[dict[str, Any]]) -> list[str]:
    return [event["why"] for event in events if event["kind"] == "left"]


def test_a_killed_worker_of_another_host_starts_the_team_again(tmp_path: Path) -> None:
    expected = train_here(long(), Team(), tmp_path / "alone").digest
    client = Client(act_on("checkpointed", lambda pid: os.kill(pid, signal.SIGKILL), version=4))
    run, told = train_on((1, 1), long(), team(), tmp_path / "run", client=client)
    assert run.digest == expected == told[0].result["digest"]
    assert run.result["restarts"] == 1
    (why,) = left(run.events)
    assert "worker 1 on host 1" in why
    assert "SIGKILL" in why
    assert [event["version"] for event in run.events if event["kind"] == "run_started"] == [0, 4]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_without_a_host_that_is_lost_the_others_go_on(number: int, tmp_path: Path) -> None:
    expected = train_here(long(), Team(), tmp_path / "alone").digest
    followers = Followers(long(), team(), (1, 1), tmp_path)
    client = at_version(4, lambda: followers.kill(1, number))
    began = time.monotonic()
    run, _ = train_on((1, 1), long(), team(), tmp_path / "run", client=client, followers=followers, told_s=0.0)
    assert time.monotonic() - began < 10
    assert run.digest == expected
    (why,) = left(run.events)
    assert "host 1" in why
    assert sum(event["kind"] == "joined" for event in run.events) == 6


def test_a_host_that_is_waited_for_comes_back(tmp_path: Path) -> None:
    expected = train_here(long(), Team(), tmp_path / "alone").digest
    followers = Followers(long(), team(when_lost="wait"), (1, 1), tmp_path, again=[1])

    def act() -> None:
        followers.kill(1)
        threading.Timer(0.5, followers.start_again, [1]).start()

    client = at_version(4, act)
    run, told = train_on((1, 1), long(), team(when_lost="wait"), tmp_path / "run", client=client, followers=followers)
    assert told[0].error == ""
    assert run.digest == expected == told[0].result["digest"]
    assert run.result["restarts"] == 1


def test_a_stop_is_asked_for_by_any_host_and_saves(tmp_path: Path) -> None:
    recipe = long(steps=500)
    followers = Followers(recipe, team(), (1, 1), tmp_path)
    client = at_version(2, lambda: followers.kill(1, signal.SIGTERM))
    run, told = train_on((1, 1), recipe, team(), tmp_path / "run", client=client, followers=followers)
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


def test_another_recipe_is_refused_by_its_field_and_host(tmp_path: Path) -> None:
    followers = Followers(long(batch=16), team(), (1, 1), tmp_path)
    with pytest.raises(RecipeError, match=r"host 1 .* another recipe: recipe\.batch is .* here and 16 there"):
        train_on((1, 1), long(), team(), tmp_path / "run", followers=followers)


def test_who_does_not_come_is_named(tmp_path: Path) -> None:
    followers = Followers(long(), team(), (1, 1), tmp_path)
    followers.kill(1)
    with pytest.raises(WorkerError, match=r"agents 1 \(host 1\) have not come within 1 s"):
        train_on((1, 1), long(), team(join_timeout_s=1.0), tmp_path / "run", followers=followers)


def test_an_agent_whose_first_is_lost_gives_up(tmp_path: Path) -> None:
    followers = Followers(long(), team(join_timeout_s=1.0), (1, 1), tmp_path)
    (told,) = followers.told(6)
    followers.end()
    assert "no answer came from agent 0 within 1 s" in told.error
