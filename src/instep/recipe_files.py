"""The files of recipes: the built-in ones, a user's, and what a run has saved."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instep.errors import RecipeError, cut, shown
from instep.recipe import Recipe, Team
from instep.tables import as_saved, suggest

RECIPES = Path(__file__).parent / "recipes"
"""The folder of the built-in recipes."""


def read(name_or_path: str | Path) -> dict[str, Any]:
    """The table of a built-in recipe, by name, or of a TOML file. Built-in names come first. Raises RecipeError."""
    path = path_of(name_or_path)
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):  # ValueError: a null byte
        if (path / "recipe.toml").is_file():
            raise RecipeError(
                f"{path} is the folder of a run; go on with it by --resume {path}, or take its recipe for a new one: "
                f"{path / 'recipe.toml'}."
            ) from None
        hint = suggest(str(name_or_path), names_of_recipes(), "the built-in recipes are")
        raise RecipeError(f"{shown(str(name_or_path))} is neither a built-in recipe nor a file{hint}") from None
    except OSError as error:
        raise RecipeError(
            f"{cut(path)} cannot be read: {error.strerror}; give a built-in recipe or a TOML file."
        ) from None
    try:
        table = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:  # a number of too many digits is no TOMLDecodeError
        raise RecipeError(f"{path} is not valid TOML: {cut(error)}.") from None
    table.setdefault("name", path.stem)
    return table


def read_saved(path: str | Path) -> dict[str, Any]:
    """The table in a run's ``recipe.toml``, which any version may have written. Raises RecipeError."""
    table = as_saved(Recipe, read(Path(path).absolute()))
    if isinstance(table.get("team"), Mapping):
        table["team"] = as_saved(Team, table["team"])
    return table


def path_of(name_or_path: str | Path) -> Path:
    """The file of the built-in recipe of this name, or else the path itself."""
    return RECIPES / f"{name_or_path}.toml" if str(name_or_path) in names_of_recipes() else Path(name_or_path)


def names_of_recipes() -> list[str]:
    """The names of the built-in recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))
