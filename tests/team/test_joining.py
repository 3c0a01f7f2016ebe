"""A run that goes on with agents that have no folder of it: agent 0 tells them what is trained."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from instep.errors import WorkerError
from instep.recipe import Team
from instep.team import joining, meeting
from instep.team.joining import RunToJoin, run_to_join
from instep.team.link import AgentLink, Listener
from instep.team.messages import Cancelled, Failed
from instep.team.place import Place
from instep.team.waiting import ready_of
from instep.team.wire_messages import AskRun, RunGiven

PLACE = Place(1, 2, 1, 2, 0, "torchrun", (1, 1))

Answering = Callable[[Callable[[AgentLink], None]], None]


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answering]:
    """Has an agent 0 answer who asks, each in turn as told."""
    secret, threads, over = b"a secret of this test", [], threading.Event()
    listener = Listener(("127.0.0.1", 0), secret, note=lambda _: None)
    monkeypatch.setattr(meeting, "find", lambda place, within_s: meeting.Found(listener.address, secret))
    monkeypatch.setattr(joining, "PAUSE_S", 0.01)

    def begin(*answers: Callable[[AgentLink], None]) -> None:
        def work() -> None:
            left = list(answers)
            while left and not over.is_set():
                ready_of(listener.sources(), [], 0.05)
                for link in listener.accept():
                    asked: list[object] = []
                    while not asked and not over.is_set():
                        ready_of([link], [], 0.05)
                        asked = list(link.receive())
                    assert asked == [AskRun(1)]
                    left.pop(0)(link)
                    link.close()

        threads.append(threading.Thread(target=work))
        threads[0].start()

    yield begin
    over.set()
    for thread in threads:
        thread.join()
    listener.close()


def gives(link: AgentLink) -> None:
    link.send(RunGiven('name = "mine"\nsteps = 7\n[team]\nworkers = 3\n', ("/code",)))


def test_agent_0_tells_what_is_trained(answering: Answering) -> None:
    answering(gives)
    expected = RunToJoin({"name": "mine", "steps": 7, "team": {"workers": 3}}, ("/code",))
    assert run_to_join(PLACE, Team(join_timeout_s=60)) == expected


def test_an_agent_0_that_does_not_answer_is_asked_again(
    answering: Answering, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "SAY_S", 0.0)
    answering(lambda link: None, gives)
    assert run_to_join(PLACE, Team(join_timeout_s=60)).import_paths == ("/code",)
    assert "instep: agent 1 has waited 0 s for agent 0." in capsys.readouterr().err


def test_what_has_ended_the_run_is_told(answering: Answering) -> None:
    answering(
        lambda link: link.send(Failed("WorkerError", "the run failed, as agent 0 says on host 0 (n1).")),
        lambda link: link.send(Cancelled()),
    )
    with pytest.raises(WorkerError, match="the run failed, as agent 0 says"):
        run_to_join(PLACE, Team(join_timeout_s=60))
    with pytest.raises(KeyboardInterrupt):
        run_to_join(PLACE, Team(join_timeout_s=60))


def test_who_gets_no_answer_at_all_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "find", lambda place, within_s: None)
    monkeypatch.setattr(joining, "PAUSE_S", 0.01)
    with pytest.raises(WorkerError, match="agent 1 ends: agent 0, which has the folder .* has not answered in 1 s"):
        run_to_join(PLACE, Team(join_timeout_s=1.0))
