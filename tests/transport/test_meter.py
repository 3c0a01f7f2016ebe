"""What a process's connections to other machines have carried: here, to other addresses of the loopback."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing import Pipe

import pytest

from instep.transport.meter import METER, Meter
from instep.transport.sockets import Socket


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def pair(stack: ExitStack, there: str) -> tuple[socket.socket, socket.socket]:
    """The ends of a connection from 127.0.0.1 to another address."""
    listening = stack.enter_context(socket.create_server((there, 0)))
    here = stack.enter_context(socket.create_connection(listening.getsockname(), 60, ("127.0.0.1", 0)))
    return here, stack.enter_context(listening.accept()[0])


def known(one: socket.socket) -> Socket:
    return one.fileno(), os.fstat(one.fileno()).st_ino


def exactly(one: socket.socket, count: int) -> None:
    one.settimeout(60)
    while count:
        count -= len(one.recv(count))


def test_every_byte_that_a_connection_was_given_or_that_came_is_counted_once(stack: ExitStack) -> None:
    """What went before it was told of too, and what the other end has not taken yet."""
    here, there = pair(stack, "127.0.0.2")
    here.sendall(b"x" * 1000)
    exactly(there, 1000)
    meter = Meter()
    meter.watch([known(here)])
    assert meter.look() == meter.look() == (1000, 0)
    there.sendall(b"y" * 300)
    exactly(here, 300)
    here.setblocking(False)
    given = here.send(b"x" * (64 << 20))  # more than the system takes
    assert 0 < given < 64 << 20
    assert meter.look() == (1000 + given, 300)


def test_what_a_closed_connection_had_carried_at_the_last_look_stays(stack: ExitStack) -> None:
    """Another that gets its descriptor is not taken for it."""
    here, there = pair(stack, "127.0.0.2")
    meter = Meter()
    meter.watch([known(here)])
    here.sendall(b"x" * 1000)
    exactly(there, 1000)
    meter.look()
    next_one, other = pair(stack, "127.0.0.2")
    os.dup2(next_one.fileno(), here.fileno())  # which closes the first
    next_one.sendall(b"x" * 500)
    exactly(other, 500)
    assert meter.look() == (1000, 0)
    meter.watch([known(next_one)])
    assert meter.look() == (1500, 0)


def test_what_stays_on_a_machine_is_not_counted(stack: ExitStack) -> None:
    here, there = pair(stack, "127.0.0.1")
    near, _ = socket.socketpair()
    with near, _:
        meter = Meter()
        meter.watch([known(here), known(near)])
        here.sendall(b"x" * 1000)
        near.sendall(b"x" * 1000)
        exactly(there, 1000)
        assert meter.look() == (0, 0)


@pytest.mark.processes
def test_a_process_that_is_forked_counts_its_own_alone(stack: ExitStack) -> None:
    here, there = pair(stack, "127.0.0.2")
    METER.watch([known(here)])
    stack.callback(METER.clear)
    here.sendall(b"x" * 1000)
    exactly(there, 1000)
    assert METER.look() == (1000, 0)
    ours, theirs = Pipe()
    if (pid := os.fork()) == 0:
        theirs.send(METER.look())
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert ours.recv() == (0, 0)
    METER.add(30, 40)
    assert METER.look() == (1030, 40)
