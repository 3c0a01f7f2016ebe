from __future__ import annotations

import os
import signal
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instep import api, recipe_files
from instep.cli import COMMANDS, main
from instep.components import Component
from instep.errors import WorkerError
from instep.recipe import Recipe, Schedule, Team, dumps
from instep.record import folder as folder_module

pytestmark = pytest.mark.pure

FILE = """\
# A recipe for tests
model = "mymodel:Net"
objective = {use = "mymodel:loss"}
data = {use = "mymodel:data", args = {samples = 100, shape = {width = 4}}}
seed = 5
[team]
restarts = 7
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with one recipe file, and one built-in recipe."""
    recipes = tmp_path / "builtin"
    recipes.mkdir()
    (recipes / "tiny.toml").write_text('# The smallest one\nmodel="m:M"\nobjective="m:o"\ndata="m:d"\n')
    (recipes / "other-one.toml").write_text('model="m:M"\nobjective="m:o"\ndata="m:d"\n')
    monkeypatch.setattr(recipe_files, "RECIPES", recipes)
    work = tmp_path / "work"
    work.mkdir()
    (work / "my.toml").write_text(FILE)
    monkeypatch.chdir(work)
    return work


class Trained:
    """What the stand-in for `instep.train` was called with."""

    recipe: Recipe
    team: Team
    rest: dict[str, Any]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    seen = Trained()

    def train(recipe: Recipe, *, team: Team, **rest: Any) -> None:
        seen.recipe, seen.team, seen.rest = recipe, team, rest

    monkeypatch.setattr(api, "train", train)
    return seen


def replace_train(monkeypatch: pytest.MonkeyPatch, train: Callable[..., None]) -> None:
    monkeypatch.setattr(api, "train", train)


def status(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str]:
    """The exit status and what was printed on stderr."""
    code = main(line.split())
    return code, capsys.readouterr().err


# What reaches train


def test_a_file_with_flags(trained: Trained, here: Path) -> None:
    assert main(["train", "my.toml", "--workers", "4", "--steps", "9", "--seed", "3", "--out", "runs/x"]) == 0
    assert (trained.recipe.name, trained.recipe.steps, trained.recipe.seed) == ("my", 9, 3)
    assert trained.team == Team(workers=4, restarts=7)
    assert trained.rest["out"] == Path("runs/x")
    assert trained.rest["resume"] is None
    assert trained.rest["import_paths"] == (str(here),)


def test_what_no_flag_names_comes_from_the_file(trained: Trained) -> None:
    assert main(["train", "my.toml"]) == 0
    assert trained.recipe.seed == 5
    assert trained.recipe.model == Component("mymodel:Net")
    assert trained.team == Team(restarts=7)
    assert trained.rest["out"] == Path("runs/my")


def test_a_built_in_recipe(trained: Trained, here: Path) -> None:
    assert main(["train", "tiny"]) == 0
    assert trained.recipe.name == "tiny"
    assert trained.rest["import_paths"][-1] == str(here)


def test_a_file_elsewhere_brings_its_folder(trained: Trained, here: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "far.toml").write_text(FILE)
    assert main(["train", "../far/far.toml"]) == 0
    assert trained.rest["import_paths"] == (str(tmp_path / "far"), str(here))


def test_flags_with_dots(trained: Trained) -> None:
    line = (
        "train my.toml --recipe.optimizer.args.lr 3e-4 --recipe.optimizer.args.betas=[0.9,0.95] --team.keep=5 "
        "--recipe.schedule.kind wsd --recipe.schedule.warmup-steps 3 --recipe.compile true --recipe.sample_prompt=--x "
        "--recipe.data.args.shape.depth 2 --recipe.model.args.bias False --recipe.clip_norm 1"
    )
    assert main(line.split()) == 0
    recipe = trained.recipe
    assert recipe.optimizer == Component("instep.optimizers:adamw", {"lr": 3e-4, "betas": [0.9, 0.95]})
    assert recipe.schedule == Schedule("wsd", warmup_steps=3)
    assert recipe.compile is True
    assert recipe.sample_prompt == "--x"
    assert dict(recipe.data.args) == {"samples": 100, "shape": {"width": 4, "depth": 2}}
    assert recipe.model == Component("mymodel:Net", {"bias": False})
    assert recipe.clip_norm == 1.0
    assert trained.team == Team(restarts=7, keep=5)


def test_a_component_can_be_replaced_and_given_arguments(trained: Trained) -> None:
    flags = ["--recipe.data.args.n", "3", "--recipe.data", "other:data", "--recipe.model.use", "x:Y"]
    assert main(["train", "my.toml", *flags]) == 0
    assert trained.recipe.data == Component("other:data", {"n": 3})
    assert trained.recipe.model == Component("x:Y")


def test_text_that_looks_like_a_number(trained: Trained) -> None:
    assert main(["train", "my.toml", "--recipe.name", "007", "--recipe.sample_prompt", "3"]) == 0
    assert (trained.recipe.name, trained.recipe.sample_prompt) == ("007", "3")


def test_none_takes_an_optional_field_away(trained: Trained, here: Path) -> None:
    (here / "clip.toml").write_text("clip_norm = 1.0\n" + FILE)
    assert main(["train", "clip.toml", "--recipe.clip_norm", "none", "--recipe.name", "none"]) == 0
    assert trained.recipe.clip_norm is None
    assert trained.recipe.name == "none"


# Wrong command lines


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("train my.toml --worker 2", "there is no flag --worker; did you mean --workers?"),
        ("train my.toml --worker=2", "there is no flag --worker; did you mean --workers?"),
        ("train my.toml --batch 2", "there is no flag --batch; did you mean --recipe.batch?"),
        ("train my.toml --restarts 2", "there is no flag --restarts; did you mean --team.restarts?"),
        ("train my.toml --zzz 2", "there is no flag --zzz; see 'instep train --help'."),
        ("train my.toml -w 2", "there is no flag -w; see 'instep train --help'."),
        ("digest x --zzz", "there is no flag --zzz; see 'instep digest --help'."),
        ("train my.toml --recipe.stepz 2", "there is no flag --recipe.stepz; did you mean --recipe.steps?"),
        ("train my.toml --recpe.steps 2", "there is no flag --recpe.steps; did you mean --recipe.steps?"),
        ("train my.toml --team.wokers 2", "there is no flag --team.wokers; did you mean --team.workers?"),
        ("train my.toml --recipe.schedule.knd x", "there is no flag --recipe.schedule.knd; did you mean --recipe.sche"),
        (
            "train my.toml --recipe.optimizer.lr 1",
            "there is no flag --recipe.optimizer.lr; did you mean --recipe.optimizer.args.lr?",
        ),
        ("train my.toml --recipe.steps.x 1", "there is no flag --recipe.steps.x; did you mean --recipe.steps?"),
        ("train my.toml --recipe.model.args. 1", "there is no flag --recipe.model.args.; did you mean"),
        ("train my.toml --foo.bar 1", "there is no flag --foo.bar; see 'instep train --help'."),
        ("train nowhere --recipe.stepz 2", "there is no flag --recipe.stepz"),
        ("train my.toml --recipe.steps", "--recipe.steps needs a value, as in --recipe.steps=VALUE."),
        ("train my.toml --recipe.steps --seed 1", "--recipe.steps needs a value, as in --recipe.steps=VALUE."),
        ("train my.toml --team.keep 1 --team.keep 2", "--team.keep is given twice; give it once."),
        (
            "train my.toml --steps 1 --recipe.steps 2",
            "--steps and --recipe.steps set the same field; give one of them.",
        ),
        ("simulate my.toml --workers two", "--workers is 'two', of type str; it must be a whole number."),
        ("train my.toml --workers", 'Command "train" parameter --workers requires an argument.'),
        ("train my.toml more", "'more' is one argument too many; 'instep train --help' lists what there is."),
        ("train", "'instep train' needs a recipe, or --resume with a run folder; 'instep recipes' lists recipes."),
        ("train my.toml --out a --resume b", "--out and --resume exclude each other: a resumed run goes on in its own"),
        ("recipes --team.workers 3", "--team.workers goes with 'instep train' only."),
        ("digest x --recipe.steps 3", "--recipe.steps goes with 'instep train' only."),
        ("digest", 'Command "digest" parameter PATH requires an argument.'),
        ("trian", 'Unknown command "trian". Did you mean "train"?'),
    ],
)
def test_a_wrong_command_line_is_one_sentence(
    trained: Trained, capsys: pytest.CaptureFixture[str], line: str, sentence: str
) -> None:
    code, printed = status(capsys, line)
    assert printed.startswith(f"instep: {sentence}")
    assert printed.count("\n") == 1
    assert code == 2
    assert not hasattr(trained, "recipe")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("train tinny", "'tinny' is neither a built-in recipe nor a file; did you mean 'tiny'?"),
        ("train my.toml --workers 0", "'team.workers' is 0; it must be at least 1."),
        ("train my.toml --workers -1", "'team.workers' is -1; it must be at least 1."),
        ("train my.toml --team.workers two", "'team.workers' is 'two', of type str; it must be a whole number."),
        ("train my.toml --recipe.schedule wsd", "'recipe.schedule' is 'wsd'; it must be a table."),
        ("train my.toml --recipe.batch 3", "a batch of 3 samples does not divide into 8 equal microbatches"),
        ("train my.toml --recipe.model Net", "'Net' is not an address; write it as 'package.module:name'."),
        ("digest nowhere", "there is no nowhere; give a run folder,"),
        ("train --resume nowhere", "there is no folder nowhere; give the folder of a run"),
    ],
)
def test_a_wrong_value_is_one_sentence(
    trained: Trained, capsys: pytest.CaptureFixture[str], line: str, sentence: str
) -> None:
    code, printed = status(capsys, line)
    assert printed.startswith(f"instep: {sentence}")
    assert printed.count("\n") == 1
    assert code == 1
    assert not hasattr(trained, "recipe")


# Resuming


@pytest.fixture
def run(here: Path) -> Path:
    """A run's folder, as far as the command line looks at it."""
    folder = here / "runs" / "old"
    folder.mkdir(parents=True)
    recipe = Recipe(model="m:M", objective="m:o", data="m:d", seed=5, steps=50, name="old")
    (folder / "recipe.toml").write_text(dumps(recipe, Team(workers=2, keep=9)))
    return folder


def test_resume_takes_the_saved_recipe_and_team(trained: Trained, run: Path, here: Path) -> None:
    assert main(["train", "--resume", "runs/old"]) == 0
    assert (trained.recipe.name, trained.recipe.seed, trained.recipe.steps) == ("old", 5, 50)
    assert trained.team == Team(workers=2, keep=9)
    assert trained.rest["resume"] == Path("runs/old")
    assert trained.rest["out"] is None
    assert trained.rest["import_paths"] == (str(here),)


def test_resume_with_what_may_change(trained: Trained, run: Path) -> None:
    line = "train --resume runs/old --workers 4 --steps 80 --recipe.evaluate_every 5 --team.restarts 1 --seed 5"
    assert main(line.split()) == 0
    assert trained.team == Team(workers=4, keep=9, restarts=1)
    assert (trained.recipe.steps, trained.recipe.evaluate_every) == (80, 5)


def test_resume_with_what_may_not(trained: Trained, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = status(capsys, "train --resume runs/old --recipe.threads 2")
    assert code == 1
    assert printed == (
        "instep: runs/old goes on with its own recipe, and recipe.threads is 2 here and 1 there; "
        "leave that flag out, or start a new run.\n"
    )


def test_resume_with_what_holds_from_there_on(trained: Trained, run: Path) -> None:
    flags = "--recipe.schedule.kind cosine --recipe.watch.bad_batch skip --recipe.optimizer.args.lr 1e-4"
    assert main(["train", "--resume", "runs/old", *flags.split(), "--skip-samples", "17,204"]) == 0
    assert (trained.recipe.schedule.kind, trained.recipe.watch.bad_batch) == ("cosine", "skip")
    assert trained.recipe.optimizer.args["lr"] == 1e-4
    assert trained.rest["skip_samples"] == [17, 204]


def test_samples_to_skip_are_indices(trained: Trained, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = status(capsys, "train --resume runs/old --skip-samples 17,x")
    assert code == 2
    assert "--skip-samples is '17,x'; give indices of samples, such as 17,204." in printed


def test_resume_with_the_recipe_named_again(
    trained: Trained, run: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "old.toml").write_text('model="m:M"\nobjective="m:o"\ndata="m:d"\nsteps=3')
    assert main(["train", "old.toml", "--resume", "runs/old", "--seed", "5"]) == 0
    assert trained.recipe.steps == 50
    code, printed = status(capsys, "train old.toml --resume runs/old")
    assert code == 1
    assert "'old.toml' is not the recipe of runs/old: recipe.seed is 0 here and 5 there; leave it out" in printed


def test_resume_of_a_recipe_with_objects(trained: Trained, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe(model=Component("m:M", {"act": lambda: 0}), objective="m:o", data="m:d")
    (run / "recipe.toml").write_text(dumps(recipe, Team()))
    code, printed = status(capsys, "train --resume runs/old")
    assert code == 1
    assert "<lambda>" in printed
    assert "resume it from there with instep.train(recipe, resume='runs/old')" in printed
    assert printed.count("\n") == 1


# Endings


def test_an_error_with_detail(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any, **__: Any) -> None:
        raise WorkerError("worker 1 raised ValueError: no.", detail="Traceback ...\n  more\n")

    replace_train(monkeypatch, train)
    code, printed = status(capsys, "train my.toml")
    assert code == 1
    assert printed == "instep: worker 1 raised ValueError: no.\nTraceback ...\n  more\n"


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]
)
def test_signals_end_a_run_as_an_interrupt(
    number: signal.Signals, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def train(*_: Any, **__: Any) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(30)
        except KeyboardInterrupt:
            if number != signal.SIGINT:
                os.kill(os.getpid(), signal.SIGHUP)  # one more warning must not disturb the ending
                time.sleep(0.01)
            seen.append("saved")
            raise

    replace_train(monkeypatch, train)
    before = signal.getsignal(signal.SIGTERM)
    assert status(capsys, "train my.toml") == (130, "")
    assert seen == ["saved"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_hangup_that_is_ignored_stays_ignored(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGHUP)

    replace_train(monkeypatch, train)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(["train", "my.toml"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


# The other commands


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out == "other-one\ntiny       The smallest one\n"


def test_digest(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from instep.cli import commands

    assert commands.digest_of is folder_module.digest
    monkeypatch.setattr(commands, "digest_of", lambda path: f"digest of {path}")
    assert main(["digest", "runs/x"]) == 0
    assert capsys.readouterr().out == "digest of runs/x\n"


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Usage: instep COMMAND\n")
    assert all(f"  {name}" in printed for name in COMMANDS)


def test_the_help_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """The names of flags are a contract: scripts call them."""
    assert main(["train", "--help"]) == 0
    printed = capsys.readouterr().out
    for flag in ("RECIPE", "--workers", "--steps", "--seed", "--out", "--resume", "--recipe.", "--team."):
        assert flag in printed
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert COMMANDS[name] in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert tomllib.loads(f"v = '{capsys.readouterr().out.strip()}'")["v"].count(".") == 2
