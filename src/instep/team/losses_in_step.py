"""What a roster does where a team in lockstep loses workers in the midst of a step, and the others can go on. Pure.

On one machine others hold the place of one that died until its successor takes it; who dies before all have begun has a
successor that begins with them. Over several hosts the others go on in another group, and take the successor in when it
is ready. Where they cannot, the epoch ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from instep.team import agreement, generations, messages, orders
from instep.team.hosts_there import HostsThere
from instep.team.orders import Member, Order
from instep.team.regroup_messages import NotRegrouped
from instep.team.seats import PlaceInTeam, Places, can_stand_in, stand_in, successor_of


@dataclass
class TeamChange:
    """Of a team's workers. wanted: whether it is to be changed, or is being. parting: on one machine, they are asked to
    leave their group. left: who has, or has left the next one before it was formed. under_way: the next group is
    ordered, and not there. coming: who is in it for the first time, until a step is done. leaving: who is in none after
    that. lost: one of the workers, since they left their group.
    """

    wanted: bool = False
    parting: bool = False
    under_way: bool = False
    left: list[Member] = field(default_factory=list)
    coming: list[Member] = field(default_factory=list)
    leaving: list[Member] = field(default_factory=list)
    lost: orders.Lost | None = None


class InStep(ABC):
    """That part of a `Roster`."""

    stood_in: int
    going: bool
    over: bool
    _places: Places
    _groups: generations.Generations
    hosts: HostsThere
    _leader: int
    _stopping: bool
    _pausing: bool
    _stands_in: bool
    _told_of: bool
    _change: TeamChange

    @property
    @abstractmethod
    def active(self) -> list[Member]: ...

    @abstractmethod
    def _came(self, came: orders.HostCame) -> list[Order]: ...

    @abstractmethod
    def _count_restart(self, lost: orders.Lost) -> list[Order]: ...

    @abstractmethod
    def _end(self, why: orders.Ending, *, told_of: bool = False) -> list[Order]: ...

    @abstractmethod
    def _fault(self, sentence: str) -> list[Order]: ...

    @abstractmethod
    def _stay(self) -> list[Order]: ...

    @abstractmethod
    def _once_all_have_left(self) -> list[Order]: ...

    @abstractmethod
    def _different(self, place: PlaceInTeam, names: Collection[str] | None = None) -> str: ...

    def _stand_in(self, lost: orders.Lost, place: PlaceInTeam) -> list[Order]:
        """A worker in lockstep is lost: others that can hold its place, and those that it has held, for successors."""
        if self.hosts.alone and not (self.going or self._stopping):
            return self._begin_with_another(lost)
        if not (self._stands_in and can_stand_in(self._places, place)):
            return self._lost_in_step([lost.member], lost)
        if not self._stopping and (once_too_often := self._count_restart(lost)):
            return once_too_often
        together = not (self._change.under_way or self._change.left)
        self.stood_in += place.holder is None and together and not self._stopping
        self._change.lost = self._change.lost if together else lost
        successor = None if self._stopping else successor_of(lost.member)
        holders = stand_in(self._places, lost, empty=self._stopping)
        return [orders.Replace(lost.member, successor, lost.why, holders), *self._stay(), *self._once_all_have_left()]

    def _begin_with_another(self, lost: orders.Lost) -> list[Order]:
        """One is lost before all are ready: its successor begins with the others."""
        if once_too_often := self._count_restart(lost):
            return once_too_often
        self._places[lost.member.number] = PlaceInTeam(successor := successor_of(lost.member))
        return [orders.Replace(lost.member, successor, lost.why)]

    def _lost_in_step(self, members: Sequence[Member], lost: orders.Lost) -> list[Order]:
        """Workers in lockstep are lost, or all of a host: the others go on in another group, and take the successors
        in when they are ready. The epoch ends where they cannot, or the team is to have other workers then.
        """
        others = lost.whole_host and (self.hosts.patient or self.hosts.follows)
        able = self.going and self._groups.can_do_without(self._places, members)
        if self._stopping or self._pausing or others or not able:
            return self._end(lost)
        if lost.may_return and all(member in self._groups.members for member in members):
            found = self._groups.part(self._places, lost, members)
            self._leader = self._groups.members[0].number
            return found
        if once_too_often := self._count_restart(lost):
            return once_too_often
        found = self._groups.replace(self._places, lost, members, self.hosts.shares())
        self._leader = self._groups.members[0].number
        return found

    def _of_cut(self, event: orders.HostBack | orders.HostGivenUp | orders.HostCame) -> list[Order]:
        """A host that was cut off is back, in time or later, or is not."""
        if isinstance(event, orders.HostBack):
            return self._same_again(event)
        away = [place for place in self._places if place.away and place.member.host == event.host]
        if isinstance(event, orders.HostGivenUp):
            return self._give_away(away, event.why)
        back = [place for place in away if place.member in event.members]
        if not (back and self._can_change):
            given = self._give_away(away, f"host {event.host} ({event.name}) has come anew, without its workers.")
            return given if self.over else [*given, *self._came(event)]
        self.hosts.came(event)
        group = self._groups.with_(*back)
        self._leader = self._groups.members[0].number
        dead = [place for place in away if place not in back]
        died = f"host {event.host} ({event.name}) is back without all its workers."
        return [group, *self._give_away(dead, died, whole_host=False)]

    @property
    def _can_change(self) -> bool:
        """Whether those who go on can do so in another group: else they end soon, or wait for one on the first host."""
        ends = (self._stopping or self._pausing) and self._groups.led
        return bool(self.active) and not (ends or any(place.done for place in self._places))

    def _give_away(self, places: Sequence[PlaceInTeam], why: str, *, whole_host: bool = True) -> list[Order]:
        """Who was cut off does not come back: the places get successors, on other hosts if all of that are lost."""
        if not places or self._stopping or self._pausing or not self._can_change:
            return []
        lost = orders.Lost(places[0].member, why, whole_host=whole_host)
        if once_too_often := self._count_restart(lost):
            return once_too_often
        members = [place.member for place in places]
        return self._groups.replace(self._places, lost, members, self.hosts.shares(), told=True)

    def _same_again(self, back: orders.HostBack) -> list[Order]:
        """A host was cut off, and is back: all go on in another group of the same members, over new connections. TCP
        keeps those of before waiting, about as long again as the cut was.
        """
        members = self._groups.members
        able = self.going and self._groups.led and self._groups.can_do_without(self._places, ())
        # It stands for all that are back, and may have no worker itself.
        there = min((each for each in members if each.host), key=lambda each: each.host != back.host, default=None)
        if there is None or not (able and self.active) or self._stopping or self._pausing:
            return []
        return [self._groups.again(orders.Lost(there, back.why, whole_host=True))]

    def _take_in(self, place: PlaceInTeam) -> list[Order]:
        """A successor is ready to go on with the others."""
        if different := self._different(place, generations.LASTING):
            return self._fault(different)
        if place.more:
            return []  # it comes with the others that are to come
        if not self._can_change:
            return []  # the others end without it, but where all wait for one of the first host
        group = self._groups.with_(place)
        self._leader = self._groups.members[0].number
        return [group]

    def _cannot_stand_in(self, message: messages.NotStoodIn) -> list[Order]:
        """The epoch ends for a loss that was told of and counted when it came."""
        place = self._places[message.worker]
        self.stood_in -= not place.empty
        warned = orders.Warn(agreement.no_stand_in(message.why))
        return [warned, *self._end(place.lost or orders.Lost(place.member, message.why), told_of=True)]

    def _cannot_regroup(self, message: NotRegrouped) -> list[Order]:
        lost = self._groups.why_not(message)
        if lost is None:
            return []
        return [orders.Warn(agreement.no_stand_in(message.why)), *self._end(lost, told_of=True)]
