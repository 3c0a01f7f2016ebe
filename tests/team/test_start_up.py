"""A run killed while it starts: every state that it can leave is resumed, or started anew as a true sentence says."""

from __future__ import annotations

import builtins
import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from instep.errors import RecordError
from instep.offline.tape_replay import replay
from instep.recipe import Recipe, Team, dumps
from instep.record import tape
from instep.record.folder import About, RunFolder
from instep.record.resuming import saved
from support.harness import Client, train_here
from support.patience import LONG_S
from support.processes import INSTEP, Started, complaint, wait_until, write_project
from support.serving import unlocked

TEAM = Team(workers=2, checkpoint_every=2)

CALLS = ("mkdir", "open", "write", "fsync", "replace", "rename", "ftruncate", "unlink")
"""What changes a disk. `open` is that of os and, for writing, the builtin one."""


def numbers() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(40, 3, generator=generator), torch.randn(40, 1, generator=generator))


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum()


def line() -> nn.Module:
    return nn.Linear(3, 1)


def small() -> Recipe:
    return Recipe(model=line, objective=squares, data=numbers, batch=8, microbatches=4, steps=3)


def start_up(path: Path, fatal: int, counted: Any) -> None:
    """Starts a run, in this process, and is killed at its `fatal`-th change of the disk, or at its first update."""
    own, number = os.getpid(), itertools.count(1)

    def killed_at(call: Callable[..., Any], torn: bool = False) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **more: Any) -> Any:
            writes = call is not builtins_open or "w" in (arguments[1:2] or ("r",))[0]
            if os.getpid() == own and writes:
                counted.value = next(number)
                if counted.value == fatal:
                    if torn:
                        call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                    os.kill(own, signal.SIGKILL)
            return call(*arguments, **more)

        return wrapped

    builtins_open = builtins.open
    builtins.open = killed_at(builtins_open)  # type: ignore[assignment]
    for name in CALLS:
        setattr(os, name, killed_at(getattr(os, name), torn=name == "write"))

    def see(event: dict[str, Any]) -> None:
        if event["kind"] == "merged":
            os.kill(own, signal.SIGKILL)

    train_here(small(), TEAM, path, client=Client(see))


def left_by(path: Path, fatal: int) -> int:
    """Has a run start in `path` and killed; gives how often it had changed the disk."""
    context = multiprocessing.get_context("fork")
    counted = context.Value("i", 0)
    process = context.Process(target=start_up, args=(path, fatal, counted))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    wait_until(lambda: not path.exists() or unlocked(path), LONG_S, "the end of its workers, which hold the folder too")
    return int(counted.value)


def state_of(path: Path) -> tuple[Any, ...]:
    """What lies there, but for ids and times."""
    if not path.exists():
        return ()
    return tuple(
        sorted((p.relative_to(path).as_posix(), p.stat().st_size) for p in path.rglob("*") if "logs/" not in str(p))
    )


@pytest.mark.processes
def test_a_run_killed_at_any_write_of_its_start_is_resumed_or_started_anew(tmp_path: Path) -> None:
    expected = train_here(small(), TEAM, tmp_path / "undisturbed").digest
    count = left_by(tmp_path / "counted", 10**9)
    assert count > 15
    seen, resumed, anew = set(), 0, 0
    for fatal in range(1, count + 2):
        run = tmp_path / str(fatal)
        left_by(run, fatal)
        if state_of(run) in seen:
            continue
        seen.add(state_of(run))
        folder = RunFolder(run)
        if folder.recipe_path.exists():
            table, team, paths = saved(RunFolder.open(run), small(), None, "")
            assert (table["steps"], team, paths) == (3, TEAM, [])
            outcome, resumed = train_here(small(), team, run, resume=True), resumed + 1
        else:
            with pytest.raises(RecordError) as caught:
                RunFolder.open(run)
            if folder.checkpoints.exists():
                assert f"nothing to resume; start it with --out {run}." in caught.value.message
            outcome, anew = train_here(small(), TEAM, run), anew + 1
        assert outcome.digest == expected, fatal
        events = list(tape.read(run / "tape.jsonl"))
        assert [event["kind"] for event in events].count("run_ended") == 1
    train_here(dataclasses.replace(small(), steps=4), TEAM, run, resume=True)
    assert resumed >= 4
    assert anew >= 4


@pytest.mark.processes
def test_a_run_killed_before_its_first_event_can_be_replayed_after_its_resume(tmp_path: Path) -> None:
    """It was resumed with `joined` before `run_started`, and nothing could read the tape any more."""
    run = tmp_path / "run"
    left_by(run, 10**9)
    (run / "tape.jsonl").write_bytes(b'{"t_s": 0.5, "clock": "wall", "kind": "run_st')
    outcome = train_here(small(), TEAM, run, resume=True)
    events = list(tape.read(run / "tape.jsonl"))
    assert events[0]["kind"] == "run_started"
    assert not events[0]["resumed"]
    found = replay(small(), events)
    assert (found.digest, found.same) == (outcome.digest, True)


def test_what_a_start_did_not_make_is_never_taken_for_its_rest(tmp_path: Path) -> None:
    for number, (name, content) in enumerate(
        [("mine.txt", "x"), ("logs/mine.txt", "x"), ("checkpoints/step-00000001/model.safetensors", "x"), ("logs", "x")]
    ):
        path = tmp_path / str(number)
        (path / name).parent.mkdir(parents=True)
        (path / name).write_text(content)
        with pytest.raises(RecordError, match="exists and is not an empty folder"):
            RunFolder.create(path)
        assert (path / name).read_text() == content
    (tmp_path / "tape").mkdir()
    (tmp_path / "tape" / "tape.jsonl").write_text("an event")
    with pytest.raises(RecordError, match="exists and is not an empty folder"):
        RunFolder.create(tmp_path / "tape")
    with RunFolder.create(tmp_path / "busy").locked(), pytest.raises(RecordError, match="by another process"):
        RunFolder.create(tmp_path / "busy")


def test_a_run_resumed_before_its_first_event_finds_its_modules(tmp_path: Path) -> None:
    """Where they are stood on the tape alone."""
    run = RunFolder.create(tmp_path / "run", dumps(small(), TEAM), About(import_paths=("/a", "/b")))
    assert saved(run, small(), None, "")[2] == ["/a", "/b"]


@pytest.mark.processes
@pytest.mark.slow
def test_ten_random_chains_of_signals_at_the_start_end_in_the_undisturbed_digest(tmp_path: Path) -> None:
    project = write_project(tmp_path)
    whole = Started([*INSTEP, "train", "my.toml", "--out", "whole"], project)
    began = time.monotonic()
    assert whole.ends() == 0, whole.err
    took_s = time.monotonic() - began
    expected = json.loads((project / "whole" / "result.json").read_text())["digest"]

    def chain(seed: int) -> str:
        draw = random.Random(seed)
        name = f"run-{seed}"
        for _ in range(draw.randint(1, 3)):
            started = begin(project, name)
            time.sleep(draw.uniform(0.0, took_s))
            sends(started, draw)
            started.ends()
        for _ in range(2):  # a sentence may say to start it anew
            last = begin(project, name)
            if last.ends() == 0:
                return str(json.loads((project / name / "result.json").read_text())["digest"])
            assert "--out" in complaint(last)
        return last.err

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(chain, range(10))) == [expected] * 10


def begin(project: Path, name: str) -> Started:
    """Resumes the run if there is something to resume, or else starts it."""
    there = (project / name / "recipe.toml").exists()
    how = ["--resume", name] if there else ["my.toml", "--out", name]
    return Started([*INSTEP, "train", *how], project, PAUSE_S="0.01")


def sends(started: Started, draw: random.Random) -> None:
    """A signal to the client, the supervisor, or all."""
    number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    supervisors = list(started.pids())[:1] if draw.random() < 0.4 else []
    try:
        if draw.random() < 0.2:
            os.killpg(started.process.pid, number)
        else:
            os.kill(supervisors[0] if supervisors else started.process.pid, signal.SIGKILL if supervisors else number)
    except ProcessLookupError:
        pass
