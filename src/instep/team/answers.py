"""What an agent tells while its run goes on: its client, who holds the others up; the run's owner, what that asks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, Self

from instep.errors import RecipeError
from instep.recipe import Team
from instep.record.events import Event, MergedEvent
from instep.rules import UpdateRule
from instep.team.control import Asked, AskStacks, AskTeam, AskWorkers, Control
from instep.team.crew import LocalCrew
from instep.team.crews import Crew
from instep.team.messages import HeldUp
from instep.team.standing import WAITS_S, TeamStanding
from instep.team.wire_messages import Shown
from instep.team_checks import check_workers

STACKS_S = 5.0
"""Seconds that stacks are awaited; other hosts tell theirs once a second."""

TELL_S = 1.0
"""Seconds between two words on who holds the others up."""


def why_not(rule: UpdateRule, microbatches: int, team: Team, workers: int) -> str:
    """Why the team cannot go on with so many workers; "" if it can."""
    if team.device == "cuda":
        return "each worker has a GPU of its own; end the run, and resume it with --workers."
    try:
        check_workers(rule, microbatches, replace(team, workers=workers))
    except RecipeError as error:
        return error.message
    return ""


class Answers:
    """For one run. clock: seconds since its start. crews: of all hosts, this one's first. restarts: so far. tell: sends
    the client a word, which is for no tape. resize: has the team go on with so many workers, as somebody of this name
    asks; gives how many it was to have, and why it cannot be, if so. serving: whether there is a server.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        crews: Callable[[], Sequence[Crew]],
        restarts: Callable[[], int],
        tell: Callable[[HeldUp], None],
        resize: Callable[[int, str], tuple[int, str]],
        *,
        serving: bool,
    ):
        self._clock, self._crews, self._restarts, self._tell = clock, crews, restarts, tell
        self._resize, self._standing = resize, TeamStanding(serving=serving)
        self._control: Control | None = None
        self._stacks: tuple[Asked, set[int], float] | None = (
            None  # who asks, for whose, and until when they are awaited
        )
        self._told_s, self._told = 0.0, False

    def listening(self, run_folder: int) -> Self:
        """The same, for a ``with`` in which it can be asked by the socket in the run folder, a descriptor, if it can
        have one: a run needs none.
        """
        with contextlib.suppress(OSError):
            self._control = Control(run_folder)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._over()
        control, self._control = self._control, None
        if control is not None:
            control.close()

    def _over(self) -> None:
        """Nobody waits any more."""
        if self._told:
            self._told = False
            self._tell(HeldUp())

    @property
    def opened(self) -> list[Any]:
        """What is open here that no worker needs."""
        return self._control.opened if self._control is not None else []

    def begin(self, workers: int) -> None:
        """A team of so many starts."""
        self._standing.begin(workers)

    def note(self, event: Event) -> None:
        """What has happened, as the tape tells it."""
        self._standing.note(event)
        if isinstance(event, MergedEvent):  # of a step that all have computed
            self._over()

    def sources(self) -> list[Any]:
        """What to wait for, to be read."""
        return self._control.sources() if self._control is not None else []

    def senders(self) -> list[Any]:
        """Who has something to be sent."""
        return self._control.senders() if self._control is not None else []

    def hear(self, ready: Collection[Any]) -> None:
        """Answers what was asked."""
        for asked in self._control.hear(ready) if self._control is not None else ():
            self._answer(asked)

    def _answer(self, asked: Asked) -> None:
        match asked.question:
            case AskTeam():
                asked.answer(self._table())
            case AskStacks(numbers) if self._stacks is None:
                self._stacks = asked, set(numbers), time.monotonic() + STACKS_S
                for crew in self._crews():
                    crew.ask_for_stacks(numbers)
            case AskWorkers(workers):
                before, why = self._resize(workers, asked.caller.name)
                asked.answer({"error": why} if why else {"workers": workers, "before": before})
            case AskStacks():
                asked.answer({"error": "somebody else asks for stacks at this moment; ask again."})

    def _table(self) -> dict[str, Any]:
        loaders = [each for crew in self._crews() for each in crew.loaders_shown()]
        return self._standing.table(self._shown(), self._clock(), self._restarts(), loaders)

    def _look_for_stacks(self) -> None:
        """Answers who has asked for stacks, once all are there that come in time."""
        if self._stacks is None:
            return
        asked, numbers, until = self._stacks
        found = {number: text for crew in self._crews() for number, text in crew.stacks().items()}
        table = self._table()
        awaited = [each for each in table["members"] if each["number"] in numbers and not each["stopped"]]
        if all(each["number"] in found for each in awaited) or time.monotonic() > until:
            self._stacks = None
            for each in table["members"]:
                each["stack"] = found.get(each["number"])
            asked.answer(table)

    def _shown(self) -> list[Shown]:
        return [each for crew in self._crews() for each in crew.shown()]

    def look(self) -> None:
        """Tells who has the others wait, as long as somebody does, and once when it is over."""
        self._look_for_stacks()
        own, *others = self._crews()
        assert isinstance(own, LocalCrew), "this host is the first"
        now_s = self._clock()
        one = self._standing.holds_up(self._shown()) if others or own.someone_waits(now_s - WAITS_S) else None
        if one is None:
            self._over()
        elif not self._told or time.monotonic() - self._told_s >= TELL_S:
            self._told_s, self._told = time.monotonic(), True
            doing = "stopped (SIGSTOP or a debugger)" if one.stopped else one.doing or "starting"
            self._tell(HeldUp(self._standing.name(one), doing, round(max(0.0, now_s - one.doing_s), 3)))
