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
from instep.transport.sockets import SENT_AT_ONCE, connection, open_sockets, opened_since, send_less_at_once
from instep.transport.wire import KNOWN_AFTER
from support.groups import DISTRIBUTED, run, sizes_of

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="Linux alone tells the time there and back"),
]

FAR_US = 1 << 32


def known(one: socket.socket) -> sockets.Socket:
    return one.fileno(), os.fstat(one.fileno()).st_ino


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
        before = held(here)
        send_less_at_once([known(listener), known(here)])
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


def test_what_others_connect_to_one_that_listened_before_is_not_the_group_s() -> None:
    """They may be clients of a store here, which find each other for the next group already."""
    with socket.create_server(("127.0.0.1", 0)) as store:
        before = open_sockets()
        with (
            socket.create_server(("127.0.0.1", 0)) as own,
            socket.create_connection(store.getsockname()) as asks,
            socket.create_connection(own.getsockname()) as peer,
            store.accept()[0] as asked,
            own.accept()[0] as met,
        ):
            found = opened_since(before)
            assert found >= {known(one) for one in (own, asks, peer, met)}
            assert known(asked) in open_sockets() - found
