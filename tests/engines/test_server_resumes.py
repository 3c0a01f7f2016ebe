"""The server engine: runs that end, are stopped or killed, and what goes on from them."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from instep.errors import CheckpointError, RecipeError, WorkerError
from instep.recipe import Recipe, Team
from instep.record import checkpoint, tape
from instep.record.events import Event
from instep.rules import UpdateRule
from instep.rules import presets as p
from instep.team.session import Session
from support import workloads
from support.harness import Client, Outcome, train_here
from support.patience import LONG_S
from support.processes import INSTEP, Started, wait_until, write_project
from support.reference import reference_digests
from support.regression import regression, squares
from support.sentences import one_sentence
from support.serving import (
    RULES,
    at,
    check_tape,
    killed_altogether,
    reference,
    replayed,
    server_pid,
    serving,
)

pytestmark = pytest.mark.processes

ASYNC = p.asynchronous()


def stopped_at(recipe: Recipe, team: Team, path: Path, version: int, *, resume: bool = False) -> Outcome:
    """A run that is asked to stop when it tells of `version`."""
    seen: list[bool] = []

    def see(event: dict[str, Any]) -> None:
        if event["kind"] == "merged" and event["version"] >= version and not seen:
            seen.append(True)
            client.ask_to_stop()

    client = Client(see)
    return train_here(recipe, team, path, resume=resume, client=client)


def ends_and_goes_on(name: str, workload: str, path: Path) -> None:
    recipe = workloads.ALL[workload](rule=RULES[name], steps=8)
    first = stopped_at(recipe, serving(3, slow="1:3x"), path, 2)
    assert first.result["interrupted"]
    newest, problems = checkpoint.newest_sound(path / "checkpoints")
    assert newest is not None
    assert not problems
    assert checkpoint.read_manifest(newest).digest == first.digest
    assert checkpoint.read_manifest(newest).version == first.result["versions"] < 24
    check_tape(first.events, recipe, finished=False)
    second = train_here(recipe, serving(2), path, resume=True)
    assert not second.result["interrupted"]
    assert second.events[0]["version"] == first.result["versions"]
    events = list(tape.read(path / "tape.jsonl"))
    check_tape(events, recipe)
    seqs = [e["seq"] for e in events if e["kind"] == "pushed"]
    fates = [e["seq"] for e in events if e["kind"] == "dropped"]
    fates += [c["seq"] for e in events if e["kind"] == "merged" for c in e["contributions"]]
    assert sorted(seqs) == sorted(fates) == list(range(len(seqs))), "each merged once, or dropped with a reason"
    assert replayed(recipe, path).same


@pytest.mark.parametrize("name", ["softsync"])
def test_a_run_that_is_stopped_goes_on_with_another_team(name: str, tmp_path: Path) -> None:
    ends_and_goes_on(name, "gpt", tmp_path / "run")


def test_a_run_goes_from_one_engine_to_the_other_and_back(tmp_path: Path) -> None:
    """Under a synchronous rule checkpoints are the same, whoever wrote them."""
    path = tmp_path / "run"
    engines: list[tuple[Any, int, int]] = [("lockstep", 2, 1), ("server", 3, 2), ("lockstep", 4, 3), ("server", 1, 99)]
    for engine, workers, version in engines:
        team = Team(workers=workers, engine=engine, checkpoint_every=1)
        run = stopped_at(workloads.gpt(), team, path, version, resume=path.exists())
        assert run.digest == reference("gpt")[run.result["versions"]]
    assert (run.result["versions"], run.result["interrupted"]) == (7, False)
    assert replayed(workloads.gpt(), path).same


def test_contributions_that_wait_when_a_run_is_stopped_are_dropped_with_a_reason(tmp_path: Path) -> None:
    """Two of three are there, and the third is seconds away."""
    recipe, path = regression(rule=UpdateRule(quorum="3", max_lead=0), steps=6), tmp_path / "run"

    def long(model: nn.Module, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            time.sleep(0.02)
        return squares(model, batch)

    recipe = dataclasses.replace(recipe, objective=long)
    pushed: list[int] = []

    def see(event: dict[str, Any]) -> None:
        pushed.extend([event["seq"]] if event["kind"] == "pushed" else [])
        if len(pushed) == 2:
            client.ask_to_stop()

    client = Client(see)
    first = train_here(recipe, serving(3, slow="2:1000x"), path, client=client)
    assert first.result["interrupted"]
    assert first.result["versions"] == 0
    second = train_here(recipe, serving(3), path, resume=True)
    dropped = [event for event in second.events if event["kind"] == "dropped"]
    assert [event["seq"] for event in dropped] == pushed
    assert all(event["why"] == "it was not merged before the run ended" for event in dropped)
    assert second.result["dropped"] == 2
    check_tape(tape.read(path / "tape.jsonl"), recipe)
    assert replayed(recipe, path).same


@pytest.mark.slow
@pytest.mark.parametrize("workload", workloads.ALL)
@pytest.mark.parametrize("name", RULES)
def test_a_run_that_is_stopped_goes_on_under_every_rule(name: str, workload: str, tmp_path: Path) -> None:
    ends_and_goes_on(name, workload, tmp_path / "run")


def dies_and_goes_on(name: str, workload: str, path: Path, *, supervisor: bool, workers: int) -> None:
    """Killed altogether after its second checkpoint, with work in hand."""
    recipe = workloads.ALL[workload](rule=RULES[name], steps=12)
    team = serving(3, slow="1:3x", checkpoint_every=2)
    saved: list[int] = []

    def due(event: dict[str, Any]) -> bool:
        saved.extend([event["version"]] if event["kind"] == "checkpointed" else [])
        return len(saved) >= 2 and event["kind"] == "merged"

    if supervisor:
        killed_altogether(recipe, team, path, due)
        run = train_here(recipe, serving(workers, checkpoint_every=2), path, resume=True)
    else:
        struck: list[bool] = []

        def see(event: dict[str, Any]) -> None:
            if not struck and due(event):
                struck.append(True)
                os.kill(server_pid(3), signal.SIGKILL)

        run = train_here(recipe, team, path, client=Client(see))
        assert run.result["restarts"] == 1
        (left,) = (event for event in run.events if event["kind"] == "left")
        assert left["why"].startswith("the server (pid ")
    events = list(tape.read(path / "tape.jsonl"))
    starts = [event for event in events if event["kind"] == "run_started"]
    assert [event["version"] > 0 for event in starts] == [False, True]
    assert [event["cut"] for event in starts] == [3, 3]
    check_tape(events, recipe)
    found = replayed(recipe, path)
    assert found.same, found
    assert found.digest == run.digest
    if recipe.rule.synchronous:
        assert run.digest == reference_digests(recipe)[12]


@pytest.mark.parametrize("name", ["diloco"])
def test_a_run_whose_server_is_killed_goes_on_from_its_last_checkpoint(name: str, tmp_path: Path) -> None:
    dies_and_goes_on(name, "convnet", tmp_path / "run", supervisor=False, workers=3)


@pytest.mark.parametrize(("name", "workers"), [("asynchronous", 4)])
def test_a_run_whose_supervisor_is_killed_goes_on_with_another_team(name: str, workers: int, tmp_path: Path) -> None:
    dies_and_goes_on(name, "gpt", tmp_path / "run", supervisor=True, workers=workers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("supervisor", "workers", "workload"),
    [(False, 3, "gpt"), (True, 3, "convnet"), (True, 2, "gpt"), (True, 4, "convnet")],
)
@pytest.mark.parametrize("name", RULES)
def test_a_run_killed_altogether_goes_on_under_every_rule(
    name: str, workload: str, supervisor: bool, workers: int, tmp_path: Path
) -> None:
    dies_and_goes_on(name, workload, tmp_path / "run", supervisor=supervisor, workers=workers)


def test_a_server_that_dies_between_a_checkpoint_and_its_event_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tape does not tell of the checkpoint that the run goes on from."""
    emit = Session.emit
    mark = tmp_path / "struck"

    def strike(self: Session, event: Event) -> None:
        if event.kind == "checkpointed" and event.version >= 4 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        emit(self, event)

    monkeypatch.setattr(Session, "emit", strike)
    recipe = workloads.gpt(rule=ASYNC, steps=4)
    run = train_here(recipe, serving(2, checkpoint_every=1), tmp_path / "run")
    starts = [event["version"] for event in run.events if event["kind"] == "run_started"]
    assert len(starts) == 2
    assert starts[1] >= 4
    found = replayed(recipe, run.path)
    assert found.same, found


def test_a_supervisor_that_dies_between_a_checkpoint_and_its_event_leaves_a_whole_tape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a checkpoint holds is on the tape before it is: else the run could go on and never be replayed."""
    emit = Session.emit

    def strike(self: Session, event: Event) -> None:
        if event.kind == "checkpointed" and event.version >= 4:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        emit(self, event)

    recipe, path = workloads.gpt(rule=ASYNC, steps=4), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Session, "emit", strike)
        killed_altogether(recipe, serving(2, checkpoint_every=1), path)
    run = train_here(recipe, serving(2), path, resume=True)
    assert run.events[0]["version"] >= 4
    check_tape(tape.read(path / "tape.jsonl"), recipe)
    assert replayed(recipe, path).same


def test_a_server_that_dies_together_with_a_worker_starts_again(tmp_path: Path) -> None:
    def both(pids: dict[int, int]) -> None:
        def strike(victims: tuple[int, int]) -> None:
            for pid in victims:
                os.kill(pid, signal.SIGKILL)

        threading.Timer(0.05, strike, [(pids[1], server_pid(2))]).start()  # when the supervisor waits again

    recipe = regression(rule=ASYNC, steps=300)
    run = train_here(recipe, serving(2), tmp_path / "run", client=Client(at("merged", 3, both)))
    assert "the server (pid" in [event["why"] for event in run.events if event["kind"] == "left"][-1]
    check_tape(run.events, recipe)


def test_a_server_that_exits_is_named_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emit = Session.emit

    def strike(self: Session, event: Event) -> None:
        if event.kind == "merged" and event.version == 3:
            os.write(1, b"last words\n")
            os._exit(3)
        emit(self, event)

    monkeypatch.setattr(Session, "emit", strike)
    with pytest.raises(WorkerError, match=r"the server \(pid \d+\) ended with exit status 3") as caught:
        train_here(regression(rule=ASYNC), serving(2, restarts=1), tmp_path / "run")
    assert "last words" in caught.value.detail


def test_a_finished_run_that_is_resumed_stays_as_it_is_and_ends_at_once(tmp_path: Path) -> None:
    recipe = regression(rule=ASYNC)
    run = train_here(recipe, serving(2), tmp_path / "run")
    began = time.monotonic()
    again = train_here(recipe, serving(3), tmp_path / "run", resume=True)
    assert time.monotonic() - began < 60
    assert again.digest == run.digest
    assert not any(event["kind"] == "merged" for event in again.events)
    assert replayed(recipe, run.path).same


@pytest.mark.parametrize("name", ["asynchronous", *(pytest.param(n, marks=pytest.mark.slow) for n in RULES)])
def test_more_steps_prolong_a_run(name: str, tmp_path: Path) -> None:
    """The schedule of the first part was that of the shorter run; a replay knows it."""
    recipe = workloads.gpt(rule=RULES[name], steps=4)
    train_here(recipe, serving(2), tmp_path / "run")
    longer = dataclasses.replace(recipe, steps=8)
    run = train_here(longer, serving(3), tmp_path / "run", resume=True)
    assert run.result["steps"] == 8
    check_tape(tape.read(tmp_path / "run" / "tape.jsonl"), longer)
    assert replayed(longer, run.path).same


@pytest.mark.parametrize("name", ["local_sgd", *(pytest.param(n, marks=pytest.mark.slow) for n in RULES)])
def test_fewer_steps_than_are_done_are_refused(name: str, tmp_path: Path) -> None:
    recipe = regression(rule=RULES[name], steps=8)
    train_here(recipe, serving(2), tmp_path / "run")
    with pytest.raises(
        RecipeError, match="has done 8 steps already, and 'recipe.steps' is 4; give 8 or more"
    ) as caught:
        train_here(dataclasses.replace(recipe, steps=4), serving(2), tmp_path / "run", resume=True)
    assert one_sentence(caught.value.message)


def test_fewer_steps_than_are_begun_are_refused(tmp_path: Path) -> None:
    """What was given out lies beyond the end; the run would never end, or leave samples out."""
    recipe = regression(rule=ASYNC, steps=400)
    done = stopped_at(recipe, serving(2), tmp_path / "run", 3).result["steps"]
    assert done < 400
    sentence = rf"(\d+) global batches are begun, and the run is now to end after {done}; resume with at least \1 steps"
    with pytest.raises(CheckpointError, match=sentence) as caught:
        train_here(dataclasses.replace(recipe, steps=done), serving(2), tmp_path / "run", resume=True)
    assert one_sentence(caught.value.message)


@pytest.mark.parametrize(("before", "after"), [(8, 16), pytest.param(9, 18, marks=pytest.mark.slow)])
def test_steps_that_would_cut_groups_of_local_steps_anew_are_refused(before: int, after: int, tmp_path: Path) -> None:
    recipe = regression(rule=p.local_sgd(3), steps=before)
    stopped_at(recipe, serving(2), tmp_path / "run", 1)
    longer = dataclasses.replace(recipe, steps=after)
    if before % 3 == 0:
        train_here(longer, serving(2), tmp_path / "run", resume=True)
        check_tape(tape.read(tmp_path / "run" / "tape.jsonl"), longer)
        return
    with pytest.raises(CheckpointError, match="planned for 8 steps, in groups of 3 local steps, and 16") as caught:
        train_here(longer, serving(2), tmp_path / "run", resume=True)
    assert one_sentence(caught.value.message)


def test_steps_may_change_before_the_first_group_of_local_steps(tmp_path: Path) -> None:
    recipe = regression(rule=p.post_local_sgd(3, after=6), steps=4)
    train_here(recipe, serving(2), tmp_path / "run")
    longer = dataclasses.replace(recipe, steps=9)
    train_here(longer, serving(2), tmp_path / "run", resume=True)
    check_tape(tape.read(tmp_path / "run" / "tape.jsonl"), longer)


def test_the_end_of_a_data_set_may_leave_pieces_without_samples(tmp_path: Path) -> None:
    """5 samples for 8 workers in the last batch: an update without items is no objective."""
    recipe = workloads.gpt(rule=ASYNC, steps=3)
    run = train_here(recipe, serving(8), tmp_path / "run")
    check_tape(run.events, recipe)
    assert run.result["objective_last"] > 0.5
    assert replayed(recipe, run.path).same


@pytest.mark.slow
def test_more_workers_than_microbatches_are_taken_where_nobody_waits_for_all(tmp_path: Path) -> None:
    recipe = regression(rule=ASYNC, steps=8)
    run = train_here(recipe, serving(6), tmp_path / "run")
    check_tape(run.events, recipe)
    assert replayed(recipe, run.path).same


# ------------------------------------------------------------------------------------------------------ whole processes


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found through /proc")
@pytest.mark.slow
def test_ctrl_c_ends_a_run_under_the_server_and_leaves_nothing(tmp_path: Path) -> None:
    project = write_project(tmp_path)
    run = project / "out"
    command = [*INSTEP, "train", str(project / "my.toml"), "--out", str(run), "--rule", "asynchronous"]
    started = Started([*command, "--steps", "400", "--workers", "2", "--slow", "1:3x"], project, PAUSE_S="0.02")
    try:
        started.says("step ")
        began = time.monotonic()
        started.press_ctrl_c()
        assert started.ends() == 130
        assert time.monotonic() - began < 60
        assert started.err == ""
        (line,) = (line for line in started.out.splitlines() if line.startswith("go on with"))
        instep, *rest = shlex.split(line.removeprefix("go on with"))
        assert instep == "instep"
        assert rest[:2] == ["train", "--resume"]
    finally:
        started.end()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found through /proc")
@pytest.mark.parametrize("rule", ["asynchronous", "diloco:3", "softsync,quorum=all/1"])
@pytest.mark.parametrize("how", ["ctrl-c", "supervisor"])
def test_a_run_that_was_ended_from_outside_is_resumed_and_replayed(rule: str, how: str, tmp_path: Path) -> None:
    project = write_project(tmp_path)
    run = project / "out"
    command = [*INSTEP, "train", str(project / "my.toml"), "--out", str(run), "--rule", rule, "--steps", "60"]
    started = Started([*command, "--workers", "2", "--slow", "1:3x"], project, PAUSE_S="0.05")
    try:
        started.says("step ")
        wait_until(lambda: any((run / "checkpoints").glob("step-*")), LONG_S, "a checkpoint", started)
        if how == "ctrl-c":
            started.press_ctrl_c()
            assert started.ends() == 130
        else:
            os.kill(started.supervisor(), signal.SIGKILL)
            assert started.ends() == 1
        started = Started([*INSTEP, "train", "--resume", str(run), "--workers", "3"], project)
        assert started.ends() == 0, started.err
        started = Started([*INSTEP, "replay", str(run)], project)
        assert started.ends() == 0, started.err
        assert "the replay is exact" in started.out
    finally:
        started.end()
