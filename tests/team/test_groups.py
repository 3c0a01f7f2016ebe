"""How workers of several hosts reach each other, group after group."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from instep.team.groups import Reach
from instep.team.messages import HostNetwork

pytestmark = pytest.mark.processes


def test_a_store_that_was_served_for_a_group_that_was_not_formed_serves_the_next_one() -> None:
    team = SimpleNamespace(by_nccl=False, workers=2)
    session: Any = SimpleNamespace(rank=0, machines=(1, 1), assignment=SimpleNamespace(team=team))
    listener = socket.create_server(("127.0.0.1", 0))
    network = HostNetwork((1, 1), listener.getsockname()[:2], "start 1", "127.0.0.1", listener.detach())
    before = Reach(session)  # of a group in which it was not the first
    Reach(session, before)._store(network)().set("a", "1")
    assert Reach(session, before)._store(network)().get("a") == b"1"
