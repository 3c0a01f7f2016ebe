"""What the system takes at once of what a connection is given."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch

from instep.transport import sockets
from instep.transport.group import Group
from instep.transport.sockets import SENT_AT_ONCE, connection, send_less_at_once
from instep.transport.wire import KNOWN_AFTER
from support.groups import DISTRIBUTED, run, sizes_of

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="Linux alone tells the time there and back"),
]

FAR_US = 1 << 32


def held(one: socket.socket) -> int:
    """Bytes that the system takes."""
    return one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


@pytest.mark.parametrize(("short_us", "near"), [(FAR_US, True), (-1, False)])
def test_a_connection_to_who_is_near_is_taken_less_at_once(
    short_us: int, near: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "SHORT_TRIP_US", short_us)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as here:
        listener.accept()[0].close()
        before, known = held(here), [(one.fileno(), os.fstat(one.fileno()).st_ino) for one in (listener, here)]
        send_less_at_once(known)
        assert held(here) == (2 * SENT_AT_ONCE if near else before)
    assert before != 2 * SENT_AT_ONCE


def test_a_group_over_machines_that_are_near_does_so_once_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "SHORT_TRIP_US", FAR_US)
    kind = DISTRIBUTED[0]

    def body(make: Callable[..., Group], rank: int) -> list[list[bool]]:
        group: Any = make(sizes_of(kind))
        found = []
        for _ in range(2):
            found.append([held(each) == 2 * SENT_AT_ONCE for each in map(connection, group._wire._sockets) if each])
            for _ in range(KNOWN_AFTER):
                group.gather(torch.zeros(1))
        return found

    for before, after in run(kind, sizes_of(kind), body):
        assert not any(before)
        assert after
        assert all(after)
