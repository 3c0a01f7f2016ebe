"""Python stacks of workers that are stuck, whatever their main thread does."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from instep.errors import RecordError
from instep.randomness import key_of_step
from instep.recipe import Recipe, Team
from instep.team import asking
from instep.team.asking import stacks_of, standing_of
from instep.team.heartbeat import process_state
from instep.team.stacks import Stack
from support.agents import train_on
from support.harness import train_here
from support.patience import LONG_S
from support.processes import wait_until
from support.regression import numbers, regression
from support.threads import meanwhile

pytestmark = pytest.mark.processes


def deep(calls: int, at_the_end: Callable[[], object]) -> None:
    if calls:
        deep(calls - 1, at_the_end)
    else:
        at_the_end()


@contextlib.contextmanager
def busy_with(what: Callable[[], object]) -> Iterator[tuple[Stack, int]]:
    """A process that answers, and is then busy with that, deep down."""
    stack, (ready, write) = Stack(), os.pipe()
    pid = os.fork()
    if not pid:
        stack.answer()
        os.write(write, b"1")
        deep(80, what)
        os._exit(0)
    try:
        os.read(ready, 1)
        yield stack, pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        stack.close()
        os.close(ready)
        os.close(write)


def shown(stack: Stack, pid: int) -> str:
    stack.ask(pid)
    wait_until(lambda: bool(stack.found(pid)), LONG_S, "a stack")
    return stack.found(pid)


@pytest.mark.parametrize("what", [lambda: time.sleep(600), lambda: sum(range(10**15))], ids=["asleep", "in C"])
def test_a_process_shows_its_stack_whatever_its_main_thread_does(what: Callable[[], object]) -> None:
    with busy_with(what) as (stack, pid):
        wait_until(lambda: "<lambda>" in shown(stack, pid), LONG_S, "it to begin")
        for _ in range(2):  # the second replaces the first
            text = shown(stack, pid)
            lines = text.splitlines()
            assert lines[0] == "Stack (most recent call first):"
            assert "test_stacks.py" in lines[1]
            assert "<lambda>" in lines[1]
            assert text.count(" in deep") == 81
            assert " in busy_with" in text
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "and goes on"


def test_to_show_it_takes_less_than_50_ms_of_the_process_s_time() -> None:
    def spent_s(pid: int) -> float:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9

    with busy_with(lambda: time.sleep(600)) as (stack, pid):
        wait_until(lambda: "<lambda>" in shown(stack, pid), LONG_S, "it to begin")
        wait_until(lambda: process_state(pid)[0] == "S", LONG_S, "sleep")
        spent = []
        for _ in range(5):  # a machine that is itself a guest counts the moments in which its host does something else
            before = spent_s(pid)
            shown(stack, pid)
            wait_until(lambda: process_state(pid)[0] == "S", LONG_S, "sleep")
            spent.append(spent_s(pid) - before)
        assert min(spent) < 0.05


class Waiting(Dataset[tuple[Tensor, Tensor]]):
    """The samples of `numbers`, of which those of step 2, microbatch 2 are not read before there is the file."""

    def __init__(self, file: Path):
        self._samples, self._file = numbers(), file
        self._seed = key_of_step(0, 1, 2, "data")

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        while torch.initial_seed() == self._seed and not self._file.exists():
            time.sleep(0.002)
        x, y = self._samples[index]
        return x, y


def held_by(file: Path) -> Recipe:
    return regression(steps=3, data=lambda: Waiting(file))


def until_stuck(path: Path) -> None:
    def stuck() -> bool:
        with contextlib.suppress(Exception):  # it is not there yet
            found = standing_of(path)["members"]
            stuck = any(m["doing"] == "loading step 2, microbatch 2" and m["doing_for_s"] > 1 for m in found)
            return stuck and any(m["waits_for"] for m in found)
        return False

    wait_until(stuck, LONG_S, "a worker that is stuck")


def test_a_worker_that_is_stuck_in_a_sample_shows_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, file, spy = tmp_path / "run", tmp_path / "go on", tmp_path / "py-spy"
    spy.write_text("#!/bin/sh\necho Process $4\necho\necho Thread of $3 $4, $1 $2\n")
    spy.chmod(0o755)

    def ask() -> None:
        until_stuck(path)
        monkeypatch.setattr(asking.shutil, "which", lambda name: None)
        zero, one = stacks_of(path)["members"]
        assert (zero["stack"], zero["stack_wanted"], one["stack_by"]) == (None, False, "faulthandler")
        assert one["stack"].splitlines()[1].endswith(" in __getitem__")
        zero, _ = stacks_of(path, 0)["members"]
        assert " in _wait" in zero["stack"], "one that waits shows its stack where it is asked for"
        monkeypatch.setattr(asking.shutil, "which", lambda name: str(spy))
        _, one = stacks_of(path, 1)["members"]
        assert (one["stack"], one["stack_by"]) == (f"Thread of --pid {one['pid']}, dump --nonblocking\n", "py-spy")
        spy.write_text("#!/bin/sh\nexit 1\n")
        assert stacks_of(path, 1)["members"][1]["stack_by"] == "faulthandler", "where py-spy may not look"
        os.kill(one["pid"], signal.SIGSTOP)
        wait_until(lambda: process_state(one["pid"])[0] == "T", LONG_S, "a stop")
        _, one = stacks_of(path)["members"]
        assert (one["stopped"], one["stack"], one["stack_wanted"]) == (True, None, True)
        os.kill(one["pid"], signal.SIGCONT)
        with pytest.raises(RecordError, match="has no worker 2 now; 0, 1 are there"):
            stacks_of(path, 2)

    with meanwhile(ask, file.touch):
        run = train_here(held_by(file), Team(workers=2, answer_timeout_s=LONG_S), path)
    assert run.result["restarts"] == 0
    assert run.digest == train_here(held_by(file), Team(), tmp_path / "alone").digest
    assert stacks_of(path)["members"] == [], "of a run that has ended"


@pytest.mark.usefixtures("agents_meet_here")
def test_a_worker_of_another_host_shows_its_stack_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking.shutil, "which", lambda name: None)
    path, file = tmp_path / "run", tmp_path / "go on"

    def ask() -> None:
        until_stuck(path)
        _, one = stacks_of(path, 1)["members"]
        assert one["stack"].splitlines()[1].endswith(" in __getitem__")

    with meanwhile(ask, file.touch):
        run, _ = train_on((1, 1), held_by(file), Team(workers=2, lease_s=60.0), path)
    assert run.result["steps"] == 3
