"""Agent 0 as another agent has it: finds it, and what crosses between the two goes on where a cut between them ends."""

from __future__ import annotations

import contextlib
import socket
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from instep.errors import RecipeError, WorkerError
from instep.team import meeting
from instep.team.hello import hello_of
from instep.team.link import AgentLink, connect, shaken
from instep.team.messages import Cancelled, Events, Failed, Finished, Request
from instep.team.orders import Member
from instep.team.reaching import EVERY_S, Reaching
from instep.team.remote import Silence
from instep.team.run_clock import Clock
from instep.team.telling import tell
from instep.team.waiting import ready_of
from instep.team.wire_format import TooLong
from instep.team.wire_messages import (
    FromMember,
    HelloAgain,
    HelloAgent,
    HostLeaves,
    Kept,
    WasAway,
    Welcome,
    WelcomeAgain,
)

LOOK_S = 0.2
"""Seconds between two looks at the workers, each with a sign of life for agent 0."""

TRY_S = 0.5
"""Seconds of a try to reach agent 0, and between two."""

SUSPECT_S = 0.6
"""Seconds of its silence after which it is tried whether it can be reached."""


FIND_S = 10.0
"""Seconds between two looks whether it was started somewhere else, while it cannot be reached."""


class FirstAgent:
    """Of one run, over all connections to it. clock: this host's idea of the run's. members: gives those that live here
    and can go on.
    """

    def __init__(self, run: Request, clock: Clock, members: Callable[[], tuple[Member, ...]] = tuple):
        assert run.place is not None, "there are several agents"
        self._run, self._place, self._team, self._clock = run, run.place, run.team, clock
        self._members = members
        self.hello: HelloAgent | None = None
        """What is told to it."""
        self.host = ""
        """Its name, once it was reached."""
        self.address, self.secret = "", b""
        """This host's, on the way to it; the run's."""
        self.link: AgentLink | None = None
        self.silence = Silence()
        self.why = ""
        """Why it is out of reach, if it is."""
        self.final: Finished | Failed | Cancelled | None = None
        """How the run has ended, if that is the answer to who has reached it again."""
        self._at, self._known, self._looked = ("", 0), True, 0.0
        self._reaching: Reaching | None = None  # while it is silent
        self._away_s = 0.0
        self._words: deque[Any] = deque()  # that the link has not taken yet

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
                self.silence, self.why, self._known = Silence(), "", True
                self.link.keep()
                return True
        except (EOFError, OSError):
            pass
        self.close()
        return False

    def close(self) -> None:
        """Closes the connection, and those that are tried, for this process."""
        self._reached()
        self._words.clear()
        if self.link is not None:
            self.link.close()
            self.link = None

    def say_good_bye(self) -> None:
        """Sends what waits to be sent, for a while, and closes the connection."""
        self.has_room(self._team.lease_s)
        self.close()

    def leave(self, why: str) -> None:
        """Tells it that this host's workers cannot go on with the others, and why: they do without this host then."""
        self.tell(HostLeaves(why))
        until = time.monotonic() + self._team.lease_s
        while not self.broken and time.monotonic() < until:  # until it ends the connection: what it has sent by then
            self._hear_nothing(until)  # would break it here, before it has read why
        self.why, self._known = f"the workers of this host cannot go on with the others ({why.rstrip('.')})", False
        if self.link is not None:
            self.link.close()

    def _hear_nothing(self, until: float) -> None:
        """Sends what waits, until something comes, which is not heard."""
        assert self.link is not None
        self.pump()
        left_s = max(0.0, until - time.monotonic())
        try:
            if ready_of([self.link], [self.link] if self.link.wants_write else [], left_s):
                self.link.receive()  # which says what has come there
        except (EOFError, OSError):
            self.link.close()

    def has_room(self, within_s: float = 0.0) -> bool:
        """Whether all that was told is on its way, and more can be; or comes to be so within so many seconds, in which
        nothing of what comes from there is heard.
        """
        until = time.monotonic() + within_s
        while self.link is not None and not self.broken:
            self.pump()
            if not self.link.full and not self._words:
                return True
            if time.monotonic() >= until:
                break
            self._hear_nothing(until)
        return False

    def broke(self, error: Exception) -> None:
        """The connection has ended, and the link is to go on over another."""
        assert self.link is not None, "it was reached"
        self.why = f"the connection to agent 0 on {self.host} has ended ({error or 'it closed'})"
        self.link.close()

    @property
    def broken(self) -> bool:
        """Whether it has."""
        return self.link is not None and self.link.fileno() < 0

    @property
    def gone(self) -> bool:
        """Whether there is no agent 0 any more that this link could go on to."""
        return not self._known or (self._reaching is not None and self._reaching.refused)

    def moved(self) -> bool:
        """Whether another agent 0 was started meanwhile. It is looked for now and then."""
        now = time.monotonic()
        if now - self._looked < FIND_S:
            return False
        self._looked = now
        found = meeting.find(self._place, TRY_S)
        return found is not None and (found.secret, found.address[1]) != (self.secret, self._at[1])

    def tell(self, message: Any) -> None:
        """Sends it to agent 0, as soon as the link takes it, after all that waits; nothing where that is lost, as will
        be seen. Raises WorkerError where it is longer than any message may be.
        """
        if self.link is not None:
            self._words.append(message)
            self.pump()

    @property
    def waits(self) -> bool:
        """Whether something that was told waits for the link to take it."""
        return bool(self._words)

    def pump(self) -> None:
        """Sends what waits, as far as the link takes it."""
        with contextlib.suppress(OSError):
            while self._words and self.link is not None and not self.link.full:
                message = self._words.popleft()
                try:
                    self.link.send(message)
                except TooLong as error:
                    self._words.extendleft(reversed(halves_of(message, error)))

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

    def look(self, ready: Collection[Any]) -> None:
        """Tries to reach it, where it is silent, and has the link go on. What has come over that is read by then."""
        silent_s = self.silence.look()
        if silent_s < SUSPECT_S and not self.broken:
            if self.cut_off or self.why:
                self.tell(WasAway(self._away_s))
            self._reached()
            self.why, self._looked = "", time.monotonic()
            return
        self._away_s = silent_s
        if silent_s >= self._team.lease_s and not self.broken:
            self.why = f"agent 0 on {self.host} has not answered for {silent_s:.1f} s"
        if self._reaching is None:
            self._reaching = Reaching(self._at)
        self._reaching.look()
        if self._reaching.refused:
            self.why = self.why or f"agent 0 on {self.host} is not there any more"
        if (connection := self._reaching.greeted(ready)) is not None and self._goes_on_by(connection):
            self.silence, self.why = Silence(), ""
            self._reached()

    def _goes_on_by(self, connection: socket.socket) -> bool:
        assert self.link is not None, "it was reached"
        assert self.hello is not None, "and told who this is"
        fresh = None
        try:
            fresh = shaken(connection, self._at, self.secret, time.monotonic() + TRY_S)
            who = self.hello.agent, self.hello.session
            answer = fresh.ask(HelloAgain(*who, self.link.came, self._away_s, self._members()), TRY_S)
            match answer:
                case WelcomeAgain(came, known=True):
                    self.link.go_on(fresh, came)
                    return True
                case WelcomeAgain():
                    self._known, self.why = False, f"agent 0 on {self.host} counts this host as lost"
                case Finished() | Failed() | Cancelled():
                    self.final = answer
        except (EOFError, OSError):
            pass
        if fresh is not None:
            fresh.close()
        return False

    def _reached(self) -> None:
        if self._reaching is not None:
            self._reaching.close()
            self._reaching = None


def halves_of(message: Any, why: TooLong) -> list[FromMember]:
    """Of events that are too long to be sent together. Raises WorkerError where it is one, or another message."""
    match message:
        case FromMember(member, Events(events)) if len(events) > 1:
            half = len(events) // 2
            return [FromMember(member, Events(each)) for each in (events[:half], events[half:])]
        case FromMember(member):
            raise WorkerError(
                f"what worker {member.number} has told is too long for agent 0, which is on another host: {why}; let "
                f"what the recipe names, measures or leaves (terms, metrics, figures, samples) be shorter."
            ) from why
    raise WorkerError(f"what is to be told is too long for agent 0, which is on another host: {why}.") from why
