"""A resume that is refused changes nothing of its run; one that was killed before its first step can be corrected."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from instep.errors import ComponentError, DataError, InstepError, RecipeError
from instep.recipe import Recipe, Team, dumps
from instep.recipe_files import read_saved
from instep.record import tape
from instep.record.folder import RunFolder
from instep.record.resuming import resumed
from instep.rules import presets
from instep.schedule import Change, Schedule
from instep.watch import Watch
from support.harness import Client, train_here
from support.resuming import again, begin, go_on, recipe

pytestmark = pytest.mark.processes

NOT_LOGS = ("recipe.toml", "run.json", "tape.jsonl", "result.json", "checkpoints")


def content(path: Path) -> dict[str, bytes]:
    """What of a run folder a resume reads."""
    files = [file for name in NOT_LOGS for file in (path / name, *(path / name).rglob("*")) if file.is_file()]
    return {str(file): file.read_bytes() for file in files}


def adam(lr: Any) -> Any:
    return functools.partial(torch.optim.Adam, lr=lr)


class Rateless(torch.optim.Optimizer):
    """One that has no learning rate."""

    def __init__(self, parameters: Any):
        super().__init__(parameters, {"lr": None})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(0.01 * parameter.grad)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...], type[InstepError], str]] = {
    "sample": ({}, {}, (170,), DataError, "holds 170, and the 48 samples are counted from 0"),
    "lr": ({}, {"optimizer": adam(-1.0)}, (), ComponentError, r"'recipe\.optimizer\.args\.lr' is -1\.0, which .*Adam"),
    "nan": ({}, {"optimizer": adam(float("nan"))}, (), ComponentError, r"'recipe\.optimizer\.args\.lr' is nan"),
    "inf": ({}, {"optimizer": adam(float("inf"))}, (), ComponentError, "learning rate inf; it must be a finite number"),
    "schedule": ({"optimizer": Rateless}, {"schedule": Schedule(scale=0.5)}, (), RecipeError, "has no learning rate"),
    "steps": ({}, {"steps": 2}, (), RecipeError, "has done 3 steps already"),
    "server": ({"rule": presets.asynchronous()}, {"optimizer": adam(-1.0)}, (), ComponentError, r"lr' is -1\.0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_resume_leaves_the_run_as_it_was(what: str, tmp_path: Path) -> None:
    before, change, skip, error, sentence = REFUSED[what]
    path, first = tmp_path / "run", recipe(**before)
    begin(path, first, Team(workers=2), 3)
    found = content(path)
    with pytest.raises(error, match=sentence):
        go_on(path, dataclasses.replace(first, **change), Team(workers=2), skip)
    assert content(path) == found
    if what in ("sample", "server"):
        assert go_on(path, first, Team(), steps=4).result["steps"] == 4
        assert again(path, first).same


class Killed(Exception):
    pass


def kill_at_start(event: dict[str, Any]) -> None:
    if event["kind"] == "run_started":
        raise Killed


def killed(path: Path, given: Recipe, skip: tuple[int, ...] = ()) -> None:
    """A resume that is killed after it was accepted, and before its first step."""
    with pytest.raises(Killed):
        go_on(path, given, Team(), skip, client=Client(kill_at_start))


@pytest.mark.parametrize("rule", [presets.synchronous(), presets.local_sgd(2)], ids=["lockstep", "server"])
def test_a_change_that_made_no_step_gives_way_to_another(rule: Any, tmp_path: Path) -> None:
    path, first = tmp_path / "run", recipe(rule=rule)
    slower = dataclasses.replace(first, optimizer=adam(0.01))
    team = Team(engine="server" if rule.local_steps > 1 else "auto")
    train_here(dataclasses.replace(first, steps=4), team, path)
    killed(path, slower, (3, 9))
    assert len(saved_changes(path)) == 1
    run = go_on(path, first, Team(), (5,))
    (change,) = saved_changes(path)
    assert (change["skip_samples"], "lr" in change) == ([5], False)
    assert run.result["steps"] == 12
    assert again(path, first).same, "a start that was given up is passed over"
    if rule.local_steps == 1:
        whole = recipe(changes=(Change(version=4, skip_samples=(5,)),))
        assert run.digest == train_here(whole, Team(workers=2), tmp_path / "whole").digest


def test_a_change_that_made_no_step_holds_where_nothing_else_is_asked(tmp_path: Path) -> None:
    """What the killed resume asked for is kept, and taken back by a resume that asks for what was before."""
    path, slower = tmp_path / "run", recipe(optimizer=adam(0.01))
    begin(path, recipe(), Team(), 4)
    killed(path, slower, (3,))
    kept = resumed(RunFolder(path), slower, table_of(path))[0]
    assert kept.changes == (Change(version=4, lr=0.01, skip_samples=(3,)),)
    undone = resumed(RunFolder(path), recipe(), table_of(path))[0]
    assert undone.changes == (Change(version=4, skip_samples=(3,)),)
    watched = resumed(RunFolder(path), recipe(watch=Watch(bad_batch="skip")), table_of(path), (7,))[0]
    assert watched.changes == (Change(version=4, watch=Watch(bad_batch="skip"), skip_samples=(7,)),)


def test_a_recorded_change_that_no_start_takes_is_corrected(tmp_path: Path) -> None:
    """As earlier versions left them: the refused change is in recipe.toml."""
    path = tmp_path / "run"
    begin(path, recipe(), Team(), 4)
    bad = recipe(changes=(Change(version=4, lr=-1.0, skip_samples=(170,)),))
    (path / "recipe.toml").write_text(dumps(bad, Team()))
    with pytest.raises(DataError, match="holds 170"):
        go_on(path, bad, Team())
    run = go_on(path, recipe(), Team(), (5,))
    assert (run.result["steps"], [change["skip_samples"] for change in saved_changes(path)]) == (12, [[5]])


def test_a_change_that_steps_were_made_with_stays(tmp_path: Path) -> None:
    path, slower = tmp_path / "run", recipe(optimizer=adam(0.01))
    begin(path, recipe(), Team(), 4)
    go_on(path, slower, Team(checkpoint_every=100), steps=6)
    (path / "checkpoints/step-00000006/training.pt").write_bytes(b"")
    go_on(path, recipe(), Team(), (3,))
    assert [change["version"] for change in saved_changes(path)] == [4, 4]
    assert again(path, recipe()).same


def table_of(path: Path) -> dict[str, Any]:
    table = read_saved(path / "recipe.toml")
    table.pop("team")
    return table


def saved_changes(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = table_of(path).get("changes", [])
    return found


def test_a_finished_run_says_that_nothing_is_left(tmp_path: Path) -> None:
    """And what was changed then holds for the steps that a later resume adds."""
    path, slower = tmp_path / "run", recipe(schedule=Schedule(scale=0.5))
    begin(path, recipe(), Team(), 4)
    (said,) = (e["why"] for e in go_on(path, slower, Team(), steps=4).events if e["kind"] == "warned")
    assert said == "nothing is left to train, for the run has done all its 4 steps; give more steps (--steps)."
    go_on(path, slower, Team(), steps=6)
    assert [event["lr"] for event in tape.latest(tape.read(path / "tape.jsonl"))] == [0.05] * 4 + [0.025] * 2


def test_a_jump_tells_rates_that_steps_had(tmp_path: Path) -> None:
    """The scale that a resume of a finished run has put on is on no step of before."""
    path, cosine = tmp_path / "run", Schedule(kind="cosine", final=0.1)
    scaled = recipe(schedule=dataclasses.replace(cosine, scale=0.5))
    begin(path, recipe(schedule=cosine), Team(), 4)
    go_on(path, scaled, Team(), steps=4)
    _, (said,) = resumed(RunFolder(path), scaled, table_of(path))
    assert said.startswith("the learning rate jumps from 0.1 to 0.333 of the optimizer's own at step 5")


def test_a_jump_is_told_beside_another_change(tmp_path: Path) -> None:
    path, cosine = tmp_path / "run", Schedule(kind="cosine", final=0.1)
    begin(path, recipe(schedule=cosine), Team(), 4)
    _, said = resumed(RunFolder(path), recipe(schedule=cosine), table_of(path), (3,))
    assert len(said) == 1
