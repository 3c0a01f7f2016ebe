"""Teams whose processes kill themselves, with SIGKILL, at the moment wanted."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from instep.engines.standing_in import StandIn
from instep.recipe import Recipe, Team
from instep.team.session import Session
from support.harness import Client, Outcome, told, train_here

STEPS = 8


class Deaths:
    """Kills processes at given calls: each once, by worker, incarnation and step, in whatever process that is."""

    def __init__(self, folder: Path):
        self._folder, self._me = folder, (-1, -1)

    def born(self, worker: int, incarnation: int) -> None:
        self._me = worker, incarnation

    def are_of(self, worker: int) -> bool:
        """Whether this process is the first one of that worker."""
        return self._me == (worker, 0)

    def at(self, worker: int, where: str, incarnation: int = 0) -> None:
        """Ends this process for good, if it is that one and has not died there."""
        if self._me == (worker, incarnation):
            try:
                os.close(os.open(self._folder / f"{worker} {incarnation} {where}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)


Hooks = Callable[[Deaths], dict[Any, dict[str, Any]]]
"""For some classes, what is to stand in for methods of theirs while the team is forked."""


def run(
    recipe: Recipe,
    workers: int,
    folder: Path,
    hooks: Hooks = lambda deaths: {},
    client: Client | None = None,
    *,
    resume: bool = False,
    **team: Any,
) -> Outcome:
    deaths, init = Deaths(folder), Session.__init__

    def noted(session: Session, assignment: Any, number: int, *others: Any) -> None:
        deaths.born(number, assignment.incarnation)
        init(session, assignment, number, *others)

    folder.mkdir(exist_ok=resume)
    with mock.patch.object(Session, "__init__", noted):
        patches = [mock.patch.multiple(owner, **methods) for owner, methods in hooks(deaths).items()]
        for patch in patches:
            patch.start()
        try:
            return train_here(recipe, Team(workers=workers, **team), folder / "run", client=client, resume=resume)
        finally:
            for patch in patches:
                patch.stop()


def came_through(outcome: Outcome, undisturbed: Outcome, deaths: int) -> None:
    """The digest, each update told of once and in order, and no checkpoint loaded."""
    assert outcome.digest == undisturbed.digest
    assert [event["version"] for event in told(outcome, "merged")] == list(range(1, STEPS + 1))
    assert [event["version"] for event in told(outcome, "run_started")] == [0]
    assert len(told(outcome, "left")) == outcome.result["restarts"] == outcome.result["stood_in"] == deaths
    assert "stood_in" not in undisturbed.result


def computed_again(outcome: Outcome) -> int:
    """Microbatches that were computed once more, as far as the tape tells."""
    return sum(stop - start for start, stop in (event["microbatches"] for event in told(outcome, "stood_in")))


# In which method of which class a worker dies; with a step as the first argument there, in step 3.


def before(owner: Any, name: str, worker: int, step: int = 3, *, calls: int = 0) -> Hooks:
    """calls: which call it is, counted from 1, where the step is none of its arguments."""
    return _in_call(owner, name, worker, step, calls, later=False)


def after(owner: Any, name: str, worker: int, step: int = 3, *, calls: int = 0) -> Hooks:
    return _in_call(owner, name, worker, step, calls, later=True)


def _in_call(owner: Any, name: str, worker: int, step: int, calls: int, *, later: bool) -> Hooks:
    def hooks(deaths: Deaths) -> dict[Any, dict[str, Any]]:
        whole, made = getattr(owner, name), [0]

        def dying(self: Any, *args: Any, **named: Any) -> Any:
            made[0] += 1
            here = made[0] == calls if calls else args[0] == step
            if here and not later:
                deaths.at(worker, name)
            found = whole(self, *args, **named)
            if here and later:
                deaths.at(worker, name)
            return found

        return {owner: {name: dying}}

    return hooks


def all_of(*several: Hooks) -> Hooks:
    """Of different methods."""

    def hooks(deaths: Deaths) -> dict[Any, dict[str, Any]]:
        found: dict[Any, dict[str, Any]] = {}
        for each in several:
            for owner, methods in each(deaths).items():
                assert not found.get(owner, {}).keys() & methods.keys(), "of different methods"
                found.setdefault(owner, {}).update(methods)
        return found

    return hooks


def waiting_for_successors(deaths: Deaths) -> dict[Any, dict[str, Any]]:
    """Has all places be given to successors after the step, however long they take to come."""
    between = StandIn.between

    def waiting(self: StandIn, *args: Any) -> None:
        while any(not self._successors.ready(worker) for worker in self.holds):
            time.sleep(0.002)
        between(self, *args)

    return {StandIn: {"between": waiting}}
