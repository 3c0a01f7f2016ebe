"""Values that no field takes, and values of any length: one short sentence on each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import instep
from instep.cli import main
from instep.errors import InstepError, RecipeError
from instep.monitors.console import Console
from instep.recipe import Recipe, Team, dumps
from instep.record.folder import RunFolder
from instep.schedule import Change, Schedule, what_changed
from support.sentences import one_sentence

LONG = "L" * 5000

SEVERAL = """
model = "m:Model"
objective = "m:objective"
data = "m:data"
optimizer = [{parameters = "*norm*", use = "torch.optim:AdamW"}, {parameters = "*", use = "torch.optim:Muon"}]
"""


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one sentence that the command line is refused with."""
    assert main(list(argv)) in (1, 2)
    out = capsys.readouterr()
    sentence = out.err.strip()
    assert out.out == ""
    assert one_sentence(sentence), sentence
    return sentence


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "gpt", "--steps", "2.9"], "'recipe.steps' is 2.9, of type float; it must be a whole number"),
        (["train", "gpt", "--steps", "1e3"], "'recipe.steps' is 1000.0, of type float; it must be a whole number"),
        (["train", "gpt", "--seed=1.5"], "'recipe.seed' is 1.5, of type float"),
        (["train", "gpt", "--workers", "2.5"], "'team.workers' is 2.5, of type float"),
        (["train", "gpt", "--workers", "two"], "'team.workers' is 'two', of type str"),
        (["simulate", "gpt", "--steps", "2.9"], "'recipe.steps' is 2.9"),
        (["simulate", "gpt", "--seed", "1.5"], "'recipe.seed' is 1.5"),
        (["simulate", "gpt", "--workers", "2.5"], "--workers is 2.5, of type float; it must be a whole number"),
        (["simulate", "gpt", "--workers", "2", "--contributions", "3.5"], "--contributions is 3.5"),
        (
            ["simulate", "gpt", "--times", "1ms", "--persistence", "half"],
            "--persistence is 'half'; it must be a number",
        ),
    ],
)
def test_fractions_for_counts_are_refused(argv: list[str], words: str, capsys: Any) -> None:
    assert words in said(capsys, *argv)


def test_a_negative_value_is_told_as_such(capsys: Any) -> None:
    assert "'recipe.steps' is -3; it must be at least 1" in said(capsys, "train", "gpt", "--steps", "-3")


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "gpt", "--workers", LONG], ["train", "gpt", "--seed", LONG], [LONG],
        ["train", "gpt", f"--{LONG}"], ["train", LONG], ["train", "--resume", LONG], ["digest", LONG],
        ["replay", LONG], ["memory", LONG], ["memory", "gpt", "--plot", f"{LONG}.png"],
        ["train", "gpt", "--recipe.name", LONG], ["train", "gpt", "--recipe.name", LONG, "--out", "x"],
        ["train", "gpt", f"--recipe.{LONG}"], ["train", "gpt", f"--recipe.{LONG}", "3"],
        ["simulate", "gpt", "--persistence", LONG], ["recipes", LONG],
        ["train", "gpt", "--out", LONG], ["simulate", "gpt", "--workers", "9" * 5000], ["recipes", f"--a.{LONG}", "1"],
        ["train", "gpt", "--slow", LONG], ["train", "gpt", "--memory", LONG], ["train", "gpt", "--rule", LONG],
    ],
    ids=range(22),
)  # fmt: skip
def test_a_long_value_is_cut(argv: list[str], capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    sentence = said(capsys, *argv)
    assert not sentence.endswith("....")
    assert list(tmp_path.iterdir()) == []


def test_numbers_and_brackets_without_end_in_a_file_are_one_sentence(tmp_path: Path, capsys: Any) -> None:
    for text in (f"steps = {'9' * 5000}", f"steps = {'[' * 5000}"):
        (tmp_path / "r.toml").write_text(text)
        assert "is not valid TOML" in said(capsys, "train", str(tmp_path / "r.toml"))


def test_a_name_that_is_too_long_for_a_folder_says_how_long_it_may_be() -> None:
    with pytest.raises(RecipeError, match=r"'recipe\.name' is 'LLL.*, of 5000 characters; .* at most 240"):
        Recipe(model="m:m", objective="m:o", data="m:d", name=LONG)


def test_a_sentence_ends_with_three_dots_at_most() -> None:
    assert InstepError(f"'{'a b ' * 20}... is wrong....").message.endswith("wrong...")


@pytest.mark.parametrize("given", [17, "17", [17.5], ["17"], [True], {"17": 1}, None])
def test_samples_to_skip_that_are_no_list_are_one_sentence(given: Any) -> None:
    recipe = Recipe(model="m:m", objective="m:o", data="m:d")
    with pytest.raises(RecipeError, match="'skip_samples' is .*; it must be a list of indices of samples") as caught:
        instep.train(recipe, skip_samples=given)
    assert one_sentence(str(caught.value))


def test_a_part_of_several_optimizers_is_refused_with_what_helps(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "several.toml"
    file.write_text(SEVERAL)
    for flag in ("--recipe.optimizer.args.lr", "--recipe.optimizer.0.args.lr"):
        sentence = said(capsys, "train", str(file), flag, "0.1")
        assert (
            "change the tables in the recipe's file, or scale all learning rates by --recipe.schedule.scale" in sentence
        )
    run = RunFolder.create(tmp_path / "run", SEVERAL)
    sentence = said(capsys, "train", "--resume", str(run.path), "--recipe.optimizer.args.lr", "0.1")
    assert (
        "has 2 optimizers, of which a resume may change the learning rates alone, all by one factor: --rec" in sentence
    )
    assert "file" not in sentence


@pytest.mark.parametrize("nameless", [False, True])
def test_how_to_go_on_is_what_the_recipe_allows(nameless: bool, tmp_path: Path) -> None:
    """A recipe with an object of a program's is resumed from there alone."""
    recipe = Recipe(model=(lambda: None) if nameless else "m:m", objective="m:o", data="m:d")
    run = RunFolder.create(tmp_path / "run", dumps(recipe, Team()))
    how = f"instep.train(recipe, resume='{run.path}')" if nameless else f"--resume {run.path}"
    assert run.how_to_resume() == how
    with pytest.raises(InstepError) as caught:
        RunFolder.create(run.path)
    assert how in str(caught.value)
    with pytest.raises(InstepError) as caught:
        run.read_result()
    assert how in str(caught.value)


def started(recipe: Recipe, version: int) -> dict[str, Any]:
    """As on a tape."""
    return {
        "t_s": 0.0, "clock": "wall", "kind": "run_started", "recipe": recipe.to_table(), "steps": 12, "step": version,
        "version": version, "resumed": True, "parameters": 9, "samples": 48, "engine": "lockstep",
        "team": {"workers": 1, "device": "cpu", "restarts": 3},
    }  # fmt: skip


def test_what_a_resume_changes_is_shown(capsys: Any) -> None:
    change = Change(version=4, schedule=Schedule(scale=0.5), lr=0.01, skip_samples=(3, 17))
    recipe = Recipe(model="m:m", objective="m:o", data="m:d", changes=(change,))
    assert what_changed(recipe.to_table(), 4) == "schedule.scale 0.5, learning rate 0.01, without 2 samples"
    assert what_changed(recipe.to_table(), 5) == ""
    Console(sys.stdout)(started(recipe, 4))
    assert "changed     from step 5 on: schedule.scale 0.5, learning rate 0.01" in capsys.readouterr().out
    Console(sys.stdout)(started(recipe, 7))
    assert "changed" not in capsys.readouterr().out
