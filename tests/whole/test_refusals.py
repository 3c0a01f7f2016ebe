"""Bad input as real command lines: one sentence, an exit status that is not 0, and nothing left behind."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import instep
from instep.errors import RecipeError, ResourceError
from instep.monitors.console import Console
from instep.recipe import Recipe, Team, parse
from instep.recipe_files import read
from support.harness import train_here
from support.processes import INSTEP, RECIPE, Started, complaint, write_project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, some that are wrong, and a run."""
    folder = write_project(tmp_path_factory.mktemp("project"))
    (folder / "typo.toml").write_text(RECIPE.replace("microbatches", "microbatchs"))
    (folder / "broken.toml").write_text(RECIPE.replace("[model]", "[model"))
    sys.path.insert(0, str(folder))
    try:
        train_here(parse(read(folder / "my.toml"))[0], Team(), folder / "run")
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("mymodel", None)
    return folder


@pytest.mark.processes
@pytest.mark.parametrize(
    ("flags", "status", "sentence"),
    [
        ("nowhere", 1, "'nowhere' is neither a built-in recipe nor a file; the built-in recipes are "),
        ("gtp", 1, "'gtp' is neither a built-in recipe nor a file; did you mean 'gpt'?"),
        ("{project}/my.toml --workers 0", 1, "'team.workers' is 0; it must be at least 1."),
        ("{project}/my.toml --workers 5", 1, "5 workers are more than the 4 microbatches of a step"),
        ("{project}/my.toml --recipe.batch 9", 1, "a batch of 9 samples does not divide into 4 equal microbatches"),
        ("{project}/my.toml --recipe.stepz 9", 2, "there is no flag --recipe.stepz; did you mean --recipe.steps?"),
        ("{project}/my.toml --wrokers 9", 2, "there is no flag --wrokers; did you mean --workers?"),
        ("{project}/typo.toml", 1, "unknown key 'microbatchs'; did you mean 'microbatches'?"),
        ("{project}/broken.toml", 1, "{project}/broken.toml is not valid TOML"),
        ("{project}/my.toml --out {project}/run", 1, "{project}/run exists and is not an empty folder"),
        ("--resume {project}", 1, "{project} is not the folder of a run"),
        (
            "--resume {project}/run --seed 3",
            1,
            "{project}/run goes on with its own recipe, and recipe.seed is 3 here and 0 there",
        ),
        ("--resume {project}/run --workers 9", 1, "9 workers are more than the 4 microbatches of a step"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    flags: str, status: int, sentence: str, project: Path, tmp_path: Path
) -> None:
    saved = project / "run" / "recipe.toml"
    before = saved.read_bytes()
    started = Started([*INSTEP, "train", *flags.format(project=project).split()], tmp_path, forked=True)
    assert started.ends() == status
    assert complaint(started).startswith("instep: " + sentence.format(project=project))
    assert started.out == ""
    assert [path.name[:7] for path in tmp_path.iterdir()] == ["output-"], "which are the test's own"
    assert saved.read_bytes() == before


RECIPE_OBJECT = Recipe(model="mymodel:Net", objective="mymodel:squares", data="mymodel:numbers")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"recipe": "gpt"}, "'recipe' is 'gpt'; it must be an instep.Recipe"),
        ({"recipe": {"model": "a:b"}}, "'recipe' is {'model': 'a:b'}; it must be an instep.Recipe"),
        ({"team": 2}, "'team' is 2; it must be an instep.Team"),
        ({"monitors": Console()}, "'monitors' is <.*Console object .*>; it must be a list of functions of an event"),
        ({"monitors": [Console]}, "'monitors' is .*<class .*Console'>.; it must be a list of functions of an event"),
        ({"monitors": None}, "'monitors' is None; it must be a list of functions of an event"),
    ],
)
def test_wrong_arguments_of_train_are_one_sentence(arguments: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=sentence) as caught:
        instep.train(**{"recipe": RECIPE_OBJECT, "out": tmp_path / "run", **arguments})
    assert "\n" not in caught.value.message
    assert not (tmp_path / "run").exists()


@pytest.mark.processes
def test_a_log_that_cannot_be_written_is_one_sentence(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/logs")
    (tmp_path / "run/logs").write_text("a file")
    with pytest.raises(ResourceError, match="the log .*supervisor.log cannot be written: File exists; check the fold"):
        instep.train(resume=tmp_path / "run")


WORKERS_SEE = [
    ("--recipe.model.use mymodel:Nte", "'mymodel' has no 'Nte' .*; did you mean 'Net'?"),
    ("--recipe.model.args.widht 9", "mymodel:Net does not take the arguments given to it: .*instead of 'widht'?"),
    ("--recipe.objective.use mymodel:mean", "term 'objective' of the objective is a mean, not a sum"),
    ("--recipe.data.args.samples 7", "the training data is too small: 7 samples do not fill one batch of 8"),
    ("--recipe.data.args.samples 0", "the training data is empty; give at least one sample."),
    ("--recipe.optimizer.args.lr -1.0", "AdamW refuses its arguments .Invalid learning rate: -1.0"),
    ("--team.device cuda", "team.device is 'cuda', and torch finds no GPU here"),
]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [WORKERS_SEE[0], *(pytest.param(*each, marks=pytest.mark.slow) for each in WORKERS_SEE[1:])],
)
def test_what_only_workers_see_is_one_sentence(flags: str, sentence: str, project: Path, tmp_path: Path) -> None:
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [*INSTEP, "train", str(project / "my.toml"), "--out", "run", "--workers", "1", *flags.split()]
    started = Started(command, tmp_path, forked=True)
    try:
        assert started.ends() == 1
    finally:
        started.end()
    assert re.match(f"instep: .*{sentence}", complaint(started))
    assert not (tmp_path / "run").exists()
