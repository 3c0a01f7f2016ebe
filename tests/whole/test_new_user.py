"""What a new user meets: the help, the sentences, and what a run shows."""

from __future__ import annotations

import itertools
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import instep
from instep import Recipe, objectives
from instep import gradient_checkpointing as gc
from instep.cli import COMMANDS, main
from instep.components import Component
from instep.errors import InstepError, ObjectiveError, RecipeError
from instep.recipe import Team
from instep.recipe import parse as parse_recipe
from instep.recipe_files import path_of, read
from instep.rules.presets import parse
from support.harness import train_here
from support.regression import regression, squares

BASE: dict[str, Any] = {"model": "m:M", "objective": "m:f", "data": "m:d", "batch": 8, "steps": 1}


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    main(argv)
    return capsys.readouterr().err


@pytest.mark.parametrize("columns", ["80", "200"])
@pytest.mark.parametrize("argv", [[], ["recipes"], *([name, "--help"] for name in COMMANDS)])
def test_no_word_is_broken_in_any_help_and_no_line_is_too_long(
    argv: list[str], columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= min(int(columns), 100)
    monkeypatch.setenv("COLUMNS", "1000")
    main(argv)
    words = set(capsys.readouterr().out.split())
    assert {word for line in lines for word in line.split()} == words
    short = [line for line, after in itertools.pairwise(lines) if _could_be_joined(line, after, columns)]
    assert not short, "lines that were wrapped twice"


def _could_be_joined(line: str, after: str, columns: str) -> bool:
    """Whether the next line goes on with a word that had room on this one."""
    indent, next_indent = (len(each) - len(each.lstrip()) for each in (line, after))
    goes_on = after.strip() and line.strip() and (next_indent > 8 or next_indent == indent == 0)
    if not goes_on or line.endswith(":") or re.match(r" *--[\w, -]+$|  \S", after) or re.match(r" *--[\w, -]+$", line):
        return False
    return len(line) + 1 + len(after.split(maxsplit=1)[0]) <= min(int(columns), 100)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("sync", "synchronous"),
        ("async", "asynchronous"),
        ("SSP", "bounded_staleness"),
        ("bsp", "synchronous"),
        ("asp:3", "asynchronous"),
        ("local-sgd", "local_sgd"),
        ("backup:1", "backup_workers"),
        ("softsink", "softsync"),
    ],
)
def test_a_rule_by_another_name_suggests_what_was_meant(text: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=f"is no update rule; did you mean '{meant}'"):
        parse(text)


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        ("train gpt --lr 3e-4", "--recipe.optimizer.args.lr"),
        ("train gpt --recipe.lr 3e-4", "--recipe.optimizer.args.lr"),
        ("simulate gpt --lr 3e-4", "--recipe.optimizer.args.lr"),
        ("train gpt --batch-size 8", "--recipe.batch"),
        ("train gpt --recipe.learning-rate 8", "--recipe.optimizer.args.lr"),
        ("train gpt --max-steps 8", "--steps"),
        ("train gpt --output-dir x", "--out"),
    ],
)
def test_a_flag_of_another_program_suggests_what_was_meant(
    argv: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"did you mean {meant}?" in said(capsys, *argv.split())


def test_every_flag_that_is_suggested_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    from instep.cli.flags import _MEANT, merge, toml_value

    main(["train", "--help"])
    flags = re.findall(r"--[a-z]+", capsys.readouterr().out)
    for meant in set(_MEANT.values()):
        if "." in meant:
            merge(read("gpt"), [(meant.removeprefix("--"), str(toml_value("1")))])
        else:
            assert meant in flags


def test_a_run_folder_in_the_place_of_a_recipe_suggests_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.toml").write_text(path_of("gpt").read_text())
    for command in ("train", "simulate", "memory"):
        told = said(capsys, command, str(tmp_path))
        assert f"is the folder of a run; go on with it by --resume {tmp_path}, or take its recipe" in told


def test_the_example_of_a_budget_in_the_help_is_one_that_the_built_in_recipe_can_keep(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    main(["memory", "--help"])
    (share,) = re.findall(r"share such as (\d+%)", capsys.readouterr().out)
    assert main(["memory", "gpt", "--budget", share]) == 0
    out = capsys.readouterr().out
    assert "measured" in out
    assert max(map(len, out.splitlines())) <= 100


def test_a_missing_plotting_library_or_a_wrong_format_is_said_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object) -> None:
        raise AssertionError("the work was begun")

    monkeypatch.setattr("instep.worker.memory_trade.memory_trade", work)
    pytest.importorskip("matplotlib")
    assert "name a .png, .svg or .pdf" in said(capsys, "memory", "gpt", "--plot", str(tmp_path / "trade.doc"))
    assert "a folder that is not there" in said(capsys, "memory", "gpt", "--plot", str(tmp_path / "no" / "trade.png"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'instep[report]'" in said(capsys, "memory", "gpt", "--plot", str(tmp_path / "trade.png"))


@pytest.mark.processes
def test_a_teacher_that_is_missing_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InstepError, match="train one with 'instep train gpt' and give its folder"):
        train_here(parse_recipe(read("distil"))[0], Team(), tmp_path / "run")


def test_a_plan_fits_a_screen_and_explains_its_bound() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8 + n), nn.Tanh(), nn.Linear(8 + n, 8)) for n in range(30)])
    profile = gc.profile(
        model, lambda m, x: m(x).square().sum(), torch.randn(64, 8), blocks=[str(n) for n in range(30)]
    )
    plan = gc.plan(profile, budget_bytes=gc.least_bytes(profile))
    lines = str(plan).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert "whatever backward needs and does not find is made again" in " ".join(str(plan).split())
    assert len(repr(plan)) < 100 > len(repr(profile))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Recipe(**BASE, schedule="cosine"), "'recipe.schedule' is 'cosine'; give an instep.Schedule."),
        (lambda: Recipe(**BASE, watch=3), "'recipe.watch' is 3; give an instep.Watch."),
        (lambda: Recipe(**BASE, rule=3), "'recipe.rule' is 3; give an instep.UpdateRule or its text."),
        (lambda: Recipe(**BASE, compile=1), "'recipe.compile' is 1, of type int; it must be True or False."),
    ],
)
def test_messages_of_python_speak_python(make: Any, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make()
    assert caught.value.message == told


def test_a_mean_for_a_sum_is_told_of_counts() -> None:
    def mean(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    bound = objectives.bind(objectives.from_component(Component.of(mean)))
    model, batch = nn.Linear(4, 1), torch.randn(6, 4)
    bound = objectives.learn_terms(bound, model, batch)
    with pytest.raises(ObjectiveError, match=r"unless counts= of instep\.objective says what its items are"):
        objectives.check_protocol(bound, model, batch)


@pytest.mark.processes
@pytest.mark.usefixtures("forked_pythons")
def test_ctrl_c_in_python_names_the_folder_to_go_on_with(tmp_path: Path) -> None:
    seen = []

    def interrupt(event: Any) -> None:
        seen.append(event["kind"])
        if event["kind"] == "merged" and seen.count("merged") == 1:
            raise KeyboardInterrupt

    def slowly(model: nn.Module, batch: Any) -> Tensor:
        if slow.exists():  # else it might end before the interrupt reaches it
            time.sleep(0.02)
        return squares(model, batch)

    slow = tmp_path / "slow"
    slow.touch()
    recipe = regression(steps=1000, objective=slowly)
    with pytest.raises(KeyboardInterrupt) as caught:
        instep.train(recipe, out=tmp_path / "run", monitors=[interrupt])
    assert f"go on with instep.train(recipe, resume='{tmp_path / 'run'}')" in str(caught.value)
    slow.unlink()
    assert instep.train(recipe, team=instep.Team(), resume=tmp_path / "run", monitors=[]).result["steps"] == 1000
