"""One host's processes as whoever decides for a team sees them, whether they are here or on another host."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from instep.team.messages import Assignment, SupervisorToWorker, WorkerToSupervisor
from instep.team.orders import Member, Regroup, RosterEvent
from instep.team.wire_messages import LoaderShown, Shown

SERVED_GRACE_S = 1.0
"""Seconds that workers of the server engine have, all together: what they still compute is for nobody."""


@dataclass(frozen=True)
class Heard:
    """What a member has sent."""

    member: Member
    message: WorkerToSupervisor


class Crew(Protocol):
    """One host's. Between `start` and `end` it has an epoch's members; its methods may raise ResourceError."""

    def start(self, members: Collection[Member], assignment: Assignment) -> None:
        """Starts the processes of an epoch, without a recipe's code in this one."""

    def prepare(self, facts: Mapping[str, Any]) -> None:
        """All members of the team are ready, with these `facts`: makes room for what those of the host share."""

    def go(self) -> None:
        """Lets them begin."""

    def join(self, member: Member) -> None:
        """A successor is ready: lets it begin with the others, who go on."""

    def send(self, member: Member, message: SupervisorToWorker) -> None:
        """Sends a member a message; nothing where it is dead, as will be heard."""

    def sources(self) -> list[Any]:
        """What to wait for, with `multiprocessing.connection.wait`."""

    def hear(self, ready: Collection[Any]) -> Iterator[Heard | RosterEvent]:
        """What is heard of those of the `sources` that are ready."""

    def look(self) -> RosterEvent | None:
        """What no message tells: the first that is lost in silence."""

    def shown(self) -> tuple[Shown, ...]:
        """What its members do, as far as is known."""

    def loaders_shown(self) -> tuple[LoaderShown, ...]:
        """What its loaders do, as far as is known."""

    def ask_for_stacks(self, numbers: Collection[int]) -> None:
        """Has those of its members that have these numbers show their Python stacks; `stacks` has them in a while."""

    def stacks(self) -> Mapping[int, str]:
        """What they have shown since they were asked last."""

    def take_out(self, member: Member) -> list[WorkerToSupervisor]:
        """Ends what is left of a member that was lost. Returns its last words, if they are here already."""

    def succeed(self, successor: Member, assignment: Assignment) -> None:
        """Starts the successor of a member that was taken out, or one more."""

    def add(self, members: Collection[Member], assignment: Assignment) -> None:
        """Starts these, who are to be in a later group of the epoch."""

    def regroup(self, group: Regroup, told: int, saved: int) -> None:
        """Tells those that are in this group of it. told, saved: the last update and checkpoint that
        the tape has.
        """

    def leave(self) -> None:
        """Waits a while for those that have said their last word to end by themselves."""

    def end(self) -> None:
        """Ends all of an epoch at once; `last_words` must follow."""

    def last_words(self) -> Iterator[Heard]:
        """What they had told before their end, unheard so far."""
