"""An agent that follows agent 0: forks and watches its host's workers as that one orders, and passes on what they say.

It has no run folder, but one for scratch: logs, until they are sent, and the checkpoint that the workers start from.
Where agent 0 is lost the workers keep what they hold and end, and it looks for agent 0 a while, which may be started
again and go on from there.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from instep.descendants import adopting_orphans, children
from instep.errors import InstepError, RecipeError, WorkerError
from instep.recipe import Team
from instep.record.events import WarnedEvent, plain
from instep.record.folder import RunFolder
from instep.tables import from_table
from instep.team import meeting
from instep.team.channel import Channel
from instep.team.crew import Heard, LocalCrew
from instep.team.hello import hello_of
from instep.team.journal import ClientGone
from instep.team.keeping import Keeping
from instep.team.letters import key_of_server
from instep.team.link import AgentLink, connect
from instep.team.logs import Logs
from instep.team.meeting import SAY_S
from instep.team.messages import (
    Assignment,
    Cancelled,
    Digest,
    Ended,
    Failed,
    Finished,
    HostNetwork,
    PlainEvents,
    Request,
    StopRun,
)
from instep.team.orders import Lost, Regroup
from instep.team.received import Received
from instep.team.remote import Silence
from instep.team.run_clock import Clock
from instep.team.showing import Showing
from instep.team.signals import Interrupted, Requests
from instep.team.telling import tell
from instep.team.waiting import ready_of
from instep.team.wire_messages import (
    Beat,
    CheckpointPart,
    EndMembers,
    EpochGone,
    FromMember,
    GiveKept,
    GoMembers,
    HelloAgent,
    MemberLost,
    RegroupMembers,
    StacksWanted,
    StartMembers,
    StartSuccessor,
    TakeOut,
    ToMember,
    Welcome,
)
from instep.transport.meter import METER

LOOK_S = 0.2
"""Seconds between two looks at the workers, each with a sign of life for agent 0."""

TRY_S = 0.5
"""Seconds of a try to reach agent 0, and between two."""


class Follower:
    """One agent but the first, over all its connections to that."""

    def __init__(self, run: Request, client: Channel, requests: Requests):
        assert run.place is not None, "there are several agents"
        self._run, self._client, self._requests = run, client, requests
        self._place, self._parent, self._team = run.place, os.getppid(), run.team
        self._scratch = RunFolder(run.folder)
        self._received = Received(self._scratch.checkpoints)
        self._keeping = Keeping(self._scratch, self._place.host)
        self._others = children()
        self._hello: HelloAgent | None = None
        self._link: AgentLink | None = None
        self._crew: LocalCrew | None = None
        self._start: StartMembers | None = None
        self._silence, self._clock = Silence(), Clock(run.began)
        self._going = False  # whether the workers have begun
        self._folder = ""  # agent 0's
        self._asked = False  # whether agent 0 was told to stop
        self._leader = ""  # agent 0's host
        self._logs = Logs(self._scratch.logs)
        self._showing = Showing()

    def follow(self) -> dict[str, Any]:
        """Does what agent 0 orders until the run ends. Returns the result.

        Raises InstepError, Interrupted and ClientGone.
        """
        with adopting_orphans():
            try:
                self._join(self._team.join_timeout_s, "no answer came from agent 0")
                while (final := self._listened()) is None:
                    pass
                if isinstance(final, Finished) and self._crew is not None:
                    self._crew.leave()
            finally:
                self._end()
                self._logs.send(self._tell)
                self._say_good_bye()
        match final:
            case Finished(result):
                return dict(result)
            case Failed():
                raise final.error()
            case _:
                raise Interrupted

    def _listened(self) -> Finished | Failed | Cancelled | None:
        """As `_listen`; agent 0 is told of what goes wrong here."""
        try:
            return self._listen()
        except InstepError as error:
            self._tell(Failed.of(error))
            raise

    def _say_good_bye(self) -> None:
        """Sends what waits to be sent, for a while, and closes the connection."""
        until = time.monotonic() + self._team.lease_s
        with contextlib.suppress(OSError):
            while self._link is not None and self._link.wants_write and time.monotonic() < until:
                ready_of([], [self._link], LOOK_S)
        self._drop()

    # The connection

    def _join(self, within_s: float, why: str) -> None:
        """Connects to agent 0, however often it takes. Raises WorkerError."""
        began = said = time.monotonic()
        while not self._connected():
            now = time.monotonic()
            self._look_around(self._client in ready_of([self._client], [], TRY_S))
            if self._asked:
                raise Interrupted
            if now - began >= within_s:
                raise WorkerError(
                    f"agent {self._place.agent} ends: {why} within {within_s:g} s; go on with the run folder of "
                    f"agent 0, or start the run again{self._keeping.leave(self._folder)}."
                )
            if not self._leader:
                meeting.check_open(self._place)
            if now - said >= SAY_S:
                said = now
                self._say(f"agent {self._place.agent} has waited {now - began:.0f} s for agent 0.")

    def _connected(self) -> bool:
        found = meeting.find(self._place, TRY_S)
        if found is None:
            return False
        address, port = found.address
        try:
            if self._place.host == 0:  # it listens at the interface that is asked for
                address = meeting.own_address(self._place, self._team.interface)
            self._address = meeting.route_address(address, self._team.interface)
        except RecipeError as error:
            tell(self._place, error)
            raise
        except OSError:
            return False
        try:
            self._link = connect((address, port), found.secret, TRY_S)
            self._secret = found.secret
            if self._hello is None:
                self._hello = hello_of(self._run, self._address)
            self._clock.begin()
            hello = replace(self._hello, address=self._address, kept=self._keeping.kept)
            message = self._link.ask(hello, self._team.lease_s)
            if isinstance(message, Failed):
                raise message.error()
            if isinstance(message, Welcome):
                self._leader = message.name
                self._clock.heard(message.clock_s)
                self._silence, self._beaten = Silence(), 0.0
                return True
        except (EOFError, OSError):
            pass
        self._drop()
        return False

    def _drop(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _tell(self, message: Any) -> None:
        """Sends it to agent 0; nothing where that is lost, as will be seen."""
        with contextlib.suppress(OSError):
            if self._link is not None:
                self._link.send(message)

    # What it hears

    def _listen(self) -> Finished | Failed | Cancelled | None:
        """Waits until something happens. Returns how the run has ended, if it has."""
        assert self._link is not None
        link, crew = self._link, self._crew
        sources = [self._client, link, *(crew.sources() if crew is not None else ())]
        ready = ready_of(sources, [link] if link.wants_write or self._keeping.gives else [], LOOK_S)
        self._look_around(self._client in ready)
        if crew is not None:
            for heard in crew.hear(ready):
                self._hear_member(heard)
        if link in ready or link.holds or self._keeping.gives:
            try:
                self._keeping.pump(link)
                for message in link.receive():
                    self._silence.heard()
                    if isinstance(message, Finished | Failed | Cancelled):
                        return message
                    self._obey(message)
            except (EOFError, OSError) as error:
                self._lose(f"the connection to agent 0 on {self._leader} has ended ({error or 'it closed'})")
                return None
        if self._silence.look() >= self._team.lease_s:
            self._lose(f"agent 0 on {self._leader} has not answered for {self._silence.seconds:.1f} s")
        else:
            self._beat()
        return None

    def _look_around(self, heard: bool) -> None:
        """Whether the client lives, and what it and signals ask for."""
        if os.getppid() != self._parent:
            raise ClientGone
        if heard:
            try:
                message = self._client.recv()
            except (EOFError, ConnectionResetError):
                raise ClientGone from None
            assert isinstance(message, StopRun), f"during a run a client asks for its end alone, not {message}"
            self._ask_to_stop()
        if self._requests.end or self._requests.at_once:
            self._ask_to_stop()
        if self._crew is not None and self._crew.stop_wanted():
            self._ask_to_stop()

    def _ask_to_stop(self) -> None:
        if not self._asked:
            self._asked = True
            self._tell(StopRun())

    def _hear_member(self, heard: Heard | Lost) -> None:
        if isinstance(heard, Lost):
            self._tell(MemberLost(heard.member, heard.why, heard.detail))
        else:
            if isinstance(heard.message, Digest | Ended):  # with which bytes are told on the tape
                self._tell_beat()
            self._tell(FromMember(heard.member, heard.message))

    def _beat(self) -> None:
        """Signs of life, logs, and what no message of the workers tells."""
        now = time.monotonic()
        if now - self._beaten < LOOK_S:
            return
        self._beaten = now
        self._tell_beat()
        self._logs.send(self._tell)
        if self._crew is not None and (lost := self._crew.look()) is not None:
            self._hear_member(lost)
        if self._crew is not None and (word := self._showing.word(self._crew)) is not None:
            self._tell(word)

    def _tell_beat(self) -> None:
        carried = self._crew.carried() if self._crew is not None else METER.look()
        self._tell(Beat(0, time.monotonic(), 0.0, self._clock.error_s, *carried))

    def _lose(self, why: str) -> None:
        """Agent 0 is lost: ends the workers, and looks for it again."""
        self._drop()
        limit = f"{self._team.give_up_s:g} s"
        self._say(f"{why}; agent {self._place.agent} ends its workers, and looks for it for {limit} at most.")
        if self._crew is not None and self._start is not None and self._going and self._run.engine == "lockstep":
            self._keeping.keep(self._crew, self._start.run_id, self._look_meanwhile)
        self._end()
        self._join(self._team.give_up_s, f"{why}, and it could not be reached again")

    def _look_meanwhile(self) -> None:
        """While the workers keep what they hold. A stop has nothing to wait for there."""
        self._look_around(self._client in ready_of([self._client], [], 0))
        if self._asked:
            raise Interrupted

    # What it does

    def _obey(self, message: Any) -> None:
        match message:
            case Beat(_, sent_s, clock_s):
                self._clock.heard(clock_s, sent_s)
            case CheckpointPart():
                self._keeping.forget()  # agent 0 has something better, which comes in its place
                self._received.write(message)
            case StartMembers():
                self._begin(message)
            case GiveKept():
                self._keeping.give(message)
            case GoMembers(epoch, facts) if self._is_at(epoch):
                assert self._crew is not None
                self._going = True
                self._crew.prepare(facts)
                self._crew.go()
            case ToMember(member, told) if self._is_at(member.epoch):
                assert self._crew is not None
                self._crew.send(member, told)
            case StacksWanted() if self._crew is not None:
                self._showing.ask(message, self._crew)
            case TakeOut(member) if self._is_at(member.epoch):
                assert self._crew is not None
                for word in self._crew.take_out(member):
                    self._tell(FromMember(member, word))
            case StartSuccessor(member) if self._is_at(member.epoch):
                assert self._crew is not None
                self._crew.succeed(member, replace(self._assignment, first=False, resume_from=None))
            case RegroupMembers(epoch, generation, members, at_once, told, saved) if self._is_at(epoch):
                assert self._crew is not None
                self._crew.regroup(Regroup(epoch, generation, members, at_once), told, saved)
            case EndMembers(epoch) if self._is_at(epoch):
                self._end()
                self._logs.send(self._tell)
                self._tell(EpochGone(epoch))
            case _:
                pass  # of an epoch that is past

    def _is_at(self, epoch: int) -> bool:
        return self._start is not None and self._start.epoch == epoch

    def _begin(self, start: StartMembers) -> None:
        self._end()
        self._keeping.forget()
        run, self._start, self._folder = self._run, start, start.folder
        team = from_table(Team, start.team, "team")
        crew = self._crew = LocalCrew(
            team,
            self._others,
            self._unused,
            serving=run.engine == "server",
            name=self._name,
            folder=self._scratch,
            began=lambda: self._clock.began,
            host=self._place.host,
        )
        assert self._hello is not None
        key = key_of_server(self._secret)
        self._assignment = Assignment(
            recipe=run.recipe,
            team=team,
            folder=Path(start.folder),
            fingerprints=run.fingerprints or (run.fingerprint,),
            resume_from=self._scratch.checkpoints / start.checkpoint if start.checkpoint else None,
            serving=run.engine == "server",
            began=self._clock.began,
            identity=(0, 0),
            first=start.first,
            run_id=start.run_id,
            written=tuple(start.written),
            network=HostNetwork(tuple(start.hosts), start.store, start.name, self._address, key=key),
            scratch=self._scratch.path,
        )
        crew.start(start.members, self._assignment)

    def _unused(self) -> list[Any]:
        return [self._client, self._link]

    def _name(self, number: int) -> str:
        assert self._hello is not None
        return f"worker {number} on host {self._place.host} ({self._hello.name})"

    def _end(self) -> None:
        """Ends the workers, and passes their last words on."""
        crew, self._crew, self._going = self._crew, None, False
        start, self._start = self._start, None
        if crew is None or start is None:
            return
        crew.end()
        for word in crew.last_words():
            self._hear_member(word)

    def _say(self, why: str) -> None:
        """Tells the client something that is on no tape."""
        with contextlib.suppress(OSError):
            self._client.send(PlainEvents([plain(WarnedEvent(why=why))]))
