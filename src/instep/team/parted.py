"""Workers that have lost each other while all hosts answer: agent 0 finds out whose link it is. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from instep.team.hosts import Hosts
from instep.team.messages import PeersLost
from instep.team.orders import Lost, Member

PARTED_S = 1.0
"""Seconds after which it would be known of a worker that died, or of a host."""


class Parted:
    """Those of one epoch who have lost others."""

    def __init__(self) -> None:
        self._lost: dict[Member, PeersLost] = {}
        self._since = 0.0

    def note(self, member: Member, lost: PeersLost) -> None:
        """What a member has told."""
        self._since = self._since if self._lost else time.monotonic()
        self._lost[member] = lost

    def clear(self) -> None:
        """Another epoch begins."""
        self._lost.clear()

    def look(self, active: Collection[Member], hosts: Hosts, name: Callable[[int], str]) -> Lost | None:
        """Who counts as lost, if nobody died. Where two hosts that do not reach each other both reach agent 0, the last
        of them is set aside, as `hosts` then tell.
        """
        lost = {member: told for member, told in self._lost.items() if member in active}
        if not lost or time.monotonic() - self._since < PARTED_S:
            return None
        member = next((each for each, told in lost.items() if told.silent), next(iter(lost)))
        other = hosts.at(lost[member].silent)
        if hosts.silent(member.host) or hosts.silent(other):
            return None  # its lease will tell
        self.clear()
        if other is not None and 0 < other != member.host > 0:
            hosts.set_aside(*sorted((member.host, other)), why=lost[member].why)
            return None
        who = name(member.number)
        return Lost(member, f"{who} was cut off from the other workers, who live: {lost[member].why}.")
