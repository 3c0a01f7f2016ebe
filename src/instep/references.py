"""Values of a recipe file that another place of it gives: ``"${recipe.model.args.folder}"``, as OmegaConf writes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from instep.errors import RecipeError, shown

_REFERENCE = re.compile(r"\$\{recipe\.([\w.-]+)\}")


def resolved(table: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's table with each reference replaced by the value that it names, of this table.

    A reference is a whole text: one that stands in a longer text is text. Raises RecipeError where it names nothing, or
    another reference.
    """

    def put_in(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: put_in(item) for key, item in value.items()}
        if isinstance(value, list):
            return [put_in(item) for item in value]
        match = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        return _found(table, match[1]) if match else value

    return {key: put_in(value) for key, value in table.items()}


def _found(table: Mapping[str, Any], path: str) -> Any:
    found: Any = table
    for key in path.split("."):
        if not isinstance(found, Mapping) or key not in found:
            raise RecipeError(
                f"the recipe refers to its own field {shown(path)}, and has none; give it with --recipe.{path}."
            )
        found = found[key]
    if isinstance(found, str) and _REFERENCE.fullmatch(found):
        raise RecipeError(f"the recipe's field {shown(path)} refers on to {shown(found)}; name the value's own field.")
    return found
