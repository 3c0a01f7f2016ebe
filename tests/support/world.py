"""Processes that obey a roster, for histories of a team: every promise is looked at with every order and event."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instep.bounds import Bounds
from instep.errors import DataError, InstepError, ResourceError
from instep.team.generations import NEVER
from instep.team.hosts_there import HostsThere
from instep.team.messages import (
    Digest,
    Ended,
    EndedFor,
    Failed,
    FoundWritten,
    FoundWrong,
    HandedOver,
    NotStoodIn,
    Ready,
    StoppedAt,
)
from instep.team.orders import (
    AskToPause,
    AskToStop,
    CancelRun,
    CannotStart,
    DropSuccessor,
    EndEpoch,
    EpochEnded,
    FailRun,
    FinishRun,
    Go,
    HandOver,
    HostBack,
    HostCame,
    HostGivenUp,
    HostLost,
    Join,
    LongAwaited,
    Lost,
    Member,
    NoteLoss,
    NoteResize,
    Order,
    Regroup,
    Replace,
    Resize,
    Resumed,
    RosterEvent,
    Said,
    Saved,
    Start,
    StartMore,
    StopAsked,
    StopServer,
)
from instep.team.regroup_messages import NotRegrouped
from instep.team.roster import Roster

NAMES = ("a", "b", "c")
ROOMS = (2, 1, 2, 1)
"""For how many workers each host has room, where their number follows that."""

FINAL = (FinishRun, FailRun, CancelRun)
IN_LIFE = ("building", "ready", "waiting", "working")
OF_AN_EPOCH = (EpochEnded, Resumed, Saved)


class World:
    """Processes that obey a roster, and what happens to them. Every promise is looked at with every order and event.

    `stage`: of all that were ever started, and "empty" of a place to which nobody comes: building, ready, waiting for a
    place, working, done; "lost" once the roster knows of it, "dead" if it was ended, and "away" while its host is cut
    off. `holders`: who holds the place
    of whom. `said`: what a process has told the roster so far.
    """

    def __init__(
        self,
        workers: int = 2,
        restarts: int = 1,
        *,
        serving: bool = False,
        unlooked: bool = False,
        agents: tuple[int, ...] = (1,),
        patient: bool = False,
        stands_in: bool = False,
        regroups: bool = False,
        begun: bool = False,
        bounds: Bounds | None = None,
    ):
        hosts = HostsThere(workers, agents, patient=patient, bounds=bounds, room=ROOMS[0])
        self.bounds, self.needed = bounds, set(range(len(agents)))
        self.roster = Roster(hosts, restarts, Path("run"), serving=serving)
        self.hosts, self.patient = len(agents), patient
        self.regroups = regroups and not serving and len(agents) > 1
        self.facts = {
            "weights": "alike", "stands_in": stands_in and not serving and agents == (1,), "regroups": self.regroups,
        }  # fmt: skip
        self.group: Regroup | None = None  # the newest of the epoch
        self.holders: dict[Member, Member] = {}
        self.parting = False  # a host is cut off, and may be back
        self.here = {0} if agents[0] == 1 else set()
        self.started = False  # whether the present epoch has not ended
        self.allowed, self.serving, self.unlooked = restarts, serving, unlooked
        self.stage: dict[Member, str] = {}
        self.said: list[RosterEvent] = []
        self.orders: list[Order] = []
        self.epochs: list[int] = []
        self.ending: RosterEvent | None = None  # what the roster heard when it had an epoch ended, until that is gone
        self.last: RosterEvent | None = None
        self.final: Order | None = None
        self.stopping = self.server_told = self.pausing = self.undone = False
        self.proved = 0  # with how many workers the team has done a step last
        self.wanted = workers
        self.counted = 0
        self.losses: list[Member] = []  # which must be told of
        self.obey(self.roster.begin())
        if begun:
            self.build()

    # What is ordered

    def obey(self, orders: list[Order]) -> None:
        for order in orders:
            assert self.final is None, f"{order} came after {self.final}"
            self.orders.append(order)
            self.obey_one(order)
        assert self.roster.over == (self.final is not None)
        assert self.roster.restarts == self.counted <= self.allowed, "each restart is counted once"
        if self.final is None and self.ending is None:
            active = self.roster.active
            assert set(active) <= set(self.living()), "it waits for the dead"
            assert set(self.roster.hosts.awaited) == self.awaited()
            if self.awaited():
                assert not active
                assert not self.living(), "a process lives, and its team waits for a host"
                return
            assert active, "it waits for nobody"
            assert self.roster.going or any(self.stage[member] == "building" for member in active), "all wait for all"

    def awaited(self) -> set[int]:
        """The hosts without which no team may start now."""
        return set() if self.started else (set(range(self.hosts)) if self.few else self.needed) - self.here

    @property
    def room(self) -> int:
        return sum(ROOMS[host] for host in self.here)

    @property
    def few(self) -> bool:
        """Whether there is too little room for the team."""
        return self.bounds is not None and self.room < self.bounds.least

    def obey_one(self, order: Order) -> None:
        match order:
            case Start():
                assert not self.stopping, "nothing starts after a stop"
                assert not self.living(), "the team of before is not gone"
                assert order.epoch == self.roster.epoch > max(self.epochs, default=0)
                assert {member.epoch for member in order.members} == {order.epoch}
                assert [member.number for member in order.members] == list(range(len(order.members)))
                hosts = [member.host for member in order.members]
                if self.serving:
                    assert hosts.pop() == 0, "the server is where the roster is"
                assert hosts == sorted(hosts), "workers of a host are neighbours"
                assert set(hosts) <= self.here, "who is not there starts nothing"
                if self.bounds is not None:
                    self.wanted = min(self.bounds.most, self.room)
                    assert self.wanted >= self.bounds.least
                    assert all(hosts.count(host) <= ROOMS[host] for host in hosts), "no more than there is room for"
                assert len(hosts) == self.wanted, "so many workers as are wanted"
                self.needed = set()
                self.started, self.group = True, None
                self.server_told = self.pausing = False
                self.epochs.append(order.epoch)
                self.stage.update(dict.fromkeys(order.members, "building"))
                self.roster.hear(Resumed(order.epoch, (), self.unlooked and not order.looked))
            case Go(members=members):
                self.go(members)
                assert set(members) == set(self.present()), "all begin together"
            case Join(member=member):
                assert "working" in map(self.stage.get, self.present()), "there is nobody to join"
                self.go((member,))
                self.stage[member] = "waiting" if member in self.holders else "working"
            case HandOver(member=member):
                assert self.stage[member] == "waiting"
                assert self.last == Said(self.holders.pop(member), HandedOver(member.number, member.incarnation, b""))
                self.stage[member] = "working"
            case DropSuccessor(member=member):
                assert isinstance(self.last, Lost) or (
                    isinstance(self.last, Said) and isinstance(self.last.message, EndedFor)
                )
                assert self.last.member == self.holders.pop(member)
                self.stage[member] = "done"
            case Replace(member=old, successor=new, holders=holders):
                late = ("building", "ready", "waiting", "away")
                too_late = new is None and self.stage[old] in late and self.regroups
                goes_on = self.serving or self.regroups or holders or (self.stopping and new is None)
                assert goes_on, "in lockstep nobody goes on alone"
                assert self.roster.going
                if too_late:
                    self.stage[old] = "dead"
                    return
                assert self.stage[old] == ("away" if order.told else "lost")
                self.stage[old] = "away" if self.parting else "dead"
                assert (new is None) >= self.parting, "nobody comes in its place"
                assert old.number != self.roster.leader.number or holders or self.regroups
                if new is not None:
                    assert not self.stopping, "nothing starts after a stop"
                    assert new == Member(old.epoch, old.number, old.incarnation + 1, new.host)
                    assert new.host == old.host or (self.regroups and new.host in self.here | {0})
                    assert new not in self.stage
                    self.stage[new] = "building"
                    self.counted += not (self.regroups and isinstance(self.last, HostLost | HostCame | HostGivenUp))
                for place in [] if holders else [m for m, holder in self.holders.items() if holder == old]:
                    if self.stage[place] == "empty":
                        self.holders.pop(place)
                if holders:
                    empty = Member(old.epoch, old.number, old.incarnation + 1, old.host)
                    self.stage.update({empty: "empty"} if new is None else {})
                    self.check_holders(old, holders)
            case Regroup():
                self.regroup(order)
            case StartMore(members=members):
                assert self.serving, "in lockstep nobody goes on alone"
                assert self.roster.going
                assert not self.stopping, "nothing starts after a stop"
                (host,) = {member.host for member in members}
                assert host in self.here - {0}, "who is not there starts nothing"
                assert not [member for member in self.living() if member.host == host]
                for new in members:
                    assert Member(new.epoch, new.number, new.incarnation - 1, host) in self.stage
                    assert new not in self.stage
                    self.stage[new] = "building"
            case NoteResize(workers=workers, before=before) if isinstance(self.last, Lost | Said | CannotStart):
                assert self.proved == workers < before == len(self.of_workers()), "it has grown, and done no step"
                self.wanted, self.bounds, self.undone = workers, None, True
                self.losses = self.losses[:-1] if isinstance(self.last, Lost) else self.losses
            case NoteResize(workers=workers, before=before):
                assert self.bounds is not None, "what a person asks for is noted by who hears it"
                assert self.epochs, "there was no other number before"
                assert workers == self.bounds.within(self.room) != before
            case AskToStop(epoch=epoch):
                assert epoch == self.roster.epoch
                assert self.roster.going
                assert self.orders.count(order) == 1, "asked twice"
            case AskToPause(epoch=epoch):
                assert epoch == self.roster.epoch
                assert self.roster.going
                assert not self.stopping
                assert self.orders.count(order) == 1, "asked twice"
                self.pausing = True
            case StopServer(server=server):
                assert self.stage[server] == "working"
                assert not self.server_told
                self.server_told = True
            case EndEpoch(epoch=epoch):
                assert epoch == self.roster.epoch
                assert self.ending is None
                raised = isinstance(self.last, Said) and isinstance(self.last.message, Failed)
                self.ending = Lost(self.last.member, "it raised") if raised else self.last  # as one that dies
                if isinstance(self.last, Saved):
                    now = {m.host for m in self.living("working")}
                    assert self.here - now, "nobody has come"
                    assert not self.stopping
                    assert not self.serving, "whose workers come and go one by one"
                    assert not [m for m in self.present() if self.stage[m] == "done"], "it is about to end"
                if isinstance(self.last, HostLost | HostCame):
                    lost = [m for m in self.living() if m.host == self.last.host]
                    self.stage.update(dict.fromkeys(lost, "lost"))
                    self.losses += lost[:1]
                    assert lost or (self.bounds is not None and not self.roster.going), "it is taken in"
            case NoteLoss(member=member):
                assert self.stage[member] in ("lost", "dead")
                assert [type(o) for o in self.orders if getattr(o, "member", None) == member].count(NoteLoss) == 1
            case FinishRun(leader=leader):
                assert self.stage[leader] == "done"
                self.final = order
            case FailRun() | CancelRun():
                self.final = order

    def go(self, members: tuple[Member, ...]) -> None:
        for member in members:
            assert self.stage[member] == "ready", f"{member} was let go, but is {self.stage[member]}"
            self.stage[member] = "working"

    def regroup(self, group: Regroup) -> None:
        """All who work, and one who is ready, are in it, or nobody is while nobody is on the first host."""
        assert self.regroups
        assert self.roster.going
        assert not self.stopping or (self.group is not None and not self.group.members), "all waited for the first host"
        assert group.generation == (self.group.generation if self.group else 0) + 1
        self.group = group
        hosts = [member.host for member in group.members]
        assert hosts == sorted(hosts), "workers of a host are neighbours"
        for member in group.members:
            back = self.last.members if isinstance(self.last, HostCame) else ()
            assert self.stage[member] in ("ready", "waiting", "working") or member in back, "it is there"
            self.stage[member] = "working"
        working = {member for member in self.living("working") if member.epoch == self.roster.epoch}
        if group.members:
            assert working == set(group.members)
            assert self.roster.leader == group.members[0]
        else:
            assert not [member for member in working if member.host == 0]

    def check_holders(self, lost: Member, holders: Mapping[Member, Member]) -> None:
        """The places of all that are not there are held by who is, and those of others by nobody."""
        self.holders.pop(lost, None)
        self.holders.update(holders)
        vacant = [m for m in self.present() if self.stage[m] in ("building", "ready", "waiting", "empty")]
        assert set(vacant) == self.holders.keys(), "places of all that are not there are held"
        assert all(self.stage[holder] == "working" for holder in self.holders.values())
        load = Counter(self.holders.values())
        assert max(load.values()) <= min(load[m] for m in self.living("working")) + len(self.holders)

    # What happens

    def tell(self, event: RosterEvent) -> None:
        self.said.append(event)
        self.last = event
        self.obey(self.roster.hear(event))

    def says(self, member: Member, message: Any) -> None:
        self.tell(Said(member, message))

    def present(self) -> list[Member]:
        """The newest process in each place."""
        found = {member.number: member for member in sorted(self.stage) if member.epoch == self.roster.epoch}
        return list(found.values())

    def living(self, *stages: str) -> list[Member]:
        return [m for m, stage in self.stage.items() if stage in (stages or IN_LIFE)]

    def comes(self, host: int) -> None:
        self.here.add(host)
        self.goes_on_without(host)
        self.gives_away(host)
        self.tell(HostCame(host, "b", room=ROOMS[host]))

    def away(self, host: int) -> list[Member]:
        """Those of a host that is cut off."""
        return [member for member in self.present() if self.stage[member] == "away" and member.host == host]

    def returns(self, host: int) -> None:
        """One that was cut off is back, with its processes."""
        self.here.add(host)
        self.tell(HostCame(host, "b", room=ROOMS[host], members=tuple(self.away(host))))

    def is_given_up(self, host: int) -> None:
        self.gives_away(host)
        self.tell(HostGivenUp(host, "host 1 (b) has not come back within 60 s."))

    def gives_away(self, host: int) -> None:
        """Its places get successors elsewhere, if others go on."""
        away, done = self.away(host), any(self.stage[member] == "done" for member in self.present())
        if not away or done or self.ending is not None or self.stopping or self.pausing:
            return
        if self.counted == self.allowed:
            self.stage[away[0]] = "lost"
            self.losses += away[:1]
        self.counted += self.counted < self.allowed

    def ends_without(self, members: list[Member]) -> bool:
        """Whether a team in lockstep that was asked to end does so though these are lost."""
        if self.serving or not (self.stopping and self.roster.going) or self.ending is not None:
            return False
        leader = self.roster.leader
        return leader not in members and (members[0].host != leader.host or self.stage[leader] == "done")

    def goes_on_without(self, host: int, *, may_return: bool = False) -> None:
        """A host's workers are lost and the others live on, under a server or to the end."""
        there = [m for m in self.living() if m.host == host]
        if there and self.ends_without(there):
            self.stage.update(dict.fromkeys(there, "lost"))
            self.losses += there
            return
        if not (self.serving and self.roster.going and there) or self.ending is not None:
            if self.can_regroup(there):
                self.parting = may_return and all(self.stage[member] == "working" for member in there)
                self.stage.update(dict.fromkeys(there, "lost"))
                if self.parting:
                    self.losses += there
                    return
                self.losses += there[:1] if self.counted == self.allowed else there
                self.counted += self.counted < self.allowed
            return
        if self.few and not self.stopping and not self.server_told:
            return
        self.stage.update(dict.fromkeys(there, "lost"))
        if self.server_told:
            return
        if self.bounds is not None:
            self.losses += there
            return
        too_often = self.counted == self.allowed and not self.stopping
        self.losses += there[:1] if too_often else there
        self.counted += not self.stopping and not too_often

    def can_regroup(self, lost: list[Member]) -> bool:
        """Whether the others go on when all of these, of a host, are lost."""
        able = self.regroups and self.roster.going and self.ending is None and not (self.stopping or self.pausing)
        others = [member for member in self.living("working") if member not in lost]
        done = any(self.stage[member] == "done" for member in self.present())
        return able and bool(lost and others) and not done and not self.patient

    def loses(self, host: int, *, may_return: bool = False) -> None:
        self.here.discard(host)
        self.goes_on_without(host, may_return=may_return)
        self.tell(HostLost(host, "host 1 (b) is lost.", may_return))
        self.parting = False

    def is_back(self, host: int) -> None:
        """One was cut off for less than it takes to be lost."""
        self.tell(HostBack(host, "host 1 (b) could not be reached for 1.0 s"))

    def saves(self) -> None:
        self.tell(Saved(self.roster.epoch))

    def gone(self, written: tuple[str, ...] = ()) -> None:
        wrong = isinstance(self.ending, Said) and isinstance(self.ending.message, FoundWrong)
        lost = wrong or isinstance(self.ending, Lost)
        lost |= isinstance(self.ending, HostLost | HostCame) and self.bounds is None
        lost &= not self.undone
        self.counted += lost and not self.stopping and self.counted < self.allowed
        self.started, self.ending, self.undone = False, None, False
        self.needed = set(range(self.hosts)) if self.patient else set()
        self.holders.clear()
        self.stage.update({m: "dead" for m, stage in self.stage.items() if stage != "lost"})
        self.tell(EpochEnded(self.roster.epoch, written))

    def ready(self, member: Member, **facts: Any) -> None:
        self.stage[member] = "ready"
        self.says(member, Ready(facts, {}))

    def hands_over(self, member: Member) -> None:
        self.says(self.holders[member], HandedOver(member.number, member.incarnation, b""))

    def cannot_regroup(self) -> None:
        assert self.group is not None
        self.says(self.roster.leader, NotRegrouped(self.group.generation, "no host has a version whole"))

    def cannot(self, member: Member) -> None:
        self.says(self.holders[member], NotStoodIn(member.number, "worker 1 died while it saved."))

    def end(self, member: Member, digest: str = "same", *, leaves: bool = False) -> None:
        """leaves: it doesn't know of the places that it holds."""
        generation = self.group.generation if self.group is not None else 0
        ended = Ended({"version": 7}, digest, interrupted=self.stopping or self.pausing, generation=generation)
        for place in [] if leaves else [place for place, holder in self.holders.items() if holder == member]:
            self.says(member, EndedFor(place.number, ended))
            if self.stage[place] == "empty":
                del self.holders[place]
                self.stage[place] = "done"
        self.stage[member] = "done"
        self.says(member, ended)

    def lose(self, member: Member, why: str = "it was killed.") -> None:
        self.stage[member] = "lost"
        if not self.server_told:
            self.losses.append(member)
        self.tell(Lost(member, why, "last words"))

    def raises(self, member: Member, error: InstepError | None = None) -> None:
        comes_late = member in self.holders or self.roster._places[member.number].joins == NEVER
        self.stage[member] = "lost" if comes_late else "done"
        if comes_late and not self.server_told:
            self.losses.append(member)
        self.says(member, Failed.of(error or DataError("no sample")))

    def writes(self, member: Member, names: tuple[str, ...]) -> None:
        self.stage[member] = "done"
        self.says(member, FoundWritten(names, "step 3"))

    def resize(self, workers: int) -> None:
        self.wanted, self.bounds = workers, None
        self.tell(Resize(workers))

    def waits_long(self) -> None:
        if self.bounds is not None:
            self.needed &= {0}
        self.tell(LongAwaited())

    def of_workers(self) -> list[Member]:
        """Those present but the server."""
        return self.present()[: -1 if self.serving else None]

    def does_a_step(self) -> None:
        self.proved = len(self.of_workers())
        self.roster.hosts.proved()

    def stop(self, *, at_once: bool = False, within: bool = False) -> None:
        self.stopping = True
        self.tell(StopAsked(at_once, within))

    def hear_old(self, event: RosterEvent) -> None:
        """Something that was said before comes again, of a process that is not waited for any more, or an epoch that is
        past: nothing changes.
        """
        member = getattr(event, "member", None)
        if member is not None and (self.ending or member not in self.roster.active):
            pass
        elif not isinstance(event, OF_AN_EPOCH) or (event.epoch == self.roster.epoch and self.final is None):
            return
        before = self.state()
        assert self.roster.hear(event) == []
        assert self.state() == before, f"{event}, which is old, has changed something"

    def state(self) -> dict[str, Any]:
        return {name: sorted(it) if isinstance(it, set) else repr(it) for name, it in vars(self.roster).items()}

    def happens(self, kind: str, pick: int) -> None:
        """One of many things, to one of those to whom it can happen; nothing where there is nobody."""
        if kind == "old":
            past = self.roster.epoch - 1
            for event in (*self.said[pick % 5 :: 5], EpochEnded(past, ("old",)), Resumed(past, ("old",), True)):
                self.hear_old(event)
            return
        if self.final is not None:
            return
        host = pick % self.hosts
        match kind, self.ending is not None:
            case "come", _ if host or not self.here:
                self.comes(host)
            case "part", _ if host:
                self.loses(host)
            case "cut", _ if host:
                self.loses(host, may_return=True)
            case "return", _ if host and (self.away(host) or host in self.here):
                self.returns(host)
            case "give up", _ if host:
                self.is_given_up(host)
            case "back", _ if host:
                self.is_back(host)
            case "gone", True:
                self.gone(NAMES[pick % 3 : pick % 2])
            case "save", False if self.roster.going:
                self.saves()
            case "resize", _:
                self.resize(1 + pick % 4)
            case "prove", False if self.roster.going:
                self.does_a_step()
            case "room", False if self.started and not self.roster.going:
                self.tell(CannotStart(ResourceError("there is no room.")))
            case "late", _:
                self.waits_long()
            case "stop", _:
                self.stop(at_once=pick % 5 == 0, within=pick % 5 == 1)
            case _, True:
                return
        stages = {
            "build": ("building",), "ready": ("building",), "end": ("working",), "hand": ("waiting",),
            "digest": ("working",), "drift": ("working",),
        }  # fmt: skip
        if kind == "cannot" and self.group is not None and self.group.members and self.roster.active:
            return self.cannot_regroup()
        able = list(self.holders) if kind == "cannot" else self.living(*stages.get(kind, ()))
        waits = self.group is not None and not self.group.members
        able = [] if kind == "end" and waits else able
        if self.final is not None or self.ending is not None or not able:
            return
        member = able[pick % len(able)]
        match kind:
            case "build":
                self.build()
            case "ready":
                self.ready(member, **self.facts, written=NAMES[: pick % 2])
            case "hand":
                self.hands_over(member)
            case "cannot":
                self.cannot(member)
            case "end":
                self.end(member, leaves=pick % 7 == 0)
            case "digest" | "drift":
                if not self.serving:
                    self.says(member, Digest(pick, "same" if kind == "digest" else f"of {member}"))
            case "lose":
                self.lose(member)
            case "raise":
                self.raises(member)
            case "write":
                self.writes(member, (NAMES[pick % 3],))

    def build(self) -> None:
        """All who are not ready are."""
        for each in self.living("building"):
            if self.final is None and self.ending is None:
                self.ready(each, **self.facts)

    def run_out(self) -> None:
        """Nothing more befalls the team: it must come to its end."""
        for _ in range(200):
            if self.final is not None:
                return
            working = self.living("working")
            if self.ending is not None:
                self.gone()
            elif self.awaited():
                self.comes(min(self.awaited()))
            elif self.living("building"):
                self.build()
            elif self.living("waiting"):
                self.hands_over(self.living("waiting")[0])
            elif self.server_told:
                self.says(self.roster.leader, StoppedAt(5))
            else:
                self.end(self.roster.leader if self.serving else working[0])
        raise AssertionError(f"no end came: {self.orders[-10:]}")
