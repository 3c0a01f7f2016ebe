"""How agents find agent 0: by torchrun's store, or by srun's environment; and which address a host is reached at."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from instep.errors import RecipeError, ResourceError, WorkerError
from instep.team import meeting, telling
from instep.team.link import Listener
from instep.team.meeting import Found
from instep.team.place import Place
from instep.team.telling import telling_the_others
from support.processes import free_port

pytestmark = pytest.mark.processes

BY_TORCHRUN = Place(1, 2, 1, 2, 0, "torchrun", (1, 1), run="none")
BY_SRUN = Place(1, 2, 1, 2, 0, "srun", (1, 1), run="7", head="localhost", others=("localhost",), port=16391)

STORE = """\
import sys
from torch._C._distributed_c10d import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


class Store:
    """A store of torch's in a process of its own, as torchrun has one."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", STORE], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.address = ("127.0.0.1", int(self.process.stdout.readline()))

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    found = Store()
    yield found
    found.end()


def left() -> tuple[list[int], int]:
    """Children of this process, and descriptors, but for what other tests have left as rubbish."""
    gc.collect()
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return sorted(map(int, children)), len(os.listdir("/proc/self/fd"))


def test_agent_0_is_found_in_torchruns_store_where_the_last_one_that_said_so_is(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "MORE_S", 0.1)
    unreachable = ("127.0.0.1", 9)
    place = replace(BY_TORCHRUN, stores=(unreachable, store.address), run="a run")
    meeting._store(store.address)  # imports torch here once, not in each process that asks
    before = left()
    assert meeting.find(place, 1.0) is None
    for port, secret in ((1234, b"first"), (4321, meeting.draw_secret(place, {}))):
        meeting.publish(place, ("10.1.2.3", port), secret)
        assert meeting.find(place, 60.0) == Found(("10.1.2.3", port), secret)
    assert meeting.find(replace(place, run="another"), 0.5) is None
    assert left() == before


def test_a_store_that_was_stopped_keeps_nobody_waiting_longer_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = Store()
    place = replace(BY_TORCHRUN, stores=(stopped.address,))
    os.kill(stopped.process.pid, signal.SIGSTOP)
    before, began = left(), time.monotonic()
    try:
        assert meeting.find(place, 0.5) is None
        monkeypatch.setattr(meeting, "PUBLISH_S", 0.5)
        with pytest.raises(ResourceError, match=r"torchrun's store at 127\.0\.0\.1, port \d+, is not to be reached"):
            meeting.publish(place, ("10.1.2.3", 1), b"secret")
        assert time.monotonic() - began < 60
        assert left() == before
    finally:
        stopped.end()


def test_an_agent_that_waits_ends_once_torchruns_store_is_gone(store: Store) -> None:
    with socket.socket() as deaf:  # nobody else gets its port
        deaf.bind(("127.0.0.1", 0))
        closed = deaf.getsockname()
        for stores in ((closed, store.address), (("no.such.host.invalid", 29500),), ()):
            meeting.check_open(replace(BY_TORCHRUN, stores=stores))
        why = f"agent 1 ends: the torchrun .* at 127.0.0.1, port {closed[1]}, has ended"
        with pytest.raises(WorkerError, match=why):
            meeting.check_open(replace(BY_TORCHRUN, stores=(("no.such.host.invalid", 29500), closed)))


@pytest.mark.parametrize("value", ["", "{}", '["h"]', '["h",0,"ab"]', '["h",1,"xy"]', '["h","1","ab"]', "[" * 3000])
def test_what_else_stands_in_the_store_is_not_agent_0(store: Store, value: str) -> None:
    place = replace(BY_TORCHRUN, stores=(store.address,), run="strange")
    meeting._store(store.address).set(meeting._key(place), value)
    assert meeting.find(place, 60.0) is None


def test_a_process_that_asks_holds_no_connection_of_the_agents(store: Store) -> None:
    """A copy would hide the end of the other agent's."""
    one, other = socket.socketpair()
    reader, pid = meeting._asking(lambda: repr(sorted(map(int, os.listdir("/proc/self/fd")))).encode())
    one.close()
    said = os.read(reader, 1000)
    assert eval(said[1:]).count(other.fileno()) == 0
    assert len(eval(said[1:])) <= 6
    os.waitpid(pid, 0)
    os.close(reader)
    other.close()


def test_with_a_secret_in_sruns_environment_agent_0_is_on_the_first_host_at_a_port_that_follows_from_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("INSTEP_SECRET", "0123456789abcdef")
    assert meeting.find(BY_SRUN, 1.0) == Found(("127.0.0.1", 16391), b"0123456789abcdef")
    assert meeting.draw_secret(BY_SRUN, os.environ) == b"0123456789abcdef"
    meeting.publish(BY_SRUN, ("127.0.0.1", 1), b"")  # all know it
    monkeypatch.setenv("INSTEP_SECRET", "short")
    with pytest.raises(RecipeError, match=r"INSTEP_SECRET .* 5 characters, .*\$\(openssl rand -hex 32\)"):
        meeting.find(BY_SRUN, 1.0)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("INSTEP_SECRET", raising=False)
    return tmp_path


def test_under_srun_agent_0_is_found_by_a_file_that_its_user_alone_reads(home: Path) -> None:
    assert meeting.find(BY_SRUN, 1.0) is None
    for port in (1234, 4321):
        secret = meeting.draw_secret(BY_SRUN, {})
        meeting.publish(BY_SRUN, ("10.1.2.3", port), secret)
        assert meeting.find(BY_SRUN, 1.0) == Found(("10.1.2.3", port), secret)
    (file,) = (home / ".instep").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert meeting.find(replace(BY_SRUN, run="8"), 1.0) is None
    file.chmod(0o640)
    with pytest.raises(RecipeError, match="srun-7, which holds the run's secret, is not of this user alone"):
        meeting.find(BY_SRUN, 1.0)
    meeting.withdraw(BY_SRUN)
    assert meeting.find(BY_SRUN, 1.0) is None


def test_a_file_that_agent_0_has_left_and_this_host_does_not_see_is_named_at_once(home: Path) -> None:
    secret = meeting.draw_secret(BY_SRUN, {})
    with contextlib.closing(Listener(("127.0.0.1", 0), secret, note=lambda _: None)) as listener:
        seen = threading.Event()
        greeting = threading.Thread(target=lambda: [listener.accept() for _ in iter(lambda: seen.wait(0.01), True)])
        greeting.start()
        place = replace(BY_SRUN, port=listener.address[1])
        with pytest.raises(RecipeError, match=r"host 1 does not see the file in .*\.instep .*openssl rand -hex 32"):
            meeting.find(place, 60.0)
        seen.set()
        greeting.join()
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        assert meeting.find(replace(BY_SRUN, port=stranger.getsockname()[1]), 0.1) is None, "which is no agent 0"


def test_under_srun_a_first_agent_that_fails_before_it_begins_ends_the_others(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telling, "place_of", lambda launcher: replace(BY_SRUN, agent=0, host=0))
    with pytest.raises(RecipeError, match="a mistake"), telling_the_others():
        raise RecipeError("a mistake")
    with pytest.raises(WorkerError, match="the run failed before it began, as agent 0 says"):
        meeting.find(BY_SRUN, 1.0)
    meeting.publish(BY_SRUN, ("10.1.2.3", 1), b"secret")  # the next one
    assert meeting.find(BY_SRUN, 1.0) is not None


def test_with_a_secret_a_first_agent_that_fails_before_it_begins_tells_who_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("INSTEP_SECRET", "0123456789abcdef")
    monkeypatch.setattr(meeting, "own_address", lambda place: "127.0.0.1")
    monkeypatch.setattr(meeting, "FAREWELL_S", 60.0)
    place = replace(BY_SRUN, port=free_port())
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meeting.say_ended, replace(place, agent=0, host=0))
        telling.tell(place, RecipeError("a mistake"))
        first.result()


def test_under_torchrun_a_first_agent_that_fails_before_it_begins_leaves_word_of_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = replace(BY_TORCHRUN, stores=(store.address,), run="ended")
    meeting._store(store.address)
    meeting.say_ended(replace(place, agent=0, host=0))
    assert meeting.find(place, 60.0) is None, "the store that all meet at is its own torchrun's, and ends with it"
    monkeypatch.setattr(meeting, "_is_here", lambda host: False)
    meeting.say_ended(replace(place, agent=0, host=0))
    assert meeting.find(place, 60.0) is None, "torchrun may start it again"
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    with pytest.raises(WorkerError, match="the run failed before it began, as agent 0 says"):
        meeting.find(place, 60.0)


def test_files_that_agents_who_were_killed_have_left_are_taken_away_in_time(home: Path) -> None:
    meeting.publish(BY_SRUN, ("10.1.2.3", 1), b"secret")
    (old,) = (home / ".instep").iterdir()
    os.utime(old, (0, 0))
    meeting.publish(replace(BY_SRUN, run="8"), ("10.1.2.3", 1), b"secret")
    assert [file.name for file in (home / ".instep").iterdir()] == ["srun-8"]


def test_a_home_that_takes_no_file_is_named_with_what_helps(home: Path) -> None:
    (home / ".instep").write_text("a file")
    with pytest.raises(ResourceError, match=r"secret cannot be written to .*\(File exists\).*openssl rand -hex 32"):
        meeting.publish(BY_SRUN, ("10.1.2.3", 1), b"secret")


def test_a_hosts_address_is_that_on_the_way_to_the_others_or_of_the_interface_named() -> None:
    assert meeting.route_address("127.0.0.1") == "127.0.0.1"
    assert meeting.address_of("lo") == "127.0.0.1"
    assert meeting.own_address(BY_TORCHRUN, "127.0.0.1") == "127.0.0.1"
    assert meeting.own_address(replace(BY_TORCHRUN, hosts=1, host=0)) == "127.0.0.1"
    assert meeting.route_address("10.1.2.3", "lo") == "127.0.0.1"
    for wrong in ("eth77", "203.0.113.7", "nonsense"):
        with pytest.raises(RecipeError, match=f"team.interface is '{wrong}'.* it has .*lo \\(127.0.0.1\\)"):
            meeting.address_of(wrong)
