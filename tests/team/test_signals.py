"""Signals: whoever they are sent to, a run ends saved; a second SIGTERM is a second Ctrl-C; all have a name."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from instep.errors import killed_by
from instep.team.signals import Stop, deaf, interrupting
from support.kinds import quick
from support.patience import LONG_S
from support.processes import INSTEP, Started, complaint, wait_until, write_project

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found through /proc"),
]


@pytest.mark.parametrize(
    ("number", "name"),
    [(15, "SIGTERM"), (35, "SIGRTMIN+1"), (63, "SIGRTMIN+29"), (64, "SIGRTMAX"), (33, "signal 33"), (99, "signal 99")],
)
def test_every_signal_has_a_name(number: int, name: str) -> None:
    assert killed_by(-number) == f"killed by {name}"


def raised(stop: Stop, *numbers: int) -> list[int]:
    """Which of these signals, one after the other, raise KeyboardInterrupt: their places."""
    found = []
    for place, number in enumerate(numbers):
        try:
            stop.hear(number, None)
        except KeyboardInterrupt:
            found.append(place)
    return found


def test_the_first_signal_interrupts_and_so_does_each_sigterm() -> None:
    assert raised(Stop(), signal.SIGUSR1, signal.SIGUSR1, signal.SIGXCPU) == [0]
    assert raised(Stop(), signal.SIGTERM, signal.SIGHUP, signal.SIGTERM) == [0, 2]
    assert raised(Stop(), signal.SIGUSR2, signal.SIGTERM) == [0, 1]


def test_a_run_that_trains_notes_all_but_a_second_sigterm() -> None:
    stop = Stop()
    with stop.noting():
        assert raised(stop, signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGTERM) == [4]
    assert stop.wanted
    assert stop.terminated


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", "SLURM_STEP_ID"])
def test_a_sigterm_that_a_launcher_passes_on_is_not_the_second(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launcher, "0")
    stop, now = Stop(), time.monotonic()
    with stop.noting():
        assert raised(stop, signal.SIGTERM, signal.SIGTERM) == []
        monkeypatch.setattr(time, "monotonic", lambda: now + 60)
        assert raised(stop, signal.SIGTERM) == [0]


def test_signals_that_the_program_answers_are_left_alone() -> None:
    heard: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGHUP)}
    signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupting() as stop, interrupting() as same:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop is same
            assert not stop.wanted
            with deaf():
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGUSR2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert heard == [signal.SIGUSR1]


# ------------------------------------------------------------------------------------------------------ real processes

LIBRARY = """
import instep
recipe = instep.Recipe(model="mymodel:Net", objective="mymodel:squares", data="mymodel:numbers", batch=8, steps=5000)
instep.train(recipe, team=instep.Team(workers=2), out="library", import_paths=["."])
"""

RUNS: dict[str, tuple[str, float]] = {
    "usr1 to all": ("--steps 5000", 0.1),
    "xcpu to the supervisor": ("--steps 5000", 0.1),
    "term to the supervisor": ("--steps 5000", 0.1),
    "term twice to all": ("--steps 40", 100),
    "stopped": ("--steps 5000 --team.answer_timeout_s 1.5", 0.1),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Started, Path]]]:
    """Starts a run and waits until it is in the midst of training."""
    project = write_project(tmp_path_factory.mktemp("project"))
    started: list[Started] = []

    def training(name: str) -> tuple[Started, Path]:
        flags, pause_s = RUNS.get(name, ("", 0.1))
        folder = project / ("library" if name not in RUNS else f"run-{list(RUNS).index(name)}")
        line = f"train my.toml --out {folder} {flags}"
        command = [INSTEP[0], "-c", LIBRARY] if name not in RUNS else [*INSTEP, *line.split()]
        run = Started(command, project, forked=name in RUNS, PAUSE_S=str(pause_s))
        started.append(run)
        kind = '"run_started"' if RUNS.get(name, ("", 0.0))[1] > 1 else '"merged"'
        tape = folder / "tape.jsonl"
        wait_until(lambda: tape.exists() and kind in tape.read_text(), LONG_S, kind, run)
        return run, folder

    yield training
    for run in started:
        run.end()


Runs = Callable[[str], tuple[Started, Path]]


def ends_saved(run: Started, folder: Path) -> None:
    assert run.ends() == 130, run.err
    result = json.loads((folder / "result.json").read_text())
    assert result["interrupted"]
    assert (folder / "checkpoints" / f"step-{result['versions']:08d}").exists()


def test_a_warning_to_all_ends_a_run_saved(runs: Runs) -> None:
    run, folder = runs("usr1 to all")
    os.killpg(run.process.pid, signal.SIGUSR1)
    ends_saved(run, folder)
    assert run.err == ""


@pytest.mark.parametrize("number", quick([signal.SIGXCPU, signal.SIGTERM], signal.SIGTERM))
def test_a_signal_to_the_supervisor_ends_a_run_saved(number: signal.Signals, runs: Runs) -> None:
    run, folder = runs(f"{number.name.removeprefix('SIG').lower()} to the supervisor")
    os.kill(run.supervisor(), number)
    ends_saved(run, folder)


@pytest.mark.slow  # of Stop there is a test without a process
def test_a_warning_ends_a_program_s_run_saved(runs: Runs) -> None:
    run, folder = runs("usr2 to a program")
    run.process.send_signal(signal.SIGUSR2)
    run.process.wait(LONG_S)
    assert "KeyboardInterrupt" in run.err
    assert json.loads((folder / "result.json").read_text())["interrupted"]
    run.leaves_nothing()


@pytest.mark.slow  # test_launch.py has it of Ctrl-C
def test_a_second_sigterm_does_not_wait_for_the_step(runs: Runs) -> None:
    run, folder = runs("term twice to all")
    os.killpg(run.process.pid, signal.SIGTERM)
    time.sleep(0.7)
    assert run.process.poll() is None, "the first one waits for the step"
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.ends() == 130
    assert "Traceback" not in run.err
    assert not folder.exists(), "no step was done"


def test_a_stopped_supervisor_is_named(runs: Runs) -> None:
    run, _ = runs("stopped")
    supervisor = run.supervisor()
    os.kill(supervisor, signal.SIGSTOP)
    assert run.ends() == 1
    assert f"the supervisor of the run (pid {supervisor}) has not answered for " in complaint(run)
    assert "it is stopped (SIGSTOP or a debugger); go on with --resume " in run.err
