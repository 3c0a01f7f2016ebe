"""The check that every model makes of its sizes."""

from __future__ import annotations

from instep.errors import RecipeError, shown


def check_sizes(model: str, **sizes: int) -> None:
    """Raises RecipeError where a size of `model`, its name, is no whole number from 1."""
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise RecipeError(f"a {model}'s {shown(name)} is {shown(size)}; it must be a whole number, at least 1.")
