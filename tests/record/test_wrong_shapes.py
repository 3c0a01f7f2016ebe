"""Files that are valid and well hashed, but not as they were written: readers say so, or read them right.

Each key of a good file is taken away or given a value of another kind, one at a time.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from instep import api as alone
from instep.api import Run
from instep.cli import train as train_command
from instep.errors import CheckpointError, InstepError, RecordError
from instep.offline.tape_replay import replay
from instep.recipe import Recipe, Team
from instep.recipe_files import read_saved
from instep.record import best, checkpoint, tape
from instep.record.checkpoint import MANIFEST, MODEL, TRAINING
from instep.record.folder import RunFolder, digest
from instep.record.resuming import recorded, resumed, saved
from instep.record.shapes import NUMBER, SPAN, Maybe, misfit, one_of, whole
from instep.rules.ledger_state import resumed_ledger
from instep.rules.presets import parse
from instep.rules.work import Pieces
from instep.worker.milestones import Progress
from instep.worker.replica import Replica
from instep.worker.updates import Merger
from support.harness import train_here
from support.kinds import quick

pytestmark = pytest.mark.processes

STRANGE: list[Any] = [
    None, True, -1, 0, 7, 10**30, 1.5, float("nan"), "", "x", [], [[]], [None], {}, {"a": 1}, {"version": "x"},
]  # fmt: skip


def changes(value: Any, depth: int, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Each place in `value` down to `depth`, with what to put there; `...` takes it away."""
    for strange in STRANGE:
        yield path, strange
    if path:
        yield path, ...
    if depth and isinstance(value, dict):
        for key, item in value.items():
            yield from changes(item, depth - 1, (*path, key))
    if depth and isinstance(value, list) and value:
        yield from changes(value[0], depth - 1, (*path, 0))


def changed(value: Any, path: tuple[Any, ...], strange: Any) -> Any:
    if not path:
        return copy.deepcopy(strange)
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if strange is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = copy.deepcopy(strange)
    return value


def some(value: Any, count: int, depth: int = 4) -> list[tuple[tuple[Any, ...], Any]]:
    every = list(changes(value, depth))
    return random.Random(0).sample(every, min(count, len(every)))


def reads(*readers: Callable[[], Any]) -> int:
    """How many of the readers say something; none may raise anything but one sentence."""
    said = 0
    for reader in readers:
        try:
            reader()
        except InstepError as error:
            sentence, said = error.message, said + 1
            if not (sentence.endswith((".", "?")) and "\n" not in sentence and len(sentence) < 900):
                raise AssertionError(sentence) from error
    return said


def numbers() -> tuple[TensorDataset, TensorDataset]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 3, generator=generator), torch.randn(24, 1, generator=generator)
    return TensorDataset(x[:16], y[:16]), TensorDataset(x[16:], y[16:])


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))


def recipe(rule: str) -> Recipe:
    return Recipe(
        model=net, objective=squares, data=numbers, batch=8, microbatches=2, steps=4, rule=parse(rule),
        evaluate_every=2, checksum_every=2,
    )  # fmt: skip


RULES = ["synchronous", "asynchronous", "async_diloco:2"]


@pytest.fixture(scope="module", params=RULES)
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    path = tmp_path_factory.mktemp("good") / "run"
    given = recipe(request.param)
    train_here(given, Team(workers=2, checkpoint_every=2), path)
    torch.set_num_threads(1)
    return given, path


@pytest.fixture
def run(good: tuple[Recipe, Path], tmp_path: Path) -> tuple[Recipe, RunFolder]:
    shutil.copytree(good[1], tmp_path / "run")
    return good[0], RunFolder(tmp_path / "run")


def test_a_tape_of_strange_values_is_a_sentence_or_is_read_right(run: tuple[Recipe, RunFolder]) -> None:
    given, folder = run
    events = [json.loads(line) for line in folder.tape_path.read_text().splitlines()]
    kinds = {event["kind"]: place for place, event in enumerate(events)}
    whole = replay(given, events)
    assert whole.same
    said, count = 0, 0
    for place in kinds.values():
        for path, strange in some(events[place], 7):
            lines = [*events[:place], changed(events[place], path, strange), *events[place + 1 :]]
            folder.tape_path.write_text("".join(json.dumps(line) + "\n" for line in lines))

            tape.told(folder.tape_path)
            said += reads(
                lambda: replay(given, list(tape.read(folder.tape_path))),
                lambda: alone.recorded_times(folder, 2),
                lambda: tape.latest(tape.read(folder.tape_path)),
            )
            count += 1
    assert said > count / 4


def test_a_manifest_of_strange_values_is_a_sentence_or_is_read_right(run: tuple[Recipe, RunFolder]) -> None:
    given, folder = run
    newest, _ = folder.newest_checkpoint()
    assert newest is not None
    table = json.loads((newest / MANIFEST).read_bytes())
    del table["sha256"]
    loads = loader(given, newest)
    loads()
    said, cases = 0, some(table, 150, depth=5)
    for path, strange in cases:
        if path == ():
            continue
        (newest / MANIFEST).write_bytes(checkpoint._manifest_bytes(changed(table, path, strange)))
        said += reads(loads, lambda: digest(newest), lambda: checkpoint.steps_done(newest))
    assert said > len(cases) / 4


def loader(given: Recipe, path: Path) -> Callable[[], None]:
    """What a resume reads of a checkpoint, in one process."""
    replica = Replica(given, "cpu")

    def load() -> None:
        found = checkpoint.load(path)
        Progress.resumed(found, given)
        pieces = Pieces(given.rule, found.meta.get("cut", 2), given.microbatches, given.steps)
        Merger(replica, pieces).load(found.model_state, found.training_state)
        if "ledger" in found.meta:
            resumed_ledger(pieces, found.meta, found.version)

    return load


def test_a_training_state_of_strange_values_is_a_sentence_or_is_read_right(run: tuple[Recipe, RunFolder]) -> None:
    given, folder = run
    newest, _ = folder.newest_checkpoint()
    assert newest is not None
    state = torch.load(newest / TRAINING, weights_only=True)
    loads = loader(given, newest)
    for path, strange in some(state, 60):
        write_training(newest, changed(state, path, strange))
        reads(loads)
    for strange in STRANGE:
        write_training(newest, strange)
        assert reads(loads) == 1


def write_training(path: Path, state: Any) -> None:
    torch.save(state, path / TRAINING)
    data = (path / TRAINING).read_bytes()
    table = json.loads((path / MANIFEST).read_bytes())
    table["files"][TRAINING] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    del table["sha256"]
    (path / MANIFEST).write_bytes(checkpoint._manifest_bytes(table))


@pytest.mark.parametrize("good", RULES[:1], indirect=True)
def test_small_files_of_strange_values_are_a_sentence_or_are_read_right(run: tuple[Recipe, RunFolder]) -> None:
    given, folder = run
    marks, result = folder.checkpoints / best.NAME, folder.read_result()
    finished = Run(folder.path, result, given)
    for file, readers in (
        (marks, [lambda: best.read(folder.checkpoints), lambda: finished.state_dict(best=True)]),
        (folder.result_path, [folder.read_result, lambda: digest(folder.path)]),
        (folder.about_path, [folder.about, folder.newest_checkpoint]),
    ):
        table = json.loads(file.read_bytes())
        for path, strange in changes(table, 2):
            file.write_text(json.dumps(changed(table, path, strange)))
            reads(*readers)
        file.write_text(json.dumps(table))


@pytest.mark.parametrize("good", RULES[:1], indirect=True)
@pytest.mark.parametrize("most", quick([120, 800], 120))
def test_a_recipe_file_of_strange_values_is_a_sentence_or_is_read_right(
    most: int, run: tuple[Recipe, RunFolder]
) -> None:
    given, folder = run
    parts = {"model": "torch.nn:Identity", "objective": "math:sin", "data": "math:cos"}
    addressed = dataclasses.replace(given, **parts, artifacts={"use": "math:tan", "args": {}})
    table = {**addressed.to_table(), "team": read_saved(folder.recipe_path)["team"]}
    for path, strange in [*some(table, most, depth=3), *(((key,), ...) for key in table)]:
        if not path:
            continue
        try:
            folder.recipe_path.write_text(tomli_w.dumps(changed(table, path, strange)))
        except (TypeError, ValueError):  # no TOML
            continue
        reads(
            lambda: resumed(folder, None, saved(folder, None, None, "")[0], ()),
            lambda: resumed(folder, addressed, saved(folder, addressed, None, "")[0], ()),
            lambda: recorded(folder, None, saved(folder, None, None, "")[0]),
            lambda: train_command._saved(folder.path, None, []),
        )  # fmt: skip


@pytest.mark.parametrize("good", RULES[:1], indirect=True)
@pytest.mark.parametrize("files", [{}, {MODEL: 1}, {TRAINING: 1}])
def test_a_manifest_that_verifies_nothing_does_not_pass(files: dict[str, int], run: tuple[Recipe, RunFolder]) -> None:
    newest, _ = run[1].newest_checkpoint()
    assert newest is not None
    table = json.loads((newest / MANIFEST).read_bytes())
    table["files"] = {name: table["files"][name] for name in files}
    del table["sha256"]
    (newest / MANIFEST).write_bytes(checkpoint._manifest_bytes(table))
    with pytest.raises(CheckpointError, match=r"manifest\.json does not tell of \S+, so nothing could be verified"):
        checkpoint.verify(newest)


@pytest.mark.parametrize("good", RULES[:1], indirect=True)
def test_a_resume_beside_a_damaged_best_mark_says_what_to_do(run: tuple[Recipe, RunFolder]) -> None:
    given, folder = run
    (folder.checkpoints / best.NAME).write_text('{"version": "3", "objective": 1.0}')
    longer = dataclasses.replace(given, steps=6)
    with pytest.raises(RecordError, match="'version' is '3', and it must be a whole number from 0; restore it"):
        train_here(longer, Team(workers=2), folder.path, resume=True)
    (folder.checkpoints / best.NAME).unlink()
    train_here(longer, Team(workers=2), folder.path, resume=True)


def test_shapes_say_what_is_wrong() -> None:
    assert misfit(3, whole(5)) == "it is 3, and it must be a whole number from 5"
    assert misfit(True, whole()) == "it is True, and it must be a whole number from 0"
    assert misfit(2**64, NUMBER) == "it is a number beyond 64 bits, and it must be a finite number"
    assert misfit(None, Maybe(NUMBER)) is None
    assert misfit([2, 1], SPAN) == "it is [2, 1], and it must be [start, stop]"
    assert misfit("c", one_of("a", "b")) == "it is 'c', and it must be one of 'a', 'b'"


# What a replay compares


def test_a_replay_compares_what_the_tape_says_of_each_update(run: tuple[Recipe, RunFolder]) -> None:
    given, folder = run
    events = list(tape.read(folder.tape_path))
    found = replay(given, events)
    updates = len(tape.latest(events))
    serving = given.rule.name != "synchronous"
    pushed = sum(event["kind"] == "pushed" for event in events) if serving else 0
    saved_at = sum(event["kind"] == "checkpointed" for event in events)
    sums = [
        each for event in events if event["kind"] == "checksummed" for each in (event["weights"], event["optimizer"])
    ]
    assert bool(sums) == (not serving)
    assert dataclasses.astuple(found.proof) == (saved_at, updates, pushed, sum(map(len, sums)))
    for name, other, words in (
        ("objective", 0.5, "its objective is 0.5 on the tape and "),
        ("lr", 0.5, "its learning rate is 0.5 on the tape and "),
        ("items", 3, "its count of items is 3 on the tape and "),
        ("staleness", [99], "its staleness of contribution"),
    ):
        if name == "staleness" and not serving:
            continue
        lying = copy.deepcopy(events)
        merged = next(event for event in lying if event["kind"] == "merged")
        merged[name] = other * len(merged[name]) if name == "staleness" else other
        found = replay(given, lying)
        assert not found.same
        assert found.digest == found.recorded
        assert re.match(
            f"version {merged['version']}: {words}.*; the last weights are those of the run", found.divergence
        )


@pytest.mark.parametrize("good", RULES[1:2], indirect=True)
def test_a_replay_compares_what_the_tape_says_of_each_contribution(run: tuple[Recipe, RunFolder]) -> None:
    given, folder = run
    for name, add in (("items", 1), ("piece", 1), ("version", 1)):
        events = list(tape.read(folder.tape_path))
        pushed = next(event for event in events if event["kind"] == "pushed")
        pushed[name] += add
        found = replay(given, events)
        assert not found.same
        who = f"the contribution {pushed['seq']} of worker {pushed['worker']}"
        assert found.divergence.startswith(f"{who}: its {name} is {pushed[name]} on the tape")
