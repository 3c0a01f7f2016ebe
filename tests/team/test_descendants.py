"""What a run's processes start ends with them, is in nobody's way, and hides no death."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from instep import descendants
from instep.recipe import Recipe, Team
from instep.record.folder import RunFolder
from instep.rules.presets import parse as rule
from instep.team import crew
from instep.team.processes import MemberProcesses
from support.harness import Client, train_here
from support.kinds import quick
from support.patience import LONG_S
from support.processes import INSTEP, Started, complaint, wait_until, write_project
from support.regression import squares
from support.serving import alive

pytestmark = [pytest.mark.processes, pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")]


def note(pid: int | None) -> None:
    """For a test that looks for helpers in other processes."""
    if "HELPERS" in os.environ:
        with open(os.environ["HELPERS"], "a") as file:
            file.write(f"{pid}\n")


def a_process(daemon: bool = True) -> None:
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(300,), daemon=daemon)
    process.start()
    note(process.pid)


def a_process_that_is_waited_for() -> None:
    a_process(daemon=False)


def a_fork_in_its_own_session() -> None:
    if not os.fork():
        os.setsid()
        if os.fork():
            os._exit(0)
        note(os.getpid())
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(300)
        os._exit(0)


def a_program_in_its_own_session() -> None:
    note(subprocess.Popen(["sleep", "300"], start_new_session=True).pid)


def a_program_without_an_environment() -> None:
    note(subprocess.Popen(["sleep", "300"], start_new_session=True, env={}).pid)


HELPERS = [
    a_process,
    a_process_that_is_waited_for,
    a_fork_in_its_own_session,
    a_program_in_its_own_session,
    a_program_without_an_environment,
]


class Helped(Dataset[tuple[Tensor, Tensor]]):
    """Starts helpers in each worker, which hold what the worker holds."""

    def __init__(self, *helpers: Callable[[], None]) -> None:
        self.helpers = list(helpers)
        self.x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        while self.helpers:
            self.helpers.pop()()
        return self.x[index], self.x[index, :1]


def recipe(*helpers: Callable[[], None], **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "model": lambda: nn.Linear(3, 1), "objective": squares, "data": Helped(*helpers), "batch": 8,
        "microbatches": 4, "steps": 8,
    }  # fmt: skip
    return Recipe(**{**fields, **changes})


@pytest.mark.parametrize("engine", ["lockstep", "server"])
def test_a_death_is_seen_at_once_though_helpers_hold_the_pipes(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "GRACE_S", 0.5)  # for a worker that waits for its helper at the end
    pids: dict[int, int] = {}
    killed: list[tuple[int, float]] = []

    def kill(event: dict[str, Any]) -> None:
        if event["kind"] == "joined":
            pids[event["worker"]] = event["pid"]
        if event["kind"] == "merged" and event["version"] >= 2 and not killed:
            killed.append((pids[1], time.monotonic()))
            os.kill(pids[1], signal.SIGKILL)
        if event["kind"] == "left":
            left.append((event["why"], time.monotonic()))

    left: list[tuple[str, float]] = []
    before = descendants.children()
    made = recipe(*HELPERS, rule=rule("asynchronous" if engine == "server" else "synchronous"), steps=30)
    team = Team(workers=2, checkpoint_every=2, answer_timeout_s=600.0)
    run = train_here(made, team, tmp_path / "run", client=Client(kill))
    ((why, seen),) = left
    assert why.startswith(f"worker 1 (pid {killed[0][0]}) was killed by SIGKILL")
    assert seen - killed[0][1] < 60.0, "it is not silence that tells of it"
    assert run.result["restarts"] == 1
    assert descendants.children() == before, "helpers are ended, adopted or not"
    with RunFolder(tmp_path / "run").locked():
        pass


def test_helpers_of_workers_that_live_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When another worker dies under the server engine, even those that nobody is the parent of any more."""
    monkeypatch.setenv("HELPERS", str(tmp_path / "helpers"))
    (tmp_path / "helpers").touch()
    look, known = MemberProcesses.look_for_orphans, set[int]()

    def noting(self: MemberProcesses) -> None:
        look(self)
        known.update(self._orphans)

    def act(event: dict[str, Any]) -> None:
        if event["kind"] == "joined":
            if orphans:  # a successor
                lived.extend(map(alive, orphans))
                client.ask_to_stop()
            pids[event["worker"]] = event["pid"]
        begun = set(map(int, (tmp_path / "helpers").read_text().split()))
        if event["kind"] == "merged" and not orphans and len(begun) == 3 and begun <= known:
            orphans.update(begun)
            os.kill(pids[1], signal.SIGKILL)

    monkeypatch.setattr(MemberProcesses, "look_for_orphans", noting)
    pids: dict[int, int] = {}
    orphans: set[int] = set()
    lived: list[bool] = []
    before = descendants.children()
    made = recipe(a_fork_in_its_own_session, rule=rule("asynchronous"), steps=100_000)
    client = Client(act)
    train_here(made, Team(workers=2, checkpoint_every=10**6), tmp_path / "run", client=client)
    assert lived == [True] * 3, "of the server and of both workers"
    assert descendants.children() == before


def test_a_forked_child_holds_no_lock(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    with folder.locked():
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.write(write, b"x")
            time.sleep(300)
            os._exit(0)
        os.read(read, 1)
    try:
        with folder.locked():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


HELPERS_MODULE = """
from mymodel import *
import test_descendants
def helped():
    return test_descendants.Helped(*test_descendants.HELPERS), numbers()
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_project(tmp_path)
    (tmp_path / "helped.py").write_text(HELPERS_MODULE)
    return tmp_path


def begun(line: str, project: Path, helpers: int, forked: bool) -> tuple[Started, list[int]]:
    """A command whose processes have started so many helpers; their pids."""
    paths = os.pathsep.join([*map(str, Path(__file__).parents[:2]), os.environ.get("PYTHONPATH", "")])
    (project / "pids").touch()
    environment = {"PYTHONPATH": paths, "HELPERS": str(project / "pids"), "PAUSE_S": "0.1"}
    started = Started([*INSTEP, *line.split()], project, forked=forked, **environment)
    pids = (project / "pids").read_text
    wait_until(lambda: pids().count("\n") >= helpers, LONG_S, "helpers", started)
    return started, [int(pid) for pid in pids().split()]


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("who", ["client", "supervisor"])
def test_nothing_is_left_of_a_run_whose_head_is_killed(who: str, project: Path) -> None:
    line = "train my.toml --recipe.data.use helped:helped --steps 5000 --out run --team.checkpoint_every 1"
    started, helpers = begun(line, project, 2 * len(HELPERS), forked=who == "client")
    try:
        tape = project / "run" / "tape.jsonl"
        wait_until(lambda: tape.exists() and "checkpointed" in tape.read_text(), LONG_S, "a checkpoint", started)
        if who == "client":
            started.process.kill()
        else:
            for pid in [pid for pid in helpers if alive(pid) and not Path(f"/proc/{pid}/environ").read_bytes()]:
                os.kill(pid, signal.SIGKILL)  # nothing tells whose it is once its supervisor is gone
            os.kill(started.supervisor(), signal.SIGKILL)
        assert started.ends() == (-signal.SIGKILL if who == "client" else 1)
        if who == "supervisor":
            assert "was killed by SIGKILL" in complaint(started)
            assert "and its workers with it; go on with --resume run." in complaint(started)
        wait_until(lambda: gone(helpers), LONG_S, "the end of the helpers")
        with RunFolder(project / "run").locked():
            pass
    finally:
        started.end()


@pytest.mark.parametrize("ending", quick(["by itself", "client killed"], "client killed"))
def test_nothing_is_left_of_a_simulation(ending: str, project: Path) -> None:
    steps = 1 if ending == "by itself" else 5000
    line = f"simulate my.toml --recipe.data.use helped:helped --workers 2 --times 1s --steps {steps}"
    started, helpers = begun(line, project, len(HELPERS) - 1, forked=True)
    try:
        if ending == "client killed":
            started.process.kill()
        started.ends()
        wait_until(lambda: gone(helpers), LONG_S, "the end of the helpers")
    finally:
        started.end()


def test_whose_parent_was_killed_knows_as_soon_as_its_end_of_a_pipe_closes() -> None:
    """Which is before the parent is gone: it still is the parent then, now and then."""
    program = """\
import os, signal, sys
from instep.descendants import orphaned
told, tell = os.pipe()
for _ in range(50):
    theirs, ours = os.pipe()
    parent = os.fork()
    if not parent:
        parent = os.getpid()
        if os.fork():
            os.close(theirs)
            signal.pause()
        os.close(ours)
        assert not orphaned(parent)
        os.write(tell, b"r")
        os.read(theirs, 1)
        os.write(tell, b"y" if orphaned(parent) else b"n")
        os._exit(0)
    os.close(ours)
    assert os.read(told, 1) == b"r"
    os.kill(parent, signal.SIGKILL)
    assert os.read(told, 1) == b"y"
    os.waitpid(parent, 0)
    os.close(theirs)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
