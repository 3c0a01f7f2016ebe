"""Which agents each host has, as agent 0 knows it: their launcher tells, or else they do as they come. No torch."""

from __future__ import annotations

import itertools

from instep.team.place import Place
from instep.team.wire_messages import HelloAgent


class AgentsByHost:
    """Those of one run. A host's are neighbours, though hosts need not be in the order of their agents."""

    def __init__(self, place: Place):
        counts, self._agents, self._hosts = place.agents_by_host, place.agents, place.hosts
        stops = list(itertools.accumulate(counts))
        spans = [range(stop - count, stop) for count, stop in zip(counts, stops, strict=True)]
        self._of = dict(enumerate(spans if all(counts) else spans[:1]))

    def of(self, host: int) -> range | None:
        """A host's; None where that is not known yet."""
        return self._of.get(host)

    def can_be(self, agent: int, host: int) -> bool:
        """Whether this may be an agent of this host's, and is not the first."""
        if host in self._of:
            return agent in self._of[host] and agent > 0
        taken = any(agent in span for span in self._of.values())
        return 0 < agent < self._agents and 0 <= host < self._hosts and not taken

    def learn(self, hello: HelloAgent) -> bool:
        """What an agent tells of its host; False, and nothing is learned, where that cannot be."""
        found = range(hello.agent - hello.local, hello.agent - hello.local + hello.here)
        if not self.can_be(hello.agent, hello.host) or hello.agent not in found:
            return False
        if hello.host in self._of:
            return self._of[hello.host] == found
        taken = {agent for span in self._of.values() for agent in span}
        left, others = self._agents - len(taken) - len(found), self._hosts - len(self._of) - 1
        fits = found.start > 0 and found.stop <= self._agents and taken.isdisjoint(found)
        if not fits or left < others or (left and not others):
            return False
        self._of[hello.host] = found
        return True
