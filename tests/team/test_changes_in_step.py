"""What a roster orders where a team in lockstep is to have other workers while it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from instep.errors import ResourceError
from instep.team.hosts_there import HostsThere
from instep.team.messages import Ended, HandedOver, Ready
from instep.team.orders import (
    AskToStop,
    CannotStart,
    EndEpoch,
    EpochEnded,
    FailRun,
    FinishRun,
    Go,
    HandOver,
    Join,
    Lost,
    Member,
    NoteLoss,
    NoteResize,
    Order,
    Regroup,
    Replace,
    Resize,
    Said,
    Start,
    StartMore,
    StopAsked,
    Warn,
)
from instep.team.regroup_messages import LeftGroup, NotRegrouped, Regrouped
from instep.team.roster import Roster

pytestmark = pytest.mark.pure

FACTS = {"weights": "alike", "stands_in": True, "resizes": True}
APART = FACTS | {"stands_in": False, "regroups": True}


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


def left(roster: Roster, *numbers: int) -> list[Order]:
    """These have left the present group."""
    generation = roster.generation
    return [order for each in numbers for order in roster.hear(Said(member(each), LeftGroup(generation)))]


def apart(workers: int) -> Roster:
    """As `going`, of a team that can have several."""
    roster = Roster(HostsThere(workers), 3, Path("run"), serving=False)
    roster.begin()
    for each in map(member, range(workers)):
        roster.hear(Said(each, Ready(APART, {})))
    assert roster.going
    return roster


def test_newcomers_come_together_and_who_is_too_many_is_ended_once_the_others_are_among_themselves() -> None:
    roster = going()
    assert roster.hear(Resize(4)) == [StartMore((member(2), member(3)))]
    assert ready(roster, member(3)) == []
    four = tuple(map(member, range(4)))
    assert ready(roster, member(2)) == [Regroup(1, 1, (), at_once=False)]
    assert left(roster, 0) == []
    assert left(roster, 1) == [Regroup(1, 1, four, at_once=False)]
    assert roster.hear(Said(member(0), Regrouped(1))) == []
    assert roster.size == 4
    assert roster.hear(Resize(2)) == [Regroup(1, 2, (), at_once=False, fewer=True)]
    (fewer,) = left(roster, 0, 1, 2, 3)
    assert fewer == Regroup(1, 2, four[:2], at_once=False, fewer=True)
    assert isinstance(fewer, Regroup)
    assert fewer.formed == 1, "what workers shared in that group, or in one before, need not be kept"
    found = roster.hear(Said(member(0), Regrouped(2)))
    assert found == [Replace(each, None, "the team goes on with 2 workers.", resized=True) for each in four[2:]]
    assert (roster.size, roster.restarts) == (2, 0)
    assert roster.hear(Resize(3)) == [StartMore((member(2, 1),))]


def test_of_two_numbers_that_are_asked_for_the_last_counts() -> None:
    roster = going()
    roster.hear(Resize(4))
    (ended,) = roster.hear(Resize(3))
    assert ended == Replace(member(3), None, "the team goes on with 3 workers.", resized=True)
    ready(roster, member(2))
    (group,) = left(roster, 0, 1)
    assert isinstance(group, Regroup)
    assert len(group.members) == 3
    assert roster.hear(Resize(2)) == [], "until that group is there"
    assert roster.hear(Said(member(0), Regrouped(1))) == [Regroup(1, 2, (), at_once=False, fewer=True)]
    (fewer,) = left(roster, 0, 1, 2)
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


def changing(workers: int = 3) -> Roster:
    """A team of 2 that is told to leave its group for one of so many."""
    roster = going()
    roster.hear(Resize(workers))
    ready(roster, *map(member, range(2, workers)))
    return roster


STAY = Regroup(1, 0, (), at_once=False)
LEAVE = Regroup(1, 1, (), at_once=False)


def test_who_dies_before_all_have_left_is_stood_in_for_and_the_change_waits_for_its_successor() -> None:
    roster = changing()
    replaced, stays = roster.hear(Lost(member(1), "it was killed."))
    assert replaced == Replace(member(1), member(1, 1), "it was killed.", {member(1, 1): member(0)})
    assert (stays, roster.restarts, roster.stood_in) == (STAY, 1, 1)
    assert ready(roster, member(1, 1)) == [Join(member(1, 1))]
    handed = roster.hear(Said(member(0), HandedOver(1, 1, b"state")))
    assert handed == [HandOver(member(1, 1), b"state"), LEAVE]


def test_a_newcomer_that_dies_before_all_have_left_leaves_the_others_as_they_were() -> None:
    roster = changing(4)
    found = roster.hear(Lost(member(3), "it was killed."))
    assert isinstance(found[0], Warn)
    assert [type(order) for order in found[1:]] == [NoteResize, Replace, Replace, Regroup]
    assert found[-1] == STAY
    assert left(roster, 0) == [], "it was too late to stay"
    assert left(roster, 1) == [Regroup(1, 1, (member(0), member(1)), at_once=False)]
    roster.hear(Said(member(0), Regrouped(1)))
    assert (roster.restarts, roster.size, roster.active) == (0, 2, [member(0), member(1)])


def test_who_dies_when_others_have_left_leaves_them_among_themselves_and_its_successor_comes_as_newcomers_do() -> None:
    for told_late in (False, True):
        roster = changing()
        alone, successor = Regroup(1, 1, (member(0),), at_once=False), member(1, 1)
        replaced = Replace(member(1), successor, "it was killed.", {successor: member(0)})
        if told_late:
            assert left(roster, 0) == []
            assert roster.hear(Lost(member(1), "it was killed.")) == [replaced, STAY, alone]
        else:
            assert roster.hear(Lost(member(1), "it was killed.")) == [replaced, STAY]
            assert left(roster, 0) == [alone]
        assert roster.hear(Said(member(0), Regrouped(1))) == []
        assert (roster.size, roster.restarts, roster.numbers) == (2, 1, (0,))
        assert ready(roster, successor) == [Regroup(1, 2, (), at_once=False)]
        (three,) = left(roster, 0)
        assert three == Regroup(1, 2, (member(0), successor, member(2)), at_once=False)
        assert isinstance(three, Regroup)
        assert three.fresh == {1, 2}
        roster.hear(Said(member(0), Regrouped(2)))
        assert (roster.size, roster.restarts) == (3, 1)


def test_a_successor_that_is_to_come_and_dies_has_one_itself() -> None:
    roster = changing()
    left(roster, 0)
    roster.hear(Lost(member(1), "it was killed."))
    roster.hear(Said(member(0), Regrouped(1)))
    replaced = Replace(member(1, 1), member(1, 2), "it was killed, too.")
    assert roster.hear(Lost(member(1, 1), "it was killed, too.")) == [replaced]
    assert ready(roster, member(1, 2)) == [Regroup(1, 2, (), at_once=False)]
    assert (roster.size, roster.restarts) == (2, 2)


def test_after_a_stop_those_who_live_go_on_without_a_successor_and_end_the_run() -> None:
    roster = changing()
    left(roster, 0)
    roster.hear(StopAsked())
    alone = Regroup(1, 1, (member(0),), at_once=False)
    replaced = Replace(member(1), None, "it was killed.", {member(1, 1): member(0)})
    assert roster.hear(Lost(member(1), "it was killed.")) == [replaced, STAY, alone]
    roster.hear(Said(member(0), Regrouped(1)))
    ended = Ended({"version": 7}, "same", interrupted=True, generation=1)
    late = Replace(member(2), None, "the run has ended before it could take part.")
    assert roster.hear(Said(member(0), ended)) == [late, FinishRun(member(0))]
    assert roster.restarts == 0


def test_where_there_is_no_room_for_the_next_group_those_who_have_left_go_on_in_one_of_their_own() -> None:
    roster = changing()
    left(roster, 0, 1)
    found = roster.hear(CannotStart(ResourceError("there is no memory.")))
    assert [type(order) for order in found] == [Warn, NoteResize, Replace, Regroup]
    assert found[-1] == Regroup(1, 2, (member(0), member(1)), at_once=False)


def test_who_dies_while_the_next_group_forms_is_stood_in_for_if_that_is_formed_and_else_all_leave_it() -> None:
    for formed in (True, False):
        roster = changing()
        (group,) = left(roster, 0, 1)
        assert group == Regroup(1, 1, tuple(map(member, range(3))), at_once=False)
        holders = {member(1, 1): member(0)}
        assert roster.hear(Lost(member(1), "it was killed.")) == [
            Replace(member(1), member(1, 1), "it was killed.", holders)
        ]
        if formed:
            assert roster.hear(Said(member(0), Regrouped(1))) == []
            assert ready(roster, member(1, 1)) == [Join(member(1, 1))]
            continue
        assert left(roster, 2) == []
        (again,) = left(roster, 0)
        assert again == Regroup(1, 2, (member(0), member(2)), at_once=False)
        assert isinstance(again, Regroup)
        assert again.fresh == {2}
        assert roster.hear(Said(member(0), Regrouped(2))) == []
        assert ready(roster, member(1, 1)) == [Regroup(1, 3, (), at_once=False)]
        assert left(roster, 0, 2) == [Regroup(1, 3, (member(0), member(1, 1), member(2)), at_once=False)]


def test_a_newcomer_that_dies_while_the_next_group_forms_leaves_the_others_as_they_were() -> None:
    for formed in (True, False):
        roster = changing(4)
        left(roster, 0, 1)
        found = roster.hear(Lost(member(3), "it was killed."))
        assert [type(order) for order in found] == [Warn, NoteResize, Replace]
        if formed:
            assert roster.hear(Said(member(0), Regrouped(1))) == [Regroup(1, 2, (), at_once=False, fewer=True)]
            last = left(roster, 0, 1, 2)
        else:
            last = left(roster, 0, 1, 2)
        two = Regroup(1, 2, (member(0), member(1)), at_once=False, fewer=True)
        assert last == [two]
        ended = Replace(member(2), None, "the team goes on with 2 workers.", resized=True)
        assert roster.hear(Said(member(0), Regrouped(2))) == [ended]
        assert (roster.restarts, roster.size, roster.active) == (0, 2, [member(0), member(1)])


def test_where_all_who_have_the_state_are_lost_those_who_were_to_leave_go_on() -> None:
    roster = going()
    roster.hear(Resize(1))
    left(roster, 0, 1)
    found = roster.hear(Lost(member(0), "it was killed."))
    assert isinstance(found[0], Replace)
    assert found[1:] == [Regroup(1, 2, (member(1),), at_once=False)]
    (dropped,) = roster.hear(Said(member(1), Regrouped(2)))
    assert dropped == Replace(member(0, 1), None, "the team goes on with 1 worker.", resized=True)
    assert (roster.size, roster.active) == (1, [member(1)])


def test_who_is_lost_before_all_are_ready_has_a_successor_that_begins_with_the_others() -> None:
    roster = Roster(HostsThere(2, alone=True), 1, Path("run"), serving=False)
    roster.begin()
    ready(roster, member(0))
    replaced = Replace(member(1), member(1, 1), "it was killed.")
    assert roster.hear(Lost(member(1), "it was killed.")) == [replaced]
    (go,) = ready(roster, member(1, 1))
    assert go == Go(1, (member(0), member(1, 1)))
    assert (roster.restarts, roster.stood_in) == (1, 0)
    once_more = Roster(HostsThere(2, alone=True), 0, Path("run"), serving=False)
    once_more.begin()
    found = once_more.hear(Lost(member(1), "it was killed."))
    assert [type(order) for order in found] == [NoteLoss, FailRun]


def test_where_no_group_with_newcomers_can_be_formed_the_team_begins_anew_as_it_was() -> None:
    """Though nobody was lost."""
    roster = apart(2)
    roster.hear(Resize(3))
    roster.hear(Said(member(2), Ready(APART, {})))
    assert roster.hear(Said(member(1), NotRegrouped(1, "there is no memory for it"))) == [
        Warn("the team cannot have 3 workers, and goes on with 2: there is no memory for it."),
        NoteResize(2, 3, "there is no memory for it."),
        EndEpoch(1),
    ]
    (start,) = roster.hear(EpochEnded(1))
    assert isinstance(start, Start)
    assert (len(start.members), roster.restarts) == (2, 0)


def test_over_hosts_who_dies_before_it_is_to_leave_has_the_others_go_on_at_once() -> None:
    """Those of its host wait for it in memory, where nobody else would tell them."""
    roster = apart(3)
    (group,) = roster.hear(Resize(2))
    assert group == Regroup(1, 1, (member(0), member(1)), at_once=False, fewer=True)
    assert roster.hear(Lost(member(2), "it was killed.")) == [
        Replace(member(2), None, "it was killed."),
        Regroup(1, 2, (member(0), member(1)), at_once=True),
    ]
    assert roster.hear(Said(member(0), Regrouped(2))) == []
    assert (roster.restarts, roster.size) == (0, 2)


def test_of_hosts_the_first_of_the_group_stays_whatever_its_number() -> None:
    """It serves the store by which the others find each other."""
    roster = apart(2)
    roster.hear(Lost(member(0), "it was killed."))
    (group,) = roster.hear(Said(member(0, 1), Ready(APART, {})))
    assert group == Regroup(1, 2, (member(1), member(0, 1)), at_once=False)
    assert roster.hear(Resize(1)) == [Regroup(1, 3, (member(1),), at_once=False, fewer=True)]
    (ended,) = roster.hear(Said(member(1), Regrouped(3)))
    assert isinstance(ended, Replace)
    assert ended.member == member(0, 1)
