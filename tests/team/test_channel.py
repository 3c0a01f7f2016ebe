"""Channels: whole messages or none, in order, whatever their length and whoever dies."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from instep.recipe import Team
from instep.team import channel
from instep.team.channel import PACKET_BYTES, Channel, Line
from support.harness import train_here
from support.regression import regression

Ends = tuple[Channel, Channel]


@pytest.fixture
def ends() -> Iterator[Ends]:
    one, other = Channel.pair()
    yield one, other
    one.close()
    other.close()


def forked(act: Callable[[], None]) -> int:
    """A process that does this, and ends without a word to anybody."""
    pid = os.fork()
    if not pid:
        try:
            act()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    return pid


def open_descriptors() -> int:
    gc.collect()  # what other tests have left
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("length", [0, PACKET_BYTES - 100, PACKET_BYTES, PACKET_BYTES + 1, 5_000_000])
def test_messages_of_any_length_arrive_whole_and_in_order(ends: Ends, length: int) -> None:
    one, other = ends
    before = open_descriptors()
    one.send({"first": bytes(length)})
    one.send(("second", length))
    assert other.recv() == {"first": bytes(length)}
    assert other.recv() == ("second", length)
    other.send("and back")
    assert one.recv() == "and back"
    assert open_descriptors() == before


def test_a_channel_is_ready_where_there_is_a_message_or_an_end(ends: Ends) -> None:
    one, other = ends
    assert not other.poll()
    one.send("a")
    assert other.poll()
    other.recv()
    assert not other.poll(0.01)
    one.close()
    assert other.poll(1)


def test_what_was_sent_before_the_end_is_still_heard(ends: Ends) -> None:
    one, other = ends
    one.send("a last word")
    one.close()
    assert other.recv() == "a last word"
    with pytest.raises(EOFError):
        other.recv()
    with pytest.raises(BrokenPipeError):
        other.send("nobody hears it")


@pytest.mark.processes
def test_hanging_up_ends_it_for_all_who_hold_an_end(ends: Ends) -> None:
    one, other = ends
    pid = forked(lambda: other.recv())  # holds both ends, so that closing this one here would end nothing
    one.hang_up()
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    with pytest.raises(EOFError):
        other.recv()
    one.close()
    other.hang_up()  # once more does no harm


@pytest.mark.processes
def test_of_a_message_whose_sender_dies_meanwhile_there_is_all_or_nothing(ends: Ends) -> None:
    """The end of the dead stays open here, as a line's does, for its successor."""
    one, other = ends
    pid = forked(lambda: [one.send((number, bytes(PACKET_BYTES))) for number in range(10**9)])  # type: ignore[func-returns-value]
    heard = [other.recv()[0] for _ in range(20)]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while other.poll():
        heard.append(other.recv()[0])
    one.send("its successor")
    assert heard == list(range(len(heard)))
    assert other.recv() == "its successor"


def test_a_message_without_memory_for_it_is_an_error_of_the_sender(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left() -> int:
        raise OSError(24, "Too many open files")

    one, other = ends
    monkeypatch.setattr(channel, "memory_file", none_left)
    with pytest.raises(OSError, match="Too many"):
        one.send(bytes(PACKET_BYTES))
    one.send("small")
    assert other.recv() == "small"


def test_what_was_said_arrives_though_the_answer_was_never_read(ends: Ends) -> None:
    one, other = ends
    one.send("an answer")
    other.send("the last word")
    other.close()
    assert one.recv() == "the last word"
    with pytest.raises(EOFError):
        one.recv()


@pytest.mark.processes
def test_a_process_is_started_with_the_number_of_its_end(ends: Ends) -> None:
    one, other = ends
    pid = forked(lambda: Channel.of(other.fileno()).send(os.getpid()))
    os.waitpid(pid, 0)
    assert one.recv() == pid


@pytest.mark.processes
def test_a_line_goes_both_ways_and_is_taken_over_by_a_successor() -> None:
    line = Line.open()
    for word in ("the first", "its successor"):
        os.waitpid(forked(lambda word=word: line.worker.send(word)), 0)  # type: ignore[misc]
    assert [line.server.recv(), line.server.recv()] == ["the first", "its successor"]
    line.server.send("work")
    assert line.worker.recv() == "work"
    line.close()
    assert line.server.fileno() == line.worker.fileno() == -1


@pytest.mark.processes
def test_contributions_longer_than_a_packet_train_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of thousands of microbatches are: many local steps, each of many."""
    alone = train_here(regression(), Team(), tmp_path / "alone")
    monkeypatch.setattr(channel, "PACKET_BYTES", 1)  # so every message is longer
    served = train_here(regression(), Team(workers=2, engine="server"), tmp_path / "served")
    assert served.digest == alone.digest
