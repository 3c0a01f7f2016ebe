"""A run trains in its own folder and from its own checkpoints: what was moved or mixed up is a sentence."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from instep.errors import CheckpointError, RecordError
from instep.offline.tape_replay import replay
from instep.recipe import Recipe, Team
from instep.record import checkpoint, tape
from instep.record.folder import RunFolder, digest
from instep.rules.presets import parse
from support.harness import Client, train_here

pytestmark = pytest.mark.processes

TEAM = Team(workers=2, checkpoint_every=2)


def numbers() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(40, 3, generator=generator), torch.randn(40, 1, generator=generator))


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum()


def small(rule: str = "synchronous", steps: int = 8) -> Recipe:
    return Recipe(
        model=lambda: nn.Linear(3, 1), objective=squares, data=numbers, batch=8, microbatches=4, steps=steps,
        rule=parse(rule),
    )  # fmt: skip


def after(version: int, act: Callable[[], Any]) -> Client:
    """Acts at the first checkpoint of this version or a later one."""
    acted: list[bool] = []

    def see(event: dict[str, Any]) -> None:
        if event["kind"] == "checkpointed" and event["version"] >= version and not acted:
            acted.append(True)
            act()

    return Client(see)


def delete(folder: Path) -> None:
    """As `rm -rf`, again where a checkpoint that is being written put something into a folder that was just emptied."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def move_and_replace(run: Path) -> None:
    run.rename(run.with_name("moved"))
    run.mkdir()
    (run / "checkpoints").mkdir()


@pytest.mark.parametrize("rule", ["synchronous", "bounded_staleness:1"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_whose_folder_is_moved_ends_and_goes_on_where_it_lies(rule: str, replaced: bool, tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    act = (lambda: move_and_replace(run)) if replaced else (lambda: run.rename(moved))
    with pytest.raises(RecordError, match=f"folder {run} was moved to {moved} while .*; resume it from {moved}, where"):
        train_here(small(rule), TEAM, run, client=after(4, act))
    left = sorted(path.name for path in run.rglob("*")) if run.exists() else None
    assert left == (["checkpoints"] if replaced else None)
    outcome = train_here(small(rule), TEAM, moved, resume=True)
    assert outcome.events[0]["kind"] in ("joined", "warned", "run_started")
    started = next(event for event in outcome.events if event["kind"] == "run_started")
    assert started["version"] >= 4
    found = replay(small(rule), tape.read(moved / "tape.jsonl"))
    assert (found.same, found.digest) == (True, outcome.digest)


@pytest.mark.parametrize("rule", ["synchronous", "asynchronous"])
def test_a_run_whose_folder_is_deleted_ends_and_is_not_born_again(rule: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    with pytest.raises(RecordError, match=f"folder {run} was deleted while the run trained in it, .* start it again"):
        train_here(small(rule), TEAM, run, client=after(2, lambda: delete(run.parent)))
    assert not run.parent.exists()


def test_a_checkpoint_of_another_run_is_passed_over(tmp_path: Path) -> None:
    """Of the same recipe, so that its fingerprint is the same."""
    recipe = small("asynchronous", steps=12)
    runs = [train_here(recipe, Team(workers=2, checkpoint_every=4), tmp_path / name) for name in "ab"]
    newest = max((tmp_path / "b" / "checkpoints").glob("step-*"))
    shutil.rmtree(newest)
    shutil.copytree(tmp_path / "a" / "checkpoints" / newest.name, newest)
    with pytest.raises(CheckpointError, match="ended at version"):
        digest(tmp_path / "b")
    outcome = train_here(dataclasses.replace(recipe, steps=16), TEAM, tmp_path / "b", resume=True)
    (why,) = [event["why"] for event in outcome.events if event["kind"] == "warned"]
    other = RunFolder(tmp_path / "a").about()
    assert other is not None
    assert f"the checkpoint {newest} is of another run ({other.id}), so it is passed over;" in why
    found = replay(recipe, tape.read(tmp_path / "b" / "tape.jsonl"))
    assert found.same, found.divergence
    assert runs[0].path.exists()


def test_a_checkpoint_that_the_tape_knows_otherwise_is_passed_over(tmp_path: Path) -> None:
    """As in a run of an earlier version, whose checkpoints name no run."""
    recipe = small(steps=4)
    train_here(recipe, TEAM, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    newest, problems = folder.newest_checkpoint()
    assert newest is not None
    assert not problems
    loaded = checkpoint.load(newest)
    meta = {key: value for key, value in loaded.meta.items() if key != "run"}
    state = {name: tensor + 1 for name, tensor in loaded.model_state.items()}
    checkpoint.save(
        folder.checkpoints, version=loaded.version, model_state=state, training_state=loaded.training_state, meta=meta,
        fingerprint=loaded.fingerprint, keep=0,
    )  # fmt: skip
    older, problems = folder.newest_checkpoint()
    assert older is not None
    assert older.name == "step-00000002"
    assert "and the tape of the run says" in problems[0]
    shutil.rmtree(older)
    with pytest.raises(CheckpointError, match="no checkpoint in .* is sound, so the run cannot be resumed") as caught:
        train_here(recipe, TEAM, folder.path, resume=True)
    assert "and the tape of the run says" in caught.value.detail


def test_a_run_without_an_id_is_resumed_and_replayed(tmp_path: Path) -> None:
    recipe, run = small("asynchronous", steps=4), tmp_path / "run"
    RunFolder.create(run)
    train_here(recipe, TEAM, run, resume=True)
    (newest, _) = RunFolder(run).newest_checkpoint()
    assert newest is not None
    assert "run" not in checkpoint.read_manifest(newest).meta
    train_here(dataclasses.replace(recipe, steps=6), TEAM, run, resume=True)
    events = list(tape.read(run / "tape.jsonl"))
    assert events[0]["run"] is None
    for event in events:
        if event["kind"] == "run_started":
            del event["run"], event["digest"]
    assert replay(recipe, events).same


@pytest.mark.parametrize("rule", ["synchronous", "asynchronous"])
def test_the_tape_names_the_run_and_the_weights_that_it_starts_from(rule: str, tmp_path: Path) -> None:
    recipe, run = small(rule, steps=2), tmp_path / "run"
    train_here(recipe, TEAM, run)
    train_here(dataclasses.replace(recipe, steps=4), TEAM, run, resume=True)
    events = list(tape.read(run / "tape.jsonl"))
    starts = [event for event in events if event["kind"] == "run_started"]
    about = RunFolder(run).about()
    assert about is not None
    assert [start["run"] for start in starts] == [about.id] * 2
    assert starts[1]["digest"] == next(e["digest"] for e in events if e["kind"] == "run_ended")
    starts[0]["digest"] = "0" * 64
    found = replay(recipe, events)
    assert not found.same
    assert "the start at version 0 has other weights here than in the run" in found.divergence
