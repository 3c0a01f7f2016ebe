"""Agents of several hosts, all on this machine: processes that are forked from the test's, over loopback."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from instep.recipe import Recipe, Team, dumps, engine_of
from instep.record.folder import About, RunFolder
from instep.team import meeting
from instep.team.agent import Agent
from instep.team.follower import Follower
from instep.team.messages import Request
from instep.team.pickling import dump
from instep.team.place import Place
from instep.team.processes import import_before_forks
from instep.team.signals import Requests
from support.harness import Client, Outcome, untried


@dataclass
class Told:
    """What an agent that follows has come to."""

    agent: int
    result: dict[str, Any] | None
    error: str


class Followers:
    """All agents but the first, each a process. `agents`: how many each host has.

    again: who can be started once more; those processes are there from the start, for what this process starts later
    counts as the run's. late: who of them is started by that alone.
    """

    def __init__(
        self,
        recipe: Recipe,
        team: Team,
        agents: Sequence[int],
        folder: Path,
        *,
        again: Sequence[int] = (),
        late: Sequence[int] = (),
    ):
        self.places = places(agents)
        self._recipe, self._team, self._folder = recipe, team, folder
        self.processes: dict[int, Any] = {}
        self._pipes: dict[int, Connection] = {}
        self._spare: dict[int, tuple[Any, Connection]] = {}
        for place in [place for place in self.places[1:] if place.agent not in late]:
            self.processes[place.agent], self._pipes[place.agent] = self._forked(place.agent)
            self._pipes[place.agent].send("go")
        for agent in again:
            self._spare[agent] = self._forked(agent)

    def _forked(self, agent: int) -> tuple[Any, Connection]:
        ours, theirs = multiprocessing.Pipe()
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        (folder / "logs").mkdir()
        request = request_of(self._recipe, self._team, folder, self.places[agent])
        process = multiprocessing.get_context("fork").Process(target=_follow, args=(request, theirs))
        with untried():
            process.start()
        theirs.close()
        return process, ours

    def start_again(self, agent: int) -> None:
        """Starts one once more."""
        self.processes[agent], self._pipes[agent] = self._spare.pop(agent)
        self._pipes[agent].send("go")

    def kill(self, agent: int, number: int = signal.SIGKILL) -> None:
        """Sends one a signal."""
        os.kill(self.processes[agent].pid, number)

    def told(self, within_s: float = 60) -> list[Told]:
        """What each has come to, in time."""
        found = []
        until = time.monotonic() + within_s
        for agent, pipe in self._pipes.items():
            if not pipe.poll(max(0.0, until - time.monotonic())):
                found.append(Told(agent, None, "no word"))
                continue
            try:
                found.append(Told(agent, *pipe.recv()))
            except EOFError:
                found.append(Told(agent, None, "killed"))
        return found

    def end(self) -> None:
        """Ends all."""
        for process in [*self.processes.values(), *(process for process, _ in self._spare.values())]:
            process.kill()
            process.join()


def _follow(request: Request, pipe: Connection) -> None:
    pipe.recv()
    client, requests = Client(), Requests()
    requests.listen()
    try:
        answer = Follower(request, client, requests).follow(), ""  # type: ignore[arg-type]
    except BaseException as error:
        answer = None, f"{type(error).__name__}: {error}"
    pipe.send(answer)
    os._exit(0)


def places(agents: Sequence[int]) -> list[Place]:
    """Those of hosts with so many agents, as torchrun tells them: of other hosts' numbers nothing."""
    host_of = [host for host, count in enumerate(agents) for _ in range(count)]
    told = [tuple(count if each == host else 0 for each, count in enumerate(agents)) for host in range(len(agents))]
    return [
        Place(agent, len(host_of), host, len(agents), agent - host_of.index(host), "torchrun", told[host])
        for agent, host in enumerate(host_of)
    ]


def meet_here(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Agents find the first by a file, and reach it over loopback."""
    file = folder / "meeting"

    def publish(place: Place, address: tuple[str, int], secret: bytes) -> None:
        file.with_suffix(".new").write_text(f"{address[0]} {address[1]} {secret.hex()}")
        file.with_suffix(".new").rename(file)

    def find(place: Place, within_s: float) -> meeting.Found | None:
        until = time.monotonic() + within_s
        while not file.exists():
            if time.monotonic() > until:
                return None
            time.sleep(0.005)
        address, port, secret = file.read_text().split()
        return meeting.Found((address, int(port)), bytes.fromhex(secret))

    monkeypatch.setattr(meeting, "publish", publish)
    monkeypatch.setattr(meeting, "find", find)
    monkeypatch.setattr(meeting, "own_address", lambda place, interface: "127.0.0.1")
    monkeypatch.setattr(meeting, "route_address", lambda to, interface: "127.0.0.1")
    monkeypatch.setattr(meeting, "draw_secret", lambda place, environ: b"a secret of these agents")


def request_of(recipe: Recipe, team: Team, folder: Path, place: Place | None, *, resume: bool = False) -> Request:
    """A run's."""
    return Request(
        recipe=dump(recipe),
        recipe_table=recipe.to_table(),
        recipe_file=dumps(recipe, team),
        fingerprint=recipe.fingerprint(),
        team=team,
        rule=recipe.rule,
        engine=engine_of(recipe, team),
        folder=folder,
        resumed=resume,
        import_paths=(),
        began=time.monotonic(),
        fingerprints=recipe.fingerprints(),
        place=place,
    )


def first_agent_killed(
    recipe: Recipe, team: Team, path: Path, followers: Followers, when: Callable[[dict[str, Any]], bool]
) -> None:
    """Trains by an agent 0 that is a process of its own, until that is killed at the first event for which `when` is
    true; nobody has gone on by then.
    """
    if not path.exists():
        RunFolder.create(path, dumps(recipe, team), About())
    import_before_forks()

    def train() -> None:
        client = Client(lambda event: os.kill(os.getpid(), signal.SIGKILL) if when(event) else None)
        resume = (path / "tape.jsonl").exists() and bool((path / "tape.jsonl").stat().st_size)
        request = request_of(recipe, team, path, followers.places[0], resume=resume)
        with client.awaited():
            Agent(request, client).supervise()  # type: ignore[arg-type]

    process = multiprocessing.get_context("fork").Process(target=train)
    with untried():
        process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, "it was killed"


def train_on(
    agents: Sequence[int],
    recipe: Recipe,
    team: Team,
    path: Path,
    *,
    resume: bool = False,
    client: Client | None = None,
    followers: Followers | None = None,
    told_s: float = 60.0,
) -> tuple[Outcome, list[Told]]:
    """As `support.harness.train_here`, on hosts with so many agents."""
    if not resume:
        RunFolder.create(path, dumps(recipe, team), About())
    import_before_forks()
    with tempfile.TemporaryDirectory() as scratch, untried():
        followers = followers or Followers(recipe, team, agents, Path(scratch))
        try:
            client = client or Client()
            request = request_of(recipe, team, path, followers.places[0], resume=resume)
            with client.awaited():
                result = Agent(request, client).supervise()  # type: ignore[arg-type]
            told = followers.told(told_s)
        finally:
            followers.end()
    digests = {e["version"]: e["digest"] for e in client.events if e["kind"] == "checkpointed"}
    return Outcome(result, client.events, path, digests), told
