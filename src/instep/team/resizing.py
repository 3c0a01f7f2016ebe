"""What a roster does where a team in lockstep is to have more or fewer workers, or some on other hosts, while it goes
on. Pure.

Newcomers are started beside those that train. Once all of them are ready, and everybody else has its place, the team
goes on in another group after the present step: with them, and without those that are too many, who are ended once it
is there. Of what is asked for meanwhile the last counts. Where a newcomer is lost before the team has done a step with
it the others go on with the number that they had.

On one machine all leave their group first, and are told of the next one then: until they do, whoever is lost is lost as
at any other time. Afterwards nobody can stand in for it, nor need anybody, for the step is done: those who live go on
in a group of their own, and its successor comes to them as newcomers do. So it is too where one dies before the next
group is formed: they all leave that.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence

from instep.team import agreement, messages, orders
from instep.team.hosts_there import MOST_IN_STEP
from instep.team.losses_in_step import InStep
from instep.team.orders import Member, Order
from instep.team.regroup_messages import LeftGroup, NotRegrouped, Regrouped
from instep.team.seats import NEVER, PlaceInTeam, come_later, newcomers, seated, stand_in, successor_of


class Resizing(InStep):
    """That part of a `Roster`."""

    epoch: int
    over: bool
    _ending: orders.Ending | None
    _serving: bool

    @abstractmethod
    def _pause(self) -> list[Order]: ...

    @abstractmethod
    def _start_if_all_are_there(self) -> list[Order]: ...

    @abstractmethod
    def _lose_all_of(self, host: int, why: str) -> list[Order]: ...

    @abstractmethod
    def _start_there(self, host: int) -> list[Order]: ...

    @abstractmethod
    def name(self, number: int) -> str: ...

    @property
    def unproved(self) -> bool:
        """Whether the team has done no step as it is now."""
        return self.hosts.unproved or (bool(self._change.coming) and not self._change.under_way)

    def proved(self) -> None:
        """It has done a step."""
        self.hosts.proved()
        if not self._change.under_way:
            self._change.coming = []

    @property
    def size(self) -> int:
        """How many workers it has, with those that come in others' places."""
        coming = self._change.coming if self._change.under_way else ()
        return len([place for place in self._places if not place.new and place.member not in coming])

    @property
    def generation(self) -> int:
        """Of its newest group."""
        return self._groups.number

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of the workers of that, by rank."""
        return self._groups.numbers

    def _can_be_other(self) -> bool:
        """Whether it can have what is wanted while it goes on."""
        shares = self.hosts.shares()
        hosts = {host for host, count in enumerate(shares) if count}
        reached = self._groups.apart or hosts == {0}
        able = self.going and self._groups.resizes and reached and self.hosts.wanted <= MOST_IN_STEP
        return able and not self._pausing and not any(place.done for place in self._places)

    def _another_number(self) -> list[Order]:
        """The team is to have what is wanted, while it goes on, or else from a new start."""
        if self._stopping or self._ending is not None:
            return []  # the next start has so many, if one comes
        if not self._can_be_other():
            return self._pause()
        self._change.wanted = True
        return []

    def _came(self, came: orders.HostCame) -> list[Order]:
        self.hosts.came(came)
        if self.hosts.waiting:
            return self._start_if_all_are_there()
        # One that was lost takes part again at once under a server; else once a checkpoint is saved, or when the team
        # next starts. A team that follows what is there takes in who is new after the present step.
        who = f"host {came.host} ({came.name})"
        lost = self._lose_all_of(came.host, f"{who} has come anew, without its workers.")
        started = [*lost, *self._start_there(came.host)]
        ends = self._stopping or self._ending is not None or self.over
        if ends or not (self._can_be_other() or (self.hosts.follows and not started)):
            return started
        noted = self.hosts.fit(f"{who}, which has come")
        anew = noted or newcomers(self._places, self.hosts.shares())
        return [*started, *noted, *(self._another_number() if anew else ())]

    def _newcomers(self) -> list[int]:
        """The hosts that a new start would take in, where it may come and would have workers on more hosts than now."""
        going = self.going and self._ending is None and not any(place.done for place in self._places)
        able = going and not (self._stopping or self._serving or self._can_be_other())
        return newcomers(self._places, self.hosts.shares()) if able else []

    def _go_on_changing(self) -> list[Order]:
        """What is to be done next for it, after anything that has happened."""
        change = self._change
        waits = change.parting or change.under_way or self._stopping or self._ending is not None or self.over
        away = any(place.away for place in self._places)  # which comes back, or does not
        if not change.wanted or waits or away or not self._can_be_other():
            return []
        shares = self.hosts.shares()
        found = self._begin_more(shares)
        more = [place for place in self._places if place.more]
        leaving = self._too_many(shares)
        if not (more or leaving):
            change.wanted = False
            return found
        stay = [place for place in self._places if place not in more and place not in leaving]
        ready = all(place.facts is not None for place in more) and self._groups.led
        seats = [place for place in stay if place.holder is not None or not self._groups.has(place)]
        if not ready or seats or any(place.holder is not None and not place.empty for place in leaving):
            return found
        change.leaving = [each.member for each in leaving]
        if self._groups.apart:
            return [*found, self._change_group(more)]
        change.parting = True
        return [*found, self._groups.leave(fewer=bool(leaving))]

    def _change_group(self, more: Sequence[PlaceInTeam]) -> Order:
        """The next group: with these."""
        change = self._change
        there = [each.member for each in self._places if each.member not in change.leaving]
        again = [each for each in change.coming if change.under_way and each in there]
        change.under_way, change.coming = True, [*again, *(each.member for each in more)]
        group = self._groups.change(self._places, more, change.leaving)
        self._leader = group.members[0].number
        return group

    def _left_group(self, message: LeftGroup, place: PlaceInTeam) -> list[Order]:
        """One has left it, or the next one before it was formed."""
        if message.generation != self._groups.number:
            return []
        self._change.left.append(place.member)
        return self._once_all_have_left()

    def _once_all_have_left(self) -> list[Order]:
        """Once all that live have left their group, or the next one before it was formed, they go on in another: in
        the one that was planned, or among themselves.
        """
        change, numbers = self._change, self._groups.numbers
        there = [each for each in seated(self._places) if each.member.number in numbers]
        none_left = change.under_way and not there  # of who was to be in it
        if not (change.left or none_left) or any(each.member not in change.left for each in there):
            return []
        more = [each for each in self._places if each.more] if change.parting else []
        change.lost = next((each.lost for each in self._places if each.holder is not None), change.lost)
        come_later(self._places)
        if change.under_way:
            many = self._too_many(self.hosts.shares())
            change.leaving += [each.member for each in many if each.member not in change.leaving]
        if all(each.member in change.coming or each.member in change.leaving for each in there):
            more += [each for each in self._places if each.member in change.leaving and each not in there]
            change.leaving = []  # who else would have the state
        change.wanted = change.wanted or any(each.more for each in self._places)
        group = self._change_group(more)
        change.parting, change.left = False, []
        return [group]

    def _stay(self) -> list[Order]:
        """They are not to leave their group, where they have not begun to."""
        if not self._change.parting:
            return []
        self._change.parting, self._change.leaving = False, []
        return [self._groups.stay()]

    def _begin_more(self, shares: Sequence[int]) -> list[Order]:
        """Has newcomers started, or ended, as many as hosts have too few or too many of them."""
        found: list[Order] = []
        there = Counter(place.member.host for place in self._places)
        for place in reversed([place for place in self._places if place.more]):
            if there[place.member.host] > shares[place.member.host]:
                there[place.member.host] -= 1
                found += self._let_go(place, agreement.fewer(self.hosts.wanted))
        for host, share in enumerate(shares):
            lack = range(there[host], share)
            if members := tuple(self._places.more(self.epoch, host).member for _ in lack):
                found.append(orders.StartMore(members))
        return found

    def _too_many(self, shares: Sequence[int]) -> list[PlaceInTeam]:
        """Who has a place, and is to leave: of each host the last of its group, whose first has the others' store."""
        found: list[PlaceInTeam] = []
        rank = {member.number: rank for rank, member in enumerate(self._groups.members)}
        for host in {place.member.host for place in self._places}:
            those = [place for place in self._places if place.member.host == host and not place.more]
            found += sorted(those, key=lambda place: rank.get(place.member.number, len(rank)))[shares[host] :]
        return found

    def _let_go(self, place: PlaceInTeam, why: str, *, resized: bool = True) -> list[Order]:
        """It is in no group any more, or never was. resized: it is not lost."""
        self._places.leave(place.member)
        return [] if place.empty else [orders.Replace(place.member, None, why, resized=resized)]

    def _regrouped(self, message: Regrouped) -> list[Order]:
        """All are in the group of this generation."""
        change = self._change
        self._groups.note_formed(message.generation)
        if message.generation != self._groups.number or not change.under_way:
            return []
        change.under_way, change.lost = False, None
        self.hosts.changed()
        left = [place for place in self._places if place.member in change.leaving]
        why = agreement.fewer(self.hosts.wanted) if len(left) > len(change.coming) else agreement.ELSEWHERE
        change.leaving = []
        return [order for place in left for order in self._let_go(place, why)]

    # What befalls them

    def _lost_in_change(self, lost: orders.Lost, place: PlaceInTeam) -> list[Order] | None:
        """What is to be done where one is lost that has come, or is coming; None where that concerns none of them."""
        change, member = self._change, lost.member
        if place.more and not place.new:
            return self._another_to_come(lost)
        if place.more:
            gone = self._let_go(place, lost.why, resized=False)
            return [*self._as_it_was(lost.why), *gone, *self._drop_more(), *self._stay()]
        if self._groups.apart and not self._stopping and member in change.leaving:
            change.leaving.remove(member)  # the others wait for it in their step all the same
            return [*self._let_go(place, lost.why, resized=False), *self._groups.without(lost, [member])]
        if member in change.leaving and not self._groups.apart and (change.left or change.under_way):
            change.leaving.remove(member)  # nobody waits for it any more
            return [*self._let_go(place, lost.why, resized=False), *self._once_all_have_left()]
        if self._stopping or member not in change.coming:
            return None
        if seated(self._places, place) and not self._groups.apart:
            noted = self._as_it_was(lost.why)
            change.coming = [each for each in change.coming if each != member and change.under_way]
            change.wanted = True
            holders = stand_in(self._places, lost, empty=True)
            replaced = orders.Replace(member, None, lost.why, holders)
            return [*noted, replaced, *self._stay(), *self._once_all_have_left()]
        if not self._groups.apart:
            return [*self._as_it_was(lost.why), *self._end(orders.Resize(self.hosts.wanted))]
        coming, change.coming = change.coming, []
        noted = self._as_it_was(lost.why, coming)
        left = self._let_go(place, lost.why, resized=False)
        for each in [other for other in self._places if other.member in coming]:
            left += self._let_go(each, agreement.fewer(self.hosts.wanted))
        group = self._groups.without(lost, coming)
        self._leader = self._groups.members[0].number
        change.under_way = change.wanted = True
        return [*noted, *left, *group]

    def _another_to_come(self, lost: orders.Lost) -> list[Order]:
        """Who is lost was to come to those who go on, in the place of one that was lost before: so is its successor."""
        if self._stopping:
            return self._let_go(self._places[lost.member.number], lost.why, resized=False)
        if once_too_often := self._count_restart(lost):
            return once_too_often
        successor = successor_of(lost.member)
        self._places[successor.number] = PlaceInTeam(successor, joins=NEVER, lost=lost, more=True)
        return [orders.Replace(lost.member, successor, lost.why)]

    def _cannot_regroup(self, message: NotRegrouped) -> list[Order]:
        """As after a loss; but where the team was to be changed, it begins anew with the number that it had."""
        if not self._change.under_way or message.generation != self._groups.number:
            return super()._cannot_regroup(message)
        if self._change.lost is not None:
            return [orders.Warn(agreement.no_stand_in(message.why)), *self._end(self._change.lost, told_of=True)]
        noted = [] if self._stopping else self._as_it_was(f"{message.why}.")
        return [*noted, *self._end(orders.Resize(self.hosts.wanted))]

    def _raised_in_change(self, message: messages.Failed, place: PlaceInTeam) -> list[Order]:
        """A newcomer has raised in its first step, so that all have stopped: they begin anew without it."""
        if self._stopping or place.member not in self._change.coming:
            return []
        return [*self._as_it_was(message.sentence), *self._end(orders.Resize(self.hosts.wanted))]

    def _no_room_to_change(self, why: str) -> list[Order]:
        """There is no room for the newcomers, or for a group with them: nothing has changed for the others."""
        change, all_have_left = self._change, False
        if change.under_way and not self._groups.apart:
            all_have_left, change.under_way = True, False
            for member in change.coming:
                self._places[member.number].more = True
        if change.under_way or not any(place.new for place in self._places):
            return []
        as_it_was = [*self._as_it_was(why), *self._drop_more()]
        return [*as_it_was, *([self._change_group([])] if all_have_left else self._stay())]

    def _drop_more(self) -> list[Order]:
        """No newcomer is to come any more; some may be too many, as was asked for meanwhile."""
        there = len([place for place in self._places if not place.new])
        come_late = any(place.more and not place.new for place in self._places)
        self._change.wanted, self._change.coming = there > self.hosts.wanted or come_late, []
        why = agreement.fewer(self.hosts.wanted)
        return [order for place in list(self._places) if place.new for order in self._let_go(place, why)]

    def _as_it_was(self, why: str, coming: Sequence[Member] = ()) -> list[Order]:
        """The team has the number that it had, if that was another, whatever comes or goes."""
        coming = coming or self._change.coming
        there = [place for place in self._places if not (place.new or place.empty or place.member in coming)]
        before = len(there)
        wanted = self.hosts.wanted
        if before >= wanted:
            return []
        self.hosts.fix(before)
        return [orders.Warn(agreement.too_large(wanted, why, before)), orders.NoteResize(before, wanted, why)]
