"""What hosts have sent and received is added up, whoever is lost meanwhile."""

from __future__ import annotations

import os

import pytest

from instep.team.carried import Carried
from instep.team.heartbeat import Heartbeat, HeartbeatBoard
from instep.team.wire_messages import Beat
from instep.transport.meter import METER

pytestmark = pytest.mark.pure


def beat(sent: int, received: int) -> Beat:
    return Beat(0, 0.5, 0.0, 0.0, sent, received)


def test_bytes_are_those_of_all_agents_of_a_host_and_of_those_that_were_lost() -> None:
    carried = Carried(3)
    carried.told(0, "a", beat(1, 2))
    carried.told(1, "b", beat(10, 20))
    carried.told(1, "b", beat(30, 40))  # since it began, as all of these
    carried.told(1, "started again", beat(5, 6))
    assert carried.by_host((100, 200)) == [
        {"host": 0, "sent": 101, "received": 202},
        {"host": 1, "sent": 35, "received": 46},
        {"host": 2, "sent": 0, "received": 0},
    ]


def test_a_process_that_takes_a_workers_place_adds_to_what_that_had_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    board = HeartbeatBoard(2)
    for own in ((10, 20), (3, 4)):
        monkeypatch.setattr(METER, "look", lambda own=own: own)
        heartbeat = Heartbeat(board, 1, os.getppid())
        heartbeat.count_bytes()
        heartbeat.count_bytes()
    assert (board.sent.tolist(), board.received.tolist()) == ([0, 13], [0, 24])
