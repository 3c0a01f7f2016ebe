"""The recipe that a command is given: a built-in name or a file, and flags that set its fields."""

from __future__ import annotations

from pathlib import Path

from instep.cli.flags import Settings, merge
from instep.recipe import Recipe, Team, parse, path_of, read


def parsed(given: str, settings: Settings) -> tuple[Recipe, Team]:
    """Recipe and team, with `settings`. Raises RecipeError and UsageError."""
    return parse(merge(read(given), settings))


def import_paths(given: str | None) -> tuple[str, ...]:
    """Where a recipe's modules are looked for: beside its file, and in the current folder."""
    folders = [Path.cwd()] if given is None else [path_of(given).resolve().parent, Path.cwd()]
    return tuple(dict.fromkeys(map(str, folders)))
