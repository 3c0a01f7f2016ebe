"""What a roster does where a team in lockstep is to have more or fewer workers, or some on other hosts, while it goes
on. Pure.

Newcomers are started beside those that train. Once all of them are ready, and everybody else has its place, the team
goes on in another group after the present step: with them, and without those that are too many, who are ended once it
is there. On one machine all leave their group first, and are told of the next one then: until they do, whoever is lost
is lost as at any other time. Of what is asked for meanwhile the last counts. Where a newcomer is lost before the team
has done a step with it the others go on with the number that they had.
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
from instep.team.seats import PlaceInTeam, newcomers, seated, stand_in


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
        return len([place for place in self._places if not place.more and place.member not in coming])

    @property
    def generation(self) -> int:
        """Of its newest group."""
        return self._groups.number

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
        change.under_way, change.coming = True, [each.member for each in more]
        group = self._groups.change(self._places, more, change.leaving)
        self._leader = group.members[0].number
        return group

    def _left_group(self, message: LeftGroup, place: PlaceInTeam) -> list[Order]:
        """One has left it. Once all have, they go on in the next, or in one of their own where that is not to be."""
        change = self._change
        if message.generation != self._groups.number or change.under_way:
            return []
        change.left.append(place.member)
        if any(each.member not in change.left for each in seated(self._places)):
            return []
        vacant = [each for each in self._places if each.holder is not None and each.member not in change.leaving]
        if vacant:  # since it was too late to stay
            return self._cannot_stand_in(messages.NotStoodIn(vacant[0].member.number, agreement.AMID_CHANGE))
        more = [each for each in self._places if each.more] if change.parting else []
        change.parting, change.left = False, []
        return [self._change_group(more)]

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
        change.under_way = False
        self.hosts.changed()
        left = [place for place in self._places if place.member in change.leaving]
        why = agreement.fewer(self.hosts.wanted) if len(left) > len(change.coming) else agreement.ELSEWHERE
        change.leaving = []
        return [order for place in left for order in self._let_go(place, why)]

    # What befalls them

    def _lost_in_change(self, lost: orders.Lost, place: PlaceInTeam) -> list[Order] | None:
        """What is to be done where one is lost that has come, or is coming; None where that concerns none of them."""
        change, member = self._change, lost.member
        if place.more:
            gone = self._let_go(place, lost.why, resized=False)
            return [*self._as_it_was(lost.why), *gone, *self._drop_more(), *self._stay()]
        if self._groups.apart and not self._stopping and member in change.leaving:
            change.leaving.remove(member)  # the others wait for it in their step all the same
            return [*self._let_go(place, lost.why, resized=False), *self._groups.without(lost, [member])]
        if self._stopping or member not in change.coming:
            return None
        together = not (self._groups.apart or change.under_way or change.left)
        if together and seated(self._places, place):
            noted, change.coming = self._as_it_was(lost.why), []
            change.wanted = True
            holders = stand_in(self._places, lost, empty=True)
            return [*noted, orders.Replace(member, None, lost.why, holders), *self._stay()]
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

    def _cannot_regroup(self, message: NotRegrouped) -> list[Order]:
        """As after a loss; but where the team was to be changed, it begins anew with the number that it had."""
        if not self._change.under_way or message.generation != self._groups.number:
            return super()._cannot_regroup(message)
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
        if change.under_way or not any(place.more for place in self._places):
            return []
        as_it_was = [*self._as_it_was(why), *self._drop_more()]
        return [*as_it_was, *([self._change_group([])] if all_have_left else self._stay())]

    def _drop_more(self) -> list[Order]:
        """No newcomer is to come any more; some may be too many, as was asked for meanwhile."""
        there = len([place for place in self._places if not place.more])
        self._change.wanted, self._change.coming = there > self.hosts.wanted, []
        why = agreement.fewer(self.hosts.wanted)
        return [order for place in list(self._places) if place.more for order in self._let_go(place, why)]

    def _as_it_was(self, why: str, coming: Sequence[Member] = ()) -> list[Order]:
        """The team has the number that it had, if that was another, whatever comes or goes."""
        coming = coming or self._change.coming
        before = len([place for place in self._places if not place.more and place.member not in coming])
        wanted = self.hosts.wanted
        if before >= wanted:
            return []
        self.hosts.fix(before)
        return [orders.Warn(agreement.too_large(wanted, why, before)), orders.NoteResize(before, wanted, why)]
