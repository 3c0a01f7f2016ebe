"""The server engine: real processes under every rule, their faults and endings, and what they leave on the tape."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from instep.api import train
from instep.errors import CheckpointError, InstepError, NonFiniteError, ObjectiveError, RecipeError, WorkerError
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.recipe import Recipe, Team, check_team
from instep.record import checkpoint, tape
from instep.record.events import Event
from instep.reduce.pack import Pack
from instep.rules import UpdateRule
from instep.rules import presets as p
from instep.team.journal import ClientGone
from instep.team.session import Session
from support import workloads
from support.harness import Client, Outcome, train_here
from support.processes import INSTEP, Started, wait_until, write_project
from support.reference import reference_digests
from support.regression import numbers, regression, squares
from support.sentences import one_sentence
from support.serving import (
    RULES,
    WORKLOADS,
    alive,
    at,
    check_tape,
    disturbed,
    kill,
    killed_altogether,
    replayed,
    server_pid,
)

pytestmark = pytest.mark.processes

ASYNC = p.asynchronous()


@functools.cache
def reference(name: str) -> dict[int, str]:
    torch.set_num_threads(1)
    return reference_digests(workloads.ALL[name]())


def serving(workers: int = 2, **fields: Any) -> Team:
    return Team(workers=workers, engine="server", **fields)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No test leaves a process, or a file of shared memory."""
    memory = set(os.listdir("/dev/shm"))
    yield
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [pid for pid in map(int, children) if alive(pid) and "worker" in Path(f"/proc/{pid}/comm").read_text()]
    assert not set(os.listdir("/dev/shm")) - memory


# --------------------------------------------------------------------------------------------------- lockstep's bits


def lockstep_bits(name: str, workers: int, rule: UpdateRule, path: Path) -> None:
    client = Client(at("released", 3, kill(1), worker=1)) if workers > 1 else None
    run = train_here(
        workloads.ALL[name](rule=rule), serving(workers, checkpoint_every=1, keep=0), path / "run", client=client
    )
    assert run.digests == reference(name)
    assert run.result["restarts"] == (workers > 1)
    assert run.result["staleness_max"] == run.result["lead_max"] == 0


@pytest.mark.parametrize(
    ("workers", "name", "rule"),
    [(2, "gpt", p.synchronous()), (3, "convnet", p.bounded_staleness(0))],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_synchronous_rule_gives_lockstep_bits_through_a_death(
    workers: int, name: str, rule: UpdateRule, tmp_path: Path
) -> None:
    lockstep_bits(name, workers, rule, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("name", workloads.ALL)
@pytest.mark.parametrize("rule", [p.synchronous(), p.bounded_staleness(0)], ids=lambda rule: rule.name)
def test_a_synchronous_rule_gives_lockstep_bits_for_any_team(
    workers: int, name: str, rule: UpdateRule, tmp_path: Path
) -> None:
    lockstep_bits(name, workers, rule, tmp_path)


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


# --------------------------------------------------------------------------------------------------------- the tape


@pytest.mark.parametrize("name", RULES)
def test_the_tape_of_every_rule_has_each_sample_once_and_its_events_in_order(name: str) -> None:
    recipe, run = disturbed(name, WORKLOADS[name])
    check_tape(run.events, recipe)
    assert list(tape.read(run.path / "tape.jsonl")) == run.events
    assert [event["kind"] for event in run.events].count("run_started") == 1, "nobody else stopped"
    (left,) = (event for event in run.events if event["kind"] == "left")
    assert left["worker"] == 1
    assert "was killed by SIGKILL" in left["why"]
    assert [event["worker"] for event in run.events if event["kind"] == "joined"].count(1) == 2, "it was replaced"


def delays(events: list[Any]) -> list[int]:
    """Of each piece, the versions between the first release of it and its update."""
    released: dict[int, int] = {}
    found = []
    for event in events:
        if event["kind"] == "released":
            released.setdefault(event["piece"], event["version"])
        if event["kind"] == "merged":
            found += [event["version"] - 1 - released[each["piece"]] for each in event["contributions"]]
    return found


@pytest.mark.parametrize("name", RULES)
def test_the_result_tells_what_the_rule_cost(name: str) -> None:
    """Each figure against the tape."""
    recipe, run = disturbed(name, WORKLOADS[name])
    result, rule = run.result, recipe.rule
    merged = [event for event in run.events if event["kind"] == "merged"]
    staleness = [old for event in merged for old in event["staleness"]]
    released = [event for event in run.events if event["kind"] == "released"]
    pushed = [event for event in run.events if event["kind"] == "pushed"]
    assert (result["rule"], result["engine"]) == (name, "server")
    assert result["versions"] == len(merged) == merged[-1]["version"]
    assert result["steps"] == recipe.steps == merged[-1]["step"]
    assert result["items"] == sum(event["items"] for event in merged)
    assert result["staleness_max"] == max(staleness)
    assert result["delayed_max"] == max(delays(run.events)) >= result["staleness_max"]
    assert result["staleness_mean"] == pytest.approx(sum(staleness) / len(staleness))
    assert result["lead_max"] == max(event["lead"] for event in released)
    assert result["dropped"] == sum(event["kind"] == "dropped" for event in run.events)
    module = recipe.model.build()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    pull = Pack(module, parameters).size_bytes
    assert result["bytes_sent"] == sum(event["bytes"] for event in pushed) + pull * len(released)
    least = 4 * sum(parameter.numel() for parameter in parameters)
    assert all(event["bytes"] % least == 0 and event["bytes"] >= least for event in pushed)
    assert len(result["idle_share"]) == 3
    assert all(0 <= share <= 1 for share in result["idle_share"]), "1: who joined too late to get any work"
    assert min(result["idle_share"]) < 1
    if rule.max_lead is not None:
        assert result["lead_max"] <= rule.max_lead
    if rule.max_staleness is not None:
        assert result["staleness_max"] <= rule.max_staleness
    assert result["restarts"] == 1
    assert result["objective_first"] == merged[0]["objective"]


def test_the_result_has_the_same_fields_under_both_engines(tmp_path: Path) -> None:
    recipe = regression()
    runs = [train_here(recipe, Team(workers=2, engine=e), tmp_path / e) for e in ("lockstep", "server")]  # type: ignore[arg-type]
    lockstep, server = (run.result for run in runs)
    assert lockstep.keys() == server.keys()
    for key in (
        "rule",
        "versions",
        "steps",
        "items",
        "staleness_mean",
        "staleness_max",
        "delayed_max",
        "lead_max",
        "dropped",
        "digest",
    ):
        assert lockstep[key] == server[key], key
    for result in (lockstep, server):
        assert result["bytes_sent"] > 0
        assert len(result["idle_share"]) == 2
        assert all(0 <= share <= 1 for share in result["idle_share"])


def test_held_out_data_are_evaluated_by_items_under_every_rule() -> None:
    for name in RULES:
        _, run = disturbed(name, WORKLOADS[name])
        evaluated = [event for event in run.events if event["kind"] == "evaluated"]
        assert len(evaluated) == 2, "at step 4, and at the end"
        merged = {event["version"]: event["step"] for event in run.events if event["kind"] == "merged"}
        assert [merged[event["version"]] for event in evaluated] == [4, 6]
        assert run.result["held_out"] == evaluated[-1]["objective"]


def test_a_rule_that_is_known_to_diverge_is_warned_of(tmp_path: Path) -> None:
    rule = dataclasses.replace(p.diloco(2), quorum="1", order="arrival", max_lead=None, max_staleness=None)
    run = train_here(regression(rule=rule), serving(), tmp_path / "run")
    assert [event["why"] for event in run.events if event["kind"] == "warned"] == rule.warnings() != []
    told: list[dict[str, Any]] = []
    simulate(regression(rule=rule), Cluster(workers=2), False, None, told.append)
    assert [event["why"] for event in told if event["kind"] == "warned"] == rule.warnings()


def test_items_a_second_leave_out_evaluations_and_checkpoints(tmp_path: Path) -> None:
    def long(model: nn.Module, batch: Any) -> Tensor:
        if not torch.is_grad_enabled():
            time.sleep(0.05)  # 1 s an evaluation, of 20 batches
        return squares(model, batch)

    recipe = regression(objective=long, data=lambda: (numbers(), numbers()), rule=ASYNC, steps=6, evaluate_every=2)
    run = train_here(recipe, serving(), tmp_path / "run")
    from_s = max(event["t_s"] for event in run.events if event["kind"] == "joined")
    to_s = max(event["t_s"] for event in run.events if event["kind"] == "merged")
    trained_s = run.result["items"] / run.result["items_per_s"]
    assert trained_s < to_s - from_s - 1.5, "two evaluations lay between"


def test_a_slow_worker_does_less_and_nobody_waits_for_it(tmp_path: Path) -> None:
    def long(model: nn.Module, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            time.sleep(0.01)
        return squares(model, batch)

    def rounds(rule: UpdateRule, name: str) -> tuple[Outcome, list[int]]:
        recipe = regression(objective=long, rule=rule, steps=8)
        run = train_here(recipe, serving(2, slow="1:5x"), tmp_path / name)
        pushes = [event["worker"] for event in run.events if event["kind"] == "pushed"]
        return run, [pushes.count(0), pushes.count(1)]

    free, done = rounds(ASYNC, "asynchronous")
    assert done[0] >= 3 * done[1]
    together, done = rounds(p.synchronous(), "synchronous")
    assert done == [8, 8]
    assert together.result["idle_share"][0] > 0.5, "it waits for the slow one"
    assert free.result["idle_share"][0] < together.result["idle_share"][0] - 0.2
    for run, worker, factor in ((free, 0, 1), (free, 1, 5)):
        took = [e["to_s"] - e["from_s"] for e in run.events if e["kind"] == "computed" and e["worker"] == worker]
        assert min(took) >= 0.02 * factor * 0.95, "two microbatches"


@pytest.mark.slow
def test_versions_that_only_waiting_contributions_need_are_kept(tmp_path: Path) -> None:
    """For delay compensation, while the workers that made them go on from newer ones."""

    def long(model: nn.Module, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            time.sleep(0.004)
        return squares(model, batch)

    recipe = regression(objective=long, rule=UpdateRule(quorum="3", compensation=0.1), steps=20)
    run = train_here(recipe, serving(4, slow="1:2x,2:3x,3:7x"), tmp_path / "run")
    assert run.result["staleness_max"] > 1
    check_tape(run.events, recipe)
    assert replayed(recipe, run.path).same


# -------------------------------------------------------------------------------------------------- workers that fail


def test_a_killed_worker_is_replaced_and_the_others_do_not_stop(tmp_path: Path) -> None:
    recipe = regression(rule=ASYNC, steps=20)
    when: list[float] = []
    named: list[float] = []
    strike = at("released", 3, lambda pids: (when.append(time.monotonic()), kill(1)(pids)), worker=1)  # type: ignore[func-returns-value]

    def see(event: dict[str, Any]) -> None:
        strike(event)
        if event["kind"] == "left":
            named.append(time.monotonic())

    run = train_here(recipe, serving(slow="0:20x"), tmp_path / "run", client=Client(see))
    check_tape(run.events, recipe)
    (left,) = (event for event in run.events if event["kind"] == "left")
    assert one_sentence(left["why"])
    assert "worker 1 (pid" in left["why"]
    assert named[0] - when[0] < 2
    pids = [event["pid"] for event in run.events if event["kind"] == "joined"]
    assert len(set(pids)) == 3
    assert not any(alive(pid) for pid in pids)
    assert run.result["restarts"] == 1


def test_a_stopped_worker_is_named_within_five_seconds_and_the_others_go_on(tmp_path: Path) -> None:
    recipe = regression(rule=ASYNC, steps=150)
    when: list[float] = []
    named: list[float] = []
    merged_between: list[int] = []
    strike = at("released", 3, lambda pids: (when.append(time.monotonic()), kill(1, signal.SIGSTOP)(pids)), worker=1)  # type: ignore[func-returns-value]

    def see(event: dict[str, Any]) -> None:
        strike(event)
        if event["kind"] == "left":
            named.append(time.monotonic())
        if event["kind"] == "merged" and when and not named:
            merged_between.append(event["version"])

    team = serving(slow="0:50x", answer_timeout_s=2.0)
    run = train_here(recipe, team, tmp_path / "run", client=Client(see))
    why = next(event["why"] for event in run.events if event["kind"] == "left")
    assert "worker 1 (pid" in why
    assert "it is stopped (SIGSTOP or a debugger)" in why
    assert named[0] - when[0] < 5
    assert len(merged_between) > 2
    check_tape(run.events, recipe)


def test_a_worker_that_raises_ends_the_run_with_its_sentence(tmp_path: Path) -> None:
    def faulty(model: nn.Module, batch: Any) -> Tensor:
        if torch.is_grad_enabled() and bool((batch[0] == numbers()[7][0]).all(1).any()):
            raise KeyError("no such thing")
        return squares(model, batch)

    client = Client()
    with pytest.raises(WorkerError, match=r"worker \d raised KeyError: 'no such thing' while computing step") as caught:
        train_here(regression(objective=faulty, rule=ASYNC), serving(3), tmp_path / "run", client=client)
    assert one_sentence(caught.value.message)
    assert "in faulty" in caught.value.detail
    assert client.events[-1]["kind"] == "failed"
    assert not any(event["kind"] == "left" for event in client.events)


def test_nothing_outlives_the_client(tmp_path: Path) -> None:
    pids: list[int] = []

    def leave(event: dict[str, Any]) -> None:
        if event["kind"] == "joined":
            pids.append(event["pid"])
        if event["kind"] == "merged" and len(pids) == 2:
            pids.append(server_pid(2))
            client.leave()

    client = Client(leave)
    with pytest.raises(ClientGone):
        train_here(regression(steps=1000, rule=ASYNC), serving(), tmp_path / "run", client=client)
    assert len(set(pids)) >= 3
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def infinite(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    return {"fit": squares(model, batch), "bar": model(batch[0]).sum() * (math.inf if len(batch[0]) else 1)}


def nothing(model: nn.Module, batch: Any) -> Tensor:
    return squares(model, batch)


nothing.counts = lambda batch: 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"objective": infinite, "rule": ASYNC}, NonFiniteError, "term 'bar' of the objective is .* in step 1, micro"),
        ({"objective": infinite, "rule": p.local_sgd(2)}, NonFiniteError, "term 'bar' .* in step 1, microbatch"),
        ({"objective": nothing}, ObjectiveError, "step 1 has no items to learn from"),
        ({"objective": lambda m, b: (m(b[0]) - b[1]).square().mean()}, ObjectiveError, "is a mean, not a sum"),
    ],
    ids=["not finite", "not finite in a local step", "no items", "a mean"],
)
def test_bad_input_is_one_sentence(
    changes: dict[str, Any], error: type[InstepError], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=sentence) as caught:
        train_here(regression(**changes), serving(2), tmp_path / "run")
    assert one_sentence(caught.value.message), caught.value.message


# ------------------------------------------------------------------------------------------------- endings and resumes


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
    first = train_here(recipe, serving(3, slow="2:40x"), path, client=client)
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
@pytest.mark.parametrize("workload", workloads.ALL)
@pytest.mark.parametrize(("supervisor", "workers"), [(False, 3), (True, 3), (True, 2), (True, 4)])
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
    assert time.monotonic() - began < 5
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
    recipe = regression(rule=ASYNC, steps=8)
    done = stopped_at(recipe, serving(2), tmp_path / "run", 3).result["steps"]
    assert done < 8
    sentence = rf"(\d) global batches are begun, and the run is now to end after {done}; resume with at least \1 steps"
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
        assert time.monotonic() - began < 10
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
    started = Started([*command, "--workers", "2", "--slow", "1:3x"], project, PAUSE_S="0.02")
    try:
        started.says("step ")
        wait_until(lambda: len(list((run / "checkpoints").iterdir())) > 0, 60, "a checkpoint", started)
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


# ---------------------------------------------------------------------------------------------------------- bad input

TEAMS: list[tuple[str, UpdateRule, dict[str, Any], str]] = [
    ("a quorum", UpdateRule(quorum="5"), {"workers": 4}, "'rule.quorum' is 5 and the team has 4 workers"),
    ("all in reserve", p.backup_workers(2), {"workers": 2}, "nobody would be waited for"),
    ("a slow worker", ASYNC, {"workers": 2, "slow": "2:4x"}, "names no worker of a team of 2"),
    ("no factor", ASYNC, {"workers": 2, "slow": "1:4y"}, "is no factor"),
    ("lockstep", ASYNC, {"workers": 2, "engine": "lockstep"}, "takes synchronous rules alone"),
    ("lockstep, local steps", p.local_sgd(4), {"engine": "lockstep"}, "takes synchronous rules alone"),
    ("a GPU", ASYNC, {"device": "cuda"}, "runs on the CPU"),
    ("too many", p.local_sgd(4), {"workers": 5}, "5 workers are more than the 4 microbatches"),
]


@pytest.mark.parametrize(("rule", "team", "sentence"), [case[1:] for case in TEAMS], ids=[case[0] for case in TEAMS])
def test_a_team_that_cannot_obey_the_rule_is_refused(
    rule: UpdateRule, team: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    recipe = regression(rule=rule)
    with pytest.raises(RecipeError, match=sentence) as caught:
        check_team(recipe, Team(**team))
    assert one_sentence(caught.value.message)
    with pytest.raises(RecipeError, match=sentence):
        train(recipe, team=Team(**team), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
