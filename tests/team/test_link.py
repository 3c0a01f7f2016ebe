"""The link between agents: messages arrive whole and in order, and nobody gets in who does not know the secret."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from instep.record.folder import RunFolder
from instep.team import link as of_link
from instep.team.link import AgentLink, Listener, WireError, connect
from instep.team.link_proofs import digest_of, tag_of
from instep.team.remote import RemoteCrew
from instep.team.wire_format import MESSAGE_BYTES
from instep.team.wire_messages import Beat, CheckpointPart, EndMembers, EpochGone, GiveKept, Kept
from support.hosts import Hosts

SECRET = b"a secret of 32 characters, as it"


class Side:
    """Agent 0's: lets in whoever comes, all the time, as its loop does."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.listener = Listener(("127.0.0.1", 0), SECRET, self.notes.append)
        self.links: list[AgentLink] = []
        self.longest_s = 0.0
        """That a look took."""
        self._strangers: list[socket.socket] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._ended.is_set():
            began = time.monotonic()
            self.links += self.listener.accept()
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            time.sleep(0.001)

    def connect(self, secret: bytes = SECRET, within_s: float = 60.0) -> AgentLink:
        return connect(self.listener.address, secret, within_s)

    def pair(self) -> tuple[AgentLink, AgentLink]:
        """Ends of a new link: agent 0's, and the other."""
        before = len(self.links)
        other = self.connect()
        wait_until(lambda: len(self.links) > before)
        return self.links[before], other

    def stranger(self) -> socket.socket:
        self._strangers.append(socket.create_connection(self.listener.address, 60))
        return self._strangers[-1]

    def refuses(self, count: int, why: str) -> None:
        wait_until(lambda: self.listener.refused >= count)
        assert self.listener.refused == count
        assert any(why in note for note in self.notes), self.notes

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self.listener.close()
        for each in [*self.links, *self._strangers]:
            each.close()


@pytest.fixture
def side() -> Iterator[Side]:
    made = Side()
    yield made
    made.close()


def wait_until(true: Callable[[], Any], within_s: float = 60.0) -> None:
    until = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.001)


def got(link: AgentLink, count: int, within_s: float = 60.0) -> list[Any]:
    """So many messages."""
    found: list[Any] = []
    wait_until(lambda: found.extend(link.receive()) or len(found) >= count, within_s)
    return found


def ends(link: AgentLink, error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        wait_until(lambda: bool(link.receive()))


def test_messages_of_any_size_arrive_in_order_both_ways(side: Side) -> None:
    zero, other = side.pair()
    for seq in range(500):
        other.send(Beat(seq, 0.1 * seq))
    assert [message.seq for message in got(zero, 500)] == list(range(500))
    contents = [random.Random(seed).randbytes(1 << seed) for seed in range(0, 22, 3)]
    for content in contents:
        zero.send(CheckpointPart("v1", "weights", 0, content, True, "ab"))
    found: list[Any] = []
    wait_until(lambda: zero.flush() or found.extend(other.receive()) or len(found) == len(contents))
    assert [message.content for message in found] == contents
    assert not zero.wants_write


def test_what_came_before_the_end_is_given_first(side: Side) -> None:
    zero, other = side.pair()
    other.send(EpochGone(3))
    other.close()
    assert got(zero, 1) == [EpochGone(3)]
    ends(zero, EOFError, "the connection has ended$")


def test_a_link_that_was_closed_in_one_process_lives_on_in_another_that_has_it(side: Side) -> None:
    zero, other = side.pair()
    copy = os.dup(other.fileno())
    other.close()
    time.sleep(0.05)
    assert zero.receive() == []
    os.close(copy)
    ends(zero, EOFError, "ended")


def test_whoever_takes_nothing_counts_as_lost(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_link, "WAITING_BYTES", 1 << 23)
    zero, other = side.pair()
    part = CheckpointPart("v1", "weights", 0, bytes(1 << 20), False)
    with pytest.raises(WireError, match="has not taken"):
        all(zero.send(part) is None for _ in range(50))
    other.close()


def says_nothing(side: Side) -> str:
    side.stranger()
    return "did not say who it is within 0.2 s"


def speaks_http(side: Side) -> str:
    side.stranger().sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
    return "is no agent of this version"


def has_another_secret(side: Side) -> str:
    with pytest.raises(WireError, match="has another secret"):
        side.connect(b"another")
    return "does not know the run's secret"


def repeats_what_another_said(side: Side) -> str:
    """The greeting and proof of an agent, as someone who listens on the wire has them."""
    own = os.urandom(32)
    with side.stranger() as first:
        nonce = first.recv(40)[8:]
        said = of_link.MAGIC + own + digest_of(SECRET, b"agent", nonce, own)
        first.sendall(said)
        assert len(first.recv(32)) == 32, "it is let in"
    side.stranger().sendall(said)
    return "does not know the run's secret"


def gives_the_proof_back(side: Side) -> str:
    """What agent 0 draws, as if the stranger had drawn it."""
    with side.stranger() as stranger:
        greeting = stranger.recv(40)
        stranger.sendall(greeting + bytes(32))
    return "does not know the run's secret"


def goes_at_once(side: Side) -> str:
    side.stranger().close()
    return "has closed the connection"


def goes_in_the_middle(side: Side) -> str:
    with side.stranger() as stranger:
        stranger.sendall(of_link.MAGIC + b"x")
    return "has closed the connection"


STRANGERS = [says_nothing, speaks_http, has_another_secret, repeats_what_another_said, gives_the_proof_back,
             goes_at_once, goes_in_the_middle]  # fmt: skip


@pytest.mark.parametrize("strange", STRANGERS, ids=lambda each: each.__name__)
def test_a_stranger_is_turned_away_counted_and_noted(
    side: Side, strange: Callable[[Side], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = side.pair()
    with monkeypatch.context() as patch:
        patch.setattr(of_link, "SHAKE_S", 0.2 if strange is says_nothing else 600.0)
        why = strange(side)
        side.refuses(1, why)
    before[1].send(EpochGone(1))
    assert got(before[0], 1) == [EpochGone(1)]
    zero, other = side.pair()
    zero.send(EndMembers(2))
    assert got(other, 1) == [EndMembers(2)]


def test_who_is_known_may_see_whether_agent_0_is_there_and_is_no_stranger(side: Side) -> None:
    side.listener.knows = lambda address: address == "127.0.0.1"
    goes_at_once(side)
    side.pair()  # which comes after it
    wait_until(lambda: len(side.listener.sources()) == 1)
    assert (side.listener.refused, side.notes) == (0, [])
    side.refuses(1, goes_in_the_middle(side))


def test_one_byte_at_a_time_is_a_handshake_if_it_comes_in_time_and_delays_nobody(
    side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_link, "SHAKE_S", 600.0)
    slow = side.stranger()
    nonce, own = slow.recv(40)[8:], os.urandom(32)
    for byte in of_link.MAGIC + own + digest_of(SECRET, b"agent", nonce, own):
        slow.send(bytes([byte]))
        if byte % 16 == 0:
            side.connect(within_s=60).close()
    assert len(slow.recv(32)) == 32
    assert side.listener.refused == 0


def test_one_byte_at_a_time_has_no_more_time_than_others(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_link, "SHAKE_S", 0.2)
    slow = side.stranger()
    with suppress(OSError):
        for byte in of_link.MAGIC + bytes(32):
            slow.send(bytes([byte]))
            time.sleep(0.02)
    side.refuses(1, "did not say who it is within")


def test_many_strangers_at_once_keep_no_agent_waiting(side: Side) -> None:
    for _ in range(3):
        strangers = [side.stranger() for _ in range(100)]
        zero, other = side.pair()
        other.send(EpochGone(1))
        assert got(zero, 1) == [EpochGone(1)]
        assert len(side.listener.sources()) <= 1 + of_link.SHAKING
        for stranger in strangers:
            stranger.close()
    assert side.longest_s < 30
    wait_until(lambda: side.listener.refused == 300)
    assert len(side.notes) < 30, "a flood fills no log"
    assert len(side.listener.sources()) == 1


def test_a_link_goes_on_over_another_connection_and_each_message_comes_once(side: Side) -> None:
    """Some had not been read, some were on their way, and some are sent while there is no way; then once more."""
    zero, other = side.pair()
    for each in (zero, other):
        each.keep()
    came: tuple[list[int], list[int]] = [], []

    def take() -> None:
        for link, found in zip((zero, other), came, strict=True):
            link.flush()
            found += [message.seq for message in link.receive()]

    for count in (40, 80, 120):
        for seq in range(count - 40, count):
            zero.send(Beat(seq, 0.5))
            other.send(Beat(seq, 0.5))
            if seq % 40 < 20:
                take()
        at_zero, at_other = side.pair()
        had = zero.came, other.came
        other.go_on(at_other, had[0])
        zero.go_on(at_zero, had[1])
        wait_until(lambda: take() or len(came[0]) == len(came[1]) == count)  # noqa: B023
        other.send(Beat(1 << 20, 0.5))
        assert got(zero, 1)[0].seq == 1 << 20
    assert came == (list(range(120)), list(range(120)))


def test_a_host_whose_agent_gives_a_new_connection_up_is_not_lost_by_that(side: Side, tmp_path: Path) -> None:
    """It has heard no answer in time, and tries another. What is ordered meanwhile comes once that is there."""
    zero, other = side.pair()
    for each in (zero, other):
        each.keep()
    hello, carried = SimpleNamespace(host=1, name="b", session="its own"), SimpleNamespace(told=lambda *told: None)
    crew = RemoteCrew(zero, hello, RunFolder(tmp_path), lambda: 0.0, 600.0, carried, None)  # type: ignore[arg-type]
    at_zero, given_up = side.pair()
    crew.go_on(at_zero, other.came, 1.0)
    given_up.close()
    wait_until(lambda: list(crew.hear(crew.sources())) or not crew.sources())
    crew.ask_for(Kept("run", 5, "step-00000005", "ab"))
    assert (crew.lost, zero.wants_write) == (None, False)
    at_zero, at_other = side.pair()
    came = zero.came
    crew.go_on(at_zero, other.came, 2.0)
    other.go_on(at_other, came)
    assert got(other, 1) == [GiveKept("step-00000005")]
    assert not zero.can_go_on(2), "no more than were sent"
    other.send(Beat(0, 0.5))
    wait_until(lambda: list(crew.hear(crew.sources())) or zero.came == 1)
    assert not zero.can_go_on(0), "it is known that more have come"
    other.close()
    wait_until(lambda: list(crew.hear(crew.sources())) or crew.lost)
    assert crew.lost is not None
    assert not crew.lost.may_return


def test_what_has_come_is_kept_no_more_and_the_other_end_says_so_by_itself(
    side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_link, "AHEAD_BYTES", 1 << 21)
    zero, other = side.pair()
    for each in (zero, other):
        each.keep()
    sent, found = 0, list[Any]()
    for _ in range(40):
        while not zero.full:
            zero.send(CheckpointPart("v1", "weights", sent, bytes(1 << 18), False))
            sent += 1
        wait_until(lambda: zero.flush() or found.extend(other.receive()) or zero.receive() or not zero.full)
    assert sent > 40, "who takes it in has said so"
    assert [part.offset for part in found] == list(range(len(found)))
    with pytest.raises(WireError, match="are said to have come of"):
        zero.go_on(other, 0)


def raw(side: Side) -> tuple[AgentLink, Callable[[bytes], Any], AgentLink]:
    """Agent 0's end, what puts bytes on its wire, and the other end."""
    zero, other = side.pair()
    return zero, other._socket.sendall, other


def frame(other: AgentLink, content: bytes, number: int = 0, length: int | None = None) -> bytes:
    """As the other end would make it."""
    tag = tag_of(other._sending, number, 0, content)
    return of_link._HEAD.pack(len(content) if length is None else length, number, 0, tag) + content


@pytest.mark.parametrize("length", [MESSAGE_BYTES + 1, 1 << 32, 1 << 40, (1 << 64) - 1])
def test_a_frame_too_long_is_refused_before_it_is_read(side: Side, length: int) -> None:
    zero, put, other = raw(side)
    put(frame(other, b"", length=length))
    ends(zero, WireError, f"of {length:,} bytes was announced")


def test_a_torn_frame_is_the_end_and_none_of_it_is_given(side: Side) -> None:
    zero, put, other = raw(side)
    put(frame(other, of_link.encode(EpochGone(1)))[:-1])
    time.sleep(0.05)
    assert zero.receive() == []
    other.close()
    ends(zero, EOFError, "in the middle of a message")


def test_a_frame_is_refused_that_is_repeated_left_out_changed_sent_back_or_of_another_link(side: Side) -> None:
    content = of_link.encode(EpochGone(1))
    for bad, why in (
        (lambda zero, other, third: 2 * frame(other, content), "message 0 came where 1 was due"),
        (lambda zero, other, third: frame(other, content, number=1), "message 1 came where 0 was due"),
        (lambda zero, other, third: frame(other, content)[:-1] + b"\7", "not as it was sent, or another's"),
        (lambda zero, other, third: frame(zero, content), "not as it was sent, or another's"),
        (lambda zero, other, third: frame(third, content), "not as it was sent, or another's"),
    ):
        zero, put, other = raw(side)
        put(bad(zero, other, side.pair()[1]))
        ends(zero, WireError, why)


def test_a_message_that_breaks_its_schema_ends_the_link(side: Side) -> None:
    for content, why in ((b"\xc1", "understood"), (b"\x91\xa4Exec", "an unknown kind, 'Exec'"), (b"", "understood")):
        zero, put, other = raw(side)
        put(frame(other, content))
        ends(zero, WireError, why)


def test_an_agent_notices_that_what_answers_is_no_agent_0(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()[:2]

        def answers(content: bytes) -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(content)
                if len(content) == 40:
                    connection.recv(100)
                    connection.sendall(bytes(32))

        for content, why in ((b"HTTP/1.1 400 Bad Request" + bytes(40), "no agent 0 of this version"), (b"x", "closed"),
                             (of_link.MAGIC + bytes(32), "does not know the run's secret")):  # fmt: skip
            thread = threading.Thread(target=answers, args=(content,))
            thread.start()
            with pytest.raises(WireError, match=why):
                connect(address, SECRET, 60)
            thread.join()
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            connect(address, SECRET, 0.2)  # nobody accepts
        assert time.monotonic() - began < 60
    with socket.socket() as deaf:  # nobody else gets its port
        deaf.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            connect(deaf.getsockname(), SECRET, 60)


@pytest.mark.processes
@pytest.mark.slow
def test_a_link_goes_on_after_a_cut_of_two_seconds_and_nothing_is_lost(tmp_path: Path) -> None:
    with Hosts(2, tmp_path / "hosts") as hosts:
        listener = hosts[0].made_there(lambda: Listener((hosts[0].address, 0), SECRET))
        made: list[AgentLink] = []
        come = partial(connect, listener.address, SECRET, 60)
        meeting = threading.Thread(target=lambda: made.append(hosts[1].made_there(come)))
        meeting.start()
        there: list[AgentLink] = []
        wait_until(lambda: there.extend(listener.accept()) or there)
        meeting.join()
        (zero,), (one,) = there, made
        came: dict[AgentLink, list[Any]] = {zero: [], one: []}
        contents = [os.urandom(1 << 20) for _ in range(4)]
        hosts.cut(1)
        began = time.monotonic()
        for seq, content in enumerate(contents):
            one.send(Beat(seq, 0.5))
            zero.send(CheckpointPart("v1", "weights", seq, content, False))
        assert time.monotonic() - began < 60, "who sends does not wait"

        def look() -> None:
            for link, found in came.items():
                link.flush()
                found.extend(link.receive())

        while time.monotonic() - began < 2:
            look()
            time.sleep(0.02)
        assert came == {zero: [], one: []}
        hosts.heal(1)
        wait_until(lambda: look() or (len(came[zero]), len(came[one])) == (4, 4))
        assert [message.seq for message in came[zero]] == [0, 1, 2, 3]
        assert [message.content for message in came[one]] == contents
        for each in (zero, one, listener):
            each.close()
