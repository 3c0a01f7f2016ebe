"""Hosts that were cut off, and are back before they were lost. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from instep.record.event_kinds import HostBackEvent
from instep.record.events import Event
from instep.team.orders import HostBack
from instep.team.remote import RemoteCrew

TOGETHER_S = 0.3
"""Seconds that one of them is kept waiting for others: where it was the first host that was cut off, all come."""


class Returns:
    """Those of one run. note: is told what is for the tape."""

    def __init__(self, note: Callable[[Event], None]):
        self._note = note
        self._since: float | None = None  # one waits

    def look(self, crews: Sequence[RemoteCrew]) -> Iterator[HostBack]:
        """Tells that some of these are back: once for all."""
        here = [crew for crew in crews if crew.lost is None]
        back, now = [crew for crew in here if crew.away_s], time.monotonic()
        self._since = (self._since or now) if back else None
        if self._since is None or (now - self._since < TOGETHER_S and any(crew.silent for crew in here)):
            return
        why = f"{back[0].name} could not be reached for {back[0].away_s:.1f} s"
        for crew in back:
            self._note(HostBackEvent(host=crew.hello.host, name=crew.hello.name, away_s=round(crew.away_s, 3)))
            crew.away_s = 0.0
        yield HostBack(back[0].hello.host, why)
