"""Whole processes: `instep train` and programs that call `instep.train`, how they end, and what they leave behind.

A new Python imports torch for seconds, so those that are not about their start are forked.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from instep.api import Run
from instep.errors import CheckpointError
from instep.recipe import Recipe, Team, parse
from instep.recipe_files import read
from instep.record import checkpoint, tape
from support.harness import Outcome, train_here
from support.kinds import quick
from support.patience import LONG_S
from support.processes import INSTEP, Started, complaint, wait_until, write_project
from support.reference import reference_digests

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found through /proc"),
]

PROGRAM = """\
import os, sys
import torch
import instep
from torch import nn
from torch.utils.data import TensorDataset
width = 6
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, width), nn.Linear(width, 1)
    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))

def scaled(scale):
    def objective(model, batch):
        print("this is for the log")
        return scale * (model(batch[0]) - batch[1]).square().sum()
    return objective

def data():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(40, 3, generator=generator), torch.randn(40, 1, generator=generator))

recipe = instep.Recipe(model=Net, objective=scaled(0.5), data=data, batch=8, microbatches=4, steps=6)
run = instep.train(recipe, team=instep.Team(workers=2), out=os.environ["OUT"])
from instep.record.digest import digest_of_state
state, model = run.state_dict(), run.model()
_ = print(run.digest, digest_of_state(state), digest_of_state(model.state_dict()), type(model).__module__)
"""

LIGHT = """\
import os, pathlib, sys
sys.path.append(pathlib.Path("/nowhere"))
import instep
seen = []
recipe = instep.Recipe(model="mymodel:Net", objective="mymodel:squares", data="mymodel:numbers", batch=8, steps=3)
watch, folder = [lambda event: seen.append(event["kind"])], pathlib.Path(os.environ["PROJECT"])
run = instep.train(recipe, out=os.environ["OUT"], monitors=watch, import_paths=[folder])
print("torch" in sys.modules, sorted(seen))
print(type(run.model()).__name__, os.environ["PROJECT"] in sys.path)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe file and, beside it, the module that it names."""
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def recipe(project: Path) -> Iterator[Recipe]:
    """The recipe in the file, for this process."""
    sys.path.insert(0, str(project))
    yield parse(read(project / "my.toml"))[0]
    sys.path.remove(str(project))
    sys.modules.pop("mymodel", None)


@pytest.fixture(scope="module")
def expected(recipe: Recipe) -> dict[int, str]:
    """The digest after every step, by the slow and obvious way, in this process."""
    torch.set_num_threads(1)
    return reference_digests(dataclasses.replace(recipe, steps=40))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Started]]:
    """Starts a process in a folder that is not the project's. What still runs at the end is ended."""
    every: list[Started] = []
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def start(*command: object, **more: Any) -> Started:
        every.append(Started([str(part) for part in command], elsewhere, **more))
        return every[-1]

    yield start
    for started in every:
        started.end()


Start = Callable[..., Started]
TEAM = Team(workers=2, checkpoint_every=5)
"""That of the recipe file."""


def result_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


# ------------------------------------------------------------------------------------------------ a run and its record


@pytest.fixture(scope="module")
def finished(project: Path, start: Start) -> tuple[Path, Started]:
    """A run that nothing disturbed."""
    out = project / "finished"
    started = start(*INSTEP, "train", project / "my.toml", "--out", out, forked=True)
    assert started.ends() == 0, started.err
    return out, started


def test_a_recipe_beside_its_module_trains_from_another_folder(
    finished: tuple[Path, Started], expected: dict[int, str]
) -> None:
    run, started = finished
    digest = expected[20]
    assert started.err == ""
    assert started.out.splitlines()[-2:] == [f"digest      {digest}", f"run folder  {run}"]
    result = result_of(run)
    assert result["digest"] == digest
    assert (result["steps"], result["workers"], result["microbatches"], result["restarts"]) == (20, 2, 4, 0)
    joined = [event for event in tape.read(run / "tape.jsonl") if event["kind"] == "joined"]
    assert sorted(event["worker"] for event in joined) == [0, 1]
    assert all(event["pid"] > 1 and event["host"] for event in joined)


def test_digest_is_alone_on_its_line(finished: tuple[Path, Started], expected: dict[int, str]) -> None:
    for path, step in ((finished[0], 20), (finished[0] / "checkpoints" / "step-00000015", 15)):
        done = subprocess.run([*INSTEP, "digest", str(path)], capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == (f"{expected[step]}\n", "")


# ------------------------------------------------------------------------------------ processes that nothing disturbs


@pytest.fixture(scope="module")
def copied(project: Path, finished: tuple[Path, Started]) -> Callable[..., Path]:
    """Copies the finished run to a folder of its own, its checkpoints of these steps damaged."""

    def copy(name: str, *damaged: int) -> Path:
        run = Path(shutil.copytree(finished[0], project / name))
        for step in damaged:
            file = run / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        return run

    return copy


def by_script(project: Path, start: Start) -> tuple[Started, Path]:
    (project / "script.py").write_text(PROGRAM)
    return start(sys.executable, project / "script.py", OUT=str(project / "by-script")), project / "by-script"


def by_hand(project: Path, start: Start) -> tuple[Started, Path]:
    return start(sys.executable, "-i", "-q", stdin=PROGRAM, OUT=str(project / "by-hand")), project / "by-hand"


def by_stdin(project: Path, start: Start) -> tuple[Started, Path]:
    return start(sys.executable, "-", stdin=PROGRAM, OUT=str(project / "by-stdin")), project / "by-stdin"


def can_mount() -> bool:
    try:
        command = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/dev/shm"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.parametrize("begin", quick([by_script, by_hand, by_stdin], by_script))
def test_a_program_without_a_guard_trains_what_it_defines(begin: Any, project: Path, start: Start) -> None:
    """A class and a closure of __main__, no ``if __name__``, and not a word on stdout or stderr."""
    started, out = begin(project, start)
    assert started.ends() == 0, started.err
    digest = result_of(out)["digest"]
    assert started.out == f"{digest} {digest} {digest} __main__\n"
    assert started.err.replace(">>> ", "").replace("... ", "").strip() == ""
    assert "this is for the log" in (out / "logs" / "worker-1.log").read_text()


def test_the_process_that_calls_train_imports_no_torch_and_modules_are_found_in_the_paths_given(
    project: Path, start: Start
) -> None:
    """Nor does what it is told of the run make it: it would wait for seconds, and show nothing meanwhile. Modules are
    found in the workers, and once more where the run's model is asked for. A path in sys.path, which Python passes
    over, is passed over there too."""
    run = project / "light"
    started = start(sys.executable, "-c", LIGHT, OUT=str(run), PROJECT=str(project))
    assert started.ends() == 0, started.err
    kinds = [event["kind"] for event in tape.read(run / "tape.jsonl")]
    assert started.out == f"False {sorted(kinds)}\nNet False\n"


def test_a_finished_run_that_is_resumed_stays_as_it_is(
    copied: Callable[..., Path], recipe: Recipe, expected: dict[int, str]
) -> None:
    run = train_here(recipe, TEAM, copied("again"), resume=True)
    assert run.digest == expected[20]
    assert not any(e["kind"] == "merged" for e in last_start(run.path))


@pytest.fixture(scope="module")
def prolonged(copied: Callable[..., Path], recipe: Recipe) -> Outcome:
    """The finished run, with another team and more steps."""
    return train_here(dataclasses.replace(recipe, steps=26), Team(workers=3), copied("prolonged"), resume=True)


def test_more_steps_prolong_a_run_with_another_team(prolonged: Outcome, expected: dict[int, str]) -> None:
    assert prolonged.digest == expected[26]
    assert [e["version"] for e in last_start(prolonged.path) if e["kind"] == "merged"] == list(range(21, 27))
    assert result_of(prolonged.path)["workers"] == 3


def test_the_weights_of_a_run_are_its_own_or_none(prolonged: Outcome, recipe: Recipe) -> None:
    """A run that was prolonged since has others, which must not pass for those that this one ended with."""
    path = prolonged.path
    now = result_of(path)
    assert Run(path, now, recipe).state_dict().keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    before = Run(path, {**now, "digest": "0" * 64}, recipe)
    for ask in (before.state_dict, before.model):
        with pytest.raises(CheckpointError, match="step-00000026, does not hold the weights that this run ended with"):
            ask()


def last_start(run: Path) -> list[dict[str, Any]]:
    """The tape from its last ``run_started`` on."""
    events = list(tape.read(run / "tape.jsonl"))
    starts = [place for place, event in enumerate(events) if event["kind"] == "run_started"]
    return events[starts[-1] :]


def test_a_damaged_checkpoint_is_told_of_and_passed_over(
    copied: Callable[..., Path], recipe: Recipe, expected: dict[int, str]
) -> None:
    run = train_here(recipe, Team(workers=4), copied("damaged", 20), resume=True)
    (why,) = (event["why"] for event in run.events if event["kind"] == "warned")
    assert "step-00000020 is damaged: model.safetensors has" in why
    assert last_start(run.path)[0]["version"] == 15
    assert run.digest == expected[20]


@pytest.mark.slow  # test_memory.py has it that nothing lies there
def test_a_small_dev_shm_does_not_matter(project: Path, start: Start, expected: dict[int, str]) -> None:
    if not can_mount():
        pytest.skip("a small /dev/shm cannot be mounted here")
    run = project / "small"
    small = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"', "sh"]
    started = start(*small, *INSTEP, "train", project / "my.toml", "--out", run, "--steps", 3)
    assert started.ends() == 0, started.err
    assert result_of(run)["digest"] == expected[3]


@pytest.mark.slow  # test_faults.py and test_refusals.py have the sentences, and that nothing is left
def test_a_run_without_a_sound_checkpoint_is_refused_and_kept(copied: Callable[..., Path], start: Start) -> None:
    run = copied("lost", 10, 15, 20)
    started = start(*INSTEP, "train", "--resume", run)
    assert started.ends() == 1
    first, *detail = started.err.splitlines()
    assert first.startswith(f"instep: no checkpoint in {run / 'checkpoints'} is sound")
    assert [step for step in (20, 15, 10) if any(f"step-{step:08d} is damaged" in line for line in detail)] == [
        20,
        15,
        10,
    ]
    assert not any(line.startswith("instep:") or "Traceback" in line for line in detail)
    assert run.exists()


# ------------------------------------------------------------------------------------------------------------- endings

PAUSE_S = "0.25"
"""So that a step takes half a second with two workers, and no run here ends by itself before it is ended."""


Training = Callable[..., tuple[Started, Path]]


@pytest.fixture
def training(project: Path, start: Start) -> Training:
    """Starts a run that is in the midst of training for long."""

    def train(name: str, *flags: object, pause_s: str = PAUSE_S) -> tuple[Started, Path]:
        out = project / name
        command = [*INSTEP, "train", project / "my.toml", "--out", out, *flags]
        return start(*command, PAUSE_S=pause_s, forked=True), out

    return train


def test_ctrl_c_ends_a_run_that_can_go_on(training: Training, expected: dict[int, str], start: Start) -> None:
    started, run = training("interrupted", "--steps", 40)
    started.says("step ")
    began = time.monotonic()
    started.press_ctrl_c()
    assert started.ends() == 130
    assert time.monotonic() - began < 60, "a step, a checkpoint, and no more"
    assert started.err == ""
    path, problems = checkpoint.newest_sound(run / "checkpoints")
    assert path is not None
    assert not problems
    version = checkpoint.read_manifest(path).version
    assert f"{version} of 40, interrupted" in started.out
    assert result_of(run)["interrupted"]
    assert result_of(run)["digest"] == expected[version]

    (line,) = (line for line in started.out.splitlines() if line.startswith("go on with"))
    instep, *command = shlex.split(line.removeprefix("go on with"))
    assert instep == "instep"
    resumed = start(*INSTEP, *command, "--workers", 3, forked=True)
    assert resumed.ends() == 0, resumed.err
    assert result_of(run)["digest"] == expected[40]
    assert (result_of(run)["workers"], result_of(run)["interrupted"]) == (3, False)


def test_a_second_ctrl_c_does_not_wait_for_the_step(training: Training) -> None:
    started, run = training("stuck", "--steps", 40, pause_s="100")
    started.says("run folder")
    wait_until(lambda: started.workers() == 2, LONG_S, "two workers", started)
    started.press_ctrl_c()
    time.sleep(0.5)
    assert started.process.poll() is None, "the first one waits for the step"
    began = time.monotonic()
    started.press_ctrl_c()
    assert started.ends() == 130
    assert time.monotonic() - began < 60
    assert "Traceback" not in started.err
    assert not run.exists(), "no step was done"


@pytest.mark.slow  # test_descendants.py has it with helpers to end too
def test_a_killed_client_takes_the_run_with_it(training: Training) -> None:
    started, run = training("client", "--steps", 1000)
    place = run / "tape.jsonl"
    wait_until(lambda: place.exists() and b'"merged"' in place.read_bytes(), LONG_S, "an update on the tape", started)
    assert started.workers() == 2
    started.process.kill()
    assert started.ends() == -signal.SIGKILL
    assert any(event["kind"] == "merged" for event in tape.read(run / "tape.jsonl"))


@pytest.mark.slow  # as the client
def test_a_killed_supervisor_takes_its_workers_with_it(training: Training) -> None:
    started, run = training("supervisor", "--steps", 1000, pause_s="0.05")
    wait_until(lambda: any((run / "checkpoints").glob("step-*")), LONG_S, "a checkpoint", started)
    supervisor = started.supervisor()
    began = time.monotonic()
    os.kill(supervisor, signal.SIGKILL)
    assert started.ends() == 1
    assert time.monotonic() - began < 60
    assert f"the supervisor of the run (pid {supervisor}) was killed by SIGKILL" in complaint(started)
    assert f"and its workers with it; go on with --resume {run}." in complaint(started)


def test_what_was_shown_is_on_the_tape_of_a_killed_supervisor(training: Training) -> None:
    started, run = training("shown", "--steps", 1000)
    started.says("step     1/1,000")
    os.kill(started.supervisor(), signal.SIGKILL)
    assert b'"merged"' in (run / "tape.jsonl").read_bytes()
    assert started.ends() == 1


@pytest.mark.slow  # test_start_up.py kills a run at every write of its start
def test_a_supervisor_killed_before_any_training_leaves_nothing_to_resume(start: Start, tmp_path: Path) -> None:
    project = write_project(tmp_path)
    slow = "\nclass Slow(Net):\n    def __init__(self):\n        time.sleep(60)\n"
    (project / "mymodel.py").write_text((project / "mymodel.py").read_text() + slow)
    run = tmp_path / "run"
    started = start(*INSTEP, "train", project / "my.toml", "--recipe.model", "mymodel:Slow", "--out", run)
    wait_until(lambda: started.workers() == 2, LONG_S, "workers that build", started)
    os.kill(started.supervisor(), signal.SIGKILL)
    assert started.ends() == 1
    assert "nothing was trained, and no folder is left of it: start the run again." in complaint(started)
    assert not run.exists()


def test_a_killed_and_a_stopped_worker_are_named_and_change_nothing(
    project: Path, start: Start, expected: dict[int, str]
) -> None:
    run = project / "disturbed"
    line = ("train", project / "my.toml", "--out", run, "--team.answer_timeout_s", 1.5)
    go = project / "both are struck"
    started = start(*INSTEP, *line, PAUSE_S=PAUSE_S, GO=str(go), forked=True)

    def worker(number: int) -> int:
        joined = [e for e in tape.read(run / "tape.jsonl") if e["kind"] == "joined" and e["worker"] == number]
        return int(joined[-1]["pid"])

    started.says("step  1/20")
    killed = worker(1)
    os.kill(killed, signal.SIGKILL)
    started.says(f"worker 1 (pid {killed}) was killed by SIGKILL")
    started.says("worker 0 does the part of worker 1 from step ")
    stopped = worker(0)
    os.kill(stopped, signal.SIGSTOP)
    started.says(f"worker 0 (pid {stopped}) has not answered")
    assert "it is stopped (SIGSTOP or a debugger)" in started.out
    go.touch()
    assert started.ends() == 0, started.err
    assert result_of(run)["restarts"] == 2
    assert result_of(run)["digest"] == expected[20]


def interrupted_while_starting(project: Path, start: Start, name: str, times: int, after_s: float) -> None:
    started = start(*INSTEP, "train", project / "my.toml", "--out", project / name, "--steps", 1000, PAUSE_S="0.01")
    wait_until(lambda: bool(started.pids()), LONG_S, "the supervisor", started)
    time.sleep(after_s)
    for press in range(times):
        if press and started.process.poll() is not None:  # once was enough
            break
        os.killpg(started.process.pid, signal.SIGINT)  # there is somebody to hear it, were it a dead one
        time.sleep(0.1)
    # What is pressed while Python itself shuts down kills it, which a shell tells as 130 too.
    assert started.ends() in ((130,) if times == 1 else (130, -signal.SIGINT))
    assert started.err == ""
    if not (project / name).exists():
        return
    events = tape.read(project / name / "tape.jsonl")
    assert any(event["kind"] == "run_started" for event in events), "else nothing is left"
    if times == 1:
        assert result_of(project / name)["interrupted"]


def test_ctrl_c_while_it_starts(project: Path, start: Start) -> None:
    interrupted_while_starting(project, start, "starting", 1, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("after_s", [0.0, 1.0, 2.0, 2.5, 3.0])
def test_ctrl_c_at_any_moment_of_the_start(times: int, after_s: float, project: Path, start: Start) -> None:
    interrupted_while_starting(project, start, f"starting-{times}-{after_s}", times, after_s)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_polite_kill_ends_a_run_as_ctrl_c_does(number: signal.Signals, project: Path, start: Start) -> None:
    run = project / number.name
    started = start(*INSTEP, "train", project / "my.toml", "--out", run, "--steps", 1000, PAUSE_S="0.1")
    started.says("step ")
    started.process.send_signal(number)
    assert started.ends() == 130
    assert result_of(run)["interrupted"]


@pytest.mark.slow
def test_a_monitor_that_fails_takes_nothing_that_was_saved(project: Path, start: Start) -> None:
    run = project / "monitored"
    program = f"""
import pathlib, sys, time
sys.path.insert(0, {str(project)!r})
import instep
checkpoints = pathlib.Path({str(run / "checkpoints")!r})
def monitor(event):
    if event["kind"] == "run_started":
        while not list(checkpoints.glob("step-*")):
            time.sleep(0.02)
        raise ValueError("no tracker there")
recipe = instep.Recipe(model="mymodel:Net", objective="mymodel:squares", data="mymodel:numbers", batch=8, steps=9999)
instep.train(recipe, team=instep.Team(checkpoint_every=1), out={str(run)!r}, monitors=[monitor])
"""
    started = start(sys.executable, "-c", program)
    assert started.ends() == 1
    assert (
        f"ValueError: no tracker there\nThe run ended after the step that it was at, and is saved: {run}" in started.err
    )
    assert checkpoint.newest_sound(run / "checkpoints")[0] is not None
