"""A run that is asked to end, and loses a host before it has: what is left of it saves, and tells its result."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from instep.objectives.language import NextToken
from instep.recipe import Recipe, Team
from instep.team import parted, process
from instep.team.signals import Interrupted
from support import workloads
from support.agents import Followers, train_on
from support.harness import Client, stopping_at, train_here
from support.patience import LONG_S
from support.processes import wait_until
from support.threads import meanwhile

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("agents_meet_here")]

LAST = 4
"""The version at which the workers of the second host stand still."""


class StandingStill(NextToken):
    """Waits for ever at `LAST` where its process's parent is not this one; each has three microbatches a step."""

    def elsewhere_than(self, parent: int) -> StandingStill:
        object.__setattr__(self, "_parent", parent)
        object.__setattr__(self, "_left", 1 + 3 * LAST)  # the first is for the names of its terms
        return self

    def __call__(self, model: Any, batch: Any) -> Any:
        object.__setattr__(self, "_left", self._left - 1)
        if os.getppid() != self._parent and self._left < 0:
            signal.pause()
        return super().__call__(model, batch)


def stands_still(**changes: Any) -> Recipe:
    return workloads.gpt(**{"steps": 50, "objective": StandingStill().elsewhere_than(os.getpid()), **changes})


class Ending:
    """Has the run asked to end at version `LAST`, and then does something to the second host's agent or worker."""

    def __init__(self, number: int, of: str, folder: Path, agents: Sequence[int], **changes: Any):
        self._number, self._of = number, of
        self.recipe, self.agents, self.folder = stands_still(), agents, folder
        self.team = Team(workers=3, checkpoint_every=3, keep=0, lease_s=60.0, **changes)
        self.client = Client(self._see)
        self.pids: dict[int, int] = {}

    def _see(self, event: dict[str, Any]) -> None:
        if event["kind"] == "joined":
            self.pids[event["worker"]] = event["pid"]
        if event["kind"] == "merged" and event["version"] == LAST:
            self.client.ask_to_stop()
            if self._of == "agent":
                self.followers.kill(sum(self.agents[:1]), self._number)
            else:
                os.kill(self.pids[2], self._number)

    def run(self) -> Any:
        self.followers = Followers(self.recipe, self.team, self.agents, self.folder)
        run, _ = train_on(
            self.agents, self.recipe, self.team, self.folder / "run", client=self.client, followers=self.followers,
            told_s=0.0,
        )  # fmt: skip
        return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of version `LAST`, of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    client = stopping_at(LAST)
    return train_here(workloads.gpt(steps=50), Team(checkpoint_every=LAST), folder, client=client).digests[LAST]


@pytest.mark.parametrize(
    ("agents", "of", "number"),
    [((1, 1), "agent", signal.SIGKILL), ((2, 1), "agent", signal.SIGKILL), ((2, 1), "worker", signal.SIGKILL),
     pytest.param((2, 1), "worker", signal.SIGSTOP, marks=pytest.mark.slow)],
)  # fmt: skip
def test_who_is_left_of_a_team_that_is_to_end_saves_what_it_has(
    agents: tuple[int, ...], of: str, number: int, tmp_path: Path, alone: str
) -> None:
    ending = Ending(number, of, tmp_path, agents, **({"answer_timeout_s": 5.0} if number == signal.SIGSTOP else {}))
    run = ending.run()
    assert run.result["interrupted"]
    assert (run.result["steps"], run.digest) == (LAST, alone)
    assert run.digests == {3: run.digests[3], LAST: alone}
    assert run.result["restarts"] == 0
    assert any("host 1" in event["why"] for event in run.events if event["kind"] == "left")


@pytest.mark.parametrize("hangs", [False, True])
def test_a_team_that_cannot_save_any_more_ends_all_the_same_and_says_what_is_lost(
    hangs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tries(*_: object) -> bool:
        if hangs:
            signal.pause()
        return False

    monkeypatch.setattr(process._Keeper, "saved_without_others", tries)
    monkeypatch.setattr(parted, "BEREFT_S", 0.5 if hangs else 600.0)
    ending = Ending(signal.SIGKILL, "agent", tmp_path, (2, 1))
    with pytest.raises(Interrupted):
        ending.run()
    assert not (tmp_path / "run" / "result.json").exists()
    (told,) = (event["why"] for event in ending.client.events if "without having saved" in event.get("why", ""))
    assert told.startswith("the run ends without having saved version 4; its last checkpoint is version 3: it goes on")


@pytest.mark.slow
def test_a_run_that_is_asked_to_end_after_its_workers_have_noticed_a_loss_and_before_others_have_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: str
) -> None:
    """The agent of the host that was lost is stopped, so that its lease alone tells."""
    noticed, wait = tmp_path / "noticed", process.wait_for_others

    def waiting(*arguments: Any) -> Any:
        noticed.touch()
        return wait(*arguments)

    monkeypatch.setattr(process, "wait_for_others", waiting)
    recipe, who = stands_still(), Team(workers=3, checkpoint_every=3, keep=0, lease_s=5.0)
    pids: dict[int, int] = {}
    last = threading.Event()

    def see(event: dict[str, Any]) -> None:
        if event["kind"] == "joined":
            pids[event["worker"]] = event["pid"]
        if event["kind"] == "merged" and event["version"] == LAST:
            last.set()

    client = Client(see)
    followers = Followers(recipe, who, (2, 1), tmp_path)

    def act() -> None:
        assert last.wait(LONG_S)
        followers.kill(2, signal.SIGSTOP)
        os.kill(pids[2], signal.SIGKILL)
        wait_until(noticed.exists, LONG_S, "the loss to be noticed")
        client.ask_to_stop()

    with meanwhile(act, lambda: None):
        run, _ = train_on((2, 1), recipe, who, tmp_path / "run", client=client, followers=followers, told_s=0.0)
    assert run.result["interrupted"]
    assert (run.result["steps"], run.digest, run.result["restarts"]) == (LAST, alone, 0)
