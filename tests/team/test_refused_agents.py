"""Agents that cannot take part are refused by one sentence, and end: no process is left waiting."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from instep.errors import InstepError, RecipeError, ResourceError
from instep.recipe import Team
from instep.record.folder import RunFolder
from instep.team import farewell as of_farewell
from instep.team import hello as of_hello
from instep.team import hosts as of_hosts
from instep.team import meeting
from instep.team.hello import hello_of
from instep.team.hosts import Hosts
from instep.team.link import AgentLink, connect
from instep.team.messages import Failed, Request
from instep.team.orders import HostCame
from instep.team.taking_up import TakingUp
from instep.team.waiting import ready_of
from instep.team.wire_messages import AskRun, Beat, HelloAgent, NotComing, RunGiven, Welcome
from support import workloads
from support.agents import Followers, Told, meet_here, places, request_of, train_on
from support.patience import LONG_S

pytestmark = pytest.mark.processes


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meet_here(monkeypatch, tmp_path)


def elsewhere(monkeypatch: pytest.MonkeyPatch, name: str, other: Any) -> None:
    """Has what `hello` finds out about its machine be another in other processes than this one."""
    own, parent = getattr(of_hello, name), os.getpid()
    monkeypatch.setattr(of_hello, name, lambda: own() if os.getpid() == parent else other(own()))


def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str, **team: Any) -> None:
    """Trains on two hosts in vain: agent 0 raises this error, and the other agent ends too."""
    recipe, who = workloads.gpt(steps=4), Team(workers=2, **team)
    followers = Followers(recipe, who, (1, 1), tmp_path)
    told: list[Told] = []
    end = followers.end
    monkeypatch.setattr(followers, "end", lambda: (told.extend(followers.told(60)), end()))
    with pytest.raises(InstepError, match=why) as error:
        train_on((1, 1), recipe, who, tmp_path / "run", followers=followers)
    assert error.value.message.count("\n") == 0
    assert "the run failed, as agent 0 says on host 0" in told[0].error


def test_another_version_is_named_with_its_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere(monkeypatch, "libraries", lambda own: {**own, "torch": "2.99.0"})
    why = r"host 1 \(.*\), agent 1, has torch 2\.99\.0, and agent 0 has 2\..*; install the same version on all hosts\."
    refused(tmp_path, monkeypatch, why)


def test_another_kind_of_processor_is_named_with_its_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere(monkeypatch, "processor", lambda own: "AcmeCorp AVX9")
    refused(tmp_path, monkeypatch, r"host 1 .* has a processor of another kind, AcmeCorp AVX9 instead of .*bits")


def test_processors_that_may_differ_withdraw_the_promise_on_the_tape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(monkeypatch, "processor", lambda own: "AcmeCorp AVX9")
    who = Team(workers=2, mixed_processors=True, lease_s=60.0)
    run, told = train_on((1, 1), workloads.gpt(steps=4), who, tmp_path / "run")
    assert told[0].error == ""
    (warned,) = (event["why"] for event in run.events if event["kind"] == "warned")
    assert "has a processor of another kind, AcmeCorp AVX9" in warned
    assert "the bits of this run are not promised (team.mixed_processors)." in warned


def hosts_of(request: Request, folder: Path) -> Hosts:
    """Of a run of which nobody has kept anything."""
    nothing_kept = TakingUp(request, RunFolder(folder), cast("Any", None), "a run", None)
    return Hosts(request, RunFolder(folder), "a run", nothing_kept, lambda event: None)


class Met:
    """Agent 0's side of a run on two hosts that has begun, and agents that come there."""

    def __init__(self, folder: Path, agents: Sequence[int] = (1, 2)):
        self._places = places(agents)
        self._request = request_of(workloads.gpt(steps=4), Team(workers=2), folder, self._places[0])
        self.hosts = hosts_of(self._request, folder)
        self.events: list[Any] = []

    def hear(self, *, begun: bool = True) -> None:
        ready = ready_of(self.hosts.sources(), self.hosts.senders(), 0.02)
        self.events += self.hosts.hear(ready, begun=begun)

    def hear_on(self, *, begun: bool) -> None:
        while True:
            self.hear(begun=begun)

    def connected(self) -> AgentLink:
        found = meeting.find(self._places[1], 60.0)
        assert found is not None
        with ThreadPoolExecutor(1) as pool:
            link = pool.submit(connect, found.address, found.secret, 60)
            while not link.done():
                self.hear()
        return link.result()

    def hello(self, **fields: Any) -> tuple[AgentLink, HelloAgent]:
        """One that says hello, as agent 1 but for `fields`."""
        hello = replace(hello_of(replace(self._request, place=self._places[1]), "127.0.0.1"), **fields)
        link = self.connected()
        link.send(hello)
        return link, hello

    def answers(self, link: AgentLink) -> Any:
        """The next message to it."""
        while not (messages := link.receive()):
            self.hear()
        return messages[0]


@pytest.fixture
def met(tmp_path: Path) -> Iterator[Met]:
    """On the second host are agents 1 and 2."""
    (tmp_path / "run").mkdir()
    found = Met(tmp_path / "run")
    yield found
    for each in found.hosts.opened:
        each.close()


def test_an_agent_that_was_replaced_ends_when_it_comes_back(met: Met) -> None:
    standby, _ = met.hello(agent=2, local=1, session="that of 2")
    first, hello = met.hello()
    assert isinstance(met.answers(first), Welcome)
    second, _ = met.hello(session="another")
    assert isinstance(met.answers(second), Welcome)
    stale, _ = met.hello(session=hello.session)
    refused = met.answers(stale)
    assert refused == Failed("WorkerError", "agent 1 was started again while this one was away; it ends.")
    assert met.events == [HostCame(1, hello.name, 2, hello.room)] * 2
    for link in (standby, first, second, stale):
        link.close()


def test_an_agent_without_workers_is_answered_and_may_come_and_go(met: Met) -> None:
    first, hello = met.hello()
    assert isinstance(met.answers(first), Welcome)
    for _ in range(2):
        standby, _ = met.hello(agent=2, local=1, session="that of 2")
        assert isinstance(met.answers(standby), Welcome)
        standby.send(Beat(3, 1.5))
        answer = met.answers(standby)
        assert isinstance(answer, Beat)
        assert (answer.seq, answer.sent_s) == (3, 1.5)
        standby.close()
    assert met.events == [HostCame(1, hello.name, 2, hello.room)], "its host lost nothing by that"
    first.close()


def test_the_first_host_is_there_when_its_other_agents_are(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    met = Met(tmp_path / "run", (2, 1))
    link, hello = met.hello(host=0, local=1)
    assert isinstance(met.answers(link), Welcome)
    assert met.events == [HostCame(0, hello.name, 2, hello.room)]
    for each in (link, *met.hosts.opened):
        each.close()


@pytest.mark.parametrize("fields", [{"agent": 3}, {"agent": 0}, {"host": 0}])
def test_an_agent_of_no_place_in_the_run_is_turned_away(met: Met, fields: dict[str, int]) -> None:
    link, hello = met.hello(**fields)
    refused = met.answers(link)
    assert isinstance(refused, Failed)
    assert f"agent {hello.agent} of host {hello.host} is none of this run's; end it." in refused.sentence
    assert met.events == []
    link.close()


def test_who_asks_what_is_trained_takes_no_place(met: Met) -> None:
    link = met.connected()
    link.send(AskRun(1))
    given = met.answers(link)
    assert isinstance(given, RunGiven)
    assert "[model]" in given.recipe_file
    assert met.events == []
    assert met.hosts.crews == []
    link.close()


NOT_COMING = NotComing(1, 1, "n1", "RecipeError", "there is no recipe 'gtp'.", "more of it")


def test_an_agent_that_failed_before_it_came_ends_a_run_that_has_not_begun(
    met: Met, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = met.connected()
    link.send(NOT_COMING)
    with pytest.raises(RecipeError) as raised:
        met.hear_on(begun=False)
    assert raised.value.message == "host 1 (n1), agent 1: there is no recipe 'gtp'."
    assert raised.value.detail == "more of it"
    monkeypatch.setattr(of_farewell, "FAREWELL_S", 600.0)
    began = time.monotonic()
    waiting, _ = met.hello(agent=2, local=1, session="that of 2")
    with ThreadPoolExecutor(1) as pool:
        left = pool.submit(met.hosts.__exit__, RecipeError, raised.value, None)
        for each in (link, waiting):
            assert isinstance(answer := each_answer(each), Failed)
            assert "the run failed, as agent 0 says on host 0" in answer.sentence
            each.close()
        left.result()
    assert time.monotonic() - began < LONG_S, "it is not waited for"


def test_an_agent_that_fails_before_it_comes_back_is_told_of_and_ends_nothing(met: Met) -> None:
    for word in (replace(NOT_COMING, agent=7), NOT_COMING):
        link = met.connected()
        link.send(word)
        with pytest.raises(EOFError):
            met.answers(link)
        link.close()
    assert (
        met.hosts.awaiting([])
        == "host 1 (n1), agent 1, has failed before it could come back: there is no recipe 'gtp'."
    )
    assert met.hosts.awaiting([]) == ""


def each_answer(link: AgentLink) -> Any:
    while not (messages := link.receive()):
        ready_of([link], [], 0.02)
    return messages[0]


def test_who_is_awaited_is_named_from_time_to_time(met: Met, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_hosts, "SAY_S", 0.0)
    waits = r"agent 0, at 127\.0\.0\.1, has waited \d+ s for "
    assert re.fullmatch(waits + r"host 1\.", met.hosts.awaiting([1])), "how many agents it has is not known yet"
    first, _ = met.hello()
    assert isinstance(met.answers(first), Welcome)
    assert re.fullmatch(waits + r"agent 2 \(host 1\)\.", met.hosts.awaiting([1]))
    monkeypatch.setattr(of_hosts, "SAY_S", 600.0)
    assert met.hosts.awaiting([1]) == ""
    first.close()


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = replace(places((1, 1))[0], port=taken.getsockname()[1])
        request = request_of(workloads.gpt(steps=4), Team(workers=2), tmp_path, place)
        with pytest.raises(
            ResourceError, match=rf"agent 0 cannot listen at 127\.0\.0\.1, port {place.port}: .* in use"
        ):
            hosts_of(request, tmp_path)


def test_a_gpu_that_is_not_there_is_named(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    recipe, who = workloads.gpt(steps=4), Team(workers=1, device="cuda")
    with pytest.raises(InstepError, match=r"team\.device is 'cuda', and torch finds no GPU here; set team\.device"):
        train_on((1, 1), recipe, who, tmp_path / "run")
