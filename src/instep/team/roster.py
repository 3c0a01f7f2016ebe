"""The roster: the state machine that decides over a team's processes. Events in, orders out; no torch, clock or I/O.

The agent tells it who is ready, who is lost and what was asked, and carries out what comes back, in order. All the
processes of one start of the team have the number of that start in common, the epoch. What is promised, in any order
of events:

- Every epoch that starts ends: by `EndEpoch`, which is answered by `EpochEnded`, or with the run. The run ends by one
  of `FinishRun`, `FailRun` and `CancelRun`, after which no order comes.
- Orders name processes that have started and were not lost, and `Go` those of them alone that are ready.
- Nobody waits for the dead: of a process that is lost comes a successor, a new epoch, the end of the run, or, where the
  others can end without it, nothing at all. In lockstep a successor comes where another holds the place until then.
- A restart is counted once, whichever way the death was noticed, and no more of them come than are allowed. To go back
  for parameters that forwards write is none: what was found then is known later, so that it comes to an end.
- A team starts with the workers of all hosts that are there, and waits for the others where it must: for all at first,
  and later too if it is not to go on without those that were lost. Host 0, where the roster is, is always there. One
  that comes while a team trains is taken in once that has saved a checkpoint, which counts as no restart either. Under
  a server nobody waits for a host that was lost, and one that comes has its workers join those that go on.
- What comes of another epoch, or of a process that was replaced or has done its part, changes nothing.
- For another number of workers the team saves after the present step and starts anew, which counts as no restart.
- After a stop no process starts, and once those that live have ended or are lost the run is over. In lockstep, who is
  lost on another host, or once the leader has ended, keeps that from neither saving nor ending.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from instep.errors import InstepError, WorkerError, with_saved
from instep.team import agreement, generations, messages, orders
from instep.team.hosts_there import HostsThere
from instep.team.losses_in_step import TeamChange
from instep.team.orders import Member, Order
from instep.team.regroup_messages import LeftGroup, NotRegrouped, Regrouped
from instep.team.resizing import Resizing
from instep.team.seats import NEVER, PlaceInTeam, Places, left_by, let_go, passed_on, successor_of

_LASTING = ("data", "samples", "parameters")
"""What a process that joins others has in common with them; its weights they give it."""


class Roster(Resizing):
    """The team of one run, over all its epochs.

    serving: under the server engine, where a worker can be replaced while the others go on, and the run ends with the
    server; in lockstep all have the same weights, and one is nothing without the others. restarts: so many are allowed.
    folder: the run folder, for sentences. hosts: which share the workers. Where some are awaited no process lives.
    """

    def __init__(
        self,
        hosts: HostsThere,
        restarts: int,
        folder: Path,
        *,
        serving: bool,
    ):
        self._allowed, self._folder, self._serving = restarts, folder, serving
        self.epoch = 0
        """The number of the present start of the team, from 1."""
        self.restarts = 0
        """Restarts so far, of the team or of a worker."""
        self.stood_in = 0
        """Those of workers in lockstep, whose part others did."""
        self.written: set[str] = set()
        """The parameters that forwards are known to write."""
        self.going = False
        """Whether the team of this epoch has begun."""
        self.over = False
        """Whether the run has."""
        self.hosts, self._leader, self._places = hosts, hosts.wanted * serving, Places()
        self._unlooked = self._looked = self._pausing = False
        self._digests, self._groups, self._change = agreement.Digests(), generations.Generations(0), TeamChange()
        self._ending: orders.Ending | None = None  # why the epoch ends, until it is gone
        self._stopping = self._stands_in = self._told_of = False  # told of: the loss for which an epoch ends
        self._raised: InstepError | None = None  # by a worker of the server engine, while the server saves

    def begin(self) -> list[Order]:
        """Starts the team for the first time."""
        return self._start_if_all_are_there()

    def hear(self, event: orders.RosterEvent) -> list[Order]:
        """What is to be done after `event`, in this order."""
        return [] if self.over else [*self._heard(event), *self._go_on_changing()]

    def _heard(self, event: orders.RosterEvent) -> list[Order]:
        if isinstance(event, orders.StopAsked):
            return self._stop(event)
        if isinstance(event, orders.EpochEnded):
            return self._again(event) if self._ending is not None and event.epoch == self.epoch else []
        if isinstance(event, orders.Resumed):
            if event.epoch == self.epoch:
                self.written.update(event.written)
                self._unlooked = event.unlooked
            return []
        if isinstance(event, orders.HostCame | orders.HostBack | orders.HostGivenUp):
            return self._of_cut(event)
        if isinstance(event, orders.HostLost):
            self.hosts.left(event.host)
            return self._lose_all_of(event.host, event.why, may_return=event.may_return)
        if isinstance(event, orders.Resize):
            self.hosts.fix(event.workers)
            return self._start_if_all_are_there() if self.hosts.waiting else self._another_number()
        if isinstance(event, orders.LongAwaited):
            return self._start_if_all_are_there() if self.hosts.need_no_more() else []
        if isinstance(event, orders.CannotStart):
            why = event.error.message
            return self._no_room_to_change(why) or self._undo(why) or self._over(orders.FailRun(event.error))
        if isinstance(event, orders.Saved):
            return self._end(event) if event.epoch == self.epoch and self._newcomers() else []
        if event.member not in self.active:
            return []
        place = self._places[event.member.number]
        if isinstance(event, orders.Lost):
            found = self._lost_in_change(event, place)
            return (self._undo(event.why) or self._lost(event, place)) if found is None else found
        return self._said(event.message, place)

    @property
    def active(self) -> list[Member]:
        """Who is waited for: the present members but those that have done their part."""
        if self.over or self._ending is not None:
            return []
        return [place.member for place in self._places if not (place.done or place.empty or place.away)]

    @property
    def leader(self) -> Member:
        """Who speaks for all: the server or, in lockstep, worker 0."""
        return self._places[self._leader].member

    def name(self, number: int) -> str:
        """What a member is called in a sentence."""
        if self._serving and number == self._leader:
            return "the server"
        place = self._places.get(number)
        host = place.member.host if place is not None else 0
        return f"worker {number} on host {host} ({self.hosts.names[host]})" if host else f"worker {number}"

    # What follows from an event

    def _said(self, message: orders.Word, place: PlaceInTeam) -> list[Order]:
        match message:
            case messages.Ready():
                place.facts = message.facts
                if place.joins:
                    return self._take_in(place)
                return self._join(place) if self.going else self._go()
            case messages.Digest():
                return self._compare(place.member.number, message)
            case messages.Ended():
                place.ended, place.done = message, True
                left = left_by(self._places, place)
                return self._finish() if left is None else self._end(left, told_of=True)
            case messages.FoundWritten() | messages.FoundWrong():
                return self._end(agreement.cause_of(message, [place.member for place in self._places]))
            case messages.HandedOver() | messages.EndedFor():
                return passed_on(self._places, message, place)
            case messages.NotStoodIn():
                return self._cannot_stand_in(message)
            case NotRegrouped():
                return self._cannot_regroup(message)
            case Regrouped():
                return self._regrouped(message)
            case LeftGroup():
                return self._left_group(message, place)
            case messages.Failed() if place.holder is not None or place.joins == NEVER:
                lost = orders.Lost(place.member, message.sentence, message.detail)  # not yet in step
                found = self._lost_in_change(lost, place)
                return self._lost(lost, place) if found is None else found
            case messages.Failed():
                undone = self._raised_in_change(message, place) or self._undo(message.sentence)
                return undone or self._failed(message.error(), place)
            case messages.StoppedAt():
                assert self._raised is not None, "the server was told to stop"
                sentence = with_saved(self._raised.message, message.version, self._folder)
                return self._over(orders.FailRun(type(self._raised)(sentence, detail=self._raised.detail)))

    def _lose_all_of(self, host: int, why: str, *, may_return: bool = False) -> list[Order]:
        """All workers of a host are lost at once."""
        coming = [place for place in self._places if place.more and place.member.host == host]
        dropped = [order for place in coming for order in self._let_go(place, why, resized=False)]
        there = [member for member in self.active if member.host == host]
        if not there:
            return dropped
        lost = orders.Lost(there[0], why, whole_host=True, may_return=may_return)
        few = self.hosts.few and not self._stopping and self._raised is None
        without = (self._can_do_without(there[0]) and not few) or self._ends_without(there[0])
        found = self._go_on_without(there, lost) if without else self._lost_in_step(there, lost)
        return [*dropped, *found]

    def _go_on_without(self, members: Sequence[Member], lost: orders.Lost) -> list[Order]:
        """Members are lost, and have no successors, those of a host before it comes back."""
        dropped = let_go(self._places, members)
        if self._raised is not None:
            return []
        if not self._stopping and (once_too_often := self._count_restart(lost)):
            return once_too_often
        return [*(orders.Replace(member, None, lost.why) for member in members), *dropped, *self._finish()]

    def _start_there(self, host: int) -> list[Order]:
        """The workers of a host that was lost start there again, while the others go on."""
        ends = self._stopping or self.over or self._ending is not None or self._raised is not None
        if ends or not (self._serving and self.going):
            return []
        successors = tuple(successor_of(place.member) for place in self._places if place.member.host == host)
        for successor in successors:
            self._places[successor.number] = PlaceInTeam(successor)
        return [orders.StartMore(successors)] if successors else []

    def _start_if_all_are_there(self) -> list[Order]:
        if self.hosts.too_few:
            return self._fault(self.hosts.too_few)
        if not self.hosts.look():
            self._places, self._ending, self.going = Places(), None, False
            return []
        noted = self.hosts.fit("hosts that have come or gone")
        looked, self._looked = self._looked, False
        return [*(noted if self.epoch else ()), self._start(looked=looked)]

    def _undo(self, why: str) -> list[Order]:
        """A team that has grown, and has done no step since, goes on as it was before; nothing for any other."""
        if self._stopping or not self.hosts.on_trial:
            return []
        resized = self.hosts.undo(why)
        told = orders.Warn(agreement.too_large(resized.before, why, resized.workers))
        return [told, resized, *self._end(orders.Resize(resized.workers))]

    def _pause(self) -> list[Order]:
        """The team is to start anew after the present step."""
        if self._stopping or self._ending is not None:
            return []  # the next start has so many, if one comes
        if not self.going:  # nothing is lost
            return self._end(orders.Resize(self.hosts.wanted))
        known, self._pausing = self._pausing, True
        return [] if known else [orders.AskToPause(self.epoch)]

    def _start(self, *, looked: bool = False) -> orders.Start:
        self.epoch += 1
        self._leader = self.hosts.wanted * self._serving
        hosts = [host for host, count in enumerate(self.hosts.started()) for _ in range(count)] + [0] * self._serving
        members = tuple(Member(self.epoch, number, host=host) for number, host in enumerate(hosts))
        self._places, self._change = Places.of(members), TeamChange()
        self._unlooked = self._told_of = self.going = self._pausing = self._stands_in = False
        self._digests, self._ending, self._raised = agreement.Digests(), None, None
        return orders.Start(self.epoch, members, looked)

    def _go(self) -> list[Order]:
        """Lets the team begin once all are ready, if they agree on what they start from."""
        if any(place.facts is None for place in self._places):
            return []
        facts = self._places[self._leader].facts or {}
        for place in self._places:
            if different := self._different(place):
                return self._fault(different)
        new = tuple(sorted({*facts.get("written", ())} - self.written))
        if new and self._unlooked:  # before the checkpoint that the team starts from, say
            return self._end(messages.FoundWritten(new, "a first forward after a stop"))
        self.going, self._stands_in = True, bool(facts.get("stands_in"))
        members = tuple(place.member for place in self._places)
        apart, resizes = (not self._serving and bool(facts.get(name)) for name in ("regroups", "resizes"))
        self._groups = generations.Generations(self.epoch, members, apart=apart, resizes=resizes)
        return [orders.Go(self.epoch, members)]

    def _join(self, place: PlaceInTeam) -> list[Order]:
        """Lets one begin with those that go on, if it agrees with the leader."""
        if different := self._different(place, _LASTING):
            return self._failed(WorkerError(different), place)
        return [orders.Join(place.member)]

    def _different(self, place: PlaceInTeam, names: Collection[str] | None = None) -> str:
        """A sentence on what it starts from and the leader does not; "" if there is nothing."""
        named = self.name(place.member.number), self.name(self._leader)
        return agreement.difference(place.facts or {}, self._places[self._leader].facts or {}, *named, names)

    def _compare(self, number: int, own: messages.Digest) -> list[Order]:
        other = self._digests.compare(number, own.version, own.digest, len(self._places))
        return [] if other is None else self._fault(agreement.drifted(self.name(number), self.name(other), own.version))

    def _finish(self) -> list[Order]:
        """Ends the run with the server, or else with the last worker."""
        leader = self._places[self._leader]
        late = generations.late(self._places, leader)
        if not (leader.done if self._serving else all(place.done or place in late for place in self._places)):
            return []
        self._digests = agreement.Digests()
        for place in [] if self._serving else [each for each in self._places if each.ended is not None]:
            assert place.ended is not None, "all have but who was lost, see `_ends_without`"
            own = messages.Digest(place.ended.progress["version"], place.ended.digest)
            if different := self._compare(place.member.number, own):
                return different
        ended = leader.ended
        if self._pausing and not self._stopping and ended is not None and ended.interrupted:
            return self._end(orders.Resize(self.hosts.wanted))
        left_out = [orders.Replace(place.member, None, agreement.TOO_LATE, told=place.away) for place in late]
        return [*left_out, *self._over(orders.FinishRun(self.leader))]

    def _failed(self, error: InstepError, place: PlaceInTeam) -> list[Order]:
        """What a process's code raised ends the run; in lockstep, and at the server, it is saved by then."""
        if not self._can_do_without(place.member):
            return self._over(orders.FailRun(self._raised or error))
        place.done = True
        if self._raised is not None:
            return []
        self._raised = error
        return [orders.StopServer(self.leader, place.member.number)]

    def _lost(self, event: orders.Lost, place: PlaceInTeam) -> list[Order]:
        member = event.member
        if self._raised is not None:  # the first error is the one to tell of
            return self._failed(self._raised, place)
        if not (self._can_do_without(member) or self._ends_without(member)):
            return self._stand_in(event, place)
        if self._stopping:
            return self._go_on_without([member], event)
        if once_too_often := self._count_restart(event):
            return once_too_often
        self._places[member.number] = PlaceInTeam(successor := successor_of(member))
        return [orders.Replace(member, successor, event.why)]

    def _can_do_without(self, member: Member) -> bool:
        """Whether the others go on when it is lost."""
        return self._serving and self.going and member != self.leader

    def _ends_without(self, member: Member) -> bool:
        """Whether a team in lockstep that was asked to end does so though this one is lost."""
        if self._serving or not (self.going and self._stopping) or member == self.leader:
            return False
        return member.host != self.leader.host or self._places[self._leader].ended is not None

    @property
    def bereft(self) -> bool:
        """Whether a team in lockstep, which was asked to end, is to do so without some that it has lost."""
        return bool(self.active) and not self._serving and any(p.done and p.ended is None for p in self._places)

    def _stop(self, event: orders.StopAsked) -> list[Order]:
        known, self._stopping = self._stopping, True
        if event.at_once or self.hosts.waiting:
            return self._over(orders.CancelRun())
        if event.within or self._ending is not None:
            return []
        if not self.going:
            return self._over(orders.CancelRun())
        return [] if known else [orders.AskToStop(self.epoch)]

    def _end(self, why: orders.Ending, *, told_of: bool = False) -> list[Order]:
        self._ending, self._told_of = why, told_of
        return [orders.EndEpoch(self.epoch)]

    def _again(self, gone: orders.EpochEnded) -> list[Order]:
        """An epoch has ended before its time: what comes now."""
        why = self._ending
        assert why is not None
        lost = why if isinstance(why, orders.Lost) and not self._told_of else None
        noted: list[Order] = [orders.NoteLoss(lost.member, lost.why)] if lost else []
        if self._stopping:
            return [*noted, *self._over(orders.CancelRun())]
        if isinstance(why, messages.FoundWritten):
            return self._go_back(why, gone.written)
        if isinstance(why, orders.Saved | orders.Resize):
            return self._start_again()
        if lost and (once_too_often := self._count_restart(lost)):
            return once_too_often
        return [*noted, *self._start_again()]

    def _go_back(self, found: messages.FoundWritten, more: Sequence[str]) -> list[Order]:
        """A new start with what was found to be written. It is no fault of a worker's, so it counts as no restart."""
        new = sorted({*found.names, *more} - self.written)
        if not new:
            return self._fault(agreement.known_written(found.names, found.where))
        self.written.update(new)
        return [orders.Warn(agreement.first_written(new, found.where)), *self._start_again(looked=True)]

    def _start_again(self, *, looked: bool = False) -> list[Order]:
        self._looked = looked
        self.hosts.begin_anew()
        return self._start_if_all_are_there()

    def _count_restart(self, lost: orders.Lost) -> list[Order]:
        """Counts a restart, but for a host where the team follows what is there; the end where it is one too many."""
        if lost.whole_host and self.hosts.follows:
            return []
        if self.restarts == self._allowed:
            error = WorkerError(agreement.too_often(lost.why, self.restarts), detail=lost.detail)
            return [orders.NoteLoss(lost.member, lost.why), *self._over(orders.FailRun(error))]
        self.restarts += 1
        return []

    def _fault(self, sentence: str) -> list[Order]:
        return self._over(orders.FailRun(WorkerError(sentence)))

    def _over(self, order: orders.FinishRun | orders.FailRun | orders.CancelRun) -> list[Order]:
        self.over = True
        return [order]
