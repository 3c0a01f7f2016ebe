"""Who has which place in a team, and who holds one whose process was lost, until its successor is there. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from instep.team.messages import Ended, EndedFor, HandedOver
from instep.team.orders import DropSuccessor, HandOver, Lost, Member, Order


@dataclass(slots=True)
class PlaceInTeam:
    """Who has a place in the team. `done`: it is not waited for any more. `holder`: the number of the worker that holds
    the place until it is there, after another was `lost`; or to the end where nobody comes: `empty`. `joins`: the
    generation of the first group that it is in. `away`: its host was cut off, and may come back with it. `more`: it is
    to be there beside those who go on, and is not yet; in the place of another, where one was `lost`.
    """

    member: Member
    facts: Mapping[str, Any] | None = None
    ended: Ended | None = None
    done: bool = False
    holder: int | None = None
    lost: Lost | None = None
    empty: bool = False
    joins: int = 0
    away: bool = False
    more: bool = False

    @property
    def new(self) -> bool:
        """Whether it is to be there beside those who go on, in nobody's place."""
        return self.more and self.lost is None


@dataclass
class Places:
    """The places of a team, by the numbers of who has them; in that order, those that there are."""

    _of: dict[int, PlaceInTeam] = field(default_factory=dict)
    _left: dict[int, int] = field(default_factory=dict)  # incarnations of who has left, by number

    @classmethod
    def of(cls, members: Sequence[Member]) -> Places:
        return cls({member.number: PlaceInTeam(member) for member in members})

    def __iter__(self) -> Iterator[PlaceInTeam]:
        return iter([self._of[number] for number in sorted(self._of)])

    def __len__(self) -> int:
        return len(self._of)

    def __getitem__(self, number: int) -> PlaceInTeam:
        return self._of[number]

    def __setitem__(self, number: int, place: PlaceInTeam) -> None:
        self._of[number] = place

    def get(self, number: int) -> PlaceInTeam | None:
        return self._of.get(number)

    def more(self, epoch: int, host: int) -> PlaceInTeam:
        """One more, with the lowest number that is free."""
        number = next(number for number in range(len(self._of) + 1) if number not in self._of)
        incarnation = self._left.get(number, -1) + 1
        self._of[number] = place = PlaceInTeam(Member(epoch, number, incarnation, host), joins=NEVER, more=True)
        return place

    def leave(self, member: Member) -> None:
        """That is there no more."""
        del self._of[member.number]
        self._left[member.number] = member.incarnation


NEVER = 1 << 53
"""Of the generations, for who is in no group yet."""


def successor_of(member: Member) -> Member:
    """The next process in its place."""
    return Member(member.epoch, member.number, member.incarnation + 1, member.host)


def seated(seats: Places, but: PlaceInTeam | None = None) -> list[PlaceInTeam]:
    """Those but one whose processes are there and have their places."""
    return [seat for seat in seats if seat.holder is None and seat is not but and not seat.more]


def stand_in(seats: Places, lost: Lost, *, empty: bool = False) -> dict[Member, Member]:
    """Puts a successor in the place of a member that was lost, in name alone where that stays `empty`, and has others
    hold this place and those that it has held, spread evenly. Who holds which from then on, by successor; another must
    be `seated`.
    """
    number = lost.member.number
    before, others = seats[number], seated(seats, seats[number])
    seats[number] = new = PlaceInTeam(successor_of(lost.member), holder=before.holder, lost=lost, empty=empty)
    told = [each for each in seats if each is new or each.holder == number]
    load = {each.member.number: sum(seat.holder == each.member.number for seat in seats) for each in others}
    for each in told:
        if each.holder is None or each.holder == number:
            each.holder = min(load, key=lambda worker: (load[worker], worker))
            load[each.holder] += 1
    return {each.member: seats[each.holder].member for each in told if each.holder is not None}


def come_later(seats: Places) -> None:
    """All have left their group: places that were held in that are held no more, and their successors are to come to
    those who go on, but for those that stay empty.
    """
    for seat in [each for each in seats if each.holder is not None]:
        if seat.empty:
            seats.leave(seat.member)
        else:
            seat.holder, seat.more, seat.joins = None, True, NEVER


def can_stand_in(seats: Places, but: PlaceInTeam) -> bool:
    """Whether there is another than this one who can, and all have something to do."""
    return bool(seated(seats, but)) and not any(seat.done for seat in seats)


def passed_on(seats: Places, message: HandedOver | EndedFor, by: PlaceInTeam) -> list[Order]:
    """Gives a place to its successor, if it is the one that is waited for; or does not wait for one any more, since who
    holds the place has done its part to the end.
    """
    seat = seats[message.worker]
    if seat.holder != by.member.number or seat.done:
        return []
    if isinstance(message, EndedFor):
        seat.ended, seat.done = message.ended, True
        return [] if seat.empty else [DropSuccessor(seat.member)]
    if seat.member.incarnation != message.incarnation:
        return []
    seat.holder = None
    return [HandOver(seat.member, message.state)]


def let_go(seats: Places, members: Sequence[Member]) -> list[Order]:
    """Members are lost, and nobody waits for them any more, nor for those whose places they held: all is done."""
    numbers = {member.number for member in members}
    gone = [seat for seat in seats if seat.holder in numbers and not seat.done]
    for seat in (*gone, *(seats[number] for number in numbers)):
        seat.done = True
    return [DropSuccessor(seat.member) for seat in gone if not seat.empty]


def left_by(seats: Places, holder: PlaceInTeam) -> Lost | None:
    """Of whom one that has ended came to hold the place when all was done, so that nobody ends for it."""
    left = [seat for seat in seats if seat.holder == holder.member.number and not seat.done]
    return next((seat.lost for seat in left), None)


def newcomers(seats: Places, shares: Sequence[int]) -> list[int]:
    """The hosts that have no workers and would get some, by these shares, if workers were on more hosts then."""
    now = {seat.member.host for seat in seats}
    then = [host for host, count in enumerate(shares) if count]
    return [host for host in then if host not in now] if len(then) > len(now) else []
