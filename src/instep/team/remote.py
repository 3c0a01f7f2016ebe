"""Another host's members, as agent 0 sees them: what is ordered goes over a link to the agent there."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from instep.errors import InstepError
from instep.record.folder import RunFolder
from instep.tables import to_table
from instep.team.carried import Carried
from instep.team.crews import SERVED_GRACE_S, Heard
from instep.team.link import AgentLink
from instep.team.messages import (
    Agreed,
    Assignment,
    Ended,
    Failed,
    StopRun,
    SupervisorToWorker,
    Synced,
    WorkerToSupervisor,
)
from instep.team.orders import HostLost, Lost, Member, Regroup, StopAsked
from instep.team.received import parts_of
from instep.team.waiting import ready_of
from instep.team.wire_messages import (
    Beat,
    CheckpointPart,
    EndMembers,
    EpochGone,
    FromMember,
    GiveKept,
    GoMembers,
    HelloAgain,
    HelloAgent,
    HostLeaves,
    Kept,
    KeptGiven,
    LoaderShown,
    LogPart,
    MemberLost,
    MembersShown,
    RegroupMembers,
    Shown,
    StacksWanted,
    StartMembers,
    StartSuccessor,
    TakeOut,
    ToMember,
    WasAway,
    WireError,
)

LONGEST_LOOK_S = 0.5
"""A look counts so much at most: whoever was suspended must not take the others for lost when it wakes."""


class Silence:
    """How long nothing was heard of somebody. Time is counted in looks."""

    def __init__(self) -> None:
        self._looked, self.seconds = time.monotonic(), 0.0

    def heard(self) -> None:
        """A sign of life has come."""
        self.seconds = 0.0

    def look(self) -> float:
        """Seconds of silence."""
        now = time.monotonic()
        self.seconds += min(now - self._looked, LONGEST_LOOK_S)
        self._looked = now
        return self.seconds


class RemoteCrew:
    """Those of one host, as long as its agent is connected.

    hello: what that has told of itself. folder: the run's. clock: seconds since the run's start. lease_s: after such a
    silence the host is lost. carried: is told what the host has sent and received. given: called with what comes of a
    state that the host has kept.
    """

    def __init__(
        self,
        link: AgentLink,
        hello: HelloAgent,
        folder: RunFolder,
        clock: Callable[[], float],
        lease_s: float,
        carried: Carried,
        given: Callable[[RemoteCrew, CheckpointPart | KeptGiven], None],
    ):
        self.link, self.hello = link, hello
        self.clock_error_s = 0.0
        """Of the clock of the host's events, at most."""
        self.lost: HostLost | None = None
        """Set once it is, and told of by `hear` or `look`."""
        self.told_of_loss = False
        self.away_s = 0.0
        """For how long its agent could not reach this one, as it has told: until that is taken notice of."""
        self.members_back: tuple[Member, ...] = ()
        """Those that live there, since it is back after it was lost: until they are in a group."""
        self._folder, self._clock, self._lease_s, self._carried = folder, clock, lease_s, carried
        self._given = given
        self._epoch = 0  # which has members there; 0 for none
        self._members: set[Member] = set()
        self._ended: set[Member] = set()  # of them, who has nothing to do any more
        self._passed = 0  # the epoch of which members are still to end that take no part any more; 0 for none
        self._sent: set[str] = set()  # checkpoints that the host has
        self._facts: Mapping[str, Any] = {}
        self._shown = MembersShown(())  # as it was told last
        self._asked, self._stacks = 0, dict[int, str]()  # how often for stacks, and what came of it
        self._orders: deque[Iterator[Any]] = deque()  # to be sent as the link takes them
        self._silence = Silence()
        self._tried = False  # whether nothing has come yet over the connection by which the link goes on

    @property
    def name(self) -> str:
        """What the host is called in a sentence."""
        return f"host {self.hello.host} ({self.hello.name})"

    def start(self, members: Collection[Member], assignment: Assignment) -> None:
        self._members = {member for member in members if member.host == self.hello.host}
        if not self._members:
            return
        self.members_back = ()  # the agent ends who lives there
        network = assignment.network
        path = None if assignment.serving else assignment.resume_from  # a server alone takes up a checkpoint
        assert network is not None, "it has workers here and there"
        self._epoch, self._ended = min(self._members).epoch, set()
        if path is not None and path.name not in self._sent:
            self._orders.append(self._given_whole(path))
        self._order(
            StartMembers(
                epoch=self._epoch,
                members=tuple(sorted(self._members)),
                checkpoint=path.name if path is not None else None,
                team=to_table(assignment.team),
                first=assignment.first,
                run_id=assignment.run_id,
                written=assignment.written,
                hosts=network.workers,
                store=network.store,
                name=network.name,
                folder=str(assignment.folder),
                late=assignment.late,
            )
        )

    def _given_whole(self, path: Path) -> Iterator[CheckpointPart]:
        """A checkpoint's parts. Its host has it with the last: an epoch may be ended before that."""
        self._sent = set()
        yield from parts_of(path)
        self._sent = {path.name}

    def prepare(self, facts: Mapping[str, Any]) -> None:
        self._facts = facts

    def go(self) -> None:
        if self._epoch:
            self._order(GoMembers(self._epoch, self._facts))

    def join(self, member: Member) -> None:
        self.send(member, Agreed(self._facts, {}))

    def take_out(self, member: Member) -> list[WorkerToSupervisor]:
        self._order(TakeOut(member))
        return []  # its last words come as all others do

    def succeed(self, successor: Member, assignment: Assignment) -> None:
        self._members.add(successor)
        self._order(StartSuccessor(successor))

    def add(self, members: Collection[Member], assignment: Assignment) -> None:
        if not self._epoch or self.members_back:
            self.start(members, replace(assignment, resume_from=None))
            return
        for member in members:
            self.succeed(member, assignment)

    def regroup(self, group: Regroup, told: int, saved: int) -> None:
        if self._epoch:
            at_once = group.at_once or bool(self.members_back)  # whatever they wait for since the cut
            self.members_back = ()
            of_group = group.epoch, group.generation, group.members, at_once
            self._order(RegroupMembers(*of_group, told, saved, group.fewer, group.formed))

    def send(self, member: Member, message: SupervisorToWorker) -> None:
        assert isinstance(message, Synced | StopRun | Agreed), f"{message} is for processes of this host"
        self._order(ToMember(member, message))

    def ask_for(self, kept: Kept) -> None:
        """Has the host send what it has kept."""
        self._order(GiveKept(kept.name))

    def has(self, checkpoint: str) -> None:
        """The host has the checkpoint of this name, which need not be sent there."""
        self._sent = {checkpoint}

    def _order(self, message: Any) -> None:
        self._orders.append(iter([message]))
        self.pump()

    def pump(self) -> None:
        """Sends what waits, as far as the link takes it."""
        while self._orders and self.lost is None:
            try:
                if self.link.full:
                    return
                message = next(self._orders[0], None)
                if message is None:
                    self._orders.popleft()
                else:
                    self.link.send(message)
            except OSError as error:
                self._break(f"{self.name} cannot be reached any more: {error}.", error)

    @property
    def silent(self) -> bool:
        """Whether a sign of life is overdue."""
        return self._silence.seconds > 2 * LONGEST_LOOK_S

    def go_on(self, link: AgentLink, came: int, away_s: float) -> None:
        """Its agent is back, over this connection, after so many messages that have come there."""
        try:
            self.link.go_on(link, came)
        except OSError as error:
            self._lose(f"{self.name} cannot be reached any more: {error}.")
            link.close()
            return
        self._silence, self._tried = Silence(), True
        self.away_s = away_s

    def return_(self, link: AgentLink, again: HelloAgain) -> None:
        """As `go_on`, after it was lost: what was ordered since has not come there, and its members are in no group."""
        self.lost, self.told_of_loss = None, False
        self.go_on(link, again.came, 0.0)
        self.members_back, self._members, self._ended = again.members, set(again.members), set()
        self._epoch = min((member.epoch for member in again.members), default=0)

    def set_aside(self, why: str) -> None:
        """It is to count as lost, though it answers."""
        self._lose(why)

    def sources(self) -> list[Any]:
        return [self.link] if self.lost is None and self.link.fileno() >= 0 else []

    def hear(self, ready: Collection[Any]) -> Iterator[Heard | Lost | HostLost | StopAsked]:
        if self.link in ready and self.lost is None:
            yield from self._read()
        self.pump()
        yield from self._loss()

    def _read(self) -> Iterator[Heard | Lost | StopAsked]:
        try:
            messages = self.link.receive()
        except (EOFError, OSError) as error:
            self._break(f"{self.name} is lost: {str(error) or 'the connection has ended'}.", error)
            return
        if messages:
            self._silence.heard()
            self._tried = False
        for message in messages:
            match message:
                case FromMember(member, told) if member in self._members:
                    if isinstance(told, Ended):
                        self._ended.add(member)
                    yield Heard(member, told)
                case MemberLost(member, why, detail) if member in self._members:
                    self._ended.add(member)
                    yield Lost(member, why, detail)
                case StopRun():
                    yield StopAsked()
                case HostLeaves(why):
                    self._lose(f"{self.name} leaves the others: {why}")
                case WasAway(away_s):
                    self.away_s = away_s
                case Beat(seq, sent_s):
                    self.clock_error_s = message.error_s
                    self._carried.told(self.hello.host, self.hello.session, message)
                    self._order(Beat(seq, sent_s, self._clock()))
                case MembersShown(_, asked, stacks):
                    self._shown = message
                    if asked == self._asked:
                        self._stacks |= {int(each): str(text) for each, text in stacks.items() if each.isdecimal()}
                case LogPart(name, content):
                    self._log(name, content)
                case CheckpointPart() | KeptGiven():
                    self._given(self, message)
                case EpochGone(epoch) if epoch == self._passed:
                    self._passed = 0
                case EpochGone(epoch) if epoch == self._epoch:
                    self._epoch, self._members = 0, set()
                case Failed(_, sentence, detail):
                    raise type(message.error())(f"{self.name}: {sentence}", detail=detail)
                case _:
                    pass  # of an epoch that is past

    def _break(self, why: str, error: Exception) -> None:
        """The connection has ended. One by which the link was to go on, and over which nothing has come, may be one
        that the agent there has given up, since no answer came in time: it tries another.
        """
        if self._tried and not isinstance(error, WireError):
            self.link.close()
        else:
            self._lose(why)

    def shown(self) -> tuple[Shown, ...]:
        return tuple(each for each in self._shown.shown if each.member in self._members)

    def loaders_shown(self) -> tuple[LoaderShown, ...]:
        return self._shown.loaders if self._members else ()

    def ask_for_stacks(self, numbers: Collection[int]) -> None:
        self._asked, self._stacks = self._asked + 1, {}
        if here := tuple(member.number for member in self._members if member.number in numbers):
            self._order(StacksWanted(self._asked, here))

    def stacks(self) -> Mapping[int, str]:
        return self._stacks

    def _log(self, name: str, content: bytes) -> None:
        host = "".join(c if c.isalnum() or c in "-_." else "-" for c in self.hello.name) or "host"
        self._folder.logs.mkdir(exist_ok=True)
        with (self._folder.logs / f"{host}-{name.rpartition(' ')[2]}.txt").open("ab") as file:
            file.write(content)

    def _lose(self, why: str, *, may_return: bool = False) -> None:
        self.lost = self.lost or HostLost(self.hello.host, why, may_return)
        self._orders.clear()
        self._epoch, self._members = 0, set()
        self.link.close()

    def _loss(self) -> Iterator[HostLost]:
        if self.lost is not None and not self.told_of_loss:
            self.told_of_loss = True
            yield self.lost

    def look(self) -> HostLost | None:
        if self.lost is None and self._silence.look() >= self._lease_s:
            silent = self._silence.seconds
            why = f"{self.name} has not answered for {silent:.1f} s; team.lease_s is {self._lease_s:g}."
            self._lose(why, may_return=True)
        return next(self._loss(), None)

    def leave(self) -> None:
        until = time.monotonic() + SERVED_GRACE_S
        while self._members - self._ended and self.lost is None and (left_s := until - time.monotonic()) > 0:
            ready = ready_of(self.sources(), [self.link] if self.link.wants_write else [], left_s)
            self.pump()
            with contextlib.suppress(InstepError):  # the run is done
                for _ in self._read() if ready else ():
                    pass
        self._epoch = 0  # the agent there waits for them, once it hears of the run's end

    def end(self) -> None:
        if self._epoch:
            self._orders.clear()
            self._order(EndMembers(self._epoch))

    def end_who_is_back(self) -> None:
        """The team goes on without those who came back with the host, unless others were started in their place."""
        if self.members_back:
            self._order(EndMembers(self._epoch))
            self.members_back, self._passed, self._epoch, self._members = (), self._epoch, 0, set()

    def last_words(self) -> Iterator[Heard]:
        while self._epoch and self.lost is None:
            ready = ready_of(self.sources(), [self.link] if self.link.wants_write else [], LONGEST_LOOK_S)
            self.pump()
            for heard in self._read() if ready else ():
                if isinstance(heard, Heard):
                    yield heard
            if self._silence.look() >= self._lease_s:
                self._lose(f"{self.name} has not ended its workers; team.lease_s is {self._lease_s:g}.")
