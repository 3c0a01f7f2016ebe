"""A process that is built and idle, to take the place of the first host's only worker at once, should that die.

It has the run folder at hand, and the store where the others find each other: where nobody of that host is in a group
the others wait for a successor, which takes a second or two to be started and built. Where a host has several workers
the others of it go on meanwhile.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from instep.errors import ResourceError
from instep.team.assigning import for_successor
from instep.team.messages import Assignment
from instep.team.orders import Member
from instep.team.processes import MemberProcesses
from instep.team.seats import successor_of

AFTER_S = 0.5
"""Seconds that the worker has been there before another is built beside it."""

Own = Callable[[Member, Assignment], Assignment]


class Spare:
    """Whether there is to be one, in one epoch. own: what a member is given of an assignment. unused: what is open here
    that it does not need.
    """

    def __init__(self, assignment: Assignment, host: int, own: Own, unused: Callable[[], list[Any]]):
        team = assignment.team
        may_be = host == 0 and team.spare == "auto" and team.device == "cpu"
        self._able = may_be and assignment.network is not None and not assignment.serving
        self._assignment = replace(for_successor(assignment), remembered=None)
        self._own, self._unused = own, unused
        self._going = False
        self._alone: Member | None = None
        self._since = 0.0
        self._begun = False  # for that one

    def begin(self, facts: Mapping[str, Any]) -> None:
        """The team begins, with these facts."""
        self._going = self._able and bool(facts.get("regroups"))

    def look(self, processes: MemberProcesses, done: Collection[Member]) -> None:
        """Starts one, if it is time to, or ends one that is for nobody any more. done: who has done its part."""
        if not self._going:
            return
        here = [process for process in processes if process.member not in done]
        alone = here[0].member if len(here) == 1 and here[0].ready is not None else None
        if alone != self._alone:
            self._alone, self._since, self._begun = alone, time.monotonic(), False
            processes.drop_spare()
        if alone is None or self._begun or time.monotonic() - self._since < AFTER_S:
            return
        self._begun = True  # once: one that has ended by itself would again
        own = replace(self._own(successor_of(alone), self._assignment), units=None)  # which are the living one's
        with contextlib.suppress(ResourceError):
            processes.fork_spare(alone, own, self._unused())
