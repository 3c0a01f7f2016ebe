"""Whether the other end of a connection still acknowledges what it is sent."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from instep.transport.silence import Socket, Unanswered, ask_when_quiet
from support.hosts import Hosts
from support.kinds import quick
from support.processes import wait_until

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(2, tmp_path_factory.mktemp("hosts")) as found:
        yield found


@pytest.fixture(autouse=True)
def _healed(hosts: Hosts) -> Iterator[None]:
    yield
    hosts.heal(1)


@pytest.fixture
def ends(hosts: Hosts) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection from host 0 to host 1."""
    listener = hosts[1].made_there(lambda: socket.create_server((hosts[1].address, 0)))
    here = hosts[0].made_there(lambda: socket.create_connection(listener.getsockname(), 60))
    there, _ = listener.accept()
    yield here, there
    for each in (here, there, listener):
        each.close()


def known(one: socket.socket) -> Socket:
    return one.fileno(), os.fstat(one.fileno()).st_ino


def silence(one: socket.socket, at_least_s: float) -> str:
    """The address of who has been silent for so long."""
    unanswered, found = Unanswered(), []

    def look() -> bool:
        found.append(unanswered.look([known(one)]))
        return found[-1][1] >= at_least_s

    wait_until(look, 60, "silence")
    return found[-1][0]


@pytest.mark.parametrize("cut", ["cut", "cut_to", "cut_from"])
def test_whose_cable_is_cut_one_way_or_both_is_told_by_its_address(
    cut: str, hosts: Hosts, ends: tuple[socket.socket, socket.socket]
) -> None:
    getattr(hosts, cut)(1)
    ends[0].sendall(b"words")
    assert silence(ends[0], 0.5) == hosts[1].address
    hosts.heal(1)
    assert ends[1].recv(5) == b"words"
    wait_until(lambda: Unanswered().look([known(ends[0])]) == ("", 0.0), 60, "the answer")


@pytest.mark.parametrize("cut", quick(["cut", "cut_to", "cut_from"], "cut"))
def test_who_is_cut_off_while_nothing_is_on_its_way_is_told_by_its_address(
    cut: str, hosts: Hosts, ends: tuple[socket.socket, socket.socket]
) -> None:
    ask_when_quiet([known(ends[0])], 60.0)
    getattr(hosts, cut)(1)
    assert silence(ends[0], 0.5) == hosts[1].address
    hosts.heal(1)
    wait_until(lambda: Unanswered().look([known(ends[0])]) == ("", 0.0), 60, "the answer")


@pytest.mark.slow
def test_a_connection_breaks_that_nobody_looks_at(hosts: Hosts, ends: tuple[socket.socket, socket.socket]) -> None:
    ask_when_quiet([known(ends[0])], 1.0)
    hosts.cut(1)
    ends[0].settimeout(60)
    with pytest.raises(OSError, match="Connection timed out"):
        ends[0].recv(1)


@pytest.mark.usefixtures("ends")  # else the cards' addresses are asked for too, and the answers lost
def test_who_cannot_be_connected_to_is_told_by_its_address(hosts: Hosts) -> None:
    connecting = hosts[0].made_there(lambda: socket.socket(socket.AF_INET))
    hosts.cut_from(1)
    trying = threading.Thread(target=lambda: connecting.connect_ex((hosts[1].address, 9)), daemon=True)
    trying.start()
    assert hosts[0].made_there(lambda: silence(connecting, 0.5)) == hosts[1].address
    hosts.heal(1)
    trying.join(60)
    connecting.close()


def test_who_takes_nothing_for_it_is_slow_is_not_silent(ends: tuple[socket.socket, socket.socket]) -> None:
    here, _ = ends
    here.setblocking(False)
    unanswered = Unanswered()
    with contextlib.suppress(BlockingIOError):
        while True:
            here.send(bytes(1 << 20))
    wait_until(lambda: unanswered.look([known(here)]) == ("", 0.0), 60, "all that can be is acknowledged")
    for _ in range(5):
        time.sleep(0.1)
        assert unanswered.look([known(here)]) == ("", 0.0)


def test_what_is_no_connection_says_nothing(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, socket.create_server(("127.0.0.1", 0)) as listener:
        descriptors = [file.fileno(), listener.fileno()]
        assert Unanswered().look([(each, os.fstat(each).st_ino) for each in descriptors]) == ("", 0.0)
        assert Unanswered().look([(file.fileno(), 1), (1 << 20, 1)]) == ("", 0.0)
