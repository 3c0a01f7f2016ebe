"""The commands and what they take."""

from __future__ import annotations

import contextlib
import copy
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from cyclopts import App

from instep.cli import ABOUT, COMMANDS
from instep.cli.flags import Settings, UsageError, merge
from instep.errors import RecipeError, RecordError
from instep.recipe import Recipe, Team, names_of_recipes, parse, path_of, read, table_differences, without_address
from instep.record.folder import RunFolder
from instep.record.folder import digest as digest_of
from instep.record.monitors import Console

_TRAIN = """\
Any other field is set by its name with dots: --recipe.optimizer.args.lr 3e-4, --recipe.schedule.kind wsd, \
--team.restarts 5. A value is read as in TOML (3e-4, true, [0.9, 0.95], "text"), or else as text; none takes an \
optional field away. Flags win over the file.

With --resume the run's own recipe is used; only the team, the steps and fields that decide no result may change."""


def app(settings: Settings) -> App:
    """The commands. `settings`, the flags with dots, are for ``train``; the others refuse them."""
    app = App(name="instep", help=ABOUT, help_format="plaintext", help_formatter="plain", version_flags=[])

    @app.command(help=f"{COMMANDS['train']}\n\n{_TRAIN}")
    def train(
        recipe: str | None = None,
        /,
        *,
        workers: int | None = None,
        steps: int | None = None,
        seed: int | None = None,
        out: Path | None = None,
        resume: Path | None = None,
    ) -> None:
        """Train.

        Parameters
        ----------
        recipe
            A built-in name or a TOML file. Not needed with --resume.
        workers
            How many train. They change only the time.
        steps
            Updates of the weights.
        seed
            Keys every random number.
        out
            The run folder to make; by default runs/NAME.
        resume
            The folder of a run to go on with, where it stands.
        """
        short = (("workers", "team.workers", workers), ("steps", "recipe.steps", steps), ("seed", "recipe.seed", seed))
        for name, dotted, value in short:
            if value is not None and dotted in dict(settings):
                raise UsageError(f"--{name} and --{dotted} set the same field; give one of them.")
        given = [(dotted, str(value)) for _, dotted, value in short if value is not None]
        _train(recipe, [*settings, *given], out, resume)

    @app.command(help=COMMANDS["recipes"])
    def recipes() -> None:
        _refuse(settings)
        _recipes()

    @app.command(help=COMMANDS["digest"])
    def digest(path: Path, /) -> None:
        """Digest.

        Parameters
        ----------
        path
            A run folder, a checkpoint folder or a file of weights.
        """
        _refuse(settings)
        print(digest_of(path))

    return app


def _refuse(settings: Settings) -> None:
    if settings:
        raise UsageError(f"--{settings[0][0]} goes with 'instep train' only.")


def _recipes() -> None:
    names = names_of_recipes()
    width = max(map(len, names), default=0)
    for name in names:
        first = path_of(name).read_text("utf-8").partition("\n")[0]
        print(f"{name:<{width}}  {first.lstrip('# ') if first.startswith('#') else ''}".rstrip())


def _train(given: str | None, settings: Settings, out: Path | None, resume: Path | None) -> None:
    merge({}, settings)  # a wrong flag is named before a wrong file
    if out is not None and resume is not None:
        raise UsageError("--out and --resume exclude each other: a resumed run goes on in its own folder.")

    if resume is not None:
        recipe, team = _saved(resume, given, settings)
    elif given is not None:
        recipe, team = _parsed(given, settings)
        out = out or RunFolder.default_path(recipe.name)
    else:
        raise UsageError(
            "'instep train' needs a recipe, or --resume with a run folder; 'instep recipes' lists recipes."
        )

    from instep.engines.launch import train

    folders = [Path.cwd()] if given is None else [path_of(given).resolve().parent, Path.cwd()]
    paths = tuple(dict.fromkeys(map(str, folders)))
    with _terminable(), Console(path=out or resume) as console:
        train(recipe, team=team, out=out, resume=resume, monitors=(console,), import_paths=paths)


def _parsed(given: str, settings: Settings) -> tuple[Recipe, Team]:
    return parse(merge(read(given), settings))


def _saved(resume: Path, given: str | None, settings: Settings) -> tuple[Recipe, Team]:
    """The recipe and team saved in the run, with what `settings` may change of them.

    Raises RecipeError where they change more, or where the recipe `given` is another one.
    """
    table = read(RunFolder.open(resume).recipe_path)
    nameless = without_address(table)
    if nameless is not None:
        raise RecordError(
            f"the recipe of {resume} holds {nameless}, an object that only the program that made it has; resume it "
            f"from there with instep.train(recipe, resume={str(resume)!r})."
        )
    recipe, team = parse(merge(copy.deepcopy(table), settings))
    changed = table_differences(recipe.to_table(), table)
    if changed:
        raise RecipeError(
            f"{resume} goes on with its own recipe, and {changed[0]}; leave that flag out, or start a new run."
        )
    if given is not None:
        changed = table_differences(_parsed(given, settings)[0].to_table(), table)
        if changed:
            raise RecipeError(
                f"{given!r} is not the recipe of {resume}: {changed[0]}; leave it out, or start a new run."
            )
    return recipe, team


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, and SIGHUP unless it is ignored as under nohup, end the block as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        for number in before:  # what follows is the ending: once is enough
            signal.signal(number, lambda *_: None)
        raise KeyboardInterrupt

    catchable = threading.current_thread() is threading.main_thread()
    wanted = (signal.SIGTERM, signal.SIGHUP) if catchable else ()
    before = {number: signal.getsignal(number) for number in wanted if signal.getsignal(number) == signal.SIG_DFL}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
