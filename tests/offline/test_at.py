"""`run.at`: the model of any version of a run, computed again from the nearest checkpoint before."""

from __future__ import annotations

import doctest
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from instep.errors import RecordError
from instep.offline.past import Past
from instep.offline.stretches import stretch_to
from instep.offline.tape_replay import replay
from instep.recipe import Recipe, Team
from instep.record.digest import digest_of_state
from instep.record.folder import RunFolder
from instep.record.resuming import resumed, saved
from instep.rules import presets
from instep.run import Run
from instep.schedule import Schedule
from support import workloads
from support.harness import Outcome, stopping_at, train_here
from support.kinds import quick
from support.regression import regression
from support.sentences import one_sentence

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("forked_pythons")]


def opened(recipe: Recipe, outcome: Outcome) -> Run:
    return Run(outcome.path, outcome.result, recipe)


def digest_at(run: Run, version: int) -> str:
    return digest_of_state(run.at(version).state_dict())


def changed_tape(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = path / "tape.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()]
    for event in events:
        change(event)
    file.write_text("".join(json.dumps(event) + "\n" for event in events))


def test_any_version_of_a_run_in_lockstep_has_the_weights_that_it_had(tmp_path: Path) -> None:
    recipe = workloads.convnet()
    every = train_here(recipe, Team(workers=1, checkpoint_every=1, keep=99), tmp_path / "every")
    run = opened(recipe, train_here(recipe, Team(workers=3, checkpoint_every=3, keep_best=False), tmp_path / "run"))
    assert sorted(every.digests) == list(range(1, 8))
    for version in (3, 5):
        assert digest_at(run, version) == every.digests[version], version
    past = Past.of(run.path, recipe, "")
    assert [(past.to(version).start, past.to(version).updates) for version in (2, 3, 5, 7)] == [
        (0, 2), (3, 0), (3, 2), (7, 0),
    ]  # fmt: skip


@pytest.mark.slow
def test_versions_before_and_after_a_resume_with_other_rates_are_those_of_then(tmp_path: Path) -> None:
    """A resume in between, with another schedule and more steps; what was done again counts once."""
    recipe, path = regression(steps=4), tmp_path / "run"
    team = Team(workers=2, checkpoint_every=2, keep=99)
    first = train_here(recipe, team, path, client=stopping_at(3))
    last = first.events[-1]["version"]
    changed = regression(steps=7, schedule=Schedule("cosine", warmup_steps=1))
    folder = RunFolder.open(path)
    table, _, _ = saved(folder, changed, None, "")
    again, _ = resumed(folder, changed, table)
    second = train_here(again, Team(workers=1, checkpoint_every=1, keep=99), path, resume=True)
    run = Run(path, second.result, again)
    digests = first.digests | second.digests
    assert last in digests
    for version in (2, last, last + 1, 7):
        assert digest_at(run, version) == digests[version], version


@pytest.mark.parametrize("rule", quick(["asynchronous", "diloco"], "asynchronous"))
def test_versions_of_a_servers_run_are_computed_from_its_start(rule: str, tmp_path: Path) -> None:
    recipe = regression(rule=presets.asynchronous() if rule == "asynchronous" else presets.diloco(2), steps=8)
    outcome = train_here(recipe, Team(workers=2, checkpoint_every=1, keep=99), tmp_path / "run")
    run = opened(recipe, outcome)
    for version in sorted(outcome.digests)[1::4]:
        assert digest_at(run, version) == outcome.digests[version], version


@pytest.mark.slow
def test_a_servers_run_that_was_resumed_is_taken_up_there(tmp_path: Path) -> None:
    recipe, path = regression(rule=presets.asynchronous(), steps=8), tmp_path / "run"
    team = Team(workers=2, checkpoint_every=1, keep=99)
    first = train_here(recipe, team, path, client=stopping_at(6))
    begun = first.events[-1]["version"]
    second = train_here(recipe, team, path, resume=True)
    run = opened(recipe, second)
    digests, last = first.digests | second.digests, second.result["versions"]
    past = Past.of(path, recipe, "")
    before, after = max(v for v in digests if v < begun), min(v for v in digests if v > begun)
    assert past.to(after).start == begun
    assert past.to(begun - 1).start == 0
    for version in (before, after, last):
        assert digest_at(run, version) == digests[version], version


def test_a_run_on_a_server_that_went_on_in_lockstep_is_computed_from_before_that(tmp_path: Path) -> None:
    recipe, path = regression(steps=6), tmp_path / "run"
    first = train_here(recipe, Team(engine="server", checkpoint_every=1, keep=99), path, client=stopping_at(3))
    second = train_here(recipe, Team(checkpoint_every=1, keep=99), path, resume=True)
    last = first.events[-1]["version"]
    for saved_at in (path / "checkpoints").iterdir():
        if int(saved_at.name[-8:]) <= last + 1:
            shutil.rmtree(saved_at)
    assert digest_at(Run(path, second.result, recipe), last + 1) == second.digests[last + 1]


def test_what_an_audit_has_refuted_is_not_replayed(tmp_path: Path) -> None:
    """As on the tape of a run that went back from version 4 to 2: what it told of 3 and 4 in between was wrong."""
    recipe = regression()
    events = train_here(recipe, Team(checkpoint_every=2, keep=99), tmp_path / "run").events
    place = next(n for n, event in enumerate(events) if (event["kind"], event.get("version")) == ("checkpointed", 2))
    until = next(n for n, event in enumerate(events) if (event["kind"], event.get("version")) == ("checkpointed", 4))
    changed = {"merged": "objective", "checkpointed": "digest"}
    wrong = [{**e, changed.get(e["kind"], "t_s"): 0.5} for e in events[place + 1 : until + 1]]
    told = {"worker": 1, "version": 4, "microbatch": 0, "by_whom": "", "since": 2, "removed": [4]}
    refuted = {**events[place], "kind": "refuted", **told}
    again = {**events[0], "version": 2, "step": 2, "digest": events[place]["digest"]}
    whole = [*events[: place + 1], *wrong, refuted, again, *events[place + 1 :]]
    assert replay(recipe, whole).same
    assert not replay(recipe, [event for event in whole if event is not refuted]).same


def test_what_a_later_session_went_back_behind_is_not_computed(tmp_path: Path) -> None:
    def event(kind: str, version: int, **more: Any) -> dict[str, Any]:
        return {"kind": kind, "version": version, **more}

    begin, saved = event("run_started", 0, engine="server"), event("checkpointed", 2, digest="")
    again = event("run_started", 2, engine="server")
    first, second = [[event("merged", version) for version in versions] for versions in ((1, 2), (3, 4, 5))]
    events = [begin, *first, saved, *second, again, *second]
    assert stretch_to(RunFolder(tmp_path), events, 4, 0).events == (begin, *first, saved, again, *second[:2])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    recipe = regression(checksum_every=2)
    return opened(recipe, train_here(recipe, Team(workers=2, checkpoint_every=5, keep_best=False), tmp_path / "run"))


def test_the_example_of_the_docstring_runs(run: Run) -> None:
    test = doctest.DocTestFinder(recurse=False).find(Run.at, "at", globs={"run": run, "torch": torch})[0]
    assert doctest.DocTestRunner().run(test) == (0, 1)


@pytest.mark.parametrize("version", [7, -1, True, "3"])
def test_a_version_that_there_is_not_is_refused_in_one_sentence(run: Run, version: Any) -> None:
    with pytest.raises(RecordError) as caught:
        run.at(version)
    assert one_sentence(caught.value.message)
    assert "7" not in str(version) or "ended at version 6" in caught.value.message


def test_a_tape_that_ends_before_says_how_far_it_goes(run: Run) -> None:
    file = run.path / "tape.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[: next(i for i, line in enumerate(lines) if '"version": 5, "step": 5' in line)]))
    with pytest.raises(
        RecordError, match="no update after version 4, for the run has not ended, so it has no version 6"
    ):
        run.at(6)


def test_other_libraries_and_processors_are_warned_of_and_the_checksums_decide(run: Run) -> None:
    expected = digest_at(run, 4)

    def elsewhere(event: dict[str, Any]) -> None:
        if event["kind"] == "run_started":
            event["libraries"]["torch"], event["processor"] = "2.0.0", "abacus"

    changed_tape(run.path, elsewhere)
    with pytest.warns(UserWarning, match=r"torch 2\.0\.0 \(here .*\) and a processor abacus"):
        assert digest_at(run, 4) == expected

    def flipped(event: dict[str, Any]) -> None:
        if event["kind"] == "checksummed" and event["version"] == 4:
            event["weights"]["weight"] = "00000000"

    changed_tape(run.path, flipped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run.at(3) is not None
        with pytest.raises(RecordError, match="version 4 differs in 'weight'; all were the same in version 2"):
            run.at(4)
