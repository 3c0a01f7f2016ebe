"""What all hosts of a run have sent and received, as agent 0 knows it. No torch."""

from __future__ import annotations

from instep.record.team import BytesOfHost
from instep.team.wire_messages import Beat


class Carried:
    """Agents tell of themselves and their workers with every sign of life."""

    def __init__(self, hosts: int):
        self._hosts = hosts
        self._told: dict[tuple[int, str], tuple[int, int]] = {}  # by host and agent's session

    def told(self, host: int, session: str, beat: Beat) -> None:
        """The agent of this session, on this host, has told of what it had carried since it began."""
        self._told[host, session] = beat.sent, beat.received

    def by_host(self, own: tuple[int, int]) -> list[BytesOfHost]:
        """All that was told, of lost agents too. own: what agent 0's host has carried."""
        found: list[BytesOfHost] = [{"host": host, "sent": 0, "received": 0} for host in range(self._hosts)]
        for host, (sent, received) in [(0, own), *((key[0], each) for key, each in self._told.items())]:
            found[host]["sent"] += sent
            found[host]["received"] += received
        return found
