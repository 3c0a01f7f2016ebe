"""What a resume may change: it holds from there on, for any team, in later resumes, restarts and replays."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from instep.api import train
from instep.data.cursor import Cursor
from instep.errors import CheckpointError, DataError, RecipeError
from instep.recipe import Recipe, Team, parse
from instep.recipe_files import read_saved
from instep.record import tape
from instep.record.folder import RunFolder
from instep.record.resuming import as_last_changed, resumed
from instep.schedule import Change, Phase, Schedule
from instep.watch import Watch
from support.harness import Client, train_here
from support.kinds import quick
from support.resuming import again, begin, data, go_on, linear, recipe
from support.sentences import one_sentence
from support.serving import RULES, at, kill

pytestmark = pytest.mark.processes


def rates(path: Path) -> list[float]:
    return [event["lr"] for event in tape.latest(tape.read(path / "tape.jsonl"))]


CHANGES: dict[str, dict[str, Any]] = {
    "schedule": {"schedule": Schedule(warmup_steps=9, scale=0.5)},
    "lr": {"optimizer": functools.partial(torch.optim.Adam, lr=0.01)},
    "watch": {"watch": Watch(bad_batch="skip", spike="skip", window=3)},
}


@pytest.mark.parametrize("what", quick(["lr", "skip_samples", "schedule", "watch"], "lr"))
def test_a_change_holds_from_there_on_for_any_team(what: str, tmp_path: Path) -> None:
    """Resumed at 5 with 1, 2 and 3 workers, interrupted again at 8, and in one go by a recipe that says so."""
    change, skip = CHANGES.get(what, {}), (3, 17) if what == "skip_samples" else ()
    changed = dataclasses.replace(recipe(), **change)
    digests = set()
    for workers in (1, 2, 3):
        path = tmp_path / str(workers)
        begin(path, recipe(), Team(workers=workers), 5)
        go_on(path, changed, Team(workers=4 - workers), skip, steps=8)
        run = go_on(path, changed, Team(workers=workers))
        assert again(path, changed).same
        digests.add(run.digest)
        (known,) = parse({k: v for k, v in read_saved(path / "recipe.toml").items() if k != "team"})[0].changes
        assert known.version == 5
    field = {"lr": {"lr": 0.01}, "skip_samples": {"skip_samples": skip}}.get(what, change)
    whole = recipe(changes=(Change(version=5, **field),))
    digests.add(train_here(whole, Team(workers=2), tmp_path / "whole").digest)
    assert len(digests) == 1
    plain = train_here(recipe(), Team(), tmp_path / "plain")
    assert (plain.digest in digests) == (what == "watch")
    assert rates(tmp_path / "1")[:5] == [0.05] * 5
    if what in ("schedule", "lr"):
        assert rates(tmp_path / "1")[5] < 0.05


def test_a_change_is_undone_by_another(tmp_path: Path) -> None:
    path, slower = tmp_path / "run", dataclasses.replace(recipe(), **CHANGES["lr"])
    begin(path, recipe(), Team(), 3)
    go_on(path, slower, Team(), steps=6)
    go_on(path, recipe(), Team(workers=2), steps=9)
    go_on(path, slower, Team())
    assert rates(path) == [0.05] * 3 + [0.01] * 3 + [0.05] * 3 + [0.01] * 3
    assert again(path, recipe()).same


def test_a_restart_from_before_a_change_does_not_know_it_yet(tmp_path: Path) -> None:
    """The checkpoint that a change was made at is damaged: the steps before it are done again as they were."""
    path, slower = tmp_path / "run", dataclasses.replace(recipe(), **CHANGES["schedule"])
    begin(path, recipe(), Team(checkpoint_every=3), 5)
    go_on(path, slower, Team(checkpoint_every=100), steps=7)
    for version in (5, 7):
        (path / f"checkpoints/step-{version:08d}/training.pt").write_bytes(b"")
    run = go_on(path, slower, Team(workers=2))
    whole = recipe(changes=(Change(version=5, **CHANGES["schedule"]),))
    assert run.digest == train_here(whole, Team(), tmp_path / "whole").digest
    assert again(path, slower).same


def test_a_restart_after_a_death_knows_the_changes(tmp_path: Path) -> None:
    path, slower = tmp_path / "run", dataclasses.replace(recipe(), **CHANGES["schedule"])
    begin(path, recipe(), Team(workers=2), 5)
    run = go_on(path, slower, Team(workers=2), (3,), client=Client(at("merged", 2, kill(1))))
    assert run.result["restarts"] == 1
    whole = recipe(changes=(Change(version=5, skip_samples=(3,), **CHANGES["schedule"]),))
    assert run.digest == train_here(whole, Team(), tmp_path / "whole").digest
    assert again(path, slower).same


@pytest.mark.parametrize("rule", quick([rule for rule in RULES if rule != "synchronous"], "asynchronous", "local_sgd"))
def test_a_change_holds_and_replays_under_every_rule(rule: str, tmp_path: Path) -> None:
    path, first = tmp_path / "run", recipe(rule=RULES[rule])
    begin(path, first, Team(workers=2), 4)
    changed = dataclasses.replace(first, **CHANGES["schedule"])
    run = go_on(path, changed, Team(workers=3), (3, 17))
    assert run.result["steps"] == 12
    assert again(path, changed).same


def test_samples_that_are_left_out_make_their_batches_smaller_and_change_no_others() -> None:
    cursor = Cursor(samples=40, batch=8, microbatches=4, seed=0)
    left = dataclasses.replace(cursor, skipped=frozenset({3, 17}))
    for step in range(10):
        assert left.indices(step) == [index for index in cursor.indices(step) if index not in (3, 17)]
        pieces = [left.microbatch(step, m) for m in range(4)]
        assert list(itertools.chain(*pieces)) == left.indices(step)
        assert [len(piece) for piece in pieces] == [left.microbatch_size(step, m) for m in range(4)]
        assert left.size(step) == len(left.indices(step))
    none = dataclasses.replace(cursor, skipped=frozenset(cursor.indices(2)))
    assert [none.microbatch(2, m) for m in range(4)] == [[]] * 4


def test_a_sample_that_cannot_be_left_out_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"skip_samples \(--skip-samples\) holds 48, and the 48 samples are counted from 0"
    ):
        train_here(recipe(changes=(Change(version=0, skip_samples=(48,)),)), Team(), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"skip_samples \(--skip-samples\) holds -1"):
        Change(version=0, skip_samples=(-1,))


def patient(**watch: Any) -> Recipe:
    return recipe(steps=60, evaluate_every=2, evaluate_samples=None, watch=Watch(**watch), schedule=Schedule())


def test_an_early_stop_can_be_gone_past(tmp_path: Path) -> None:
    """More patience goes on as if it had been there from the start; without a change the run stays ended."""
    path = tmp_path / "run"
    stopped = train_here(patient(patience=2), Team(workers=2), path)
    assert stopped.result["stopped"]
    assert stopped.result["steps"] < 60
    same = go_on(path, patient(patience=2), Team())
    assert same.digest == stopped.digest
    assert same.result["steps"] == stopped.result["steps"]
    more = go_on(path, patient(patience=5), Team(workers=3))
    whole = train_here(patient(patience=5), Team(), tmp_path / "whole")
    assert more.result["steps"] == whole.result["steps"] > stopped.result["steps"]
    assert more.digest == whole.digest
    assert go_on(path, patient(), Team()).result["steps"] == 60
    assert again(path, patient()).same


def test_what_rewrites_the_past_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    begin(path, recipe(), Team(), 5)
    others = [
        {"clip_norm": 1.0}, {"batch": 16}, {"seed": 1}, {"optimizer": functools.partial(torch.optim.SGD, lr=0.05)},
        {"optimizer": functools.partial(torch.optim.Adam, lr=0.05, eps=1e-3)}, {"optimizer": torch.optim.Adam},
    ]  # fmt: skip
    for other in others:
        with pytest.raises(CheckpointError, match="steps, schedule .*, watch and one optimizer's lr may change"):
            go_on(path, dataclasses.replace(recipe(), **other), Team())


@pytest.mark.parametrize(("kind", "warned"), [("cosine", 1), ("wsd", 1), ("constant", 0)])
def test_a_prolonged_schedule_that_jumps_is_warned_of(kind: Any, warned: int, tmp_path: Path) -> None:
    short = recipe(steps=6, schedule=Schedule(kind=kind, final=0.0 if kind != "constant" else 0.1))
    train_here(short, Team(), tmp_path / "run")
    table = read_saved(tmp_path / "run/recipe.toml")
    table.pop("team")
    same, notices = resumed(RunFolder(tmp_path / "run"), dataclasses.replace(short, steps=12), table)
    assert same.changes == ()
    assert len(notices) == warned
    assert all("the learning rate jumps from 0 to" in notice and "at step 7" in notice for notice in notices)


def test_a_program_without_a_monitor_is_warned_of_other_rates_and_one_with_a_monitor_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, path = recipe(steps=6), tmp_path / "run"
    train_here(given, Team(), path)
    monkeypatch.setattr("instep.api._trained", lambda *wanted: None)  # nothing is to be trained here

    def told(changed: Recipe | None, **more: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)  # not what a collection of garbage has to say
            train(changed, resume=path, **more)
        assert [each.filename for each in caught] == [__file__] * len(caught)
        return [str(each.message) for each in caught]

    slower = dataclasses.replace(given, optimizer=functools.partial(torch.optim.Adam, lr=0.01), steps=8)
    scaled = dataclasses.replace(given, schedule=dataclasses.replace(given.schedule, scale=0.5))
    for changed, words in (slower, "learning rate 0.01"), (scaled, "schedule.scale 0.5"):
        (sentence,) = told(changed)
        assert sentence.startswith(f"{path} goes on from version 6 with {words}, as the given recipe says; to go on as")
        assert one_sentence(sentence)
    assert told(slower, monitors=[lambda event: None]) == []
    assert told(given) == told(None) == told(None, skip_samples=[1]) == []
    jumping = dataclasses.replace(given, steps=12, schedule=Schedule(kind="cosine"))
    train_here(dataclasses.replace(jumping, steps=6), Team(), tmp_path / "cosine")
    path = tmp_path / "cosine"
    assert [each.partition(" from ")[0] for each in told(jumping)] == ["the learning rate jumps"]


def test_changes_are_tables_that_can_be_read_back_and_leave_no_trace_where_there_are_none() -> None:
    named = recipe(model="m:Model", data="m:data", objective="m:objective", optimizer="m:optimizer")
    assert "changes" not in named.to_table()
    changes = (
        Change(version=3, schedule=Schedule(kind="cosine"), skip_samples=(5, 2)),
        Change(version=7, watch=Watch(patience=None), lr=1),  # type: ignore[arg-type]
    )
    changed = dataclasses.replace(named, changes=changes)
    assert parse(changed.to_table())[0] == changed
    assert changed.fingerprints()[0] == named.fingerprint()
    assert changed.fingerprints()[-1] == changed.fingerprint()
    assert len(set(changed.fingerprints())) == 3
    assert changed.phase(2) == Phase(named.schedule, named.watch)
    assert changed.phase(3) == Phase(Schedule(kind="cosine"), named.watch, None, frozenset({2, 5}))
    assert changed.phase(9) == Phase(Schedule(kind="cosine"), Watch(), 1.0, frozenset({2, 5}))
    table = as_last_changed(changed.to_table())
    assert table["optimizer"]["args"]["lr"] == 1.0
    assert parse(table)[0].schedule == Schedule(kind="cosine")
    with pytest.raises(RecipeError, match="do not come by rising version"):
        dataclasses.replace(named, changes=changes[::-1])


@dataclasses.dataclass(frozen=True)
class Power:
    """An objective with a setting, given as an instance."""

    power: int = 2

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        return (model(x)[:, 0] - y).abs().pow(self.power).sum()


class Built:
    """What builds a component, with a setting."""

    def __init__(self, what: str, value: float):
        self.what, self.value = what, value

    def __call__(self, *given: Any) -> Any:
        if self.what == "optimizer":
            return torch.optim.Adam(*given, lr=0.05, eps=self.value)
        return data() if self.what == "data" else linear()


OBJECTS: dict[str, tuple[Any, Any]] = {
    "objective": (Power(2), Power(4)),
    "model": (nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 1)), nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1))),
    "data": (Built("data", 1.0), Built("data", 2.0)),
    "optimizer": (Built("optimizer", 1e-8), Built("optimizer", 1e-3)),
}


@pytest.mark.parametrize("kind", quick(["objective", "model", "data", "optimizer"], "objective", "model"))
def test_an_object_that_holds_other_values_is_refused(kind: str, tmp_path: Path) -> None:
    path, (own, other) = tmp_path / "run", OBJECTS[kind]
    first = recipe(**{kind: own})
    begin(path, first, Team(), 3)
    with pytest.raises(CheckpointError, match=rf"recipe\.{kind}\.holds\.(power|repr|value) is .* here and .* there"):
        go_on(path, recipe(**{kind: other}), Team())
    assert go_on(path, recipe(**{kind: own}), Team(), steps=4).result["steps"] == 4
    assert recipe(**{kind: own}).fingerprint() == recipe(**{kind: other}).fingerprint(), "as before they were compared"
    saved = (path / "recipe.toml").read_text()
    (path / "recipe.toml").write_text("\n".join(line for line in saved.splitlines() if not _shows(line)))
    assert go_on(path, first, Team(), steps=5).result["steps"] == 5, "a recipe saved before holds nothing"


def _shows(line: str) -> bool:
    return ".holds]" in line or line.startswith(("power =", "repr =", "what =", "value ="))
