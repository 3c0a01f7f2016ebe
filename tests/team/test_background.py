"""Checkpoints by the clock, written in the background: of exactly their version, no bit changed, none half there."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from instep.engines.lockstep import Lockstep
from instep.errors import InstepError, RecipeError, ResourceError
from instep.recipe import Recipe, Team
from instep.record import checkpoint, tape
from instep.record.checkpoint import SavedCheckpoint
from instep.record.events import CheckpointedEvent
from instep.team.asking import resized, standing_of
from instep.team.background import BackgroundCheckpoints, KeptCopy
from instep.team.outcome import saved_amid
from instep.team.process import _Keeper
from support import workloads
from support.agents import train_on
from support.deaths import Deaths, Hooks, after, before, run
from support.full_disk import full_disk
from support.harness import Client, Outcome, stopping_at, told, train_here
from support.patience import LONG_S
from support.processes import wait_until
from support.reference import reference_digests
from support.regression import waiting_for
from support.sentences import one_sentence
from support.serving import RULES, at, kill, killed_altogether, replayed
from support.threads import meanwhile

STEPS = 12
ALWAYS, NEVER = 1e-9, 10**6
"""Minutes, and steps, between checkpoints."""

BY_CLOCK: dict[str, Any] = {"checkpoint_minutes": ALWAYS, "checkpoint_every": NEVER, "keep": 0}
"""Of a team."""


def gpt(**changes: Any) -> Recipe:
    return workloads.gpt(**{"steps": STEPS, "evaluate_every": 0, **changes})


def team(**changes: Any) -> Team:
    return Team(**{**BY_CLOCK, **changes})


def aside(outcome: Outcome | Client) -> list[dict[str, Any]]:
    """The events of checkpoints that were written in the background."""
    return [event for event in told(outcome, "checkpointed") if "step_s" in event]


def held(steps: int = 2) -> AbstractContextManager[Any]:
    """Has each be written only when so many more steps are done, or somebody waits for it."""
    settle, begin, write = BackgroundCheckpoints.settle, BackgroundCheckpoints.begin, BackgroundCheckpoints._write
    seen = [0, 0]  # settled so far, and until when the one that is written waits

    def counted(self: BackgroundCheckpoints, *, wait: bool) -> int:
        seen[0] += NEVER if wait else 1
        return settle(self, wait=wait)

    def begun(self: BackgroundCheckpoints, *arguments: Any) -> None:
        seen[1] = seen[0] + steps
        begin(self, *arguments)

    def late(self: BackgroundCheckpoints, arguments: dict[str, Any]) -> None:
        while seen[0] < seen[1]:
            time.sleep(0.001)
        write(self, arguments)

    return mock.patch.multiple(BackgroundCheckpoints, settle=counted, begin=begun, _write=late)


@pytest.fixture(scope="module")
def in_step(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A checkpoint of each version, written in the step's way."""
    return train_here(gpt(), Team(checkpoint_every=1, keep=0), tmp_path_factory.mktemp("in_step") / "run")


def same_content(outcome: Outcome, event: dict[str, Any], in_step: Outcome) -> None:
    """All that the checkpoint holds is what one of this version holds that was written in the step's way."""
    ours, theirs = (checkpoint.load(each.path / "checkpoints" / event["path"]) for each in (outcome, in_step))
    assert (ours.version, ours.digest, ours.fingerprint) == (event["version"], event["digest"], theirs.fingerprint)
    assert ours.digest == theirs.digest == in_step.digests[event["version"]]
    (one, tree), (other, its_tree) = (pytree.tree_flatten(each.training_state) for each in (ours, theirs))
    assert tree == its_tree
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    times = ("train_s", "checksum_s")
    progress = [{k: v for k, v in each.meta["progress"].items() if k not in times} for each in (ours, theirs)]
    assert progress[0] == progress[1]
    assert ours.meta["data"] == theirs.meta["data"]
    assert ours.meta["unlooked"]


@pytest.mark.processes
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_they_hold_exactly_their_version_though_training_went_on(
    workers: int, tmp_path: Path, in_step: Outcome
) -> None:
    with held():
        outcome = train_here(gpt(), team(workers=workers), tmp_path / "run")
    assert outcome.digest == in_step.digest == reference_digests(gpt())[STEPS]
    written = aside(outcome)
    assert len(written) >= 2
    for event in written:
        before = outcome.events[: outcome.events.index(event)]
        made = [each["version"] for each in before if each["kind"] == "merged"]
        assert max(made) >= min(event["version"] + 2, STEPS), (
            "the tape tells of it once it is whole, and training did not wait"
        )
        same_content(outcome, event, in_step)
    versions = [event["version"] for event in told(outcome, "checkpointed")]
    assert versions == sorted(set(versions))
    assert versions[-1] == STEPS, "the last one is written as before, after any other"
    assert replayed(gpt(), outcome.path).same


@pytest.mark.processes
def test_without_minutes_none_is_written_and_with_many_none_is_due(tmp_path: Path) -> None:
    for minutes in (0.0, 60.0):
        outcome = train_here(gpt(steps=3), team(checkpoint_minutes=minutes), tmp_path / f"run-{minutes:g}")
        assert [event["version"] for event in told(outcome, "checkpointed")] == [3]
    with pytest.raises(RecipeError, match=r"'team\.checkpoint_minutes' is -1"):
        Team(checkpoint_minutes=-1)


@pytest.mark.processes
def test_each_is_told_of_once_it_can_be_gone_on_from(tmp_path: Path) -> None:
    seen: list[int] = []

    def look(event: dict[str, Any]) -> None:
        if event["kind"] == "checkpointed":
            newest, problems = checkpoint.newest_sound(tmp_path / "run" / "checkpoints")
            assert newest is not None
            assert (newest.name, problems) == (event["path"], [])
            seen.append(event["version"])

    outcome = train_here(gpt(), team(workers=2, keep=2), tmp_path / "run", client=Client(look))
    assert len(seen) > 2
    left = [path.name for path in (outcome.path / "checkpoints").iterdir() if "step-" in path.name]
    assert sorted(left) == [f"step-{version:08d}" for version in seen[-2:]], "team.keep holds for them too"


@pytest.mark.processes
def test_a_run_that_is_asked_to_end_waits_for_the_one_that_is_being_written(tmp_path: Path, in_step: Outcome) -> None:
    with held(NEVER // 2):
        outcome = train_here(gpt(), team(workers=2), tmp_path / "run", client=stopping_at(4))
    assert outcome.result["interrupted"]
    first, last = told(outcome, "checkpointed")
    assert (first["version"], "step_s" in first, "step_s" in last) == (2, True, False)
    same_content(outcome, first, in_step)
    assert train_here(gpt(), team(workers=3), tmp_path / "run", resume=True).digest == in_step.digest


def dying_in(number: int, worker: int = 0) -> Hooks:
    """The worker dies in the midst of writing its checkpoint of this number in the background, counted from 1."""

    def hooks(deaths: Deaths) -> dict[Any, dict[str, Any]]:
        write_weights, write, made = checkpoint.write_weights, BackgroundCheckpoints._write, [0]

        def counted(self: BackgroundCheckpoints, arguments: dict[str, Any]) -> None:
            made[0] += 1
            write(self, arguments)

        def half(file: Any, state: Any) -> None:
            if made[0] == number:
                file.write(b"half of it")
                deaths.at(worker, "half")
            write_weights(file, state)

        return {BackgroundCheckpoints: {"_write": counted}, checkpoint: {"write_weights": half}}

    return hooks


def all_sound(outcome: Outcome) -> None:
    folder = outcome.path / "checkpoints"
    assert not list(folder.glob(".saving*"))
    for path in checkpoint.all_in(folder):
        checkpoint.verify(path)


@pytest.mark.processes
def test_who_is_killed_while_it_writes_leaves_the_one_before_and_the_run_goes_on_from_it(
    tmp_path: Path, in_step: Outcome
) -> None:
    with held():
        outcome = run(gpt(), 1, tmp_path / "it", dying_in(2), **BY_CLOCK, remember=0)
    first = aside(outcome)[0]
    starts = [event["version"] for event in told(outcome, "run_started")]
    assert starts == [0, first["version"]]
    assert outcome.digest == in_step.digest
    assert len([each for each in told(outcome, "merged") if each["version"] == first["version"] + 1]) == 2
    (why,) = (event["why"] for event in told(outcome, "warned") if "not finished" in event["why"])
    assert one_sentence(why)
    all_sound(outcome)
    assert replayed(gpt(), outcome.path).same


@pytest.mark.processes
def test_others_go_on_in_step_where_worker_0_is_killed_while_it_writes(tmp_path: Path, in_step: Outcome) -> None:
    with held():
        outcome = run(gpt(steps=40), 2, tmp_path / "it", dying_in(2), **BY_CLOCK)
    assert outcome.digest == train_here(gpt(steps=40), Team(), tmp_path / "alone").digest
    assert [event["version"] for event in told(outcome, "run_started")] == [0], "no checkpoint is loaded"
    assert [event["version"] for event in told(outcome, "merged")] == list(range(1, 41))
    all_sound(outcome)


@pytest.mark.processes
@pytest.mark.parametrize("dies", [before, after])
def test_others_go_on_in_step_where_worker_0_is_killed_around_its_copy(
    dies: Callable[..., Hooks], tmp_path: Path, in_step: Outcome
) -> None:
    """All know then that a checkpoint is due, and nobody else copies."""
    with held():
        outcome = run(gpt(), 2, tmp_path / "it", dies(_Keeper, "_keep_aside", 0, calls=2), **BY_CLOCK)
    assert outcome.digest == in_step.digest
    assert [event["version"] for event in told(outcome, "run_started")] == [0], "no checkpoint is loaded"
    assert [event["version"] for event in told(outcome, "merged")] == list(range(1, STEPS + 1))
    assert len(told(outcome, "left")) == 1
    same_content(outcome, aside(outcome)[0], in_step)
    all_sound(outcome)


@pytest.mark.processes
def test_where_another_worker_raises_the_one_that_is_being_written_is_whole_and_told_of(tmp_path: Path) -> None:
    client, look = Client(), Lockstep._compute

    def raising(self: Lockstep, step: int, totals: dict[str, int]) -> None:
        if step == 5 and self.worker == 1:
            raise ValueError("of the user's")
        look(self, step, totals)

    with (
        held(NEVER // 2),
        mock.patch.object(Lockstep, "_compute", raising),
        pytest.raises(InstepError, match="of the user's"),
    ):
        train_here(gpt(), team(workers=2, restarts=0), tmp_path / "run", client=client)
    first, last = told(client, "checkpointed")
    assert ("step_s" in first, last["version"]) == (True, 5)
    folder = tmp_path / "run" / "checkpoints"
    assert [checkpoint.verify(path).version for path in checkpoint.all_in(folder)] == [first["version"], 5]
    assert not list(folder.glob(".saving*"))


@pytest.mark.processes
@pytest.mark.parametrize(("engine", "workers"), [("lockstep", 3), ("lockstep", 1), ("server", 3)])
def test_a_team_that_is_changed_waits_for_the_one_that_is_being_written(
    engine: Any, workers: int, tmp_path: Path, ordered: Callable[[], None]
) -> None:
    path, file = tmp_path / "run", tmp_path / "go on"
    recipe = waiting_for((2, 0, file), steps=5)

    def ask() -> None:
        wait_until(lambda: _computes(path, "step 3, microbatch 0"), LONG_S, "step 3")
        resized(path, workers)
        if engine == "lockstep":
            ordered()

    with meanwhile(ask, file.touch), held(NEVER // 2):
        outcome = train_here(recipe, team(workers=2, engine=engine), path)
    assert outcome.digest == train_here(recipe, Team(), tmp_path / "alone").digest
    assert [(each["before"], each["workers"]) for each in told(outcome, "resized")] == [(2, workers)]
    first = aside(outcome)[0]["version"]
    assert first == (1 if engine == "server" else 2), "in step the first version is tried alone"
    all_sound(outcome)
    assert replayed(recipe, path).same


def _computes(path: Path, what: str) -> bool:
    try:
        return any(each["doing"] == f"computing {what}" for each in standing_of(path)["members"])
    except Exception:  # it is not there yet
        return False


@pytest.mark.processes
def test_a_run_that_was_killed_is_resumed_from_one(tmp_path: Path, in_step: Outcome) -> None:
    who, dies = team(workers=1, restarts=0, remember=0), at("merged", 1, kill(0), version=9)
    with held(1), pytest.raises(InstepError):
        train_here(gpt(), who, tmp_path / "run", client=Client(dies))
    newest, _ = checkpoint.newest_sound(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert checkpoint.read_manifest(newest).version > 1
    resumed = train_here(gpt(), team(workers=3), tmp_path / "run", resume=True)
    assert resumed.events[-1]["digest"] == in_step.digest
    assert next(each["version"] for each in told(resumed, "run_started")) == checkpoint.read_manifest(newest).version


@pytest.mark.processes
def test_a_full_disk_is_warned_of_once_and_training_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    with full_disk(tmp_path, 1 << 17) as disk:  # of the checkpoints alone

        def look(event: dict[str, Any]) -> None:
            if event["kind"] == "merged" and event["version"] == 1:
                folder.rmdir()  # of which nothing is there yet
                folder.symlink_to(disk, target_is_directory=True)

        client = Client(look)
        with pytest.raises(ResourceError, match="No space left"):  # at the end, as before
            train_here(gpt(steps=60), team(workers=2), tmp_path / "run", client=client)
        assert told(client, "merged")[-1]["version"] == 60
        whys = [event["why"] for event in told(client, "warned") if "No space left" in event["why"]]
        assert len(whys) == 1
        assert one_sentence(whys[0])
        assert whys[0].endswith(" is kept; training goes on, and tries it again.")
        newest, problems = checkpoint.newest_sound(folder)
        assert newest is not None
        assert not problems
        assert checkpoint.load(newest).version == aside(client)[-1]["version"]


@pytest.mark.processes
def test_an_error_that_is_no_disks_ends_the_run_as_in_the_steps_way(tmp_path: Path) -> None:
    def broken(self: BackgroundCheckpoints, arguments: dict[str, Any]) -> None:
        arguments["training_state"]["optimizer"] = broken  # which no checkpoint can hold
        write(self, arguments)

    write = BackgroundCheckpoints._write
    with (
        mock.patch.object(BackgroundCheckpoints, "_write", broken),
        pytest.raises(InstepError, match="training state"),
    ):
        train_here(gpt(), team(), tmp_path / "run")


@pytest.mark.processes
def test_under_an_audit_they_are_written_in_the_steps_way(tmp_path: Path, in_step: Outcome) -> None:
    outcome = train_here(gpt(), team(workers=2, audit="50%"), tmp_path / "run")
    assert outcome.digest == in_step.digest
    assert len(told(outcome, "checkpointed")) > 2
    assert not aside(outcome)


@pytest.mark.processes
@pytest.mark.parametrize("rule", ["diloco", "asynchronous"])
def test_under_a_server_too_training_goes_on_and_the_run_is_replayed(rule: str, tmp_path: Path) -> None:
    recipe = gpt(rule=RULES[rule], steps=24)
    with held():
        outcome = train_here(recipe, team(workers=2, engine="server"), tmp_path / "run")
    written = aside(outcome)
    assert len(written) >= 2
    for event in written:
        loaded = checkpoint.load(outcome.path / "checkpoints" / event["path"])
        assert (loaded.version, loaded.digest) == (event["version"], event["digest"])
        assert loaded.meta["ledger"]["version"] == event["version"]
        made = [each["version"] for each in outcome.events[: outcome.events.index(event)] if each["kind"] == "merged"]
        assert max(made) > event["version"]
    assert replayed(recipe, outcome.path).same
    if rule == "diloco":
        alone = train_here(recipe, Team(workers=2, engine="server", checkpoint_every=NEVER), tmp_path / "alone")
        assert outcome.digest == alone.digest


@pytest.mark.processes
@pytest.mark.parametrize("told_of", [True, False])
def test_a_run_under_a_server_that_was_killed_goes_on_from_one_and_is_replayed(told_of: bool, tmp_path: Path) -> None:
    """Also where it was killed before the tape was told."""
    recipe, who, path = gpt(rule=RULES["asynchronous"], steps=24), team(workers=2, engine="server"), tmp_path / "run"
    settle, due = BackgroundCheckpoints.settle, BackgroundCheckpoints.due

    def silent(self: BackgroundCheckpoints, *, wait: bool) -> int:
        return settle(self, wait=wait) if wait else 0

    def once(self: BackgroundCheckpoints) -> bool:
        return not self._version and due(self)

    def late(event: dict[str, Any]) -> bool:
        return event["kind"] == "checkpointed" if told_of else event["kind"] == "merged" and event["version"] >= 20

    changed = {"due": once} if told_of else {"settle": silent}  # else one may be whole, and not yet told of
    with mock.patch.multiple(BackgroundCheckpoints, **changed):
        killed_altogether(recipe, who, path, late)
    resumed = train_here(recipe, who, path, resume=True)
    events = list(tape.read(path / "tape.jsonl"))
    (_, start) = [place for place, event in enumerate(events) if event["kind"] == "run_started"]
    versions = [event["version"] for event in events[:start] if event["kind"] == "checkpointed"]
    assert events[start]["version"] in versions if told_of else not versions
    assert events[start]["version"] > 0
    assert resumed.result["steps"] == 24
    assert replayed(recipe, path).same


@pytest.mark.processes
@pytest.mark.usefixtures("agents_meet_here")
def test_over_hosts_the_others_go_on_where_the_writer_is_killed(tmp_path: Path, in_step: Outcome) -> None:
    killed: list[int] = []

    def dies(pids: dict[int, int]) -> None:
        killed.append(pids[0])
        kill(0)(pids)

    with held(NEVER // 2):
        who, client = team(workers=2, lease_s=60.0), Client(at("merged", 1, dies, version=6))
        outcome, _ = train_on((1, 1), gpt(), who, tmp_path / "run", client=client)
    assert outcome.digest == in_step.digest
    assert killed
    assert [event["version"] for event in told(outcome, "run_started")] == [0]
    all_sound(outcome)


# ---------------------------------------------------------------------------------------------- without processes


KINDS: dict[str, Callable[[], Any]] = {
    "as it is": lambda: torch.randn(5, 3),
    "transposed": lambda: torch.randn(5, 3).t(),
    "a part": lambda: torch.randn(9, 3)[2:6],
    "every second": lambda: torch.randn(8)[::2],
    "of half precision": lambda: torch.randn(7).bfloat16(),
    "complex and conjugated": lambda: torch.randn(4, dtype=torch.complex64).conj(),
    "a number": lambda: torch.tensor(3),
    "empty": lambda: torch.empty(0, 4),
    "weights": lambda: nn.Parameter(torch.randn(2, 2)),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "a table": lambda: {"one": torch.ones(2), "many": [1, (2.5, "text", None)]},
}


@pytest.mark.pure
def test_copies_of_all_kinds_are_what_was_and_take_the_memory_of_those_before() -> None:
    torch.manual_seed(0)
    training = {kind: make() for kind, make in KINDS.items()}
    tied = torch.randn(3)
    model, kept = {"one": tied, "two": tied}, KeptCopy()
    places = []
    for number in range(3):
        expected = {kind: value.clone() if isinstance(value, Tensor) else value for kind, value in training.items()}
        first = tied.clone()
        found_model, found, meta = kept.of(model, training, {"number": number, "more": []})
        tied.add_(1)
        training["as it is"].add_(1)
        assert torch.equal(found_model["one"], first)
        assert found_model["two"] is found_model["one"], "what is one in memory stays one"
        assert meta == {"number": number, "more": []}
        for kind, value in expected.items():
            if isinstance(value, Tensor):
                assert type(found[kind]) is type(training[kind])
                assert (found[kind].dtype, found[kind].layout) == (value.dtype, value.layout)
                assert torch.equal(found[kind].to_dense(), value.to_dense()), kind
            else:
                assert found[kind]["many"] == value["many"]
        places.append({kind: each.data_ptr() for kind, each in found.items() if kind in ("as it is", "transposed")})
    assert places[0] == places[1] == places[2]
    assert found["as it is"].stride() == training["as it is"].stride()
    assert found["transposed"].stride() == training["transposed"].stride()


@pytest.mark.pure
def test_one_is_due_so_many_minutes_after_the_last_or_the_start_or_the_newest_that_is_there(tmp_path: Path) -> None:
    now, emitted = [0.0], list[Any]()

    def of(minutes: float) -> BackgroundCheckpoints:
        return BackgroundCheckpoints(minutes, tmp_path, lambda: now[0], emitted.append)

    here = of(0.5)
    assert not here.due()
    now[0] = 29.9
    assert not here.due()
    now[0] = 30.0
    assert here.due()
    here.saved()
    assert not here.due()
    now[0] = 60.0
    assert here.due()
    assert not of(0.0).due()
    newest = tmp_path / "step-00000007"
    newest.mkdir()
    os.utime(newest, (time.time() - 20,) * 2)
    assert not of(0.5).due(), "a successor goes on with the minutes of who wrote that"
    os.utime(newest, (time.time() - 40,) * 2)
    assert of(0.5).due()
    now[0] = 10.0
    assert not of(0.5).due(), "the run goes on since 10 s, whatever a session of before has written"
    (tmp_path / ".saving-step-00000009").mkdir()
    here.tell_unfinished(but=9)
    assert not emitted
    here.tell_unfinished()
    here.tell_unfinished()
    (event,) = emitted
    assert event.why.startswith("the checkpoint of version 9 was not finished, for ")
    assert one_sentence(event.why)


@pytest.mark.pure
def test_a_disk_that_is_slower_than_the_minutes_is_told_of_once_and_none_is_due_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, emitted = [10.0], list[Any]()

    def save(folder: Path, *, version: int, **_: Any) -> SavedCheckpoint:
        now[0] += 90.0
        if version == 3:
            error = OSError(errno.ENOSPC, "full")
            raise ResourceError(f"the checkpoint cannot be saved: {error.strerror}.")
        return SavedCheckpoint(folder / f"step-{version:08d}", 10, "d")

    monkeypatch.setattr(checkpoint, "save", save)
    background = BackgroundCheckpoints(1, tmp_path, lambda: now[0], emitted.append)
    for version in (1, 2, 3, 3, 4):
        about = {"version": version, "meta": {}, "fingerprint": "", "keep": 0}
        background.begin({"w": torch.ones(2)}, {}, about, now[0] - 0.5)
        assert not background.due()
        assert background.settle(wait=True) == (version if version != 3 else 0)
        assert background.settle(wait=True) == 0
        assert background.due()
    kinds = [type(event).__name__ for event in emitted]
    assert kinds == ["WarnedEvent", "CheckpointedEvent", "CheckpointedEvent", "WarnedEvent", "CheckpointedEvent"]
    assert emitted[0].why.startswith("a checkpoint was whole 90 s after it was begun, and ")
    assert emitted[3].why == "the checkpoint cannot be saved: full; training goes on, and tries it again."
    assert all(one_sentence(emitted[each].why) for each in (0, 3))
    assert emitted[1].cpu_s >= 0


@pytest.mark.pure
def test_a_team_that_changes_at_a_checkpoint_waits_for_one_of_the_present_version() -> None:
    run = SimpleNamespace(recipe_table={"steps": 9})
    saved = CheckpointedEvent(version=3, path="step-00000003", bytes=1, digest="d")
    assert saved_amid(saved, run)  # type: ignore[arg-type]
    assert not saved_amid(replace(saved, step_s=0.1), run)  # type: ignore[arg-type]
    assert not saved_amid(replace(saved, version=9), run)  # type: ignore[arg-type]
