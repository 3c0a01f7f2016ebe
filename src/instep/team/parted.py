"""Workers that have lost each other: agent 0 finds out whose link it is where all hosts answer, and has a team that was
asked to end do so without those who are lost. No torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from instep.team import orders
from instep.team.hosts import Hosts
from instep.team.orders import Lost, Member
from instep.team.regroup_messages import PeersLost
from instep.team.remote import LONGEST_LOOK_S
from instep.team.roster import Roster

BEREFT_S = 10.0
"""Seconds that workers who were asked to end, and have lost others meanwhile, have to agree on what is to be saved, and
to end once it is. To write it may take as long as any checkpoint may.
"""

PARTED_S = 2.0
"""Seconds after which it would be known of a worker that died, or that a sign of its host is overdue. Counted in
looks, before which all is heard that has come: an agent that was busy itself must not set anybody aside."""


class Parted:
    """Those of one epoch who have lost others."""

    def __init__(self) -> None:
        self._lost: dict[Member, PeersLost] = {}
        self._looked = self._waited_s = 0.0
        self._generation, self._broken_off = 0, 0
        self._bereft_since = time.monotonic()
        self.saves = False
        """Whether those who were asked to end, and have lost others, are writing what they have."""

    def note(self, member: Member, lost: PeersLost) -> None:
        """What a member has told."""
        if lost.generation < (self._broken_off if lost.forming else self._generation):
            return  # who was lost then is known, or it has gone on to another group with the others
        if not self._lost:
            self._looked, self._waited_s = time.monotonic(), 0.0
        self._lost[member] = lost

    def keeps(self, member: Member) -> None:
        """A member has told that the workers of its host write what they have."""
        self.saves = True
        self._lost = {each: told for each, told in self._lost.items() if each.host != member.host}

    def clear(self, generation: int = 0, *, at_once: bool = True) -> None:
        """Another group of the workers begins, by default the first of an epoch. at_once: that of before is broken off.

        Else who could not form that one has gone to the next, and the others of that one still wait for it.
        """
        self._lost = {} if at_once else {member: told for member, told in self._lost.items() if told.forming}
        self._generation, self._broken_off = generation, generation if at_once else self._broken_off
        self.saves = False

    def look(self, roster: Roster, hosts: Hosts) -> orders.RosterEvent | None:
        """Who counts as lost, if nobody died; or that a team which is to end without some cannot save, or hangs."""
        now = time.monotonic()
        self._waited_s += min(now - self._looked, LONGEST_LOOK_S)
        self._looked = now
        lost = self._cut_off(roster.active, hosts, roster.name)
        if not roster.bereft or self.saves:
            self._bereft_since = now
        if roster.bereft and lost is not None and lost.member.host != roster.leader.host:
            return orders.HostLost(lost.member.host, lost.why)  # those beside the leader save without it
        if roster.bereft and roster.leader not in roster.active and now - self._bereft_since >= BEREFT_S:
            left = roster.active[0]  # all is saved
            return Lost(left, f"{roster.name(left.number)} has not ended {BEREFT_S:g} s after the run was saved.")
        if roster.bereft and (lost is not None or now - self._bereft_since >= BEREFT_S):
            return orders.StopAsked(at_once=True)
        return lost

    def _cut_off(self, active: Collection[Member], hosts: Hosts, name: Callable[[int], str]) -> Lost | None:
        """Who counts as lost, if nobody died. Where two hosts that do not reach each other both reach agent 0, the last
        of them is set aside, as `hosts` then tell.
        """
        lost = {member: told for member, told in self._lost.items() if member in active}
        if not lost or self._waited_s < PARTED_S:
            return None
        member = next((each for each, told in lost.items() if told.silent), next(iter(lost)))
        other = hosts.at(lost[member].silent)
        if any(map(hosts.silent, {other, *(each.host for each in active)})):
            return None  # it may have lost a worker, or its lease will tell
        del self._lost[member]
        if other is not None and 0 < other != member.host > 0:
            hosts.set_aside(*sorted((member.host, other)), why=lost[member].why)
            return None
        who = name(member.number)
        return Lost(member, f"{who} was cut off from the other workers, who live: {lost[member].why}.")
