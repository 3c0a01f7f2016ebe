"""An agent that follows agent 0: forks and watches its host's workers as that one orders, and passes on what they say.

It has no run folder, but one for scratch: logs, until they are sent, and the checkpoint that the workers start from.
Where agent 0 is lost the workers keep what they hold and end, and it looks for agent 0 a while, which may be started
again and go on from there.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from instep.descendants import adopting_orphans, children
from instep.errors import InstepError, ResourceError, WorkerError
from instep.recipe import Team
from instep.record.events import WarnedEvent, plain
from instep.record.folder import RunFolder
from instep.sources import KeptSources
from instep.tables import from_table
from instep.team import meeting
from instep.team.assigning import for_successor
from instep.team.channel import Channel
from instep.team.crew import LocalCrew
from instep.team.crews import Heard
from instep.team.first_agent import LOOK_S, TRY_S, FirstAgent
from instep.team.hosts_there import most_in_step
from instep.team.journal import ClientGone
from instep.team.keeping import Keeping
from instep.team.letters import key_of_server
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
from instep.team.orders import Lost, Member, Regroup
from instep.team.received import Received
from instep.team.run_clock import Clock
from instep.team.showing import Showing
from instep.team.signals import Interrupted, Requests
from instep.team.waiting import ready_of
from instep.team.wire_messages import (
    Beat,
    CheckpointPart,
    EndMembers,
    EpochGone,
    FromMember,
    GiveKept,
    GoMembers,
    MemberLost,
    RegroupMembers,
    StacksWanted,
    StartMembers,
    StartSuccessor,
    TakeOut,
    ToMember,
)
from instep.transport.meter import METER


class Follower:
    """One agent but the first, over all its connections to that."""

    def __init__(self, run: Request, client: Channel, requests: Requests):
        assert run.place is not None, "there are several agents"
        self._run, self._client, self._requests = run, client, requests
        self._place, self._parent, self._team = run.place, os.getppid(), run.team
        self._scratch = RunFolder(run.folder)
        self._received = Received(self._scratch.checkpoints)
        self._keeping = Keeping(self._scratch, self._place.host)
        self._others, self._sources = children(), KeptSources()
        self._crew: LocalCrew | None = None
        self._start: StartMembers | None = None
        self._clock = Clock(run.began)
        self._first = FirstAgent(run, self._clock, self._living)
        self._beaten = 0.0
        self._going = False  # whether the workers have begun
        self._folder = ""  # agent 0's
        self._asked = False  # whether agent 0 was told to stop
        self._said = False
        self._waits_since: float | None = None  # with workers that are kept, for an agent 0 that is out of reach
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
                if isinstance(final, Finished) and self._crew is not None and self._waits_since is None:
                    self._crew.leave()
            finally:
                self._end()
                self._logs.send(self._tell, lambda: self._first.has_room(self._team.lease_s))
                self._first.say_good_bye()
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

    # The connection

    def _join(self, within_s: float, why: str, waited_s: float = 0.0) -> None:
        """Connects to agent 0, however often it takes. waited_s: of that time are over. Raises WorkerError."""
        said = time.monotonic()
        began = said - waited_s
        while not self._first.connected(self._keeping.kept):
            now = time.monotonic()
            self._look_around(self._client in ready_of([self._client], [], TRY_S))
            if self._asked:
                raise Interrupted
            if now - began >= within_s:
                raise WorkerError(
                    f"agent {self._place.agent} ends: {why} within {within_s:g} s; go on with the run folder of "
                    f"agent 0, or start the run again{self._keeping.leave(self._folder)}."
                )
            if not self._first.host:
                meeting.check_open(self._place)
            if now - said >= SAY_S:
                said = now
                self._say(f"agent {self._place.agent} has waited {now - began:.0f} s for agent 0.")

    def _tell(self, message: Any) -> None:
        self._first.tell(message)

    # What it hears

    def _listen(self) -> Finished | Failed | Cancelled | None:
        """Waits until something happens. Returns how the run has ended, if it has."""
        first, crew, link = self._first, self._crew, self._first.link
        assert link is not None, "agent 0 is connected"
        sources = [self._client, *first.sources(), *(crew.sources() if crew is not None else ())]
        first.pump()
        gives = (self._keeping.gives or first.waits) and not link.full
        sends = (link.wants_write or gives) and not first.broken
        ready = ready_of([*sources, *([] if first.broken else [link])], [link] if sends else [], first.look_s)
        self._look_around(self._client in ready)
        if crew is not None:
            for heard in crew.hear(ready):
                self._hear_member(heard)
        if (link in ready or link.holds or self._keeping.gives) and not first.broken:
            try:
                self._keeping.pump(link)
                for message in link.receive():
                    first.silence.heard()
                    if isinstance(message, Finished | Failed | Cancelled):
                        return message
                    self._obey(message)
            except (EOFError, OSError) as error:
                first.broke(error)
        first.look(ready)
        if first.final is not None:
            return first.final
        if first.why:
            self._wait_for_the_first()
        else:
            self._waits_since = None
            if not first.cut_off:
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
        self._logs.send(self._tell, self._first.has_room)
        if self._crew is not None and (lost := self._crew.look()) is not None:
            self._hear_member(lost)
        if self._crew is not None and (word := self._showing.word(self._crew)) is not None:
            self._tell(word)

    def _tell_beat(self) -> None:
        carried = self._crew.carried() if self._crew is not None else METER.look()
        self._tell(Beat(0, time.monotonic(), 0.0, self._clock.error_s, *carried))

    def _living(self) -> tuple[Member, ...]:
        """Those here that can go on with others, should agent 0 be back."""
        if self._crew is None or not self._going or self._run.engine != "lockstep":
            return ()
        return tuple(each.member for each in self._crew.shown() if not each.done)

    def _wait_for_the_first(self) -> None:
        """Agent 0 is out of reach: the workers are kept as long as it may know them."""
        first, limit_s, now = self._first, self._team.give_up_s, time.monotonic()
        if first.gone or self._asked or not self._living():
            self._lose(first.why)
        elif self._waits_since is None:
            self._waits_since, self._said = now, False
        elif now - self._waits_since >= limit_s or first.moved():
            self._lose(first.why, now - self._waits_since)
        elif not self._said and now - self._waits_since >= TRY_S:  # else it is not there any more, as is known at once
            self._said = True
            self._say(
                f"{first.why}; agent {self._place.agent} keeps its workers, and looks for it for {limit_s:g} s at most."
            )

    def _lose(self, why: str, waited_s: float = 0.0) -> None:
        """Agent 0 is lost: ends the workers, and looks for it again, after it was waited for."""
        self._waits_since = None
        self._first.close()
        limit = f"{self._team.give_up_s:g} s"
        self._say(f"{why}; agent {self._place.agent} ends its workers, and looks for it for {limit} at most.")
        if self._crew is not None and self._start is not None and self._going and self._run.engine == "lockstep":
            self._keeping.keep(self._crew, self._start.run_id, self._look_meanwhile)
        self._end()
        self._join(self._team.give_up_s, f"{why}, and it could not be reached again", waited_s)

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
                with self._or_leaving() as crew:
                    crew.succeed(member, for_successor(replace(self._assignment, first=False)))
            case RegroupMembers(epoch, generation, members, at_once, told, saved, fewer, formed) if self._is_at(epoch):
                self._going = True
                with self._or_leaving() as crew:
                    crew.regroup(Regroup(epoch, generation, members, at_once, fewer, formed), told, saved)
            case EndMembers(epoch) if self._is_at(epoch):
                self._end()
                self._logs.send(self._tell, self._first.has_room)
                self._tell(EpochGone(epoch))
            case _:
                pass  # of an epoch that is past

    @contextlib.contextmanager
    def _or_leaving(self) -> Iterator[LocalCrew]:
        """Where there is no room here for what is to be done, this host leaves the others, who go on."""
        assert self._crew is not None
        try:
            yield self._crew
        except ResourceError as error:
            self._going = False  # so that nobody keeps what it holds: the others have it
            self._first.leave(error.message)

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
            most=most_in_step(run),
            sources=self._sources,
        )
        assert self._first.hello is not None
        key = key_of_server(self._first.secret)
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
            network=HostNetwork(tuple(start.hosts), start.store, start.name, self._first.address, key=key),
            scratch=self._scratch.path,
            late=start.late,
        )
        crew.start(start.members, self._assignment)

    def _unused(self) -> list[Any]:
        return [self._client, self._first]

    def _name(self, number: int) -> str:
        assert self._first.hello is not None
        return f"worker {number} on host {self._place.host} ({self._first.hello.name})"

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
