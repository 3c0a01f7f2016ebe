"""What ``instep compare`` does: a recipe under several rules, one run after another, and then the report."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from instep.cli.flags import Settings, UsageError, import_paths, merge, parsed
from instep.cli.report import check_out, number_of, tell
from instep.errors import RecordError, shown
from instep.monitors.console import Console
from instep.recipe import Recipe, Team
from instep.recipe_files import read_saved
from instep.record.folder import RunFolder
from instep.record.resuming import resume_differences
from instep.report.comparison import compare
from instep.report.reading import read, read_all
from instep.rules.presets import parse, text_of
from instep.rules.rule import UpdateRule
from instep.team.signals import interrupting
from instep.team_checks import check_team

EVALUATIONS = 12
"""Of a run, unless the person says how often."""


@dataclass(frozen=True)
class Entry:
    """One of the compared: a rule, and what its team has beside what all have, as flags name it."""

    rule: UpdateRule
    team: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """As a person writes it."""
        return ",".join([text_of(self.rule), *(f"{name}={value}" for name, value in self.team)])


@dataclass(frozen=True)
class _Planned:
    """A run of the comparison."""

    label: str
    recipe: Recipe
    team: Team
    folder: Path


def compare_rules(
    given: str, settings: Settings, rules: str, seeds: str, out: Path | None, target: str | None, as_json: bool
) -> None:
    """Trains `given` under each rule with each seed, what is missing of it, and tells who wins. Raises UsageError and
    whatever training does.
    """
    merge({}, settings)
    for name, flag in (("recipe.rule", "--rules"), ("recipe.seed", "--seeds")):
        if any(setting == name or setting.startswith(f"{name}.") for setting, _ in settings):
            raise UsageError(f"--{name} goes with 'instep train'; give {flag}.")
    recipe, _ = parsed(given, settings)
    if not any(name == "recipe.evaluate_every" for name, _ in settings):
        recipe = replace(recipe, evaluate_every=max(1, recipe.steps // EVALUATIONS))
    folder = out or Path("runs") / f"compare-{recipe.name}"
    wanted = None if target is None else number_of(target)
    entries = entries_of(rules)
    teams = {each: parsed(given, list({**dict(settings), **dict(each.team)}.items()))[1] for each in entries}
    planned = _plan(recipe, teams, seeds_of(seeds, recipe.seed), folder)
    _check_folder(folder)
    if not as_json:
        folder.mkdir(parents=True, exist_ok=True)
        check_out(folder / "report.html")
    missing = [run for run in planned if not _done(run)]  # what does not fit is told before hours of training
    with interrupting():
        for run in missing:
            _train(run, f"{planned.index(run) + 1} of {len(planned)}: {run.label}", given, as_json)
    if not as_json and missing:
        print()
    tell(compare(read_all([run.folder for run in planned]), wanted), folder / "report.html", as_json)


def _check_folder(folder: Path) -> None:
    """Raises UsageError where runs cannot be made in it."""
    if RunFolder(folder).recipe_path.exists():
        raise UsageError(
            f"--out {shown(str(folder))} is the folder of a run; name another one, which the runs of the comparison "
            f"are made in."
        )
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {shown(str(folder))} is a file; name a folder, which the runs are made in.")


def entries_of(text: str) -> list[Entry]:
    """Those of ``--rules``: a part with an equals sign belongs to the rule before it, or to the team of its runs where
    it begins with ``team.``. Raises RecipeError and UsageError.
    """
    rules: list[str] = []
    teams: list[dict[str, str]] = []
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if rules and equals and name.startswith("team."):
            teams[-1][name] = value
        elif rules and equals:
            rules[-1] += f",{part}"
        else:
            rules.append(part)
            teams.append({})
    found = [Entry(parse(rule.strip()), tuple(team.items())) for rule, team in zip(rules, teams, strict=True)]
    for place, each in enumerate(found):
        if each in found[:place]:
            raise UsageError(f"--rules has {shown(each.text)} twice; give it once, and more --seeds.")
    return found


def seeds_of(text: str, own: int) -> list[int]:
    """The seeds of ``--seeds``, in their order. Raises UsageError."""
    parts = [part.strip() for part in text.split(",")] if text else [str(own)]
    if not all(part.isdecimal() for part in parts) or len({int(part) for part in parts}) < len(parts):
        raise UsageError(f"--seeds is {shown(text)}; give different whole numbers from 0, such as 0,1,2.")
    return [int(part) for part in parts]


def _plan(recipe: Recipe, teams: Mapping[Entry, Team], seeds: Sequence[int], folder: Path) -> list[_Planned]:
    """Seed by seed, so that what is there after an interruption compares all rules."""
    planned = []
    for seed in seeds:
        for entry, team in teams.items():
            own = replace(recipe, rule=entry.rule, seed=seed)
            check_team(own, team)
            name = re.sub(r"[^\w.=+-]+", "-", entry.text)
            label = f"{entry.text}, seed {seed}" if len(seeds) > 1 else entry.text
            planned.append(_Planned(label, own, team, folder / f"{name}-seed{seed}"))
    return planned


def _done(run: _Planned) -> bool:
    """Whether it has ended. Raises RecordError where another run is in its place."""
    if not RunFolder(run.folder).recipe_path.is_file():
        return False
    other = resume_differences(run.recipe.to_table(), read_saved(RunFolder.open(run.folder).recipe_path))
    if other:
        raise RecordError(f"{run.folder} has a run of another recipe: {other[0]}; choose another folder with --out.")
    try:
        found = read(run.folder)
    except RecordError:
        return False
    steps = (found.result or {}).get("steps", 0)
    return found.state == "ended" and (steps >= run.recipe.steps or bool((found.result or {}).get("stopped")))


def _train(run: _Planned, title: str, given: str, as_json: bool) -> None:
    from instep.api import train

    there = RunFolder(run.folder).recipe_path.is_file()
    with Console(sys.stderr if as_json else None, path=run.folder, brief=title) as console:
        train(
            run.recipe, team=run.team, out=None if there else run.folder, resume=run.folder if there else None,
            monitors=[console], import_paths=import_paths(given),
        )  # fmt: skip
