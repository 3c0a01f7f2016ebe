"""What a roster orders where a team in lockstep is to have other workers while it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from instep.team.hosts_there import HostsThere
from instep.team.messages import Ended, Ready
from instep.team.orders import (
    AskToStop,
    EndEpoch,
    FinishRun,
    Lost,
    Member,
    NoteResize,
    Order,
    Regroup,
    Replace,
    Resize,
    Said,
    StartMore,
    StopAsked,
    Warn,
)
from instep.team.regroup_messages import Regrouped
from instep.team.roster import Roster

pytestmark = pytest.mark.pure

FACTS = {"weights": "alike", "stands_in": True, "resizes": True}


def member(number: int, incarnation: int = 0) -> Member:
    return Member(1, number, incarnation)


def ready(roster: Roster, *members: Member) -> list[Order]:
    return [order for each in members for order in roster.hear(Said(each, Ready(FACTS, {})))]


def going(workers: int = 2) -> Roster:
    """A team of one machine that trains."""
    roster = Roster(HostsThere(workers), 3, Path("run"), serving=False)
    roster.begin()
    ready(roster, *map(member, range(workers)))
    assert roster.going
    return roster


def test_newcomers_come_together_and_who_is_too_many_is_ended_once_the_others_are_among_themselves() -> None:
    roster = going()
    assert roster.hear(Resize(4)) == [StartMore((member(2), member(3)))]
    assert ready(roster, member(3)) == []
    four = tuple(map(member, range(4)))
    assert ready(roster, member(2)) == [Regroup(1, 1, four, at_once=False)]
    assert roster.hear(Said(member(0), Regrouped(1))) == []
    assert roster.size == 4
    assert roster.hear(Resize(2)) == [Regroup(1, 2, four[:2], at_once=False, fewer=True)]
    found = roster.hear(Said(member(0), Regrouped(2)))
    assert found == [Replace(each, None, "the team goes on with 2 workers.", resized=True) for each in four[2:]]
    assert (roster.size, roster.restarts) == (2, 0)
    assert roster.hear(Resize(3)) == [StartMore((member(2, 1),))]


def test_of_two_numbers_that_are_asked_for_the_last_counts() -> None:
    roster = going()
    roster.hear(Resize(4))
    (ended,) = roster.hear(Resize(3))
    assert ended == Replace(member(3), None, "the team goes on with 3 workers.", resized=True)
    (group,) = ready(roster, member(2))
    assert isinstance(group, Regroup)
    assert len(group.members) == 3
    assert roster.hear(Resize(2)) == [], "until that group is there"
    (fewer,) = roster.hear(Said(member(0), Regrouped(1)))
    assert isinstance(fewer, Regroup)
    assert (len(fewer.members), fewer.fewer) == (2, True)


def test_a_newcomer_that_dies_while_it_is_built_leaves_the_others_as_they_were() -> None:
    roster = going()
    roster.hear(Resize(4))
    found = roster.hear(Lost(member(3), "it was killed."))
    assert found[:3] == [
        Warn("the team cannot have 4 workers, and goes on with 2: it was killed."),
        NoteResize(2, 4, "it was killed."),
        Replace(member(3), None, "it was killed."),
    ]
    assert found[3:] == [Replace(member(2), None, "the team goes on with 2 workers.", resized=True)]
    assert (roster.restarts, roster.size, roster.active) == (0, 2, [member(0), member(1)])


def test_while_others_hold_the_place_of_one_that_died_nobody_comes() -> None:
    roster = going()
    roster.hear(Resize(3))
    (replaced,) = roster.hear(Lost(member(1), "it was killed."))
    assert isinstance(replaced, Replace)
    assert replaced.successor == member(1, 1)
    assert not [order for order in ready(roster, member(2)) if isinstance(order, Regroup)]


def test_a_stop_while_newcomers_are_built_ends_the_run_without_them() -> None:
    roster = going()
    roster.hear(Resize(3))
    assert roster.hear(StopAsked()) == [AskToStop(1)]
    assert ready(roster, member(2)) == []
    ended = Ended({"version": 7}, "same", interrupted=True)
    found = [order for each in (0, 1) for order in roster.hear(Said(member(each), ended))]
    late = Replace(member(2), None, "the run has ended before it could take part.")
    assert found == [late, FinishRun(member(0))]


def test_who_dies_within_the_change_has_the_team_start_again() -> None:
    roster = going()
    roster.hear(Resize(3))
    ready(roster, member(2))
    assert roster.hear(Lost(member(1), "it was killed.")) == [EndEpoch(1)]
