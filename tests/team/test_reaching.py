"""When somebody who did not answer can be reached again."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from instep.record.event_kinds import HostBackEvent
from instep.team import reaching, returns
from instep.team.orders import HostBack, HostGivenUp
from instep.team.reaching import Reaching
from instep.team.returns import TOGETHER_S, Returns
from instep.team.waiting import ready_of
from instep.team.wire_messages import HelloAgain
from support.hosts import Hosts
from support.patience import LONG_S
from support.processes import wait_until


@pytest.mark.processes
def test_who_listens_but_greets_nobody_is_not_cut_off_and_is_asked_no_more_than_he_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reaching, "LONGEST_S", LONG_S)  # else a busy machine may give the only one up
    with socket.create_server(("127.0.0.1", 0)) as server:
        trying = Reaching(server.getsockname())
        for _ in range(20):
            trying.look()
            assert trying.greeted(ready_of(trying.sources(), [], 0.02)) is None
        assert not trying.cut
        assert len(trying.sources()) == 1
        taken, _ = server.accept()
        taken.sendall(b"welcome")
        found: list[Any] = []
        wait_until(
            lambda: found.append(trying.greeted(ready_of(trying.sources(), [], 0.02))) or found[-1],
            LONG_S,
            "a greeting",
        )
        assert found[-1].recv(7) == b"welcome"
        assert not trying.sources()
        for each in (taken, found[-1]):
            each.close()


@pytest.mark.processes
def test_where_nobody_listens_any_more_it_is_told() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        trying = Reaching(deaf.getsockname())

        def look() -> bool:
            trying.look()
            return trying.greeted(ready_of(trying.sources(), [], 0.02)) is None and trying.refused

        wait_until(look, LONG_S, "a refusal")
        assert not trying.cut
        trying.close()


@pytest.mark.processes
@pytest.mark.slow
def test_the_end_of_a_cut_is_noticed_at_once_however_long_it_was(tmp_path: Path) -> None:
    with Hosts(2, tmp_path) as hosts:
        server = hosts[0].made_there(lambda: socket.create_server((hosts[0].address, 0)))
        server.setblocking(False)
        for seconds in (1.0, 4.0):
            hosts.cut(1)
            trying, began = hosts[1].made_there(lambda: Reaching(server.getsockname())), time.monotonic()

            def look(trying: Reaching = trying) -> socket.socket | None:
                hosts[1].made_there(trying.look)
                with suppress(BlockingIOError):
                    server.accept()[0].sendall(b"welcome")
                return trying.greeted(ready_of(trying.sources(), [], reaching.EVERY_S))

            while time.monotonic() - began < seconds:
                assert look() is None
            assert trying.cut
            hosts.heal(1)
            wait_until(look, LONG_S, "the end of the cut")
            trying.close()
        server.close()


@pytest.mark.pure
def test_hosts_that_come_back_together_are_told_of_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was cut off alone is at once; of several, the first waits for the others, but not for long."""
    clock, noted = [10.0], list[Any]()
    monkeypatch.setattr(returns, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def crew(host: int, *, silent: bool) -> Any:
        hello = SimpleNamespace(host=host, name="b")
        return SimpleNamespace(hello=hello, name=f"host {host} (b)", lost=None, away_s=0.0, silent=silent)

    one, other, looks = crew(1, silent=False), crew(2, silent=True), Returns(noted.append, 60.0)
    assert list(looks.look([one, other])) == []
    one.away_s = 1.25
    assert list(looks.look([one, other])) == []
    other.silent, other.away_s = False, 1.5
    assert list(looks.look([one, other])) == [HostBack(1, "host 1 (b) could not be reached for 1.2 s")]
    assert noted == [HostBackEvent(host=1, name="b", away_s=1.25), HostBackEvent(host=2, name="b", away_s=1.5)]
    assert list(looks.look([one, other])) == [], "once"
    one.away_s, other.silent = 2.0, True
    assert list(looks.look([one, other])) == []
    clock[0] += TOGETHER_S
    assert [event.host for event in looks.look([one, other])] == [1]


@pytest.mark.pure
def test_who_was_lost_may_come_back_for_a_while_as_who_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, noted = [10.0], list[Any]()
    monkeypatch.setattr(returns, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    hello = SimpleNamespace(host=1, name="b", agent=2, session="its own")
    looks, crew = Returns(noted.append, 60.0), SimpleNamespace(hello=hello, name="host 1 (b)")
    looks.leave(crew)  # type: ignore[arg-type]
    assert looks.come(HelloAgain(2, "another's", 0, 7.0)) is None
    assert looks.come(HelloAgain(1, "its own", 0, 7.0)) is None
    assert looks.come(HelloAgain(2, "its own", 0, 7.0)) is crew
    assert noted == [HostBackEvent(host=1, name="b", away_s=7.0)]
    assert looks.come(HelloAgain(2, "its own", 0, 7.0)) is None, "it is there"
    for anew in (False, True):
        looks.leave(crew)  # type: ignore[arg-type]
        if anew:
            looks.forget(2)
        clock[0] += 59.0
        assert list(looks.given_up()) == []
        clock[0] += 1.0
        why = "host 1 (b) has not come back within 60 s."
        assert list(looks.given_up()) == ([] if anew else [HostGivenUp(1, why)])
        assert list(looks.given_up()) == []
        assert looks.come(HelloAgain(2, "its own", 0, 7.0)) is None, "it is too late"
