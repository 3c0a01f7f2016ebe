"""Agent 0 as another agent has it: finds it, and what crosses between the two goes on where a cut between them ends."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from instep.errors import RecipeError
from instep.team import meeting
from instep.team.hello import hello_of
from instep.team.link import AgentLink, connect, shaken
from instep.team.messages import Failed, Request
from instep.team.reaching import EVERY_S, Reaching
from instep.team.remote import Silence
from instep.team.run_clock import Clock
from instep.team.telling import tell
from instep.team.waiting import ready_of
from instep.team.wire_messages import HelloAgain, HelloAgent, Kept, WasAway, Welcome, WelcomeAgain

LOOK_S = 0.2
"""Seconds between two looks at the workers, each with a sign of life for agent 0."""

TRY_S = 0.5
"""Seconds of a try to reach agent 0, and between two."""

SUSPECT_S = 0.6
"""Seconds of its silence after which it is tried whether it can be reached."""


class FirstAgent:
    """Of one run, over all connections to it. clock: this host's idea of the run's."""

    def __init__(self, run: Request, clock: Clock):
        assert run.place is not None, "there are several agents"
        self._run, self._place, self._team, self._clock = run, run.place, run.team, clock
        self.hello: HelloAgent | None = None
        """What is told to it."""
        self.host = ""
        """Its name, once it was reached."""
        self.address, self.secret = "", b""
        """This host's, on the way to it; the run's."""
        self.link: AgentLink | None = None
        self.silence = Silence()
        self._at = ("", 0)
        self._reaching: Reaching | None = None  # while it is silent
        self._away_s = 0.0

    def connected(self, kept: Kept | None) -> bool:
        """Tries to connect to it; kept: what is here of the run. Raises its error, where it lets this one not in."""
        found = meeting.find(self._place, TRY_S)
        if found is None:
            return False
        address, port = found.address
        try:
            if self._place.host == 0:  # it listens at the interface that is asked for
                address = meeting.own_address(self._place, self._team.interface)
            self.address = meeting.route_address(address, self._team.interface)
        except RecipeError as error:
            tell(self._place, error)
            raise
        except OSError:
            return False
        try:
            self.link = connect((address, port), found.secret, TRY_S)
            self.secret, self._at = found.secret, (address, port)
            if self.hello is None:
                self.hello = hello_of(self._run, self.address)
            self._clock.begin()
            message = self.link.ask(replace(self.hello, address=self.address, kept=kept), self._team.lease_s)
            if isinstance(message, Failed):
                raise message.error()
            if isinstance(message, Welcome):
                self.host = message.name
                self._clock.heard(message.clock_s)
                self.silence = Silence()
                self.link.keep()
                return True
        except (EOFError, OSError):
            pass
        self.close()
        return False

    def close(self) -> None:
        """Closes the connection, and those that are tried, for this process."""
        self._reached()
        if self.link is not None:
            self.link.close()
            self.link = None

    def say_good_bye(self) -> None:
        """Sends what waits to be sent, for a while, and closes the connection."""
        until = time.monotonic() + self._team.lease_s
        with contextlib.suppress(OSError):
            while self.link is not None and self.link.wants_write and time.monotonic() < until:
                ready_of([], [self.link], LOOK_S)
        self.close()

    def tell(self, message: Any) -> None:
        """Sends it to agent 0; nothing where that is lost, as will be seen."""
        with contextlib.suppress(OSError):
            if self.link is not None:
                self.link.send(message)

    @property
    def cut_off(self) -> bool:
        """Whether it is known that a cut is in the way: what can wait is not to be sent."""
        return self._reaching is not None and self._reaching.cut

    @property
    def look_s(self) -> float:
        """Seconds to wait at most before the next `look`."""
        return LOOK_S if self._reaching is None else EVERY_S

    def sources(self) -> list[Any]:
        """What to wait for besides the link."""
        return [] if self._reaching is None else self._reaching.sources()

    def look(self, ready: Collection[Any]) -> float:
        """Tries to reach it, where it is silent, and has the link go on. The seconds of its silence; 0 once it has
        ended. What has come over the link is read by then.
        """
        silent_s = self.silence.look()
        if silent_s < SUSPECT_S:
            if self.cut_off:
                self.tell(WasAway(self._away_s))
            self._reached()
            return silent_s
        self._away_s = silent_s
        if self._reaching is None:
            self._reaching = Reaching(self._at)
        self._reaching.look()
        if (connection := self._reaching.greeted(ready)) is None or not self._goes_on_by(connection):
            return silent_s
        self.silence = Silence()
        self._reached()
        return 0.0

    def _goes_on_by(self, connection: socket.socket) -> bool:
        assert self.link is not None, "it was reached"
        assert self.hello is not None, "and told who this is"
        fresh = None
        try:
            fresh = shaken(connection, self._at, self.secret, time.monotonic() + TRY_S)
            again = HelloAgain(self.hello.agent, self.hello.session, self.link.came, self._away_s)
            answer = fresh.ask(again, TRY_S)
            if isinstance(answer, WelcomeAgain):
                self.link.go_on(fresh, answer.came)
                return True
        except (EOFError, OSError):
            pass
        if fresh is not None:
            fresh.close()
        return False

    def _reached(self) -> None:
        if self._reaching is not None:
            self._reaching.close()
            self._reaching = None
