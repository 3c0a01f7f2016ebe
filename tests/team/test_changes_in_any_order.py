"""A team on one machine that is to have other workers comes to have them, whatever befalls it meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from instep.team.hosts_there import HostsThere
from instep.team.messages import Ended, EndedFor, HandedOver, Ready
from instep.team.orders import (
    DropSuccessor,
    EndEpoch,
    FinishRun,
    HandOver,
    Join,
    Lost,
    Member,
    Order,
    Regroup,
    Replace,
    Resize,
    RosterEvent,
    Said,
    StartMore,
    StopAsked,
)
from instep.team.regroup_messages import LeftGroup, NotRegrouped, Regrouped
from instep.team.roster import Roster

pytestmark = pytest.mark.pure

KINDS = ("ready", "ready", "lose", "lose", "resize", "resize", "step", "step", "leave", "leave", "form", "hand", "stop")
HISTORIES = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 29)), max_size=40)
FACTS = {"weights": "alike", "stands_in": True, "resizes": True}


class Team:
    """Processes that do what a roster orders. `stage`: of those that live: building, ready, waiting for a place,
    working, left (its group), forming. `holders`: by who is to come in its place, who holds it. fresh: was in no group.

    asked: whether they are told to leave their group; leaving: whether they do, since the end of a step; broken: one
    died too early for the next one to be formed.
    """

    def __init__(self, workers: int):
        self.roster = Roster(HostsThere(workers), 99, Path("run"), serving=False)
        self.stage = dict.fromkeys([Member(1, number) for number in range(workers)], "working")
        self.holders: dict[Member, Member] = {}
        self.empty: set[Member] = set()
        self.fresh: set[Member] = set()
        self.generation, self.next = 0, 0
        self.asked = self.leaving = self.broken = self.stopping = self.over = self.finished = False
        self.roster.begin()
        for member in self.stage:
            self.roster.hear(Said(member, Ready(FACTS, {})))
        assert self.roster.going

    def those(self, *stages: str) -> list[Member]:
        return [member for member, stage in self.stage.items() if stage in stages]

    def tell(self, event: RosterEvent) -> None:
        for order in self.roster.hear(event):
            self.obey(order)
        if not self.over:
            assert set(self.roster.active) <= self.stage.keys(), "it waits for the dead"

    def obey(self, order: Order) -> None:
        match order:
            case StartMore(members):
                assert not self.stopping
                self.stage.update(dict.fromkeys(members, "building"))
            case Replace(member=old, successor=new, holders=holders):
                assert self.stage.pop(old, None) not in ("working", "forming"), "it is in no group"
                if holders:
                    here = Member(1, old.number, old.incarnation + 1)
                    self.holders = {each: holder for each, holder in self.holders.items() if each != old} | holders
                    assert set(self.holders.values()) <= set(self.those("working", "left", "forming")), "who lives"
                    self.empty |= {here} if new is None else set()
                if new is not None:
                    self.stage[new] = "building"
            case Join(member):
                self.stage[member] = "waiting"
            case HandOver(member):
                del self.holders[member]
                self.stage[member] = "working"
            case DropSuccessor(member):
                self.stage.pop(member, None)
            case Regroup(members=()):
                assert not self.those("left", "forming") or order.generation == self.generation
                assert order.generation in (self.generation, self.generation + 1)
                self.asked = order.generation > self.generation
            case Regroup(members=members):
                assert not self.those("working", "forming"), "all have left"
                assert {self.stage[member] for member in members} <= {"left", "ready", "waiting"}, "all are there"
                assert [*members] == sorted(members), "ranks are in the order of numbers"
                self.fresh |= {member for member in members if self.stage[member] != "left"}
                assert {each.number for each in self.fresh & {*members}} == order.fresh
                self.next, self.broken, self.holders, self.empty = order.generation, False, {}, set()
                self.stage.update(dict.fromkeys(members, "forming"))
            case EndEpoch():
                self.over = True
                assert not {*self.those("working", "left", "forming")} - self.fresh, "the others could have gone on"
            case FinishRun():
                self.over = self.finished = True
            case _:
                pass

    def happens(self, kind: str, pick: int) -> None:
        """One of many things, to one of those to whom it can happen."""
        if self.over:
            return
        if kind == "resize":
            return self.tell(Resize(1 + pick % 5))
        if kind == "stop" and pick < 5:
            self.stopping = True
            return self.tell(StopAsked())
        able = {
            "ready": self.those("building"), "lose": list(self.stage), "hand": [] if self.leaving else self.waiting,
            "step": self.those("working") if self.asked and not (self.leaving or self.stopping) else [],
            "leave": self.those("working" if self.leaving else "", "forming" if self.broken else ""),
            "form": [] if self.broken else self.those("forming"),
        }.get(kind)  # fmt: skip
        if not able:
            return
        member = able[pick % len(able)]
        match kind:
            case "ready":
                self.stage[member] = "ready"
                self.tell(Said(member, Ready(FACTS, {})))
            case "lose":
                self.broken |= self.stage.pop(member) == "forming" and pick % 2 == 0
                self.tell(Lost(member, "it was killed."))
            case "hand":
                self.tell(Said(self.holders[member], HandedOver(member.number, member.incarnation, b"")))
            case "step":
                self.leaving = True
            case "leave":
                generation = self.next if self.stage[member] == "forming" else self.generation
                self.stage[member] = "left"
                self.tell(Said(member, LeftGroup(generation)))
            case "form":
                self.form()

    @property
    def waiting(self) -> list[Member]:
        held = [member for member in self.those("waiting") if member in self.holders]
        return [member for member in held if self.stage.get(self.holders[member]) == "working"]

    def form(self) -> None:
        """All are in the next group, if any of them has the state; who is left over has no part in it."""
        if not {*self.those("forming")} - self.fresh:
            return self.tell(Said(self.those("forming")[0], NotRegrouped(self.next, "nobody has the state")))
        self.generation, self.asked, self.leaving = self.next, False, False
        self.fresh.clear()
        self.stage.update(dict.fromkeys(self.those("forming"), "working"))
        self.tell(Said(self.those("working")[0], Regrouped(self.generation)))

    def settles(self) -> None:
        """Nothing more befalls it: it has as many as are wanted then, and ends when it is asked to."""
        for _ in range(200):
            kinds = ("form", "leave", "ready", "hand", "step")
            before = dict(self.stage), self.leaving
            for kind in kinds:
                self.happens(kind, 0)
                if before != (dict(self.stage), self.leaving):
                    break
            else:
                break
        if self.over:
            return
        there = self.those("working")
        if not self.stopping:
            assert (len(there), self.roster.size) == (self.roster.hosts.wanted,) * 2, self.stage
            assert len(self.stage) == len(there), "nobody is left over"
            self.stopping = True
            self.tell(StopAsked())
        self.end(there)

    def end(self, there: list[Member]) -> None:
        ended = Ended({"version": 7}, "same", interrupted=True, generation=self.generation)
        for member in there:
            for place in [place for place, holder in self.holders.items() if holder == member]:
                self.tell(Said(member, EndedFor(place.number, ended)))
            del self.stage[member]
            self.stage[member] = "done"
            self.tell(Said(member, ended))
        assert self.finished


@settings(max_examples=300)
@given(st.integers(1, 4), HISTORIES)
@example(2, [("resize", 3), ("ready", 0), ("ready", 0), ("lose", 3), ("step", 0), ("leave", 0), ("leave", 0)])
@example(2, [("resize", 2), ("ready", 0), ("step", 0), ("lose", 2), ("leave", 0), ("leave", 0), ("form", 0)])
@example(2, [("resize", 2), ("ready", 0), ("resize", 0), ("lose", 2)])
@example(3, [("resize", 0), ("lose", 0), ("ready", 0), ("hand", 0)])
@example(2, [("resize", 0), ("step", 0), ("leave", 0), ("leave", 0), ("lose", 0)])
@example(2, [("resize", 2), ("ready", 0), ("step", 0), ("leave", 0), ("leave", 0), ("lose", 0), ("leave", 0)])
@example(2, [("resize", 2), ("ready", 0), ("step", 0), ("leave", 0), ("lose", 1), ("form", 0), ("lose", 1)])
def test_a_team_comes_to_have_as_many_as_are_wanted_in_any_order_of_events(
    workers: int, history: list[tuple[str, int]]
) -> None:
    team = Team(workers)
    for kind, pick in history:
        team.happens(kind, pick)
    team.settles()
