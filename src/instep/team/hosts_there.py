"""Which of a team's hosts are there, and how many workers each is to have. No torch, clock or I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from instep.bounds import Bounds, room_here
from instep.ranges import fill, share_out
from instep.team.orders import HostCame, NoteResize, Order

if TYPE_CHECKING:
    from instep.team.messages import Request
    from instep.team.place import Place


def hosts_of(run: Request) -> HostsThere:
    """Those of a run, as its first agent begins."""
    place, team = run.place, run.team
    if place is None:  # this machine has room for so many
        return HostsThere(team.workers, alone=run.engine == "lockstep" and team.device == "cpu")
    patient = team.when_lost == "wait"
    return HostsThere(
        team.workers, place.agents_by_host, patient=patient, bounds=team.limits, room=room_of(place, run.recipe_table)
    )


def room_of(place: Place, recipe: Mapping[str, Any]) -> int:
    """For how many workers an agent's host has room: one for each of its agents, or, with one, for what it has of
    processors.
    """
    return place.room or (place.here if place.here > 1 else room_here(recipe["threads"]))


MOST_IN_STEP = 1024
"""To more workers than this no team in lockstep grows while it goes on: each takes some bytes of every agent."""


def most_in_step(run: Request) -> int:
    """How many workers a team may come to have while it goes on; 0 where it starts anew for another number."""
    able = run.engine == "lockstep" and run.team.device == "cpu"
    return min(MOST_IN_STEP, run.recipe_table["microbatches"]) if able else 0


class HostsThere:
    """Those of one run. Host 0, whose agent is the first, is there once all its agents are.

    workers: how many the team is to have at first. agents: how many each host has, 0 where that is told when it comes.
    patient: whether all are waited for whenever the team starts, not just at first. bounds: of the number of workers,
    if it follows what is there; room: for how many host 0 has room then. alone: there is no other, and workers in
    lockstep on its processors.
    """

    def __init__(
        self,
        workers: int,
        agents: Sequence[int] = (1,),
        *,
        patient: bool = False,
        bounds: Bounds | None = None,
        room: int = 1,
        alone: bool = False,
    ):
        self.alone = alone
        self.wanted = workers
        """How many workers the team is to have from its next start on."""
        self.names: dict[int, str] = {}
        self.waiting = False
        """Whether a team waits for some before it starts."""
        self._started = self._proved = 0  # how many workers it has now, and had when it last did a step
        self._agents, self._bounds, self._rooms = list(agents), bounds, [room, *[0] * (len(agents) - 1)]
        self._here = {0} if agents[0] == 1 else set[int]()
        self.patient, self._needed = patient, frozenset(range(len(agents)))  # without which no team starts

    @property
    def follows(self) -> bool:
        """Whether the number of workers follows what is there."""
        return self._bounds is not None

    @property
    def awaited(self) -> list[int]:
        """Those that a team waits for before it starts, if it does."""
        return self._missing if self.waiting else []

    @property
    def few(self) -> bool:
        """Whether there is too little room."""
        return self._bounds is not None and self._room < self._bounds.least

    @property
    def _missing(self) -> list[int]:
        """Those that are needed, or any while there is too little room."""
        return sorted((set(range(len(self._agents))) if self.few else self._needed) - self._here)

    def look(self) -> bool:
        """Before a start: whether it can come now, or else is to wait."""
        self.waiting = bool(self._missing)
        return not self.waiting

    def begin_anew(self) -> None:
        """The team is to start again."""
        self._needed = frozenset(range(len(self._agents)) if self.patient else ())

    def need_no_more(self) -> bool:
        """Where the number of workers follows what is there: a start waits for the first alone, and for who makes room.
        Whether one does wait.
        """
        if self.follows:
            self._needed &= {0}
        return self.waiting and self.follows

    @property
    def too_few(self) -> str:
        """A sentence where all are there, and have too little room together; "" else."""
        if self._bounds is None or not self.few or len(self._here) < len(self._agents):
            return ""
        return (
            f"'team.bounds' asks for at least {self._bounds.least} workers, and all {len(self._agents)} hosts together "
            f"have room for {self._room}; lower the least, give a number of workers, or take more hosts."
        )

    @property
    def _room(self) -> int:
        return sum(self._rooms[host] for host in self._here)

    def came(self, came: HostCame) -> None:
        """One is there."""
        self._here.add(came.host)
        self.names[came.host] = came.name
        self._agents[came.host] = came.agents or self._agents[came.host]
        self._rooms[came.host] = came.room or self._rooms[came.host]

    def left(self, host: int) -> None:
        """One is there no more."""
        self._here.discard(host)

    def fix(self, workers: int) -> None:
        """The team is to have so many, whatever comes or goes."""
        self.wanted, self._bounds = workers, None

    def started(self) -> list[int]:
        """A team of as many as are wanted starts: how many workers each host gets."""
        self._started = self.wanted
        return self.shares()

    @property
    def unproved(self) -> bool:
        """Whether it has done no step with so many."""
        return self._started != self._proved

    @property
    def on_trial(self) -> bool:
        """Whether it has grown since it last did a step."""
        return 0 < self._proved < self._started

    def proved(self) -> None:
        """It has done a step."""
        self._proved = self._started

    def changed(self) -> None:
        """It has as many as are wanted, while it goes on."""
        self._started = self._proved = self.wanted

    def undo(self, why: str) -> NoteResize:
        """It is to have as many as it last did a step with, whatever comes or goes."""
        before = self._started
        self.fix(self._proved)
        return NoteResize(self.wanted, before, why)

    def fit(self, by: str) -> list[Order]:
        """Has the team take the room that there is, as `by` asks for; what is to be told of that, if it is news."""
        before = self.wanted
        if self._bounds is not None:
            self.wanted = self._bounds.within(self._room)
        return [NoteResize(self.wanted, before, by)] if self.wanted != before else []

    def shares(self) -> list[int]:
        """How many workers each host would get now."""
        if self._bounds is not None and self._room >= self.wanted:
            return fill(self.wanted, [room if host in self._here else 0 for host, room in enumerate(self._rooms)])
        return share_out(self.wanted, [n if host in self._here else 0 for host, n in enumerate(self._agents)])
