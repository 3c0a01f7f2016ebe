"""Hosts that were cut off: those that are back before they were lost, and those that may still come. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from instep.record.event_kinds import HostBackEvent
from instep.record.events import Event
from instep.team.orders import HostBack, HostGivenUp
from instep.team.remote import RemoteCrew
from instep.team.wire_messages import HelloAgain, HelloAgent

TOGETHER_S = 0.3
"""Seconds that one of them is kept waiting for others: where it was the first host that was cut off, all come."""


class Returns:
    """Those of one run. note: is told what is for the tape. give_up_s: so long those that are lost may come back."""

    def __init__(self, note: Callable[[Event], None], give_up_s: float):
        self._note, self._give_up_s = note, give_up_s
        self._since: float | None = None  # one waits
        self._away: dict[int, tuple[RemoteCrew, float]] = {}  # by agent, and since when

    @property
    def hellos(self) -> list[HelloAgent]:
        """Of those that are lost, and may come back."""
        return [crew.hello for crew, _ in self._away.values()]

    def leave(self, crew: RemoteCrew) -> None:
        """It is lost, and may come back."""
        self._away[crew.hello.agent] = crew, time.monotonic()

    def forget(self, agent: int) -> None:
        """It has come anew."""
        self._away.pop(agent, None)

    def come(self, again: HelloAgain) -> RemoteCrew | None:
        """The one that is back by this, if it may be."""
        crew, _ = self._away.get(again.agent, (None, 0.0))
        if crew is None or crew.hello.session != again.session:
            return None
        del self._away[again.agent]
        self._tell(crew, again.away_s)
        return crew

    def given_up(self) -> Iterator[HostGivenUp]:
        """Tells of those that were waited for long enough."""
        now = time.monotonic()
        for agent, (crew, since) in list(self._away.items()):
            if now - since >= self._give_up_s:
                del self._away[agent]
                yield HostGivenUp(crew.hello.host, f"{crew.name} has not come back within {self._give_up_s:g} s.")

    def _tell(self, crew: RemoteCrew, away_s: float) -> None:
        self._note(HostBackEvent(host=crew.hello.host, name=crew.hello.name, away_s=round(away_s, 3)))

    def look(self, crews: Sequence[RemoteCrew]) -> Iterator[HostBack]:
        """Tells that some of these are back: once for all."""
        here = [crew for crew in crews if crew.lost is None]
        back, now = [crew for crew in here if crew.away_s], time.monotonic()
        self._since = (self._since or now) if back else None
        if self._since is None or (now - self._since < TOGETHER_S and any(crew.silent for crew in here)):
            return
        why = f"{back[0].name} could not be reached for {back[0].away_s:.1f} s"
        for crew in back:
            self._tell(crew, crew.away_s)
            crew.away_s = 0.0
        yield HostBack(back[0].hello.host, why)
