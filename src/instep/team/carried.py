"""What all hosts of a run have sent and received, as agent 0 knows it. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from instep.record.team import BytesOfHost
from instep.team.wire_messages import Beat


class Carried:
    """host_of: of each agent. Agents tell of themselves and their workers with every sign of life."""

    def __init__(self, host_of: Sequence[int]):
        self._host_of = host_of
        self._told: dict[tuple[int, str], tuple[int, int]] = {}  # by agent and session

    def told(self, agent: int, session: str, beat: Beat) -> None:
        """One has told of what it had carried since it began."""
        self._told[agent, session] = beat.sent, beat.received

    def by_host(self, own: tuple[int, int]) -> list[BytesOfHost]:
        """All that was told, of lost agents too. own: what agent 0's host has carried."""
        hosts = sorted(set(self._host_of))
        found: dict[int, BytesOfHost] = {host: {"host": host, "sent": 0, "received": 0} for host in hosts}
        for host, (sent, received) in [(0, own), *((self._host_of[key[0]], each) for key, each in self._told.items())]:
            found[host]["sent"] += sent
            found[host]["received"] += received
        return list(found.values())
