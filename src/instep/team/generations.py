"""The groups in which a team in lockstep goes on within one epoch, as its workers are lost and come. Pure; no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial

from instep.team.orders import Lost, Member, Order, Regroup, Replace
from instep.team.regroup_messages import NotRegrouped
from instep.team.seats import NEVER, PlaceInTeam, Places

LASTING = ("data", "samples", "parameters", "apart", "written", "regroups", "resizes")
"""What a worker that comes while the others go on has in common with them; its weights they give it."""


class Generations:
    """Of one epoch. apart: its workers can be on several hosts, and others go on where some are lost. resizes: there
    can be more or fewer of them.
    """

    def __init__(self, epoch: int, members: Sequence[Member] = (), *, apart: bool = False, resizes: bool = False):
        self._epoch, self.apart, self.resizes = epoch, apart, resizes
        self.number = 0
        """Of the newest group."""
        self.formed = 0
        """Of the last one that all of it are known to have been in."""
        self.members = list(members)
        """Of it, by rank."""
        self._leaving: frozenset[Member] = frozenset()
        """Who is not, and without whom the others cannot end the step before it."""
        self._fresh: set[Member] = set()
        """Who was in none that was formed."""
        self.lost: Lost | None = None
        """Why there is another than the first, if one was lost."""

    def can_do_without(self, places: Places, lost: Collection[Member]) -> bool:
        """Whether the others can go on without these: some are there, and all have more to do."""
        return self.apart and bool(self._left(lost)) and not any(place.done for place in places)

    def _left(self, lost: Collection[Member]) -> list[Member]:
        return [member for member in self.members if member not in lost]

    def replace(
        self,
        places: Places,
        lost: Lost,
        members: Sequence[Member],
        shares: Sequence[int],
        *,
        told: bool = False,
    ) -> list[Order]:
        """These are lost, and have successors, which take part when they are ready. told: the tape has it already."""
        but = lost.member.host if lost.whole_host else None
        successors = successors_of(members, places, shares, but)
        for successor in successors:
            places[successor.number] = PlaceInTeam(successor, joins=NEVER)
        replaced = map(partial(Replace, why=lost.why, told=told), members, successors)
        return [*replaced, *self.without(lost, members)]

    def part(self, places: Places, lost: Lost, members: Sequence[Member]) -> list[Order]:
        """Their host is cut off: the others go on, and nobody comes in their places, for it may be back with them."""
        for member in members:
            places[member.number].away, places[member.number].joins = True, NEVER
        return [*(Replace(member, None, lost.why) for member in members), *self.without(lost, members)]

    def without(self, lost: Lost, members: Collection[Member]) -> list[Regroup]:
        """These are lost. Where the others have nobody on the first host, they wait until they have; and one that was
        in no group yet, or is in none any more, changes none.
        """
        self.lost = lost
        if not any(member in self.members or member in self._leaving for member in members):
            return []
        self.members = self._left(members)
        return [self._next(at_once=True)]

    def again(self, why: Lost) -> Regroup:
        """The same go on, in another group; `why`, should they not be able to."""
        self.lost = why
        return self._next(at_once=True)

    def with_(self, *places: PlaceInTeam) -> Regroup:
        """These are ready to take part, each after those of its host."""
        waits = not self.led
        self.members = sorted([*self.members, *(place.member for place in places)], key=lambda member: member.host)
        for place in places:
            place.away, place.joins = False, self.number + 1
        return self._next(at_once=waits)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of the members of the newest, by rank."""
        return tuple(member.number for member in self.members)

    def has(self, place: PlaceInTeam) -> bool:
        """Whether it is in the newest."""
        return place.joins <= self.number

    def change(self, places: Places, more: Sequence[PlaceInTeam], leaving: Collection[Member]) -> Regroup:
        """These are ready to take part, each after those of its host, and others leave."""
        there = {each.member.number: each.member for each in places if not (each.more or each.member in leaving)}
        stay = [there[member.number] for member in self.members if member.number in there]  # or who came in its place
        come = [place.member for place in more if place.member not in stay]
        self._fresh |= {place.member for place in more if place.more}
        self.members = sorted([*stay, *come], key=lambda each: (each.host, 0 if self.apart else each.number))
        self._leaving = frozenset(leaving)
        for place in more:
            place.more, place.joins, place.lost = False, self.number + 1, None
        return self._next(at_once=False, fewer=bool(leaving))

    def leave(self, *, fewer: bool) -> Regroup:
        """All are to leave the group after the present step. fewer: some are to be in none any more."""
        return Regroup(self._epoch, self.number + 1, (), at_once=False, fewer=fewer)

    def stay(self) -> Regroup:
        """They are not to leave it, where they have not begun to."""
        return Regroup(self._epoch, self.number, (), at_once=False)

    def note_formed(self, generation: int) -> None:
        """All are in the group of this generation."""
        self.formed = max(self.formed, generation)
        if generation == self.number:
            self._leaving = frozenset()
            self._fresh.clear()

    @property
    def led(self) -> bool:
        """Whether one of the newest group is on the first host, or else all wait until one is."""
        return any(member.host == 0 for member in self.members)

    def _next(self, *, at_once: bool, fewer: bool = False) -> Regroup:
        self.number += 1
        members = tuple(self.members) if self.led else ()
        fresh = frozenset(member.number for member in members if member in self._fresh)
        return Regroup(self._epoch, self.number, members, at_once, fewer, self.formed, fresh)

    def why_not(self, message: NotRegrouped) -> Lost | None:
        """The loss for which an epoch ends that its workers cannot go on from; None where there is another group."""
        return self.lost if message.generation == self.number else None


def late(places: Places, leader: PlaceInTeam) -> list[PlaceInTeam]:
    """Those who are in no group until after the one in which the leader has ended, and are not lost."""
    last = leader.ended.generation if leader.ended is not None else NEVER
    return [place for place in places if place.joins > last and not place.done]


def successors_of(lost: Sequence[Member], places: Places, shares: Sequence[int], but: int | None) -> list[Member]:
    """Those of members that were lost, on the hosts that have fewest of what each is to have, of those that have taken
    part; none on the host `but`.
    """
    counts = Counter(place.member.host for place in places if place.member not in lost)
    hosts = sorted({0, *(place.member.host for place in places)} - {but})
    found = []
    for member in lost:
        host = max(hosts, key=lambda host: (shares[host] - counts[host], host == member.host, -host))
        counts[host] += 1
        found.append(Member(member.epoch, member.number, member.incarnation + 1, host))
    return found
