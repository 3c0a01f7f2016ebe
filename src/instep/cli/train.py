"""What ``instep train`` does: a new run, or one that goes on."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from instep.cli.flags import Settings, UsageError, import_paths, merge, parsed
from instep.differences import differences, without_address
from instep.errors import RecipeError, RecordError, shown
from instep.monitors.console import Console
from instep.monitors.tensorboard import TensorBoard
from instep.monitors.trackers import tracker
from instep.recipe import Recipe, Team, parse
from instep.recipe_files import read_saved
from instep.record.folder import RunFolder
from instep.record.resuming import as_last_changed, resume_differences
from instep.tables import from_table
from instep.team.joining import run_to_join
from instep.team.place import Place, begun_before, place_of
from instep.team.ray_cluster import connected, count_of_workers
from instep.team.signals import interrupting
from instep.team.telling import telling_the_others
from instep.team_checks import check_team


def train_recipe(
    given: str | None,
    settings: Settings,
    out: Path | None,
    resume: Path | None,
    tensorboard: bool | None = None,
    skipped: Sequence[int] = (),
    track: str = "",
) -> None:
    """Trains the recipe `given`, or goes on with the run `resume`. Raises UsageError and whatever training does."""
    trackers = [tracker(name.strip()) for name in track.split(",")] if track else []
    merge({}, settings)  # a wrong flag is named before a wrong file
    if out is not None and resume is not None:
        raise UsageError("--out and --resume exclude each other: a resumed run goes on in its own folder.")
    if resume is None and (begun := begun_before(out)) is not None:
        out, resume = None, begun
    if resume is not None and (place := place_of(_own_team(settings).launcher)) is not None and place.agent > 0:
        _join(place, settings)
        return
    if resume is not None:
        recipe, team = _saved(resume, given, settings)
    elif given is not None:
        recipe, team = parsed(given, settings)
        with telling_the_others(team.launcher):
            check_team(recipe, team)  # before a folder is made
    else:
        raise UsageError(
            "'instep train' needs a recipe, or --resume with a run folder; 'instep recipes' lists recipes."
        )

    from instep.api import train
    from instep.monitors import Monitor

    own_workers = any(name in ("team.workers", "team.bounds") for name, _ in settings) or bool(team.bounds)
    if team.launcher == "ray" and not own_workers:
        with interrupting(), connected(team):
            team = replace(team, workers=count_of_workers(team))
        print(f"instep: {team.workers} workers, for as many nodes or GPUs; --workers takes others.", file=sys.stderr)
    paths, place = import_paths(given), place_of(team.launcher)
    if place is not None and not own_workers:
        team = replace(team, workers=place.agents)
        if place.agent == 0:
            print(f"instep: {place.agents} workers, one for each agent; --workers takes others.", file=sys.stderr)
    if place is not None and place.agent > 0:  # the first has the run folder, and shows the run
        with _telling_of_an_end(place):
            train(recipe, team=team, resume=resume, import_paths=paths, skip_samples=skipped)
        return
    with interrupting(), contextlib.ExitStack() as stack:
        if resume is None and out is None:
            out = RunFolder.claim(recipe.name)
            stack.callback(_give_back, out)
        folder = out or resume
        assert folder is not None, "a new run has one by now"
        console = stack.enter_context(Console(path=folder))
        monitors: list[Monitor] = [console]
        if tensorboard or (tensorboard is None and (folder / "tensorboard").is_dir()):
            monitors.append(stack.enter_context(TensorBoard(folder / "tensorboard")))
        monitors += [stack.enter_context(each) for each in trackers]
        train(recipe, team=team, out=out, resume=resume, monitors=monitors, import_paths=paths, skip_samples=skipped)


def _own_team(settings: Settings) -> Team:
    """The team, so far as the command tells of it."""
    return from_table(
        Team, merge({}, [each for each in settings if each[0].startswith("team.")]).get("team", {}), "team"
    )


def _join(place: Place, settings: Settings) -> None:
    """Goes on with a run whose folder agent 0 has. Raises RecipeError where that has another command."""
    from instep.api import train

    with interrupting():
        own, told = _own_team(settings), run_to_join(place, _own_team(settings))
        table = as_last_changed(copy.deepcopy(dict(told.table)))
        changed = differences(parse(merge(copy.deepcopy(table), settings))[0].to_table(), parse(table)[0].to_table())
        if changed:
            raise RecipeError(
                f"agent {place.agent} goes on with another recipe than agent 0: {changed[0]}; give all agents the same "
                f"command."
            )
        recipe, team = parse(told.table)
        team = replace(team, interface=own.interface, launcher=own.launcher)
        train(recipe, team=team, import_paths=(*told.import_paths, *import_paths(None)))


@contextlib.contextmanager
def _telling_of_an_end(place: Place) -> Iterator[None]:
    """In the block, an interrupt is told in its words, once on each host whose terminal does not show the run."""
    try:
        yield
    except KeyboardInterrupt as ended:
        if str(ended) and place.launcher == "torchrun" and place.host > 0 and place.local == 0:
            print(f"instep: {ended}", file=sys.stderr)
        raise


def _give_back(claimed: Path) -> None:
    """Removes the folder of a run that did not come about."""
    with contextlib.suppress(OSError):  # something lies in it, or it is gone
        claimed.rmdir()


def _saved(resume: Path, given: str | None, settings: Settings) -> tuple[Recipe, Team]:
    """The recipe and team saved in the run, with what `settings` may change of them.

    Raises RecipeError where they change more, or where the recipe `given` is another one.
    """
    table = read_saved(RunFolder.open(resume).recipe_path)
    nameless = without_address(table)
    if nameless is not None:
        raise RecordError(
            f"the recipe of {resume} holds {nameless}, an object that only the program that made it has; resume it "
            f"from there with instep.train(recipe, resume={str(resume)!r})."
        )
    optimizer = table.get("optimizer")
    if isinstance(optimizer, list) and any(name.startswith("recipe.optimizer.") for name, _ in settings):
        raise RecipeError(
            f"{resume} has {len(optimizer)} optimizers, of which a resume may change the learning rates alone, all by "
            f"one factor: --recipe.schedule.scale."
        )
    recipe, team = parse(merge(as_last_changed(copy.deepcopy(table)), settings))
    changed = resume_differences(recipe.to_table(), table)
    if changed:
        raise RecipeError(
            f"{resume} goes on with its own recipe, and {changed[0]}; leave that flag out, or start a new run."
        )
    if given is not None:
        changed = resume_differences(parsed(given, settings)[0].to_table(), table)
        if changed:
            raise RecipeError(
                f"{shown(given)} is not the recipe of {resume}: {changed[0]}; leave it out, or start a new run."
            )
    return recipe, team


def indices(text: str) -> list[int]:
    """The indices in "17,204". Raises UsageError."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--skip-samples is {shown(text)}; give indices of samples, such as 17,204.")
    return [int(part) for part in parts]
