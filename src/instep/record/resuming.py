"""What a resume may change, so that nothing of the past is rewritten: it becomes a part of the recipe, by version."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from instep.components import Component
from instep.differences import without_address, without_contents
from instep.errors import CheckpointError, RecipeError, RecordError
from instep.recipe import Recipe, Team, parse, table_differences
from instep.recipe_files import read_saved
from instep.record import checkpoint, tape
from instep.record.folder import RunFolder
from instep.schedule import Change, Phase, Schedule, what_changed
from instep.tables import from_table, to_table
from instep.watch import Watch

JUMP = 1.25
"""A learning rate that rises by more than this because a run is prolonged is warned of."""


def saved(
    folder: RunFolder, recipe: Recipe | None, team: Team | None, call: str
) -> tuple[dict[str, Any], Team, list[str]]:
    """The table of the run's recipe, the team to go on with, and where the run found its modules.

    call: of `instep`, with the recipe, for who has to give it. Raises RecipeError and CheckpointError.
    """
    table = read_saved(folder.recipe_path)
    check_given(folder, recipe, table, call)
    saved_team = from_table(Team, table.pop("team", {}), "team")
    about = folder.about()
    paths = about.import_paths if about is not None else _started(folder).get("import_paths", [])
    return table, team or saved_team, list(paths)


def check_given(folder: RunFolder, recipe: Recipe | None, table: Mapping[str, Any], call: str) -> None:
    """Raises RecipeError where the recipe itself is needed, and not given."""
    nameless = without_address(table)
    if recipe is None and nameless is not None:
        raise RecipeError(
            f"the recipe of {folder.path} holds {nameless}, an object that only the program that made it has; give "
            f"that recipe too: instep.{call}."
        )


def is_simulation(folder: RunFolder) -> bool:
    """Whether nothing was trained there."""
    about = folder.about()
    return (about is not None and about.kind == "simulation") or _started(folder).get("engine") == "virtual"


def _started(folder: RunFolder) -> dict[str, Any]:
    """The first event of the run's tape, which tells of its start; empty where there is no tape."""
    return next(iter(tape.read(folder.tape_path)), {}) if folder.tape_path.exists() else {}


def resumed(
    folder: RunFolder, given: Recipe | None, table: Mapping[str, Any], skip_samples: tuple[int, ...] = ()
) -> tuple[Recipe, list[str]]:
    """The recipe that goes on, from that in the run's `table` and the one `given`, and sentences to warn with.

    Schedule, watch and the optimizer's `lr` are, from the newest checkpoint on, those of the recipe given; up to there
    they stay as they were. Raises CheckpointError where the recipe differs in more.
    """
    before, steps = recorded(folder, given, table), table.get("steps", Recipe.steps)
    now = _last(before)
    wanted = now if given is None else _wanted(given, before, now)
    if wanted == now and not skip_samples and before.steps == steps:
        return before, []
    version, done = _newest(folder)
    used = before.known(_used(folder, before, version))  # a change that no step was made with gives way to a new one
    then, after = _last(used), before
    if skip_samples:
        wanted = dataclasses.replace(wanted, skipped=then.skipped.union(skip_samples))
    if wanted != now:
        change = _change(max([version, *(each.version for each in used.changes)]), then, wanted, before)
        after = dataclasses.replace(used, changes=(*used.changes, *change))
    prolonged = before.steps != steps and (wanted.schedule, wanted.lr) == (now.schedule, now.lr)
    return after, _jump(after, version, steps, done) if prolonged else []


def changed_rates(folder: RunFolder, recipe: Recipe, table: Mapping[str, Any]) -> list[str]:
    """A sentence where the `recipe` to go on with has other rates than the one in the run's `table`, from now on."""
    changes = recipe.to_table().get("changes", [])
    if not changes or changes == table.get("changes") or not changes[-1].keys() & {"schedule", "lr"}:
        return []
    version = changes[-1]["version"]
    return [
        f"{folder.path} goes on from version {version:,} with {what_changed(recipe.to_table(), version)}, as the given "
        f"recipe says; to go on as it was, leave the recipe out or give the run's own."
    ]


def recorded(folder: RunFolder, given: Recipe | None, table: Mapping[str, Any], *, replaying: bool = False) -> Recipe:
    """The recipe in the run's `table`, its objects and what decides no result taken from the one `given`.

    Raises CheckpointError where the two differ in what no resume may change.
    """
    if given is None:
        return parse(table)[0]
    own = {key: getattr(given, key) for key in ("model", "objective", "data", "optimizer", "artifacts")}
    parse({**table, **own})  # what no recipe holds is named as that, not as another recipe
    differences = resume_differences(given.to_table(), table)
    if differences:
        shown = "; ".join([*differences[:3], *([f"and {len(differences) - 3} more"] if len(differences) > 3 else [])])
        if replaying:
            raise CheckpointError(
                f"the run {folder.path} was trained with another recipe ({shown}); a replay computes the run again as "
                f"it was: give its own recipe, of which it needs the objects alone."
            )
        raise CheckpointError(
            f"the run {folder.path} was trained with another recipe ({shown}); resume it with its "
            f"own, of which steps, schedule (its scale for the rates of several optimizers), watch and one "
            f"optimizer's lr may change, or start a new run."
        )
    optimizer, lr = given.optimizer, lr_of(table)
    if isinstance(optimizer, Component) and lr_of(given.to_table()) is not None:
        args = {key: value for key, value in optimizer.args.items() if key != "lr"}
        optimizer = Component(optimizer.use, args if lr is None else {**args, "lr": lr})
    objects = {key: getattr(given, key) for key in ("model", "objective", "data")}
    kept = parse({**table, **objects, "optimizer": optimizer, "artifacts": given.artifacts})[0]
    return dataclasses.replace(
        given, **{key: getattr(kept, key) for key in ("optimizer", "schedule", "watch", "changes")}
    )


def resume_differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """As `table_differences`, between the table `here` and that of a run, but for what a resume may change.

    Once evaluations could end the run, how they are made cannot change.
    """
    patient = any(each.get("watch", {}).get("patience") is not None for each in (there, *there.get("changes", ())))
    sides = []
    for table in (here, there):
        kept = {key: value for key, value in table.items() if key not in ("schedule", "watch", "changes")}
        if patient:
            kept["watch"] = {"patience": 1}
        if lr_of(here) is not None and isinstance(kept.get("optimizer"), Mapping):
            args = {key: value for key, value in kept["optimizer"].get("args", {}).items() if key != "lr"}
            kept["optimizer"] = {**kept["optimizer"], "args": args}
        sides.append(kept)
    for key, value in sides[1].items():
        if key in sides[0] and without_contents(value) == value:  # a table of before, or objects that show nothing
            sides[0][key] = without_contents(sides[0][key])
    return table_differences(*sides)


def as_last_changed(table: dict[str, Any]) -> dict[str, Any]:
    """The table of a run's recipe with what its changes have made of it, and without them."""
    changes = tuple(from_table(Change, each, "recipe.changes") for each in table.pop("changes", ()))
    now = Phase(Schedule(), Watch()).after(changes)
    if any(change.schedule for change in changes):
        table["schedule"] = to_table(now.schedule)
    if any(change.watch for change in changes):
        table["watch"] = to_table(now.watch)
    if now.lr is not None:
        table["optimizer"] = {**table["optimizer"], "args": {**table["optimizer"].get("args", {}), "lr": now.lr}}
    return table


def lr_of(table: Mapping[str, Any]) -> float | None:
    """The argument `lr` of the optimizer in a recipe's table, if it is a number."""
    optimizer = table.get("optimizer", {})
    lr = optimizer.get("args", {}).get("lr") if isinstance(optimizer, Mapping) else None
    return float(lr) if isinstance(lr, (int, float)) and not isinstance(lr, bool) else None


def _wanted(given: Recipe, before: Recipe, now: Phase) -> Phase:
    """What is to hold from here on. A recipe of the run itself, with its changes, asks for nothing new."""
    own = given.changes == before.changes
    was, is_given = lr_of(before.to_table()), lr_of(given.to_table())
    current = was if now.lr is None else now.lr
    return Phase(
        now.schedule if own and given.schedule == before.schedule else given.schedule,
        now.watch if own and given.watch == before.watch else given.watch,
        now.lr if (own and is_given == was) or is_given in (None, current) else is_given,
        now.skipped,
    )


def _newest(folder: RunFolder) -> tuple[int, int]:
    """Version and steps of the checkpoint that a resume goes on from."""
    path, _ = folder.newest_checkpoint()
    if path is None:
        return 0, 0
    return checkpoint.read_manifest(path).version, checkpoint.steps_done(path)


def _used(folder: RunFolder, recipe: Recipe, version: int) -> int:
    """How many of the recipe's changes an update was made with, so far as the tape tells; `version` is the newest."""
    if not recipe.changes or recipe.changes[-1].version < version or not folder.tape_path.exists():
        return len(recipe.changes)
    known = used = 0
    try:
        for event in tape.read(folder.tape_path):
            if event["kind"] == "run_started":
                known = len(event["recipe"].get("changes", ()))
            elif event["kind"] == "merged":
                used = max(used, known)
    except RecordError:  # a damaged tape tells nothing
        return len(recipe.changes)
    return min(used, len(recipe.changes))


def _last(recipe: Recipe) -> Phase:
    """What holds after all of the recipe's changes."""
    return recipe.phase(recipe.changes[-1].version if recipe.changes else 0)


def _change(version: int, then: Phase, wanted: Phase, recipe: Recipe) -> list[Change]:
    """The change that makes of `then` what is wanted, if there is one."""
    own = lr_of(recipe.to_table())
    rates = [own if phase.lr is None else phase.lr for phase in (then, wanted)]
    change = Change(
        version=version,
        schedule=wanted.schedule if wanted.schedule != then.schedule else None,
        watch=wanted.watch if wanted.watch != then.watch else None,
        lr=wanted.lr if rates[0] != rates[1] else None,
        skip_samples=tuple(wanted.skipped - then.skipped),
    )
    return [] if change == Change(version=version) else [change]


def _jump(recipe: Recipe, version: int, steps_before: int, done: int) -> list[str]:
    """A sentence where a longer schedule takes up the learning rate again that the shorter one had lowered.

    version, done: updates and steps of the newest checkpoint, so that what was changed there held in no step yet.
    """
    steps, past, now = recipe.steps, recipe.phase(version - 1), recipe.phase(version)
    own = lr_of(recipe.to_table())
    if done == 0 or (own is None and past.lr != now.lr):
        return []
    last, following = past.schedule.factor(done - 1, steps_before), now.schedule.factor(done, steps)
    if own and now.lr is not None:
        following *= now.lr / own
    if own and past.lr is not None:
        last *= past.lr / own
    if done < now.schedule.warmup_steps or following <= JUMP * last:
        return []
    return [
        f"the learning rate jumps from {last:.3g} to {following:.3g} of the optimizer's own at step {done + 1}, for "
        f"the schedule '{now.schedule.kind}' now lasts {steps} steps and not {steps_before}; if it should not, resume "
        f"with another recipe.schedule."
    ]
