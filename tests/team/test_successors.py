"""A place goes to the successor that is ready for it, and to no other."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

from instep.team.heartbeat import HeartbeatBoard
from instep.team.successors import PlacesHeld


def test_a_place_is_given_to_the_successor_that_is_ready_though_that_one_dies_at_this_moment() -> None:
    board, session = HeartbeatBoard(2), Mock(number=0, numbers=(0, 1))
    sent: list[Any] = []
    session.pipe.send = sent.append
    places = PlacesHeld(session, board)
    board.hold({1: (0, 1)}, told=0)
    board.successors[1] = 1
    assert places.ready(1)
    board.hold({1: (0, 2)}, told=0)
    places.hand_over(1, None)  # type: ignore[arg-type]
    assert [(message.worker, message.incarnation) for message in sent] == [(1, 1)], "which the agent does not pass on"
    assert list(places.held()) == [1], "for the one that follows"
    assert not places.ready(1)


def test_who_begins_while_others_hold_places_may_hold_them_later_but_none_that_was_held_under_its_number() -> None:
    board = HeartbeatBoard(4)
    board.hold({0: (1, 1), 3: (2, 1)}, told=0)
    places = PlacesHeld(Mock(number=2, numbers=range(4)), board)
    assert list(places.held()) == [], "what worker 2 held that died has been taken, or is another's"
    board.hold({0: (2, 1)}, told=0)  # for worker 1 is lost, who held it
    assert list(places.held()) == [0]
    board.hold({3: (2, 2)}, told=0)
    assert list(places.held()) == [0, 3]
