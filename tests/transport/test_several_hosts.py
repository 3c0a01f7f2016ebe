"""The hosts that tests run on are hosts, and what goes between them outlives what a network does."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from instep.transport.group import Group
from support import hosts as of_hosts
from support.groups import APART, Ranks, sizes_of
from support.hosts import SHIFT_S, WORK, Hosts
from support.processes import wait_until

pytestmark = [pytest.mark.processes, pytest.mark.slow]

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(2, tmp_path / "hosts") as found:
        yield found


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_each_host_has_its_own_of_all_but_the_code(hosts: Hosts) -> None:
    one, two = hosts
    hosts.put({"mine.py": "found = 7"})
    assert one.run("hostname").strip() == one.name != two.name
    resolved = "import socket as s, instep, mine; print(s.gethostbyname(s.gethostname()), mine.found)"
    assert one.run(*python(resolved)).split() == ["127.0.0.1", "7"]
    one.run("sh", "-ec", "echo x >/tmp/a; echo x >/dev/shm/a; echo x >$HOME/a; echo x >a; mkdir runs")
    assert two.run("sh", "-ec", "ls /tmp /dev/shm $HOME . | grep -x -e a -e runs || true") == ""
    assert (one.path(WORK) / "a").read_text() == "x\n"
    for folder in (TESTS, sys.prefix, "/etc", "/"):
        assert one.start("touch", f"{folder}/a").ends() != 0
    sleeping = one.start("sleep", "60")
    pid = sleeping.pid
    assert one.processes() == [pid]
    assert "sleep" not in two.run("ps", "-A")
    sleeping.signal(signal.SIGTERM)
    assert sleeping.ends() != 0


def test_code_that_lies_where_a_host_has_its_own_is_found_and_can_only_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_hosts, "_ROOT", tmp_path / "clone")
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "code").write_text("here")
    with Hosts(1, tmp_path / "hosts") as hosts:
        assert hosts[0].run("cat", f"{tmp_path}/clone/code") == "here"
        assert hosts[0].start("touch", f"{tmp_path}/clone/code").ends() != 0


def test_clocks_of_hosts_differ(hosts: Hosts) -> None:
    code = python("import time; print(time.time(), time.monotonic())")
    found = []
    for host in hosts:
        before = time.time()
        wall, monotonic = map(float, host.run(*code).split())
        assert before <= wall - SHIFT_S * host.number <= time.time()
        found.append(monotonic)
    assert found[1] - found[0] > 999


SERVE = """\
import socket, sys
server = socket.create_server((sys.argv[1], 5000))
print("there", flush=True)
connection, _ = server.accept()
while got := connection.recv(1 << 20):
    connection.sendall(b"." * len(got))
"""


def talking(hosts: Hosts) -> tuple[Callable[[int], float], Any]:
    """A connection from host 1 to host 0, that brings back what is sent: the seconds that so many bytes take."""
    server = hosts[0].start(*python(SERVE), hosts[0].address)
    wait_until(lambda: "there" in server.out, 60, "the server")
    connection = hosts[1].made_there(lambda: socket_to(hosts[0].address))

    def times(count: int) -> float:
        began = time.monotonic()
        threading.Thread(target=connection.sendall, args=(bytes(count),), daemon=True).start()
        left = count
        while left:
            left -= len(connection.recv(left))
        return time.monotonic() - began

    return times, connection


def socket_to(address: str) -> socket.socket:
    connection = socket.create_connection((address, 5000), 60)
    connection.settimeout(60)
    return connection


def test_a_network_is_shaped_and_its_bytes_are_counted(hosts: Hosts) -> None:
    times, connection = talking(hosts)
    before, count = hosts[1].traffic(), 4_000_000
    times(count)
    received, sent = (now - then for now, then in zip(hosts[1].traffic(), before, strict=True))
    assert count < received < 1.1 * count
    assert count < sent < 1.1 * count
    hosts.shape(1, "40mbit")
    assert times(count) > 0.7, "which takes 0.8 s"
    connection.close()


@pytest.mark.parametrize("way", ["cut", "cut_from", "cut_to"])
def test_what_is_cut_off_hears_nothing_until_it_is_healed_and_nothing_is_lost(hosts: Hosts, way: str) -> None:
    times, connection = talking(hosts)
    times(1000)
    healed: list[float] = []

    def heal() -> None:
        healed.append(time.monotonic())
        hosts.heal(1)

    getattr(hosts, way)(1)
    threading.Timer(1.0, heal).start()
    times(1000)
    assert healed, "what is sent meanwhile comes no sooner"
    times(1000)
    connection.close()


def test_a_killed_host_says_nothing_more_and_the_rest_is_gone_with_it(hosts: Hosts) -> None:
    sleeping = hosts[1].start("sleep", "60")
    pid = sleeping.pid
    hosts[1].kill()
    assert sleeping.ends() != 0
    assert not Path(f"/proc/{pid}").exists()
    assert hosts[0].run("echo", "here") == "here\n"


def test_nothing_is_left_of_hosts_whose_maker_is_killed(tmp_path: Path) -> None:
    code = f"""\
import sys, time
sys.path.insert(0, {str(TESTS)!r})
from pathlib import Path
from support.hosts import Hosts
hosts = Hosts(2, Path({str(tmp_path)!r}))
command = hosts[0].start("sleep", "60")
print(command.pid, hosts[0].pid, hosts[1].pid, hosts._network.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        pids = list(map(int, maker.stdout.readline().split()))
        assert all(map(lives, pids))
        maker.kill()
    wait_until(lambda: not any(map(lives, pids)), 60, "the end of all")


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_group_goes_on_after_a_cut_of_two_seconds_and_nothing_is_lost(tmp_path: Path) -> None:
    kind, turns, over = APART[1], tmp_path / "turns", tmp_path / "over"
    turns.touch()

    def body(make: Callable[..., Group], rank: int) -> list[float]:
        group, found = make(sizes_of(kind)), []
        turn = 0
        while group.gather(torch.tensor([float(not over.exists())])).min() > 0:
            found.append(float(group.gather(torch.tensor([float(turn * (rank + 1))])).sum()))
            turn += 1
            with turns.open("a") as file:
                file.write(".")
        group.close()
        return found

    def more(count: int) -> None:
        until = turns.stat().st_size + count * kind.size
        wait_until(lambda: turns.stat().st_size >= until, 60, "turns")

    ranks = Ranks(kind, sizes_of(kind), body)
    assert ranks.hosts is not None
    more(10)
    ranks.hosts.cut(1)
    time.sleep(2)
    ranks.hosts.heal(1)
    more(10)
    over.touch()
    answers = ranks.answers()
    assert answers[0] == [10.0 * turn for turn in range(len(answers[0]))]
    assert all(each == answers[0] for each in answers)
    assert len(answers[0]) > 10
