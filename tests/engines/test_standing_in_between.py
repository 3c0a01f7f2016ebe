"""Workers in lockstep that die while all evaluate, save or end are stood in for, too; nobody waits for successors."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from instep.engines.between_steps import BetweenSteps
from instep.engines.sharding import Placement, Sharded
from instep.engines.shared_evaluation import SharedEvaluation
from instep.engines.standing_in import StandIn
from instep.engines.step_facts import StepFacts
from instep.recipe import Recipe, Team
from instep.record import checkpoint
from instep.record.events import ChecksummedEvent, EvaluatedEvent
from instep.team.session import Session
from instep.transport.shared_memory import SharedMemoryGroup
from support import workloads
from support.deaths import STEPS, Deaths, Hooks, after, all_of, before, came_through, run, told, waiting_for_successors
from support.harness import Outcome, stopping_at, train_here

pytestmark = pytest.mark.processes

RECIPES: dict[str, Callable[[], Recipe]] = {
    "gpt": lambda: workloads.gpt(steps=STEPS, evaluate_every=2, checksum_every=2),
    "convnet": lambda: workloads.convnet(steps=STEPS, evaluate_every=2, checksum_every=2),
}
TEAM: dict[str, Any] = {"checkpoint_every": 4, "keep_best": True, "keep": 9}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    known: dict[str, Outcome] = {}

    def of(name: str) -> Outcome:
        if name not in known:
            known[name] = run(RECIPES[name](), 2, tmp_path_factory.mktemp("undisturbed") / "run", **TEAM)
        return known[name]

    return of


def half_a_file(worker: int) -> Hooks:
    """It dies with half of the second checkpoint's weights on the disk."""

    def hooks(deaths: Deaths) -> dict[Any, dict[str, Any]]:
        whole, made = checkpoint.write_weights, [0]

        def half(file: Any, state: Any) -> None:
            made[0] += 1
            if made[0] == 2 and deaths.are_of(worker):
                written = io.BytesIO()
                whole(written, state)
                file.write(written.getvalue()[: written.tell() // 2])
                deaths.at(worker, "half")
            whole(file, state)

        return {checkpoint: {"write_weights": half}}

    return hooks


def telling(kind: type, worker: int) -> Hooks:
    """It dies when the tape has just been told."""

    def hooks(deaths: Deaths) -> dict[Any, dict[str, Any]]:
        emit = Session.emit

        def dying(self: Session, event: Any) -> None:
            emit(self, event)
            if type(event) is kind and event.version == 4:
                self.send_events()
                deaths.at(worker, "told")

        return {Session: {"emit": dying}}

    return hooks


MOMENTS: dict[str, Callable[[int], Hooks]] = {
    "before it tells what it loads first": lambda worker: before(StepFacts, "gather", worker, calls=1),
    "in the first step": lambda worker: before(SharedMemoryGroup, "exchange", worker, calls=1),
    "before it takes checksums": lambda worker: before(Placement, "checksums_by", worker, calls=2),
    "having told how many bytes its checksums are": lambda worker: before(SharedMemoryGroup, "_put", worker, calls=2),
    "before it evaluates": lambda worker: before(SharedEvaluation, "_evaluate", worker, calls=2),
    "having evaluated": lambda worker: after(SharedEvaluation, "_evaluate", worker, calls=2),
    "before what the evaluation comes to is known": lambda worker: before(BetweenSteps, "answer", worker, calls=2),
    "before it gives its state": lambda worker: before(Sharded, "training_state", worker, calls=2),
    "having given its state": lambda worker: after(Sharded, "training_state", worker, calls=2),
    "in the last evaluation": lambda worker: before(SharedEvaluation, "_evaluate", worker, calls=4),
    "at the end": lambda worker: before(BetweenSteps, "meet", worker, calls=1),
    "at the very end": lambda worker: before(BetweenSteps, "meet", worker, calls=2),
}
OF_WORKER_0: dict[str, Hooks] = {
    "having told the tape of an evaluation": telling(EvaluatedEvent, 0),
    "having told the tape of checksums": telling(ChecksummedEvent, 0),
    "before it saves": before(Session, "save", 0, calls=2),
    "with half a file": half_a_file(0),
    "having written all but the manifest": before(checkpoint, "_check_safe", 0, calls=2),
    "having saved": after(Session, "save", 0, calls=2),
    "having marked the best": after(Session, "mark_best", 0, calls=2),
    "saving the last version": before(Session, "save", 0, calls=4),
    "writing its sample": before(Session, "leave", 0, calls=1),
}
QUICK = {
    "before it tells what it loads first 0", "in the first step 1", "having told how many bytes its checksums are 1",
    "before it evaluates 0", "before it gives its state 1", "with half a file", "saving the last version",
    "at the end 1", "writing its sample",
}  # fmt: skip


def cases() -> list[Any]:
    hooks = {f"{moment} {worker}": made(worker) for moment, made in MOMENTS.items() for worker in (0, 1)}
    return [
        pytest.param(each, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, each in {**hooks, **OF_WORKER_0}.items()
    ]


def same_record(outcome: Outcome, other: Outcome) -> None:
    """What the tape, the result and the checkpoints tell of versions, each once."""
    for kind in ("evaluated", "checkpointed", "checksummed"):
        assert [timeless(event) for event in told(outcome, kind)] == [timeless(event) for event in told(other, kind)]
    assert outcome.result["held_out"] == other.result["held_out"]
    assert outcome.result["sample"] == other.result["sample"]
    kept = {path.name: path for path in checkpoint.all_in(outcome.path / "checkpoints")}
    assert kept.keys() == {path.name for path in checkpoint.all_in(other.path / "checkpoints")}
    for path in kept.values():
        manifest, there = checkpoint.verify(path), checkpoint.verify(other.path / "checkpoints" / path.name)
        assert manifest.files[checkpoint.MODEL] == there.files[checkpoint.MODEL]
        assert_alike(checkpoint.load(path), checkpoint.load(other.path / "checkpoints" / path.name))
        assert timeless(manifest.meta["progress"]) == timeless(there.meta["progress"])
    best = [(each.path / "checkpoints" / "best.json").read_bytes() for each in (outcome, other)]
    assert best[0] == best[1]


def assert_alike(one: checkpoint.Loaded, other: checkpoint.Loaded) -> None:
    """All that training goes on with. The bytes of the file depend on which names were one object."""
    (ours, our_tree), (theirs, their_tree) = (pytree.tree_flatten(each.training_state) for each in (one, other))
    assert our_tree == their_tree
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def timeless(table: Any) -> Any:
    """Without times and what they change: the manifest, in which some stand, is part of a checkpoint's bytes."""
    times = ("t_s", "took_s", "bytes", "train_s", "checksum_s")
    return {name: value for name, value in table.items() if name not in times}


@pytest.mark.parametrize("hooks", cases())
def test_a_worker_that_dies_between_two_steps_is_stood_in_for(
    hooks: Hooks, tmp_path: Path, undisturbed: Callable[[str], Outcome]
) -> None:
    outcome = run(RECIPES["gpt"](), 2, tmp_path / "it", hooks, **TEAM)
    came_through(outcome, undisturbed("gpt"), 1)
    same_record(outcome, undisturbed("gpt"))


def once_it_is_to_end(worker: int) -> Hooks:
    """It dies in step 3 when the team was asked to end after it."""

    def hooks(deaths: Deaths) -> dict[Any, dict[str, Any]]:
        until_rows = StandIn.until_rows

        def dying(self: StandIn, step: int, totals: dict[str, int]) -> None:
            while step == 3 and deaths.are_of(worker) and not self._stop_wanted():
                time.sleep(0.001)
            if step == 3:
                deaths.at(worker, "to end")
            until_rows(self, step, totals)

        return {StandIn: {"until_rows": dying}}

    return hooks


@pytest.mark.parametrize("worker", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_that_is_to_stop_does_so_after_the_step_though_a_worker_dies(
    worker: int, tmp_path: Path, undisturbed: Callable[[str], Outcome]
) -> None:
    recipe = RECIPES["gpt"]()
    stopped = run(recipe, 2, tmp_path / "it", once_it_is_to_end(worker), stopping_at(3), restarts=0, **TEAM)
    assert (stopped.result["interrupted"], stopped.result["versions"]) == (True, 4)
    assert len(told(stopped, "left")) == len(told(stopped, "stood_in")) == 1
    assert not any(event["worker"] == worker for event in told(stopped, "joined")[2:]), "no process starts after a stop"
    assert checkpoint.verify(max(checkpoint.all_in(stopped.path / "checkpoints"))).version == 4
    resumed = train_here(recipe, Team(workers=2, **TEAM), stopped.path, resume=True)
    assert resumed.digest == undisturbed("gpt").digest


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["optimizer", "none"])
@pytest.mark.parametrize("workers", [3, 5])
def test_all_but_one_may_die_in_an_evaluation_with_buffers(
    shard: str, workers: int, tmp_path: Path, undisturbed: Callable[[str], Outcome]
) -> None:
    def hooks(deaths: Deaths) -> dict[Any, dict[str, Any]]:
        evaluate, made = SharedEvaluation._evaluate, [0]

        def dying(self: SharedEvaluation, worker: int) -> Any:
            made[0] += 1
            for each in range(workers) if made[0] == 2 else ():
                if each != 1:
                    deaths.at(each, "evaluating")
            return evaluate(self, worker)

        return {SharedEvaluation: {"_evaluate": dying}}

    outcome = run(RECIPES["convnet"](), workers, tmp_path / "it", hooks, restarts=workers, shard=shard, **TEAM)
    came_through(outcome, undisturbed("convnet"), workers - 1)
    same_record(outcome, undisturbed("convnet"))


@pytest.mark.parametrize("worker", [0, 1])
def test_a_successor_knows_all_that_evaluations_have_come_to(
    worker: int, tmp_path: Path, undisturbed: Callable[[str], Outcome]
) -> None:
    dies = all_of(before(SharedEvaluation, "_evaluate", worker, calls=1), waiting_for_successors)
    outcome = run(RECIPES["gpt"](), 2, tmp_path / "it", dies, **TEAM)
    came_through(outcome, undisturbed("gpt"), 1)
    same_record(outcome, undisturbed("gpt"))
    assert [event["worker"] for event in told(outcome, "took_place")] == [worker]
