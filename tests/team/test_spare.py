"""Where the first of several hosts has one worker, a process waits there that has its place at once should it die."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from instep.recipe import Recipe, Team
from instep.team.heartbeat import Heartbeat, HeartbeatBoard
from instep.team.messages import Assignment, HostNetwork
from instep.team.orders import Member
from instep.team.spare import AFTER_S, Spare
from instep.team.successors import FIRST_TO_GO
from support.agents import train_on
from support.harness import Client, told, train_here
from support.patience import LONG_S
from support.regression import waiting_for

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("agents_meet_here")]


def noting(folder: Path, go: Path) -> Recipe:
    """Whose model is noted when a process builds it, and of which worker 0 does not end the third step before `go`."""

    def model() -> nn.Module:
        (folder / str(os.getpid())).touch()
        return nn.Linear(3, 1)

    return dataclasses.replace(waiting_for((2, 0, go), steps=6), model=model)


class Killer:
    """A process that kills worker 0 in the third step: as soon as another waits to take its place (``waits``), once it
    has killed that (``dead``), or without regard to one (``off``).
    """

    def __init__(self, folder: Path, how: str):
        self.built, self.go, self._first, self._how = folder / "built", folder / "go", folder / "first", how
        self.spare = folder / "spare"
        self.built.mkdir()
        self.client = Client(self._see)

    def _see(self, event: dict[str, Any]) -> None:
        if event["kind"] == "joined" and event["worker"] == 0 and not self._first.exists():
            self._pid = str(event["pid"])
        if event["kind"] == "merged" and event["version"] == 2:
            self._first.with_suffix(".new").write_text(self._pid)
            self._first.with_suffix(".new").rename(self._first)

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        process = multiprocessing.get_context("fork").Process(target=self._kill)
        process.start()
        try:
            yield
        finally:
            process.kill()
            process.join()

    def _kill(self) -> None:
        while not self._first.exists():
            time.sleep(0.005)
        while self._how != "off" and not (idle := [each for each in self.built.iterdir() if is_idle(each.name)]):
            time.sleep(0.005)
        if self._how != "off":
            self.spare.write_text(idle[0].name)
        if self._how == "dead":
            os.kill(int(idle[0].name), signal.SIGKILL)
            while os.path.exists(f"/proc/{idle[0].name}/exe"):
                time.sleep(0.005)
        self.go.touch()
        os.kill(int(self._first.read_text()), signal.SIGKILL)


def is_idle(pid: str) -> bool:
    """Whether the process waits for a place: the system would end it first."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text()) == FIRST_TO_GO
    return False


@pytest.mark.parametrize("how", ["waits", "dead", "off"])
def test_who_waits_takes_the_place_of_the_first_hosts_only_worker(how: str, tmp_path: Path) -> None:
    kill = Killer(tmp_path, how)
    recipe, spare = noting(kill.built, kill.go), "off" if how == "off" else "auto"
    who = Team(workers=2, lease_s=LONG_S, checkpoint_every=100, spare=spare)  # type: ignore[arg-type]
    with kill.awaited():
        run, _ = train_on((1, 1), recipe, who, tmp_path / "run", client=kill.client)
    assert run.digest == train_here(recipe, Team(), tmp_path / "alone").digest
    assert (len(told(run, "run_started")), run.result["restarts"]) == (1, 1)
    assert [event["version"] for event in told(run, "merged")] == list(range(1, 7))
    assert [event["why"] for event in told(run, "left") if "SIGKILL" not in event["why"]] == []
    came = [event["pid"] for event in told(run, "joined") if event["worker"] == 0]
    assert len(came) == 2
    if how != "off":
        assert (came[1] == int(kill.spare.read_text())) == (how == "waits")
        assert not is_idle(str(came[1])), "it is no more likely to be ended than any other"
    assert not [pid.name for pid in kill.built.iterdir() if (Path("/proc") / pid.name / "exe").exists()]


class Processes:
    """In place of a host's: those with these numbers, who are ready."""

    def __init__(self, *numbers: int):
        self._there = {number: SimpleNamespace(member=Member(1, number), ready=True) for number in numbers}
        self.done: list[str] = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self._there.values())

    def fork_spare(self, member: Member, assignment: Assignment, unused: list[Any]) -> None:
        assert assignment.units is None, "nobody is in the way of the living one's loaders"
        self.done.append(f"{member.number}.{assignment.incarnation}")

    def drop_spare(self) -> None:
        self.done.append("dropped")

    def succeed(self) -> None:
        self._there[0] = SimpleNamespace(member=Member(1, 0, 1), ready=None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("instep.team.spare.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def spare_of(host: int = 0, *, regroups: bool = True, alone: bool = False, **team: Any) -> Spare:
    network = None if alone else HostNetwork((1, 1), ("10.0.0.1", 4711), "start 1", "10.0.0.1")
    recipe: Any = None
    own = Assignment(recipe, Team(workers=2, **team), Path("run"), ("f",), None, 0.0, (1, 2), network=network)
    found = Spare(own, host, lambda member, it: dataclasses.replace(it, incarnation=member.incarnation, units=1), list)
    found.begin({"regroups": regroups})
    return found


def looked(spare: Spare, processes: Processes, clock: list[float], *seconds: float) -> list[str]:
    for each in seconds:
        clock[0] = each
        spare.look(processes, set())  # type: ignore[arg-type]
    return [each for each in processes.done if each != "dropped"]


def test_one_is_built_beside_each_that_is_alone_and_once(clock: list[float]) -> None:
    spare, processes = spare_of(), Processes(0)
    assert looked(spare, processes, clock, 1.0, 1.0 + AFTER_S / 2) == []
    assert looked(spare, processes, clock, 1.0 + AFTER_S, 2.0, 9.0) == ["0.1"]
    processes.succeed()
    assert looked(spare, processes, clock, 10.0, 20.0) == ["0.1"], "it is built itself still"
    next(iter(processes)).ready = True
    assert looked(spare, processes, clock, 21.0, 22.0) == ["0.1", "0.2"]


def test_none_is_there_where_nobody_would_wait_for_it(clock: list[float]) -> None:
    others = [spare_of(1), spare_of(regroups=False), spare_of(alone=True), spare_of(spare="off")]
    others.append(spare_of(device="cuda"))
    assert [looked(each, Processes(0), clock, 1.0, 2.0) for each in others] == [[]] * 5
    assert looked(spare_of(), Processes(0, 2), clock, 1.0, 2.0) == []
    spare, ended = spare_of(), Processes(0)
    for clock[0] in (1.0, 2.0):
        spare.look(ended, {Member(1, 0)})  # type: ignore[arg-type]
    assert ended.done == []


def test_signs_of_life_are_those_of_the_place_once_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instep.team.heartbeat.METER", SimpleNamespace(look=lambda: (7, 3)))
    board = HeartbeatBoard(3)
    board.sent[0] = 100
    waiting = Heartbeat(board, 0, os.getppid(), spare=True)
    waiting.advance()
    waiting.doing("building")
    waiting.count_bytes()
    assert (board.progress.tolist(), board.sent.tolist(), board.doing.read(0)) == ([0, 0, 1], [100, 0, 7], ("", 0))
    for _ in range(2):
        waiting.take_place()
    waiting.advance()
    waiting.count_bytes()
    assert (board.progress.tolist(), board.sent.tolist(), board.answers.tolist()) == ([1, 0, 1], [107, 0, 0], [1, 0, 0])
