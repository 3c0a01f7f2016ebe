"""``instep compare``: what it trains, what it leaves alone, and what it refuses. Training itself is stood in for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from instep import api
from instep.cli import main
from instep.cli.compare import Entry, entries_of
from instep.recipe import Recipe, Team
from instep.rules import parse
from support import runs

pytestmark = pytest.mark.pure

FILE = 'model = "m:M"\nobjective = "m:o"\ndata = "m:d"\nmicrobatches = 4\nbatch = 8\nsteps = 100\nname = "tiny"\n'

Trained = list[tuple[str, int, bool]]
"""(folder, seed, whether it was resumed)"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my.toml").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """What was trained. Each run takes four updates, but for one that is broken off where `trained` says so before."""
    seen: Trained = []

    def train(recipe: Recipe, *, team: Team, out: Path | None, resume: Path | None, **rest: Any) -> None:
        path = out or resume
        assert path is not None
        seen.append((path.name, recipe.seed, resume is not None))
        if resume is not None:
            with open(resume / "tape.jsonl", "a") as tape:
                tape.write(json.dumps(runs.ended(4, 9.0, steps=recipe.steps)) + "\n")
            return
        events = [runs.started(rule=recipe.rule.name, seed=recipe.seed), *runs.joined(2.0, 0, 1)]
        for version in range(1, 5):
            events += runs.step(version, 2.0 + version, 3.0 - version / 4)
            events += [runs.event("evaluated", 2.4 + version, version=version, objective=2.0, terms={}, items=5)]
        last = runs.ended(4, 9.0, steps=recipe.steps)
        if len(seen) == 2:  # Ctrl-C
            runs.folder(path, [*events, runs.ended(4, 9.0, steps=4, interrupted=True)], recipe=recipe)
            raise KeyboardInterrupt
        runs.folder(path, [*events, last], recipe=recipe)

    monkeypatch.setattr(api, "train", train)
    return seen


def test_what_is_interrupted_goes_on_with_the_same_command(
    trained: Trained, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["compare", "my.toml", "--rules", "synchronous,asynchronous", "--seeds", "0,1"]
    assert main(line) == 130
    assert main(line) == 0
    assert trained == [
        ("synchronous-seed0", 0, False), ("asynchronous-seed0", 0, False), ("asynchronous-seed0", 0, True),
        ("synchronous-seed1", 1, False), ("asynchronous-seed1", 1, False),
    ]  # fmt: skip
    shown = capsys.readouterr().out
    assert "4 runs of 100 steps by 2 workers" in shown
    assert "The page is runs/compare-tiny/report.html." in shown
    trained.clear()
    assert main([*line, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert not trained
    assert [(rule["rule"], rule["seeds"]) for rule in told["rules"]] == [
        ("synchronous", [0, 1]),
        ("asynchronous", [0, 1]),
    ]


def test_held_out_data_are_looked_at_twelve_times_unless_it_is_said(
    trained: Trained, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    stand_in = api.train
    monkeypatch.setattr(
        api,
        "train",
        lambda recipe, **rest: seen.append(recipe.evaluate_every) or stand_in(recipe, **rest),  # type: ignore[func-returns-value]
    )
    assert main(["compare", "my.toml", "--rules", "synchronous", "--json"]) == 0
    line = ["compare", "my.toml", "--rules", "diloco:4", "--json", "--out", "other", "--recipe.evaluate_every", "30"]
    assert main(line) == 130  # the second that the stand-in trains
    assert seen == [8, 30]


def test_a_field_of_a_rule_belongs_to_the_rule_before_it() -> None:
    assert entries_of("synchronous,diloco:20,outer_lr=0.5,wire=int4,asynchronous") == [
        Entry(parse("synchronous")), Entry(parse("diloco:20,outer_lr=0.5,wire=int4")), Entry(parse("asynchronous")),
    ]  # fmt: skip


def test_a_field_of_the_team_belongs_to_the_rule_before_it(
    trained: Trained, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str, int]] = []
    stand_in = api.train
    monkeypatch.setattr(
        api,
        "train",
        lambda recipe, team, **rest: (
            seen.append((rest["out"].name, team.balance, team.workers)) or stand_in(recipe, team=team, **rest)  # type: ignore[func-returns-value]
        ),
    )
    trained += [("the second, which alone is broken off", 0, False)] * 2
    line = ["compare", "my.toml", "--rules", "synchronous,team.balance=off,synchronous", "--workers", "3"]
    assert main(line) == 0
    assert seen == [("synchronous-team.balance=off-seed0", "off", 3), ("synchronous-seed0", "auto", 3)]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("--rules sinchronous", "did you mean"),
        ("--rules synchronous,synchronous", "--rules has 'synchronous' twice; give it once, and more --seeds."),
        ("--rules synchronous,team.balence=off", "there is no flag --team.balence; did you mean --team.balance?"),
        ("--rules team.balance=off,synchronous", "'team.balance=off'"),
        (
            "--rules synchronous,team.balance=off,synchronous,team.balance=off",
            "--rules has 'synchronous,team.balance=off' twice",
        ),
        ("--seeds 0,x", "--seeds is '0,x'; give different whole numbers from 0, such as 0,1,2."),
        ("--seeds 1,1", "--seeds is '1,1'; give different whole numbers"),
        ("--recipe.rule diloco:20", "--recipe.rule goes with 'instep train'; give --rules."),
        ("--recipe.seed 3", "--recipe.seed goes with 'instep train'; give --seeds."),
        ("--out my.toml", "--out 'my.toml' is a file; name a folder, which the runs are made in."),
        ("--target low", "--target is 'low'; it must be a number"),
        ("--rules synchronous,backup_workers:3 --workers 2", "so nobody would be waited for"),
    ],
)
def test_bad_input_to_compare_is_a_sentence_before_anything_is_trained(
    given: str, sentence: str, trained: Trained, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "my.toml", *given.split()]) in (1, 2)
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1
    assert not trained
    assert not (here / "runs").exists()


def test_another_recipes_run_in_its_place_is_told_before_anything_is_trained(
    trained: Trained, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "my.toml", "--rules", "synchronous", "--json"]) == 0
    trained.clear()
    line = ["compare", "my.toml", "--rules", "asynchronous,synchronous", "--recipe.batch", "16"]
    assert main(line) == 1
    err = capsys.readouterr().err
    assert "runs/compare-tiny/synchronous-seed0 has a run of another recipe: recipe.batch is 16 here and 8 there" in err
    assert not trained


def test_a_comparison_is_not_made_in_the_folder_of_a_run(
    trained: Trained, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.folder(here / "run", [])
    assert main(["compare", "my.toml", "--out", "run", "--json"]) == 2
    assert "--out 'run' is the folder of a run; name another one" in capsys.readouterr().err
    assert not trained
